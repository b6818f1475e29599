"""The tensors of the output, and where their bytes come from. No torch.

A tensor that belongs to one expert is kept or left out and renumbered; a tensor that holds all experts along one axis
is sliced; everything else is copied. If experts become narrower, the rows or columns of the channels that stay are
taken from their tensors. A stage of the run may compute the bytes of a tensor anew.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamprune.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry
from streamprune.formats.base import ChannelMask, ChannelRows, ExpertRows, KeptExperts
from streamprune.formats.decoded import DecodedEntry
from streamprune.formats.slicing import Bytes, slice_channels, slice_experts
from streamprune.models.expert_layout import Layout
from streamprune.quantize.schemes import Scheme
from streamprune.work.layer_records import Computed


@dataclass(frozen=True)
class SourceSlice:
    """A written tensor that is bytes of the source, unchanged: `parts` of a file, in order.

    `experts` are the source's experts in it, in order; empty for a tensor of no expert.
    """

    file: str
    parts: tuple[Bytes, ...]
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageTensor:
    """A tensor that a stage of the run computed: the stage's name, and the tensor's bytes as they are written.

    `from_source`: they are what rounding the source's values gives. So they are not on record as computed, but verified
    against the source, like those that no stage computes.
    """

    stage: str
    data: bytes
    from_source: bool = False

    @property
    def origin(self) -> Computed:
        return Computed(self.stage, hashlib.sha256(self.data).hexdigest())


def origins_of(computed: Mapping[str, StageTensor]) -> dict[str, Computed]:
    """What is on record of computed tensors."""
    return {name: tensor.origin for name, tensor in computed.items() if not tensor.from_source}


@dataclass(frozen=True)
class ComputedTensors:
    """What stages of the run have computed of a layer.

    `plain` are plain tensors by their names; those of them that are to be quantized are not rounded yet. `parts` are
    parts of quantized matrices, by their names in the output. They are kept apart, since the codes of an FP8 matrix
    have the name of the plain one. For a matrix whose codes are computed, but not its scales, these are its source's.
    """

    plain: Mapping[str, StageTensor] = field(default_factory=dict)
    parts: Mapping[str, StageTensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.plain or self.parts)

    @property
    def written(self) -> dict[str, StageTensor]:
        """All of them as the output has them, once nothing in `plain` is to be quantized."""
        return {**self.plain, **self.parts}


@dataclass(frozen=True)
class EncodedPart:
    """A part of the matrix `plain` of the output, which is quantized on the way to it by `scheme`."""

    plain: OutputTensor
    part: str
    scheme: Scheme


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output. `layer` is None for what lies outside the decoder's layers.

    Exactly one of these describes it: `rows` (slice `sources[0]`), several `sources` (one per source expert; this
    output tensor is that of the `slot`-th kept expert), or neither (copy `sources[0]`). With `channels` only those
    that stay are taken of each expert. `encoded` says which part of a quantized matrix the tensor is; the others
    describe the plain matrix then, and `dtype` and `shape` the part. A stage of the run may compute other bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[TensorEntry, ...] = field(repr=False)
    slot: int | None = None
    rows: ExpertRows | None = None
    channels: ChannelRows | None = None
    encoded: EncodedPart | None = field(default=None, repr=False)

    @property
    def is_of_experts(self) -> bool:
        """Whether the tensor belongs to one expert, or holds all experts of its layer."""
        return self.slot is not None or self.rows is not None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def is_decoded(self) -> bool:
        """Whether the tensor is plain, but quantized in the source."""
        return isinstance(self.sources[0], DecodedEntry)

    def decoded_from(self, kept: KeptExperts) -> list[DecodedEntry]:
        """What is decoded to make up this tensor, in order, when `kept` stays of the experts of its layer.

        Empty for a tensor that is copied: see `slice_of`.
        """
        entry = self.sources[0]
        if not isinstance(entry, DecodedEntry):
            return []
        if self.rows is not None:
            return [entry.expert(expert, entry.shape[0]) for expert in kept.experts]
        source = self.sources[kept.experts[self.slot]] if self.slot is not None else entry
        assert isinstance(source, DecodedEntry)
        return [source]

    def slice_of(self, kept: KeptExperts) -> SourceSlice:
        """The bytes of the source that make up this tensor when `kept` stays of the experts of its layer, in order."""
        if self.slot is not None:
            expert = kept.experts[self.slot]
            entry = self.sources[expert]
            part = self._narrowed(entry, (entry.begin, entry.end), entry.shape, kept.channels, self.slot)
            return SourceSlice(entry.file, (part,), (expert,))
        entry = self.sources[0]
        if self.rows is None:
            return SourceSlice(entry.file, (Bytes(entry.begin, entry.end),))
        if self.channels is None or kept.channels is None:
            return SourceSlice(entry.file, tuple(slice_experts(entry, self.rows, kept.experts)), kept.experts)
        # Experts are the first axis of every tensor that has channels.
        size, parts = entry.nbytes // entry.shape[0], []
        for place, expert in enumerate(kept.experts):
            begin = entry.begin + expert * size
            parts.append(self._narrowed(entry, (begin, begin + size), entry.shape[1:], kept.channels, place))
        return SourceSlice(entry.file, tuple(parts), kept.experts)

    def _narrowed(
        self,
        entry: TensorEntry,
        expert: tuple[int, int],
        shape: tuple[int, ...],
        mask: ChannelMask | None,
        place: int,
    ) -> Bytes:
        """The bytes of the channels that stay of the `place`-th kept expert, whose tensor has this shape."""
        if self.channels is None or mask is None:
            return Bytes(*expert)
        return slice_channels(*expert, shape, self.channels, mask.indices[place])


def output_tensors(
    layout: Layout, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int], width: int | None = None
) -> list[OutputTensor]:
    """Every tensor of the output, in the source's order. `counts` maps each layer to how many of its experts stay.

    `width` is the number of channels that each of them keeps; None for all. The MTP layer has as many experts as the
    last layer with some.
    """
    families: dict[str, dict[int, TensorEntry]] = defaultdict(dict)
    counts = layout.with_mtp(counts)
    for name, cut in layout.cuts.items():
        if cut.family is not None and cut.expert is not None:
            families[cut.family][cut.expert] = tensors[name]
    ordered = {family: tuple(entry for _, entry in sorted(members.items())) for family, members in families.items()}
    result = []
    for name, cut in layout.cuts.items():
        entry = tensors[name]
        keep = counts.get(cut.layer, 0) if cut.layer is not None else 0
        sources: tuple[TensorEntry, ...] = (entry,)
        shape = entry.shape
        if cut.family is not None and cut.expert is not None:
            # The experts that stay are renumbered from 0, so the first `keep` names stay, whichever experts they are.
            if cut.expert >= keep:
                continue
            sources = ordered[cut.family]
        elif cut.rows is not None:
            shape = cut.rows.resized(shape, keep)
        channels = None
        if width is not None and cut.channels is not None and layout.width is not None:
            channels, experts = cut.channels, () if cut.expert is not None else shape[:1]
            shape = (*experts, *channels.resized(shape[len(experts) :], layout.width.width, width))
        result.append(OutputTensor(name, entry.dtype, shape, cut.layer, sources, cut.expert, cut.rows, channels))
    return result
