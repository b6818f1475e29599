"""Every error that streamprune raises on purpose: one small tree.

The engine raises these; only the command line turns them into exit codes. A message says what is wrong, where,
the numbers, and what to do next.
"""

from __future__ import annotations


class StreampruneError(Exception):
    """Base class. `exit_code` is what the command line returns."""

    exit_code = 1


class SettingsError(StreampruneError):
    """The user's settings contradict each other or cannot be met (a usage error)."""

    exit_code = 2


class CheckpointError(StreampruneError):
    """The source checkpoint is missing, broken, truncated or not safetensors."""


class UnsupportedModelError(StreampruneError):
    """The model has no routed experts, or has them in a form that cannot be scored or sliced correctly."""


class CalibrationError(StreampruneError):
    """The calibration data is missing, malformed or too short."""


class ScoresError(StreampruneError):
    """A file of scores is missing, damaged, of another format, or does not belong to the model."""


class ResourceError(StreampruneError):
    """The machine lacks the disk space or memory that the run would need."""


class OutputError(StreampruneError):
    """The output folder cannot be written, or must not be overwritten."""


class NonFiniteError(StreampruneError):
    """The model produced NaN or infinity, so that no score could be trusted."""


class DoesNotFitError(StreampruneError):
    """The model cannot be pruned so far that it fits the budget."""

    exit_code = 3


class TooMuchLostError(StreampruneError):
    """The pruned model's predictions are farther from the original's than the user wants."""

    exit_code = 4


class ResumeError(StreampruneError):
    """An interrupted run cannot be taken up: it is missing or damaged, or something that matters has changed."""


class TaskError(StreampruneError):
    """A task of lm-evaluation-harness cannot be loaded or run."""


class VerifyError(StreampruneError):
    """A result is not what its source and its record say."""


class ReportError(StreampruneError):
    """What a report is made of is missing, damaged, or does not go together."""


class UploadError(StreampruneError):
    """The Hub cannot be reached, refuses, or has not taken all that it was sent."""


class InterruptedRunError(StreampruneError):
    """The user stopped the run; what is done is saved. (75 is EX_TEMPFAIL of sysexits.h: try again.)"""

    exit_code = 75


class ProcessesError(StreampruneError):
    """The processes that share a run cannot find one another, or one of them was lost."""


class OtherProcessError(StreampruneError):
    """What went wrong in a process that only helps, with its name: the one that talks to the user cannot know it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ToldElsewhereError(StreampruneError):
    """This process has to end; another one tells the user why, so that this one says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("Another process of this run says why it ended.")
        self.exit_code = exit_code
