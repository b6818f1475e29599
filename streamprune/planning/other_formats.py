"""What other formats of the weights would keep of a model in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.config import RunSettings
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.fit.estimate import Fit, Footprint
from streamprune.models.skeleton import Skeleton
from streamprune.planning.counts import ExpertCounts
from streamprune.planning.written import written_footprint

#: The formats that are compared: one of 8 bits, of which others take about as much, and the smallest.
_COMPARED = ("fp8", "w4a16")


def other_formats_note(
    settings: RunSettings,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    footprint: Footprint,
    counts: ExpertCounts,
) -> str | None:
    """How many experts fit the budget of `counts` in other formats; None if that is no more, or there is no budget.

    `raw` is the source's config.json, and `tensors` its checkpoint's.
    """
    budget = counts.budget
    if budget is None or settings.weights != "source" or settings.has_schedule_file or settings.by != "experts":
        return None
    found = dict(_fitting(settings, raw, skeleton, tensors, footprint, counts))
    if not found:
        return None
    experts = skeleton.spec.count
    parts = [f"in {weights} {f'all {experts}' if keep == experts else keep}" for weights, keep in found.items()]
    first, *others = parts
    return f"{', '.join([f'{first} experts fit', *others])}: try --best"


def _fitting(
    settings: RunSettings,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    footprint: Footprint,
    counts: ExpertCounts,
) -> Iterator[tuple[str, int]]:
    """The formats in which more experts fit than stay now, and how many."""
    assert counts.budget is not None
    for weights in _COMPARED:
        try:
            other = replace(settings, weights=weights, rounding="rtn")
            found = written_footprint(other, raw, skeleton, tensors, footprint)
        except (SettingsError, UnsupportedModelError):
            # It cannot be stored so: `--weights` says why.
            continue
        most = Fit(found, replace(settings.serving, width=counts.width), counts.budget.nbytes).max_experts
        if most is not None and most > counts.total / counts.layers:
            yield weights, most
