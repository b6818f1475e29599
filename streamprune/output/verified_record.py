"""What verification reads of an output's streamprune.json: which experts and channels were kept, what was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from streamprune.checkpoint.index import read_json
from streamprune.errors import CheckpointError, VerifyError
from streamprune.formats.base import ChannelMask, KeptExperts
from streamprune.models.expert_layout import Layout
from streamprune.output.plan import REPORT_NAME
from streamprune.targets import MTP, QUANTIZE, ROUNDING, WEIGHTS, Storage
from streamprune.work.layer_records import Computed


class _KeptLayer(msgspec.Struct):
    index: int
    kept: list[int]
    channels: str | None = None


class _RecordedSettings(msgspec.Struct):
    width: Annotated[int, msgspec.Meta(ge=1)] | None = None
    weights: str = "source"
    quantize: str = QUANTIZE[-1]
    rounding: str = ROUNDING[0]
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        for value, choices in ((self.weights, WEIGHTS), (self.quantize, QUANTIZE), (self.rounding, ROUNDING)):
            if value not in choices:
                raise ValueError(f"{value} is none of {', '.join(choices)}")

    def storage(self, mtp: str) -> Storage:
        """How the output stores weights; `mtp` is one of MTP."""
        return Storage(self.weights, self.quantize, self.rounding, self.tensor_parallel, mtp)


class _RefittedLayer(msgspec.Struct):
    index: int


class _RecordedRefit(msgspec.Struct):
    layers: list[_RefittedLayer]


class _KeptMtp(msgspec.Struct):
    # Only stated where the experts of the MTP layer were selected by scores of their own.
    layer: _KeptLayer | None = None


class VerifiedRecord(msgspec.Struct):
    """The fields of streamprune.json that verification reads."""

    layers: list[_KeptLayer]
    settings: _RecordedSettings
    computed: dict[str, Computed] = {}
    refit: _RecordedRefit | None = None
    # Outputs of earlier versions have no layers for multi-token prediction.
    mtp: _KeptMtp | None = None

    @property
    def storage(self) -> Storage:
        return self.settings.storage(MTP[0] if self.mtp is not None else MTP[1])

    @property
    def every(self) -> list[_KeptLayer]:
        """All layers with experts, and behind them the MTP layer, if its experts were selected by their own scores."""
        return [*self.layers, *([self.mtp.layer] if self.mtp is not None and self.mtp.layer is not None else [])]


def read_verified_record(output: Path) -> VerifiedRecord:
    """Read the record of `output`. Raises VerifyError if it is missing, or does not have these fields."""
    path = output / REPORT_NAME
    try:
        return msgspec.convert(read_json(path), VerifiedRecord)
    except CheckpointError as error:
        raise VerifyError(f"{error} It is needed to know which experts were kept.") from None
    except ValueError:
        raise VerifyError(f"{path} does not list the kept experts of every layer. Was it changed?") from None


def check_kept(output: Path, kept: Mapping[int, list[int]], layers: Sequence[int], count: int) -> None:
    """Raise VerifyError unless `kept` lists experts of a source that has `count` of them in each of `layers`."""
    if sorted(kept) != sorted(layers):
        raise VerifyError(
            f"{output / REPORT_NAME} names experts for layers {_few(sorted(kept))}, but the source has them in "
            f"{_few(sorted(layers))}. Is it another model's?"
        )
    for layer, experts in kept.items():
        if experts != sorted(set(experts)) or not experts or not 0 <= experts[0] <= experts[-1] < count:
            raise VerifyError(
                f"{output / REPORT_NAME}: the experts of layer {layer} must be ascending, unique and below {count}."
            )


def kept_channels(output: Path, record: VerifiedRecord, layout: Layout) -> dict[int, KeptExperts]:
    """What stays of every layer's experts, by the record of `output`. Raises VerifyError unless that is possible."""
    width, kept = record.settings.width, {}
    for layer in record.every:
        mask = None
        try:
            if (width is None) != (layer.channels is None) or (width is not None and layout.width is None):
                raise ValueError("width and channels do not belong together")
            if layer.channels is not None and layout.width is not None:
                mask = ChannelMask.from_text(layer.channels, layout.width.width, len(layer.kept))
                if mask.kept_width != width:
                    raise ValueError(f"{mask.kept_width} channels, but the width is {width}")
        except ValueError as error:
            raise VerifyError(
                f"{output / REPORT_NAME}: the channels of layer {layer.index} are not valid ({error}). Was it changed?"
            ) from None
        kept[layer.index] = KeptExperts(tuple(layer.kept), mask)
    return kept


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
