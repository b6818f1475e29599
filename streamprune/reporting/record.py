"""`streamprune.json`, the record of how an output was made: the same classes write it, check it and read it. No torch.

Outputs and scores files may be untrusted: everything in a record is checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from streamprune.checkpoint.index import read_json
from streamprune.errors import CheckpointError, ReportError, SettingsError
from streamprune.files.kinds import describe
from streamprune.fit.cache import KV_DTYPES
from streamprune.formats.base import ChannelMask
from streamprune.models.config_json import MOST_EXPERTS, MOST_LAYERS
from streamprune.output.plan import REPORT_NAME
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.reporting.record_computed import (
    RecordedImatrix,
    RecordedQuantization,
    RecordedRefit,
    RecordedRounding,
    check_refit,
    check_rounding,
)
from streamprune.reporting.record_text import (
    MOST_LISTED,
    Calibration,
    Count,
    Name,
    Number,
    Positive,
    Share,
)
from streamprune.selection.select import LayerSelection, Selection
from streamprune.targets import ENGINES, MTP, QUANTIZE, ROUNDING, WEIGHTS, ServingSpec
from streamprune.work.layer_records import Computed

#: The format of streamprune.json.
RECORD_FORMAT = 2
Kind = TypeVar("Kind")
_Experts = Annotated[int, Meta(ge=1, le=MOST_EXPERTS)]


def _one_of(names: Sequence[str]) -> str:
    """A pattern for these names alone."""
    return f"^({'|'.join(map(re.escape, names))})$"


_ADVICE = "Was it changed? Prune again, or restore it."


class SourceFiles(Struct, frozen=True, kw_only=True):
    """The checkpoint that was pruned: its fingerprint, and the bytes of its tensors."""

    fingerprint: str | None = None
    bytes: Count


class SourceModel(SourceFiles, frozen=True, kw_only=True):
    """The same with the experts of each layer, and how many of them are used for each token.

    `width` is the number of channels that each expert has; None if it stays as it was. `formats` is how the quantized
    weights are stored, for people; not stated for plain weights. `ignored` are the bytes of tensors that the model does
    not use, except layers for multi-token prediction; not stated without.
    """

    experts: _Experts
    top_k: _Experts
    width: Positive | None = None
    formats: Annotated[list[Name], Meta(min_length=1, max_length=100)] | UnsetType = UNSET
    ignored: Positive | UnsetType = UNSET


class ScoringSettings(Struct, frozen=True, kw_only=True):
    """How the scores were computed; None without scores. `channels` is only stated where they were left out."""

    channels: bool | UnsetType = UNSET
    batch_tokens: Positive | UnsetType = UNSET
    device: Name | UnsetType = UNSET
    dtype: Name | UnsetType = UNSET
    propagate: Name | UnsetType = UNSET


class Settings(ScoringSettings, frozen=True, kw_only=True):
    """The model, how many experts stay, and how they were selected (all None for a user's own list).

    `width` is the number of channels that each expert keeps; None if they keep all.
    """

    model: Name
    revision: Name | None = None
    keep: Positive | None = None
    total: Positive | None = None
    width: Positive | None = None
    # Only stated where the number of experts was rounded down for an engine: its name, and the number before.
    rounded_for: Annotated[str, Meta(pattern=_one_of(ENGINES))] | UnsetType = UNSET
    rounded_from: Positive | UnsetType = UNSET
    method: Name | None = None
    seed: int | None = None
    mix: Annotated[dict[Name, Share], Meta(max_length=MOST_LISTED)] | None = None
    schedule: Name | None = None
    spread: Number | None = None
    floor: Count | None = None
    protect_super_experts: bool | None = None
    # The user may give any size.
    max_shard_bytes: Annotated[int, Meta(ge=1)] | None = None
    # Only stated where the weights are not stored as in the source.
    weights: Annotated[str, Meta(pattern=_one_of(WEIGHTS))] | UnsetType = UNSET
    # Only stated for weights that were quantized anew.
    quantize: Annotated[str, Meta(pattern=_one_of(QUANTIZE))] | UnsetType = UNSET
    rounding: Annotated[str, Meta(pattern=_one_of(ROUNDING))] | UnsetType = UNSET
    tensor_parallel: Positive | UnsetType = UNSET
    # Only stated where layers for multi-token prediction were not wanted.
    mtp: Annotated[str, Meta(pattern=_one_of(MTP))] | UnsetType = UNSET


class RecordedMtp(Struct, frozen=True, kw_only=True):
    """The kept layers for multi-token prediction: the number of their tensors, and the layer whose kept experts theirs
    have the numbers of; None if they have no experts, or if these were selected by scores of their own, in `layer`,
    whose index is the one behind the model's layers."""

    tensors: Positive
    experts_of: Count | None = None
    layer: RecordedLayer | UnsetType = UNSET


class PlannedUse(Struct, frozen=True, kw_only=True):
    """The use that the memory was planned for; `budget_bytes` is None without a budget.

    `gguf` is only stated where it was planned for what llama.cpp quantizes the model to: one of GGUF_TYPES.
    """

    context: Positive
    batch: Positive
    kv_dtype: Annotated[str, Meta(pattern=f"^({'|'.join(KV_DTYPES)})$")]
    budget_bytes: Positive | None = None
    gguf: Annotated[str, Meta(pattern=_one_of(tuple(GGUF_TYPES)))] | UnsetType = UNSET

    def __post_init__(self) -> None:
        try:
            _ = self.spec
        except SettingsError as error:
            raise ValueError(str(error)) from None

    @property
    def spec(self) -> ServingSpec:
        """The use as the estimate of memory takes it."""
        weights = self.gguf or "source"
        return ServingSpec(context=self.context, batch=self.batch, kv_dtype=self.kv_dtype, weights=weights)


class Provenance(Struct, frozen=True, kw_only=True):
    """Where scores come from, as a scores file states it. `versions` are of the software, by name."""

    model: Name
    revision: Name | None
    source: SourceFiles
    settings: ScoringSettings
    calibration: Calibration | None
    versions: dict[str, Any]


class RecordedLayer(Struct, frozen=True, kw_only=True):
    """A layer with experts: its number in the checkpoint, and its experts by their numbers in the source.

    `scores` and `counts` (of routed tokens) are those of every expert, or empty without scores. `channels` are those
    that each kept expert keeps, as `ChannelMask.as_text` writes them; None if they keep all.
    """

    index: Annotated[int, Meta(ge=0, le=MOST_LAYERS)]
    kept: Annotated[list[Count], Meta(min_length=1, max_length=MOST_EXPERTS)]
    scores: Annotated[list[Number], Meta(max_length=MOST_EXPERTS)]
    counts: Annotated[list[Count], Meta(max_length=MOST_EXPERTS)]
    channels: str | None = None

    def __post_init__(self) -> None:
        if self.kept != sorted(set(self.kept)):
            raise ValueError("kept does not list experts in ascending order")


class Record(Struct, frozen=True, kw_only=True):
    """All of streamprune.json. `files` are the files that belong to the model, in addition to its weights.

    `computed` are the tensors that are not the source's bytes, by name; the writer adds them to the file.
    """

    format: int = RECORD_FORMAT
    settings: Settings
    use: PlannedUse | None = None
    versions: dict[str, Any]
    source: SourceModel
    calibration: Calibration | None = None
    files: list[str] | None = None
    dropped: Annotated[list[Any], Meta(max_length=MOST_LISTED)]
    mtp: RecordedMtp | UnsetType = UNSET
    protected: dict[str, list[Count]]
    refit: RecordedRefit | UnsetType = UNSET
    quantized: RecordedQuantization | UnsetType = UNSET
    rounding: RecordedRounding | UnsetType = UNSET
    imatrix: RecordedImatrix | UnsetType = UNSET
    layers: Annotated[list[RecordedLayer], Meta(min_length=1, max_length=MOST_LISTED)]
    computed: dict[str, Computed] | UnsetType = UNSET

    def __post_init__(self) -> None:
        experts = self.source.experts
        if self.source.top_k > experts:
            raise ValueError(f"`$.source.top_k` is {self.source.top_k}, but there are {experts} experts")
        width = self.settings.width
        if width is not None and width >= (self.source.width or 0):
            raise ValueError(f"`$.settings.width` is {width}, but the experts had {self.source.width} channels")
        indices = list(self.counts)
        if len(indices) < len(self.layers) or indices != sorted(indices):
            raise ValueError("layers are not in ascending order of their `index`")
        named = [(f"$.layers[{number}]", layer) for number, layer in enumerate(self.layers)]
        if self.mtp and self.mtp.layer:
            named.append(("$.mtp.layer", self.mtp.layer))
        for where, layer in named:
            for place, expert in enumerate(layer.kept):
                if expert >= experts:
                    raise ValueError(f"`{where}.kept[{place}]` is {expert}, but there are {experts} experts")
            for name, values in (("scores", layer.scores), ("counts", layer.counts)):
                if len(values) not in (0, experts):
                    raise ValueError(f"`{where}.{name}` has {len(values)} values for {experts} experts")
            _check_channels(layer, width, self.source.width, f"`{where}.channels`")
        if self.refit:
            check_refit(self.refit, self.counts)
        if self.rounding:
            check_rounding(self.rounding, self.counts)
        for index, numbers in self.protected.items():
            if index not in map(str, indices) or any(number >= experts for number in numbers):
                raise ValueError(
                    f"protected: {index!r} is not a layer with experts, or lacks some of the listed experts"
                )

    @property
    def other_text(self) -> Calibration | None:
        """The text that weights were computed from, if it is not that which the experts were scored on."""
        found = (each.calibration for each in (self.refit, self.rounding) if each and each.calibration)
        return next(found, None)

    @property
    def needs_text(self) -> bool:
        """Whether weights were computed from text, so that scores alone do not make them again."""
        return bool(self.refit or self.rounding)

    @property
    def experts(self) -> int:
        """Experts of each layer of the source."""
        return self.source.experts

    @property
    def counts(self) -> dict[int, int]:
        """Experts that stay, by layer."""
        return {layer.index: len(layer.kept) for layer in self.layers}

    @property
    def all_experts(self) -> int:
        """Experts of the source in all layers together."""
        return self.experts * len(self.layers)

    @property
    def computed_names(self) -> list[str]:
        """The names of the computed tensors, each kind once, with `*` for numbers."""
        return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in self.computed or {}})

    @property
    def removes_experts(self) -> bool:
        """Whether any expert was removed. (Otherwise those that stay have become narrower.)"""
        return sum(self.counts.values()) < self.all_experts

    @property
    def selection(self) -> Selection:
        """What stays of every layer, without scores."""
        return Selection(tuple(map(self._selected, self.layers)))

    def _selected(self, layer: RecordedLayer) -> LayerSelection:
        channels = None
        if layer.channels is not None and self.source.width is not None:
            channels = ChannelMask.from_text(layer.channels, self.source.width, len(layer.kept))
        return LayerSelection(layer.index, tuple(layer.kept), channels=channels)

    @property
    def is_scored(self) -> bool:
        """Whether every expert has a score on record."""
        return all(layer.scores for layer in self.layers)

    @property
    def protected_layers(self) -> dict[int, list[int]]:
        """The super experts that were protected, by layer."""
        return {int(index): experts for index, experts in self.protected.items() if experts}


