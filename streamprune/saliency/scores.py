"""The scores of a model: statistics of every expert, summed over the tokens that were routed to it, by source.

All fields but one are sums over tokens, so that sources can be weighted exactly later; the peak is a maximum. For
a token routed to expert j, g is the gate weight with which the model combines j's output f (before the gate), o the
layer's routed output Σ g·f of all experts that the token chose, and x the residual stream that enters the layer.

Shapes: F fields, S sources, E experts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.errors import ScoresError
from streamprune.models.config_json import ExpertSpec

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
#: The positions of the maxima along that axis.
MAXIMA_PLACES = tuple(number for number, name in enumerate(FIELDS) if name in MAXIMA)
#: Fields that may be negative. (No known router has negative gate weights, but they are possible.)
SIGNED = frozenset({"gates", "gated_norms", "cosines"})
#: float64 represents every integer up to here.
MOST_TOKENS = 2**53
#: Far beyond what float32 can reach, squared and summed, and low enough that products of two stay finite.
MOST_VALUE = 1e120
#: Through rounding, a sum of cosines may exceed the number of its terms by this share.
_SLACK = 1e-2


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of the experts of layer `index`: `values` (F, S, E), float64, in the order of FIELDS."""

    index: int
    values: Array = field(repr=False)

    def mixed(self, weights: Sequence[float]) -> Mapping[str, Array]:
        """The statistics (E,) by field of all sources together, each source weighted by its entry in `weights` (S,).

        The weight of a source is how often each of its tokens counts. Sources with weight 0 are ignored, also their
        peaks.
        """
        factors = np.asarray(weights, dtype=np.float64)
        used = self.values[:, factors > 0]
        result = {}
        for name, values in zip(FIELDS, used, strict=True):
            if name in MAXIMA:
                result[name] = values.max(axis=0, initial=0.0)
                continue
            # One source after the other, since a matrix product would round differently on other processors.
            result[name] = np.zeros(values.shape[1])
            for factor, of_source in zip(factors[factors > 0], values, strict=True):
                result[name] += factor * of_source
        return result


@dataclass(frozen=True)
class Scores:
    """The statistics of every layer with experts, in ascending order, and their provenance.

    `sources` names the parts of the calibration text, `source_tokens` says how many tokens each of them had. Provenance
    and layout are JSON; `layout`, which says where the experts are in the checkpoint, is None if it was not recorded.
    """

    layers: tuple[LayerStatistics, ...]
    sources: tuple[str, ...]
    source_tokens: tuple[int, ...]
    spec: ExpertSpec
    provenance: Mapping[str, Any] = field(repr=False)
    layout: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The indices of the layers that have experts."""
        return tuple(layer.index for layer in self.layers)

    @property
    def tokens(self) -> int:
        """Calibration tokens of all sources together."""
        return sum(self.source_tokens)


def pack(values: Array) -> str:
    """Statistics as text, exact to the bit: base64 of their little-endian float64 values."""
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def unpack(text: str, sources: int, experts: int) -> Array:
    """Statistics (F, S, E) from `pack`. Raises ValueError or TypeError for text that is not of this size."""
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")
    return values.reshape(len(FIELDS), sources, experts).astype(np.float64)


def read_statistics(text: str, layer: int, source_tokens: Sequence[int], experts: int) -> LayerStatistics:
    """Recorded statistics of a layer, complete or not, from `pack`.

    Raises ValueError or TypeError for impossible statistics, early and not after hours, when all are written.
    """
    statistics = LayerStatistics(layer, unpack(text, len(source_tokens), experts))
    try:
        check_layer(statistics, source_tokens, experts)
    except ScoresError as error:
        raise ValueError(str(error)) from None
    return statistics


def check_layer(layer: LayerStatistics, source_tokens: Sequence[int], experts: int) -> None:
    """Raise ScoresError unless the statistics of a layer have the right shape and are possible for these tokens.

    Values are finite, counts are integers up to the source's tokens, and without tokens all values are 0.
    """
    shape = (len(FIELDS), len(source_tokens), experts)
    if layer.values.shape != shape:
        raise ScoresError(
            f"layer {layer.index} has statistics {layer.values.shape} instead of {shape}. Score the model again."
        )
    fields = dict(zip(FIELDS, layer.values, strict=True))
    tokens = fields["tokens"]
    limits = np.asarray(source_tokens, dtype=np.float64)[:, None]
    for name, values in fields.items():
        wrong = ~(np.abs(values) <= MOST_VALUE)
        if name not in SIGNED:
            wrong |= values < 0
        if name in COUNTS:
            wrong |= (values != np.floor(values)) | (values > (limits if name == "tokens" else tokens))
        if name == "cosines":
            wrong |= np.abs(values) > tokens * (1 + _SLACK) + _SLACK
        wrong |= (tokens == 0) & (values != 0)
        if wrong.any():
            source, expert = (int(number) for number in np.argwhere(wrong)[0])
            raise ScoresError(
                f"layer {layer.index}, expert {expert}, source {source}: {name} is {values[source, expert]:g} with "
                f"{tokens[source, expert]:g} tokens of {source_tokens[source]:g}, which is impossible. Score the model "
                "again."
            )
