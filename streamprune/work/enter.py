"""Opening the work folder, resuming its run, and keeping finished work on any exit.

The first SIGINT or SIGTERM makes a run save and stop; the second ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from streamprune.common_settings import OutputSettings
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, OutputError, ResumeError, TooMuchLostError
from streamprune.files.durable import writing
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.records import RUN_NAMES, RecordedRun, has_pruning, has_run, read_run


def open_work_folder(stack: ExitStack, settings: OutputSettings) -> WorkFolder:
    """Lock the work folder, and if it is not next to the output, a second one there that reserves the output's name.

    Raises OutputError if the work folder and the output contain one another, or another run holds them.
    """
    with writing(f"Looking for {settings.work_folder}", settings.work_folder):
        home, output = settings.work_folder.resolve(), settings.output.resolve()
        elsewhere = home != settings.output_work_folder.resolve()
    if home == output or home in output.parents or output in home.parents:
        raise OutputError(f"The work folder {home} and the output {output} must not be, or contain, one another.")
    if elsewhere:
        reserved = stack.enter_context(WorkFolder(settings.output_work_folder))
        stack.callback(lambda: None if reserved.has_progress() else reserved.remove())
    return stack.enter_context(WorkFolder(settings.work_folder))


@contextmanager
def on_exit(work: WorkFolder, say: Callable[[str], None]) -> Iterator[None]:
    """On any error, keep finished work and print the resume command; remove a work folder that holds none.

    A KeyboardInterrupt becomes an InterruptedRunError if there is finished work.
    """
    known = has_run(work.folder) or has_pruning(work.folder)
    try:
        yield
    except (InterruptedRunError, TooMuchLostError):
        # Its message has the resume command, so that the folder must stay, even without finished work.
        raise
    except BaseException as error:
        if not work.has_progress():
            if not (isinstance(error, ResumeError) and known):
                work.remove()
        elif isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                f"Stopped on request. All finished work is saved. Resume with: {resume_command(work.folder)}"
            ) from None
        elif not isinstance(error, ResumeError):
            # (That says itself how to go on.)
            say(f"note: finished work is saved; resume with: {resume_command(work.folder)}")
        raise


def begin(settings: RunSettings, work: WorkFolder) -> RecordedRun | None:
    """The record of an earlier run to resume; None to start over, with the work folder emptied.

    Raises ResumeError if there is work that cannot be resumed, or if there is none with --resume required.
    """
    recorded = read_run(work.folder) if settings.resume != "never" else None
    if recorded is not None and settings.resume == "auto" and not work.has_progress():
        # It has no finished work: nothing is lost by starting over.
        recorded = None
    elif recorded is None and settings.resume != "never" and work.has_progress():
        if has_pruning(work.folder) and not has_run(work.folder):
            raise ResumeError(
                f"{work.folder} has an unfinished `streamprune prune`. Resume it "
                f"({resume_command(work.folder)}), discard it with `streamprune clean --all`, or add --resume never."
            )
        raise ResumeError(
            f"{work.folder / RUN_NAMES[0]} and its copy are missing or damaged, so it is unknown which run the "
            "finished layers are from. Start over with --resume never."
        )
    if recorded is None:
        if settings.resume == "required":
            raise ResumeError(f"{work.folder} has no run to resume. Omit --resume required to start one.")
        work.start_afresh()
    return recorded


class StopRequest:
    """Whether the user has requested to stop.

    While `patient` is true, the run checks this regularly and stops after saving; otherwise a signal raises
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.patient = False

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within this context the first SIGINT or SIGTERM becomes a request to stop; a second one ends the process.

    Does nothing outside the main thread, where no signals arrive.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for other in usual:
            # Not Python's handler, which would raise an exception at any point of the code.
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
