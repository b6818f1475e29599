"""Super experts: the few whose outputs peak so far above all others that the model breaks down without them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamprune.scores.statistics import LayerStatistics

PERCENTILE = 99.5
#: Share of the largest peak of all.
LEAST_SHARE = 0.1
#: Later layers have large peaks of another kind, next to the model's output.
FIRST_LAYERS = 0.75


def super_experts(layers: Sequence[LayerStatistics], weights: Sequence[float]) -> dict[int, tuple[int, ...]]:
    """The super experts by block, ascending; blocks without any are left out. `weights` (S,) are those of the sources.

    An expert is one if its peak is above the 99.5th percentile of the peaks of all experts and above a tenth of the
    largest, and it is in the first three quarters of the layers that have experts (Su et al., 2025, arXiv:2507.23279).
    The percentile is interpolated linearly. Sources with weight 0 count for nothing here too.
    """
    peaks = [layer.mixed(weights)["peaks"] for layer in layers]
    everywhere = np.concatenate(peaks)
    threshold = max(float(np.percentile(everywhere, PERCENTILE)), LEAST_SHARE * float(everywhere.max()))
    found = {}
    for layer, values in list(zip(layers, peaks, strict=True))[: int(FIRST_LAYERS * len(layers))]:
        experts = tuple(int(expert) for expert in np.flatnonzero(values > threshold))
        if experts:
            found[layer.block] = experts
    return found
