"""What is recorded of every expert: sums over the tokens that were routed to it, apart for each source.

All fields but one are sums over tokens, so that sources can be weighed afterwards exactly; the peak is a maximum. For a
token routed to expert j, g is the gate weight with which the model combines j's output f (before the gate), o the
layer's routed output Σ g·f of all experts that the token chose, and x the residual stream that enters the block.

Shapes: F fields, S sources, E experts.
"""

from __future__ import annotations

import base64
import math
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
#: Where the latter lie along that axis.
MAXIMA_PLACES = tuple(number for number, name in enumerate(FIELDS) if name in MAXIMA)
#: Fields that may be negative. (A gate weight is negative in no router that we know of, but nothing forbids it.)
SIGNED = frozenset({"gates", "gated_norms", "cosines"})
#: Every whole number up to here is a float64.
MOST_COUNT = 2.0**53


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
            if name in MAXIMA:
                result[name] = values.max(axis=0, initial=0.0)
                continue
            # One source after the other, and no matrix product: that would round differently on other processors.
            result[name] = np.zeros(values.shape[1])
            for factor, of_source in zip(factors[factors > 0], values, strict=True):
                result[name] += factor * of_source
        return result


def pack(values: Array) -> str:
    """Statistics as text, exact to the bit: base64 of their little-endian float64 values."""
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def unpack(text: str, sources: int, experts: int) -> Array:
    """Statistics (F, S, E) from `pack`. ValueError or TypeError for text that holds none of this size."""
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")
    shape = (len(FIELDS), sources, experts)
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} numbers where {shape} are due")
    values = values.reshape(shape).astype(np.float64)
    check_values(values)
    return values


def check_values(values: Array) -> None:
    """Raise ValueError for statistics (F, S, E) that no tokens can have."""
    if not np.isfinite(values).all():
        raise ValueError("statistics that are not finite")
    for name, each in zip(FIELDS, values, strict=True):
        if name in COUNTS and ((each < 0) | (each != np.floor(each)) | (each > MOST_COUNT)).any():
            raise ValueError(f"{name} that are no numbers of tokens")
        if name not in SIGNED and (each < 0).any():
            raise ValueError(f"negative {name}")
