"""The contents of the output, planned before a weight is read: its config, its tensors, and their files. No torch.

The output holds the source's own tensors, in the source's names and layout. A tensor that belongs to one expert is
kept or left out and renumbered; a tensor that holds all experts along one axis is sliced; everything else is copied.
If experts become narrower, the rows or columns of the channels that stay are taken from their tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import ChannelMask, ChannelRows, ExpertRows, KeptExperts
from streamprune.formats.decoded import DecodedEntry
from streamprune.formats.pick import storage_text
from streamprune.formats.renumber import BESIDE
from streamprune.formats.slicing import Bytes, slice_channels, slice_experts
from streamprune.models.config_json import drop_missing_code, rewrite_config, unstated_width
from streamprune.models.expert_layout import Layout
from streamprune.models.per_layer_experts import (
    LoadingFacts,
    config_of_per_layer_experts,
    has_per_layer_experts,
    modeling_source,
)
from streamprune.output.quantized import QuantizedSource
from streamprune.work.records import Computed

#: The file in the output that records how it was made.
REPORT_NAME = "streamprune.json"


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
    """A tensor that a stage of the run computed: the stage's name, and the tensor's bytes as they are written."""

    stage: str
    data: bytes

    @property
    def origin(self) -> Computed:
        return Computed(self.stage, hashlib.sha256(self.data).hexdigest())


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output. `layer` is None for what lies outside the decoder's layers.

    Exactly one of these describes it: `rows` (slice `sources[0]`), several `sources` (one per source expert; this
    output tensor is that of the `slot`-th kept expert), or neither (copy `sources[0]`). With `channels` only those
    that stay are taken of each expert. A stage of the run may compute other bytes for a tensor of experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[TensorEntry, ...] = field(repr=False)
    slot: int | None = None
    rows: ExpertRows | None = None
    channels: ChannelRows | None = None

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


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name and its tensors in the order of their bytes, all of one layer or of none."""

    file: str
    layer: int | None
    tensors: tuple[OutputTensor, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class PrunePlan:
    """The decided output: how many experts stay (`counts`, by layer that has some), its files and its config.

    `files` are small files that are made for the output, by name; `copied` are those of the source that it gets.
    `width` is the number of channels that each expert keeps; None if they keep all. `quantized`
    is None if the source's weights are plain, or written decoded.
    """

    layout: Layout
    counts: Mapping[int, int]
    width: int | None
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)
    shards: tuple[ShardPlan, ...] = field(repr=False)
    copied: tuple[Path, ...] = field(repr=False)
    quantized: QuantizedSource | None = None

    @property
    def tensors(self) -> list[OutputTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def formats(self) -> tuple[str, ...]:
        """How the source stores its quantized tensors, for people; empty if all are plain."""
        if self.quantized is not None:
            return self.quantized.formats
        return tuple(
            dict.fromkeys(
                each.sources[0].format.name for each in self.tensors if isinstance(each.sources[0], DecodedEntry)
            )
        )

    @property
    def storage(self) -> str:
        """How the output stores what the source has quantized, for people; empty if nothing is."""
        return storage_text(self.formats, decoded=self.quantized is None)

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors: the index's `total_size`."""
        return sum(shard.nbytes for shard in self.shards)

    def config_for(self, kept: Mapping[int, KeptExperts]) -> Mapping[str, Any]:
        """config.json of the output with the experts `kept`, by layer: its quantization section may name some."""
        return self.quantized.config_for(self.config, kept) if self.quantized is not None else self.config

    def files_for(self, kept: Mapping[int, KeptExperts]) -> Mapping[str, bytes]:
        """`files`, and those of the source that name experts: renumbered, in place of the source's own."""
        return {**self.files, **(self.quantized.files_for(kept) if self.quantized is not None else {})}

    def notes_for(self, kept: Mapping[int, KeptExperts]) -> Sequence[str]:
        """What to know before the output is served, with the experts `kept` by layer."""
        return self.quantized.notes_for(self.config_for(kept), kept) if self.quantized is not None else ()


def output_tensors(
    layout: Layout, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int], width: int | None = None
) -> list[OutputTensor]:
    """Every tensor of the output, in the source's order. `counts` maps each layer to how many of its experts stay.

    `width` is the number of channels that each of them keeps; None for all.
    """
    families: dict[str, dict[int, TensorEntry]] = defaultdict(dict)
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


def make_plan(
    layout: Layout,
    loading: LoadingFacts,
    checkpoint: Checkpoint,
    counts: Mapping[int, int],
    max_shard_bytes: int,
    width: int | None = None,
) -> PrunePlan:
    """Plan the output for the experts that stay in every layer, and the channels that each of them keeps (None: all).

    Raises UnsupportedModelError if layers with different numbers could not be loaded, or JSON of a quantized source
    names experts in a way that cannot be renumbered; CheckpointError for a config that does not state the number of
    experts, or their width.
    """
    if width is not None and layout.width is None:
        raise UnsupportedModelError(f"The experts of this model cannot be made narrower: {layout.fixed_width}.")
    narrower = (layout.width, width) if width is not None and layout.width is not None else None
    most = max(counts.values())
    rewritten = rewrite_config(checkpoint.config, layout.spec, layout.count_names, most)
    if rewritten == checkpoint.config and most < layout.spec.count:
        raise CheckpointError(f"{checkpoint.folder} has a config.json that does not state {layout.spec.count} experts.")
    if narrower is not None:
        unstated = unstated_width(checkpoint.config, narrower[0])
        if unstated is not None:
            raise CheckpointError(
                f"{checkpoint.folder} has a config.json that leaves {unstated} to the model's defaults, and it has to "
                "change with the experts' width. Add it there."
            )
        rewritten = rewrite_config(checkpoint.config, layout.spec, layout.count_names, most, narrower)
    config = config_of_per_layer_experts(drop_missing_code(rewritten, checkpoint.folder), loading, counts)
    files = {loading.file_name: modeling_source(loading).encode()} if has_per_layer_experts(counts) else {}
    tensors = output_tensors(layout, checkpoint.tensors, counts, width)
    shards = plan_shards(tensors, layout.layer_count, max_shard_bytes)
    quantized = QuantizedSource.of(checkpoint, layout)
    is_decoded = any(tensor.is_decoded for tensor in tensors)
    copied = tuple(path for path in checkpoint.small_files() if not (is_decoded and path.name in BESIDE))
    return PrunePlan(layout, dict(counts), width, config, files, shards, copied, quantized)


def plan_shards(tensors: Sequence[OutputTensor], layer_count: int, max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Divide the output among files: every layer starts a file of its own, and none exceeds `max_shard_bytes`.

    (A single larger tensor gets its own file.) So the files of a layer are complete once its experts are selected, and
    are never opened again.
    """
    groups: list[tuple[int | None, list[OutputTensor]]] = []
    for layer in (None, *range(layer_count)):
        size = max_shard_bytes + 1
        for tensor in tensors:
            if tensor.layer == layer:
                if size + tensor.nbytes > max_shard_bytes:
                    groups.append((layer, []))
                    size = 0
                groups[-1][1].append(tensor)
                size += tensor.nbytes
    return tuple(
        # Wider dtypes first, as the safetensors library writes them: otherwise values could be unaligned.
        ShardPlan(
            f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            layer,
            tuple(sorted(members, key=lambda tensor: -DTYPE_BITS[tensor.dtype])),
        )
        for number, (layer, members) in enumerate(groups, start=1)
    )
