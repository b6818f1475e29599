"""What the user of `streamprune eval` asked for, checked once when it is made and never changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from streamprune.errors import SettingsError
from streamprune.settings import Computing, check_amounts


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Computing):
    """The settings of `streamprune eval`, as far as it streams: which model, against which, on what text.

    Raises SettingsError when a value is impossible whatever the model.
    """

    model: str
    against: str | None = None
    revision: str | None = None
    against_revision: str | None = None
    trust_remote_code: bool = False
    data: tuple[str, ...] = ()
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        Computing.__post_init__(self)
        check_amounts(self.samples, self.seq_len)
        if self.against_revision is not None and self.against is None:
            raise SettingsError("--against-revision is about the model of --against, which is missing.")
