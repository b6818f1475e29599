"""Taking hold of the folders that a run works in, taking up what lies there, and leaving what can be gone on with.

Stopping in good order: the first SIGINT or SIGTERM is a request, the second ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from streamprune.config import OutputSettings, RunSettings
from streamprune.errors import InterruptedRunError, OutputError, ResumeError, TooMuchLostError
from streamprune.files.durable import writing
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.records import RUN_NAMES, has_pruning, has_run


def open_work_folder(stack: ExitStack, settings: OutputSettings) -> WorkFolder:
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


@contextmanager
def keeping(work: WorkFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Whatever ends the block, what is done is kept, and the user is told how to go on; what holds nothing is removed.

    An interruption from the keyboard becomes an InterruptedRunError where something is kept.
    """
    known = has_run(work.folder) or has_pruning(work.folder)
    try:
        yield
    except (InterruptedRunError, TooMuchLostError):
        # It says how to go on, so that there must be something to go on with, were it only the command.
        raise
    except BaseException as error:
        if not work.has_progress():
            if not (isinstance(error, ResumeError) and known):
                work.remove()
        elif isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                f"Stopped as asked; all that is done is saved. Go on with: {resume_command(work.folder)}"
            ) from None
        else:
            say(f"note: what is done is kept; go on with: {resume_command(work.folder)}")
        raise


def begin(settings: RunSettings, work: WorkFolder) -> dict[str, Any] | None:
    """What is recorded of an earlier run that is to be taken up; None to begin anew, with nothing of it left."""
    recorded = work.read_run() if settings.resume != "never" else None
    if recorded is not None and settings.resume == "auto" and not work.has_progress():
        # Nothing is lost, so that nothing has to agree with it.
        recorded = None
    elif recorded is None and settings.resume != "never" and work.has_progress():
        if has_pruning(work.folder) and not has_run(work.folder):
            raise ResumeError(
                f"{work.folder} holds what `streamprune prune` began. Go on with it ({resume_command(work.folder)}), "
                "give it up with `streamprune clean --all`, or add --resume never."
            )
        raise ResumeError(
            f"{work.folder / RUN_NAMES[0]} is missing or damaged, and so is its copy, so that nobody knows which run "
            "the finished blocks beside it are from. Begin anew with --resume never."
        )
    if recorded is None:
        if settings.resume == "required":
            raise ResumeError(
                f"{work.folder} holds no run that could be resumed. Leave out --resume required to begin one."
            )
        work.start_afresh()
    return recorded


class StopRequest:
    """Whether the user has asked to stop.

    While `patient`, somebody looks at it soon and stops in good order; otherwise a signal becomes a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.patient = False

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, as long as this lasts; a second one ends the process.

    Outside the main thread, where no signals arrive, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for other in usual:
            # Not what Python makes of it: an exception somewhere in the middle is what nobody can prepare for.
            signal.signal(other, signal.SIG_DFL)
        if not request.patient:
            raise KeyboardInterrupt

    for number in usual:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
