"""The contents of the output, planned before a weight is read: its config, its tensors, and their files. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import DTYPE_BITS
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import KeptExperts
from streamprune.formats.decoded import DecodedEntry
from streamprune.formats.pick import storage_text
from streamprune.formats.quantization import SECTIONS, Quantization
from streamprune.formats.renumber import BESIDE
from streamprune.models.config_json import drop_missing_code, rewrite_config, unstated_width
from streamprune.models.expert_layout import Layout
from streamprune.models.per_layer_experts import (
    LoadingFacts,
    config_of_per_layer_experts,
    has_per_layer_experts,
    modeling_source,
)
from streamprune.output.encoded import Encoding, encode_tensors
from streamprune.output.quantized import QuantizedSource
from streamprune.output.tensors import OutputTensor, output_tensors
from streamprune.quantize.schemes import Scheme
from streamprune.targets import MTP, Storage

#: The file in the output that records how it was made.
REPORT_NAME = "streamprune.json"


@dataclass(frozen=True)
class OutputSource:
    """What an output is cut from: a checkpoint with its layout, and how a pruned model is loaded.

    `checkpoint` is the source's own, or one that its bytes decode to (`output/dequantized.py`). `encoding` says what of
    it is quantized on the way; None if nothing is.
    """

    checkpoint: Checkpoint
    layout: Layout = field(repr=False)
    loading: LoadingFacts = field(repr=False)
    encoding: Encoding | None = field(default=None, repr=False)


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
    `width` is the number of channels that each expert keeps; None if they keep all. `quantized` is None if the source's
    weights are plain, or written decoded. `scheme` is that of `encoding`, which says what is quantized on the way.
    """

    layout: Layout
    counts: Mapping[int, int]
    width: int | None
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)
    shards: tuple[ShardPlan, ...] = field(repr=False)
    copied: tuple[Path, ...] = field(repr=False)
    quantized: QuantizedSource | None = None
    encoding: Encoding | None = field(default=None, repr=False)
    scheme: Scheme | None = None

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
        """How the output stores what it or the source has quantized, for people; empty if nothing is."""
        new = self.scheme.format.name if self.scheme is not None else ""
        return storage_text(self.formats, decoded=self.quantized is None, new=new)

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors: the index's `total_size`."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def method(self) -> str:
        """The `quant_method` of the output's config.json; empty for plain weights."""
        return Quantization.of(self.config).method

    @property
    def quantized_matrices(self) -> int:
        """How many matrices are quantized on the way."""
        return len({each.encoded.plain.name for each in self.tensors if each.encoded is not None})

    @property
    def left_plain(self) -> Mapping[str, int]:
        """How many matrices stay plain beside quantized ones, by the reason, for people."""
        if self.encoding is None or self.scheme is None:
            return {}
        return self.encoding.left_plain(self.tensors, self.scheme)

    def config_for(self, kept: Mapping[int, KeptExperts]) -> Mapping[str, Any]:
        """config.json of the output with the experts `kept`, by layer: its quantization section may name some."""
        return self.quantized.config_for(self.config, kept) if self.quantized is not None else self.config

    def files_for(self, kept: Mapping[int, KeptExperts]) -> Mapping[str, bytes]:
        """`files`, and those of the source that name experts: renumbered, in place of the source's own."""
        return {**self.files, **(self.quantized.files_for(kept) if self.quantized is not None else {})}

    def notes_for(self, kept: Mapping[int, KeptExperts]) -> Sequence[str]:
        """What to know before the output is served, with the experts `kept` by layer."""
        return self.quantized.notes_for(self.config_for(kept), kept) if self.quantized is not None else ()


def written_layout(layout: Layout, storage: Storage) -> Layout:
    """What of a source with this layout is written: without layers for multi-token prediction, if that is wished."""
    return layout if storage.mtp == MTP[0] else layout.without_mtp()


def make_plan(
    source: OutputSource, counts: Mapping[int, int], max_shard_bytes: int, width: int | None = None
) -> PrunePlan:
    """Plan the output for the experts that stay in every layer, and the channels that each of them keeps (None: all).

    Raises UnsupportedModelError if layers with different numbers could not be loaded, or JSON of a quantized source
    names experts in a way that cannot be renumbered; CheckpointError for a config that does not state the number of
    experts, or their width; SettingsError if experts cannot be quantized so.
    """
    layout, loading, checkpoint = source.layout, source.loading, source.checkpoint
    rewritten = _rewritten_config(layout, checkpoint, max(counts.values()), width)
    config = config_of_per_layer_experts(drop_missing_code(rewritten, checkpoint.folder), loading, counts)
    files = {loading.file_name: modeling_source(loading).encode()} if has_per_layer_experts(counts) else {}
    tensors, scheme = output_tensors(layout, checkpoint.tensors, counts, width), None
    is_decoded = any(tensor.is_decoded for tensor in tensors)
    if source.encoding is not None:
        scheme = source.encoding.scheme(tensors)
        tensors = encode_tensors(tensors, source.encoding, scheme)
        config = {**config, SECTIONS[0]: source.encoding.config_section(tensors, scheme)}
    shards = plan_shards(tensors, layout.written_layers, max_shard_bytes)
    quantized = QuantizedSource.of(checkpoint, layout)
    copied = tuple(path for path in checkpoint.small_files() if not (is_decoded and path.name in BESIDE))
    return PrunePlan(layout, dict(counts), width, config, files, shards, copied, quantized, source.encoding, scheme)


def _rewritten_config(layout: Layout, checkpoint: Checkpoint, most: int, width: int | None) -> Mapping[str, Any]:
    """The source's config.json with `most` experts per layer, of `width` channels each (None: as many as before)."""
    if width is not None and layout.width is None:
        raise UnsupportedModelError(f"The experts of this model cannot be made narrower: {layout.fixed_width}.")
    mtp = bool(layout.mtp)
    rewritten = rewrite_config(checkpoint.config, layout.spec, layout.count_names, most, keeps_mtp=mtp)
    if rewritten == checkpoint.config and most < layout.spec.count:
        raise CheckpointError(f"{checkpoint.folder} has a config.json that does not state {layout.spec.count} experts.")
    if width is None or layout.width is None:
        return rewritten
    unstated = unstated_width(checkpoint.config, layout.width)
    if unstated is not None:
        raise CheckpointError(
            f"{checkpoint.folder} has a config.json that leaves {unstated} to the model's defaults, and it has to "
            "change with the experts' width. Add it there."
        )
    return rewrite_config(checkpoint.config, layout.spec, layout.count_names, most, (layout.width, width), mtp)


def plan_shards(tensors: Sequence[OutputTensor], layers: Iterable[int], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Divide the output among files: every layer starts a file of its own, and none exceeds `max_shard_bytes`.

    (A single larger tensor gets its own file.) So the files of a layer are complete once its experts are selected, and
    are never opened again.
    """
    groups: list[tuple[int | None, list[OutputTensor]]] = []
    for layer in (None, *layers):
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
