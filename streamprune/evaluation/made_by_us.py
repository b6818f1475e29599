"""What a model that streamprune made says of itself, as far as an evaluation has to know it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.output.writer import REPORT_NAME
from streamprune.source.checkpoint import read_json


@dataclass(frozen=True)
class MadeByUs:
    """The folder of a model that we made, with the fingerprints of its source and of the text that was held back.

    Both are None where the record does not tell.
    """

    folder: Path
    source: str | None
    held_back: str | None


def record_of(model: str) -> MadeByUs | None:
    """What the record in a model's folder tells; None for a model that we did not make, or a name that no folder has.

    Raises CheckpointError for a record that is no JSON object.
    """
    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    if not os.path.isfile(folder / REPORT_NAME):  # noqa: PTH113
        return None
    record = read_json(folder / REPORT_NAME)
    return MadeByUs(
        folder, _fingerprint(record.get("source")), _fingerprint(_entry(record.get("calibration"), "held_back"))
    )


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _fingerprint(value: Any) -> str | None:
    fingerprint = _entry(value, "fingerprint")
    return fingerprint if isinstance(fingerprint, str) else None
