"""The scores of a model: statistics of every expert, summed over the tokens that were routed to it, by source.

All fields but one are sums over tokens, so that sources can be weighted exactly later; the peak is a maximum. For
a token routed to expert j, g is the gate weight with which the model combines j's output f (before the gate), o the
layer's routed output Σ g·f of all experts that the token chose, and x the residual stream that enters the layer.

Where a model's channels can be told apart, there is also the energy of each channel: see `saliency.channels`.

Shapes: F fields, S sources, E experts, W channels of an expert.
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
Floats = NDArray[np.float32]

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
    "squared_norms": "Σ ‖f‖₂²",
}
#: Scores of format 1 and 2 have no fields but the first so many.
FIELDS_BEFORE = 9
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
    """The statistics of the experts of layer `index`: `values` (F, S, E), float64, in the order of FIELDS.

    `channels` (S, E, W), float32, are the energies of each expert's channels; None if they were not recorded. Scores of
    earlier versions have FIELDS_BEFORE fields only.
    """

    index: int
    values: Array = field(repr=False)
    channels: Floats | None = field(default=None, repr=False)

    @property
    def fields(self) -> dict[str, Array]:
        """The statistics (S, E) by field: all that were recorded."""
        return dict(zip(FIELDS, self.values, strict=False))

    def mixed(self, weights: Sequence[float]) -> Mapping[str, Array]:
        """The statistics (E,) by field of all sources together, each source weighted by its entry in `weights` (S,).

        The weight of a source is how often each of its tokens counts. Sources with weight 0 are ignored, also their
        peaks.
        """
        used = np.asarray(weights, dtype=np.float64) > 0
        return {
            name: values[used].max(axis=0, initial=0.0) if name in MAXIMA else _weighted_sum(values, weights)
            for name, values in self.fields.items()
        }

    def mixed_channels(self, weights: Sequence[float]) -> Array:
        """The channels' energies (E, W), float64, with the sources weighted as in `mixed`; they must be recorded."""
        assert self.channels is not None
        return _weighted_sum(self.channels, weights)


def _weighted_sum(by_source: NDArray[Any], weights: Sequence[float]) -> Array:
    """Σ weight·values over the sources, the first axis, in float64."""
    # One source after the other, since a matrix product would round differently on other processors.
    total = np.zeros(by_source.shape[1:])
    for weight, values in zip(weights, by_source, strict=True):
        if weight > 0:
            total += np.float64(weight) * values
    return total


@dataclass(frozen=True)
class Scores:
    """The statistics of every layer with experts, in ascending order, and their provenance.

    `sources` names the parts of the calibration text, `source_tokens` says how many tokens each of them had. Provenance
    and layout are JSON; `layout`, which says where the experts are in the checkpoint, is None if it was not recorded.
    `mtp` are the statistics of the layer for multi-token prediction, whose index is that behind all layers; None if it
    was not scored. The last token of a sequence does not enter it.
    """

    layers: tuple[LayerStatistics, ...]
    sources: tuple[str, ...]
    source_tokens: tuple[int, ...]
    spec: ExpertSpec
    provenance: Mapping[str, Any] = field(repr=False)
    layout: Mapping[str, Any] | None = field(default=None, repr=False)
    mtp: LayerStatistics | None = None

    @property
    def every(self) -> tuple[LayerStatistics, ...]:
        """All layers with experts, the MTP layer last if it was scored."""
        return self.layers if self.mtp is None else (*self.layers, self.mtp)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The indices of the layers that have experts."""
        return tuple(layer.index for layer in self.layers)

    @property
    def channel_bytes(self) -> int:
        """Bytes of the energies of all channels; 0 if they were not recorded."""
        return sum(layer.channels.nbytes for layer in self.every if layer.channels is not None)

    @property
    def tokens(self) -> int:
        """Calibration tokens of all sources together."""
        return sum(self.source_tokens)


def apart_from_mtp(
    layers: Sequence[LayerStatistics], layer_count: int
) -> tuple[tuple[LayerStatistics, ...], LayerStatistics | None]:
    """The statistics of a model's own layers, `layer_count` in all, and those of the MTP layer behind them, if any."""
    own = tuple(layer for layer in layers if layer.index < layer_count)
    return own, layers[-1] if len(own) < len(layers) else None