def _check_channels(layer: RecordedLayer, width: int | None, full_width: int | None, where: str) -> None:
    """Raise ValueError unless each kept expert of a layer keeps `width` of its channels (None: all)."""
    if layer.channels is None or full_width is None:
        if layer.channels is not None or width is not None:
            raise ValueError(f"{where} does not match the width {width}")
        return
    kept = ChannelMask.from_text(layer.channels, full_width, len(layer.kept)).kept_width
    if kept != width:
        raise ValueError(f"{where} keeps {kept} channels of each expert instead of {width}")


def public_name(name: str) -> str:
    """A Hub id or recipe unchanged; only the last part of a local path.

    Records are published with the model, and are the same wherever they are made: folders are left out.
    """
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def read_record(output: Path) -> Record:
    """Read the record of the model in `output`. Raises ReportError if it is missing or damaged."""
    path = output / REPORT_NAME
    if not path.is_file():
        raise ReportError(
            f"{output} has no {REPORT_NAME}, which says how a model was pruned: it {describe(output)}. Give the folder "
            "of a model that `streamprune run` or `streamprune prune` wrote."
        )
    value = read_object(path, _ADVICE)
    if value.get("format") != RECORD_FORMAT:
        raise ReportError(
            f"{path} has format {value.get('format')!r:.20}, but this version of streamprune reads {RECORD_FORMAT}. "
            "Prune again from the same scores, which takes the time of a file copy."
        )
    return checked(value, Record, path, _ADVICE)


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ReportError, with `advice`, if there is none."""
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ReportError(f"{damage(error)}. {advice}") from None


def checked(value: Any, kind: type[Kind], where: Path | str, advice: str) -> Kind:
    """JSON as an object of the class `kind`. Raises ReportError, with the location of the fault and `advice`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ReportError(f"{where}: {error}. {advice}") from None


def damage(error: Exception) -> str:
    """The cause in an error about a checkpoint, without its advice, which is for downloaded models."""
    said, _, advice = str(error).rpartition(". ")
    return said or advice.rstrip(".")
