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


class BadRecordError(CalibrationError):
    """A record of the calibration data cannot be used; --skip-bad passes over a few of them."""


class CommentedJsonError(CalibrationError):
    """A JSON array of the calibration data has comments or trailing commas, as settings of programs often have."""


class ScoresError(StreampruneError):
    """A file of scores is missing, damaged, of another format, or does not belong to the model."""


class ResourceError(StreampruneError):
    """The machine lacks the disk space or memory that the run would need."""


class OutputError(StreampruneError):
    """The output folder cannot be written, or must not be overwritten."""


class NonFiniteError(StreampruneError):
    """The model produced NaN or infinity, so that scores are meaningless."""


class DoesNotFitError(StreampruneError):
    """The model does not fit the budget, however many experts are removed."""

    exit_code = 3


class TooMuchLostError(StreampruneError):
    """The pruned model's predictions differ more from the original's than --stop-if-kl allows."""

    exit_code = 4


class ResumeError(StreampruneError):
    """An interrupted run cannot be resumed: it is missing or damaged, or what decides its result has changed."""


class TaskError(StreampruneError):
    """A task of lm-evaluation-harness cannot be loaded or run."""


class VerifyError(StreampruneError):
    """A result differs from its source or its record."""


class ReportError(StreampruneError):
    """The files that a report is made from are missing, damaged or inconsistent."""


class UploadError(StreampruneError):
    """The Hub cannot be reached, refuses the upload, or did not store all of it."""


class InterruptedRunError(StreampruneError):
    """The user stopped the run; finished work is saved. (75 is EX_TEMPFAIL of sysexits.h: try again.)"""

    exit_code = 75


class ProcessesError(StreampruneError):
    """The processes of a run cannot connect, or one of them was lost."""


class OtherProcessError(StreampruneError):
    """An error of another process than the first, with its name. That process prints it itself."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ReportedElsewhereError(StreampruneError):
    """This process must end, and prints nothing: another process reports the reason."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("Another process of this run reports the reason.")
        self.exit_code = exit_code
