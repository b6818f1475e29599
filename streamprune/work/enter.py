"""Taking hold of the folders that a run works in."""

from __future__ import annotations

from contextlib import ExitStack

from streamprune.errors import OutputError
from streamprune.settings import Place
from streamprune.work.disk_errors import writing
from streamprune.work.folder import WorkFolder


def enter_work(stack: ExitStack, settings: Place) -> WorkFolder:
    """Hold the work folder, and what keeps others off the output if that is somewhere else."""
    with writing(f"Looking for {settings.work_folder}", settings.work_folder):
        home, output = settings.work_folder.resolve(), settings.output.resolve()
        elsewhere = home != settings.folder_beside.resolve()
    if home == output or home in output.parents or output in home.parents:
        raise OutputError(f"The work folder {home} and the output {output} must not be, or contain, one another.")
    if elsewhere:
        beside = stack.enter_context(WorkFolder(settings.folder_beside))
        stack.callback(lambda: None if beside.has_progress() else beside.remove())
    return stack.enter_context(WorkFolder(settings.work_folder))
