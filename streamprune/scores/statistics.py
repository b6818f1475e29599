"""What is recorded of every expert: sums over the tokens that were routed to it, apart for each source.

All fields but one are sums over tokens, so that sources can be weighed afterwards exactly; the peak is a maximum. For a
token routed to expert j, g is the gate weight with which the model combines j's output f (before the gate), o the
layer's routed output Σ g·f of all experts that the token chose, and x the residual stream that enters the block.

Shapes: F fields, S sources, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Name of each field -> what it is. Their order is that of the first axis of all statistics.
FIELDS = {
    "tokens": "tokens routed to the expert",
    "gates": "Σ g",
    "gated_norms": "Σ g·‖f‖₂",
    "norms": "Σ ‖f‖₂",
    "squared_gated_norms": "Σ (g·‖f‖₂)²",
    "peaks": "largest |value| in any f",
    "relative_energies": "Σ (g·‖f‖₂)² / ‖x‖₂²",
    "cosines": "Σ cos(g·f, o)",
    "top_choices": "tokens whose largest gate weight the expert had",
}
#: Fields that count tokens, and those that are maxima instead of sums.
COUNTS = frozenset({"tokens", "top_choices"})
MAXIMA = frozenset({"peaks"})


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of the experts of one block: `values` (F, S, E), float64, in the order of FIELDS."""

    block: int
    values: Array = field(repr=False)

    def mixed(self, weights: Sequence[float]) -> Mapping[str, Array]:
        """The statistics (E,) by field of all sources together, each source weighed by its entry in `weights` (S,).

        The weight of a source is how often each of its tokens counts. Of a source with weight 0 nothing counts, its
        peaks included.
        """
        factors = np.asarray(weights, dtype=np.float64)
        used = self.values[:, factors > 0]
        result = {}
        for name, values in zip(FIELDS, used, strict=True):
            result[name] = values.max(axis=0, initial=0.0) if name in MAXIMA else factors[factors > 0] @ values
        return result