def pack(values: NDArray[Any]) -> str:
    """Statistics as text, exact to the bit: base64 of their little-endian values, float64 or float32."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def unpack(text: str, sources: int, experts: int) -> Array:
    """Statistics (F, S, E) from `pack`. Raises ValueError or TypeError for text that is not of this size."""
    return _unpacked(text, "<f8").reshape(len(FIELDS), sources, experts)


def unpack_channels(text: str, shape: Sequence[int], code: str) -> NDArray[Any]:
    """Energies of channels (S, E, W) from `pack`, of the dtype "f8" or "f4".

    Raises ValueError or TypeError for text that is not of this shape.
    """
    return _unpacked(text, f"<{code}").reshape(shape)


def unpack_squares(text: str, rows: int) -> NDArray[np.float32]:
    """float32 values (rows, C) from `pack`. Raises ValueError or TypeError for text that is not of so many rows."""
    return _unpacked(text, "<f4").reshape(rows, -1)


def _unpacked(text: str, code: str) -> NDArray[Any]:
    # Bytes that can be written to, as torch wants them.
    return np.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=code)


def read_statistics(
    facts: Mapping[str, Any],
    layer: int,
    source_tokens: Sequence[int],
    experts: int,
    width: int | None,
    code: str = "f4",
) -> LayerStatistics:
    """Recorded statistics of a layer, complete or not, from `pack`.

    `facts` has the `statistics`, and if channels are recorded, `width` for each expert, these `channels` with the dtype
    `code` ("f8" for sums that are not complete).
    Raises KeyError, ValueError or TypeError for impossible statistics, early and not after hours, when all are written.
    """
    channels = None
    if width is not None:
        channels = unpack_channels(facts["channels"], (len(source_tokens), experts, width), code)
    statistics = LayerStatistics(layer, unpack(facts["statistics"], len(source_tokens), experts), channels)
    try:
        check_layer(statistics, source_tokens, experts)
    except ScoresError as error:
        raise ValueError(str(error)) from None
    return statistics


def check_layer(layer: LayerStatistics, source_tokens: Sequence[int], experts: int) -> None:
    """Raise ScoresError unless the statistics of a layer have the right shape and are possible for these tokens.

    Values are finite, counts are integers up to the source's tokens, and without tokens all values are 0.
    """
    shape = (FIELDS_BEFORE if len(layer.values) == FIELDS_BEFORE else len(FIELDS), len(source_tokens), experts)
    if layer.values.shape != shape:
        raise ScoresError(
            f"layer {layer.index} has statistics {layer.values.shape} instead of {shape}. Score the model again."
        )
    fields = layer.fields
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
    if layer.channels is not None:
        _check_channels(layer.index, layer.channels, tokens)


def _check_channels(index: int, channels: NDArray[Any], tokens: Array) -> None:
    """Raise ScoresError unless the energies of a layer's channels (S, E, W) are possible for `tokens` (S, E)."""
    if channels.ndim != 3 or channels.shape[:2] != tokens.shape or not channels.size:
        raise ScoresError(
            f"layer {index} has channels {channels.shape} for {tokens.shape[0]} sources and {tokens.shape[1]} experts. "
            "Score the model again."
        )
    wrong = ~((channels >= 0) & (channels < np.inf))
    wrong |= (tokens == 0)[:, :, None] & (channels != 0)
    if wrong.any():
        source, expert, channel = (int(number) for number in np.argwhere(wrong)[0])
        raise ScoresError(
            f"layer {index}, expert {expert}, source {source}: the energy of channel {channel} is "
            f"{channels[source, expert, channel]:g} with {tokens[source, expert]:g} tokens, which is impossible. Score "
            "the model again."
        )
