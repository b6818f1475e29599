"""What a record says of computed weights: refitted, quantized and rounded ones, and the importance matrix. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from streamprune.models.config_json import MOST_LAYERS
from streamprune.reporting.record_text import MOST_LISTED, Calibration, Count, Name, Positive, SourceTokens
from streamprune.work.layer_records import RefittedLayer, RoundedLayer


def _mean(values: Iterable[float]) -> float:
    """The mean; 0 of none."""
    listed = list(values)
    return fmean(listed) if listed else 0.0


class AnchorText(Struct, frozen=True, kw_only=True):
    """The text that a refit also fits to: the name that the user gave, its sources and tokens."""

    name: Name
    sources: Annotated[list[SourceTokens], Meta(max_length=MOST_LISTED)]
    sequences: Count
    tokens: Count
    fingerprint: str


class LayerRefit(RefittedLayer, frozen=True, kw_only=True):
    """How the down projections of layer `index` were refitted."""

    index: Annotated[int, Meta(ge=0, le=MOST_LAYERS)]


class RecordedRefit(Struct, frozen=True, kw_only=True):
    """How the down projections of the kept experts were refitted, by layer.

    They were fitted to `fitted_tokens`, and `judging_tokens` decided how much of each change was taken; a part of both
    is of the `anchor`, if there is one. `calibration` is only stated for a refit from saved scores with text other than
    they were made on: the text of which all the rest is. `layers` are in ascending order.
    """

    anchor: AnchorText | None
    calibration: Calibration | UnsetType = UNSET
    fitted_tokens: Count
    judging_tokens: Count
    layers: Annotated[list[LayerRefit], Meta(max_length=MOST_LISTED)] = []

    @property
    def error_before(self) -> float:
        """The mean over the layers of the relative error of their output before the refit."""
        return _mean(layer.before for layer in self.layers)

    @property
    def error_after(self) -> float:
        """The same after the refit."""
        return _mean(layer.after for layer in self.layers)


class LayerRounding(RoundedLayer, frozen=True, kw_only=True):
    """How the matrices of layer `index` were rounded by GPTQ."""

    index: Annotated[int, Meta(ge=0, le=MOST_LAYERS)]


class RecordedRounding(Struct, frozen=True, kw_only=True):
    """How matrices were rounded by GPTQ, by layer: by what entered them on `tokens` tokens.

    `calibration` is only stated where the experts were scored before, on other text: that of which these are. `layers`
    are in ascending order.
    """

    calibration: Calibration | UnsetType = UNSET
    tokens: Count
    layers: Annotated[list[LayerRounding], Meta(max_length=MOST_LISTED)] = []

    @property
    def error_before(self) -> float:
        """The mean over the layers of the relative error of a matrix's output if it had been rounded to nearest."""
        return _mean(layer.before for layer in self.layers)

    @property
    def error_after(self) -> float:
        """The same as it was rounded."""
        return _mean(layer.after for layer in self.layers)

    @property
    def nearest(self) -> int:
        """How many experts have a matrix that was rounded to nearest, in all layers."""
        return sum(len(layer.nearest) for layer in self.layers)


class RecordedQuantization(Struct, frozen=True, kw_only=True):
    """What was quantized on the way to the output: the format for people, and the number of matrices.

    `plain` are the numbers of matrices that were not, by the reason.
    """

    format: Name
    matrices: Positive
    plain: Annotated[dict[Name, Positive], Meta(max_length=100)]


class RecordedImatrix(Struct, frozen=True, kw_only=True):
    """The importance matrix that was made with an output, beside it: the name and SHA-256 of its file, the weights that
    it has, and the text of the calibration (and anchor) that it is made from."""

    file: Name
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    weights: Positive
    sequences: Count
    tokens: Count


def check_refit(refit: RecordedRefit, counts: Mapping[int, int]) -> None:
    """Raise ValueError unless the layers have possible numbers for the experts that they keep, `counts` by layer."""
    indices = [layer.index for layer in refit.layers]
    if indices != sorted(counts.keys() & set(indices)):
        raise ValueError("`$.refit.layers` are not layers with experts in ascending order")
    for layer in refit.layers:
        where = f"`$.refit.layers` of layer {layer.index}"
        if any(len(each) != counts[layer.index] for each in (layer.shares, layer.tokens, layer.changes)):
            raise ValueError(f"{where} has not one value for each of {counts[layer.index]} experts")
        values = (*layer.shares, *layer.changes, layer.before, layer.after, layer.catch_up)
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(f"{where} has values below 0 or that are not finite")


def check_rounding(rounding: RecordedRounding, counts: Mapping[int, int]) -> None:
    """Raise ValueError unless the layers have possible numbers for the experts that they keep, `counts` by layer."""
    indices = [layer.index for layer in rounding.layers]
    if indices != sorted(set(indices)):
        raise ValueError("`$.rounding.layers` are not in ascending order")
    for layer in rounding.layers:
        where, count = f"`$.rounding.layers` of layer {layer.index}", counts.get(layer.index, 0)
        if len(layer.tokens) != count or any(place >= count for place in layer.nearest):
            raise ValueError(f"{where} does not have {count} experts")
        if not all(0 <= value < math.inf for value in (layer.before, layer.after)):
            raise ValueError(f"{where} has values below 0 or that are not finite")
