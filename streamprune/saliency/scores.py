"""What is recorded of every expert: sums over the tokens that were routed to it, apart for each source.

All fields but one are sums over tokens, so that sources can be weighed afterwards exactly; the peak is a maximum. For a
token routed to expert j, g is the gate weight with which the model combines j's output f (before the gate), o the
layer's routed output Σ g·f of all experts that the token chose, and x the residual stream that enters the layer.

Shapes: F fields, S sources, E experts.

The scores of a model: the statistics of all its experts, and where they come from.

What scores have to be, whoever made them. Each check raises ScoresError, or gives back what it has checked.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.errors import ScoresError
from streamprune.files.json_text import show
from streamprune.models.config_json import MOST_BLOCKS, MOST_EXPERTS, ExpertSpec

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
    """The statistics of the experts of layer `index`: `values` (F, S, E), float64, in the order of FIELDS."""

    index: int
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


@dataclass(frozen=True)
class Scores:
    """The statistics of every layer with experts, in ascending order, and their provenance.

    `sources` names the parts of the calibration text, `source_tokens` says how many tokens each of them had. Provenance
    and layout are JSON; `layout`, which says where the checkpoint holds its experts, is None where nobody recorded it.
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


MOST_SOURCES = 1000
LONGEST_SOURCE_NAME = 1000
#: Up to here float64 has every whole number.
MOST_TOKENS = 2**53
#: Far beyond what float32 can reach, squared and summed, and low enough that products of two stay finite.
MOST_VALUE = 1e120
#: Rounding may carry a sum of cosines above the number of its terms, the more so the narrower the dtype.
_SLACK = 1e-2
_SPEC_FIELDS = ("path", "attribute", "count", "top_k", "groups", "topk_groups")
_AGAIN = "Score the model again."


def check_sources(names: Sequence[Any], tokens: Sequence[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of sources: texts that can be printed, no two the same; each source has at least one token."""
    if not 1 <= len(names) == len(tokens) <= MOST_SOURCES:
        raise ScoresError(f"{len(names)} sources with {len(tokens)} token counts are no calibration. {_AGAIN}")
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.strip()) <= LONGEST_SOURCE_NAME:
            raise ScoresError(f"a source cannot be named {show(name)}. {_AGAIN}")
    if len(set(names)) < len(names):
        raise ScoresError(f"two sources have the same name: {show(sorted(names))}. {_AGAIN}")
    for name, count in zip(names, tokens, strict=True):
        if not _whole(count, 1, MOST_TOKENS):
            raise ScoresError(f"source {name} has {show(count)} tokens. {_AGAIN}")
    return tuple(names), tuple(tokens)


def check_spec(spec: ExpertSpec | Mapping[str, Any]) -> ExpertSpec:
    """How many experts there are, and how the router picks among them."""
    facts = {name: getattr(spec, name) for name in _SPEC_FIELDS} if isinstance(spec, ExpertSpec) else spec
    if facts.keys() != set(_SPEC_FIELDS):
        raise ScoresError(f"its experts are described by {show(sorted(facts))}. {_AGAIN}")
    path, attribute = facts["path"], facts["attribute"]
    count, top_k, groups, topk_groups = (facts[name] for name in _SPEC_FIELDS[2:])
    right = (
        isinstance(path, (list, tuple)) and all(isinstance(part, str) for part in path) and isinstance(attribute, str)
        and _whole(count, 1, MOST_EXPERTS) and _whole(top_k, 1, count)
        and _whole(groups, 1, count) and count % groups == 0 and _whole(topk_groups, 1, groups)
    )  # fmt: skip
    if not right:
        raise ScoresError(f"no router picks experts like this: {show(dict(facts))}. {_AGAIN}")
    return ExpertSpec(tuple(path), attribute, count, top_k, groups, topk_groups)


def check_layers(indices: Sequence[Any]) -> tuple[int, ...]:
    """Indices of layers, ascending; at least one."""
    if not indices or not all(_whole(index, 0, MOST_BLOCKS) for index in indices):
        raise ScoresError(f"these are no numbers of layers: {show(list(indices))}. {_AGAIN}")
    if any(left >= right for left, right in pairwise(indices)):
        raise ScoresError(f"its layers are not in ascending order: {show(list(indices))}. {_AGAIN}")
    return tuple(indices)


def check_layer(layer: LayerStatistics, source_tokens: Sequence[int], experts: int) -> None:
    """The statistics of one layer: of the right shape, finite, and such as sums over these tokens can be."""
    shape = (len(FIELDS), len(source_tokens), experts)
    if layer.values.shape != shape:
        raise ScoresError(f"layer {layer.index} has statistics {layer.values.shape} instead of {shape}. {_AGAIN}")
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
            source, expert = (int(index) for index in np.argwhere(wrong)[0])
            raise ScoresError(
                f"layer {layer.index}, expert {expert}, source {source}: {name} is {values[source, expert]:g} with "
                f"{tokens[source, expert]:g} tokens of {limits[source, 0]:g}, which cannot be. {_AGAIN}"
            )


def _whole(number: Any, least: int, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and least <= number <= most
