"""What all processes of a run have in common: rank 0 reads and decides it, the others take it over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.errors import ProcessesError
from streamprune.models.open import versions
from streamprune.planning.counts import ExpertCounts
from streamprune.planning.prepare import PreparedModel, prepare, read_config


@dataclass(frozen=True)
class Job:
    """What rank 0 reads and decides, and broadcasts to all ranks."""

    settings: RunSettings
    calibration: Calibration
    counts: ExpertCounts | None
    fingerprint: str
    versions: Mapping[str, str]


def open_alike(job: Job) -> PreparedModel:
    """The model as rank 0 opened it. Raises ProcessesError if this machine has another model or library version."""
    prepared = prepare(job.settings, replace(read_config(job.settings), counts=job.counts))
    if prepared.checkpoint.fingerprint() != job.fingerprint:
        raise ProcessesError(
            f"The files of {job.settings.model} on this machine differ from those on the machine of rank 0. Copy them, "
            "or give a --revision."
        )
    here = versions()
    for name, there in job.versions.items():
        if here[name] != there:
            raise ProcessesError(
                f"{name} is {here[name]} here, but {there} on the machine of rank 0. Install the same version."
            )
    return prepared
