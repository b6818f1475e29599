"""What the output will hold, decided before a weight is read: its config, its tensors, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import DTYPE_BITS
from streamprune.errors import CheckpointError
from streamprune.models.config_json import drop_missing_code, rewrite_config
from streamprune.models.expert_layout import Layout
from streamprune.models.per_layer_experts import (
    LoadingFacts,
    config_of_per_layer_experts,
    has_per_layer_experts,
    modeling_source,
)
from streamprune.output.tensors import OutputTensor, output_tensors

#: The file in the output that records how it was made.
REPORT_NAME = "streamprune.json"


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
    """The decided output: so many experts stay (`counts`, by layer that has some), in these files with this config.

    `files` are small files that are made for the output, by name.
    """

    layout: Layout
    counts: Mapping[int, int]
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)
    shards: tuple[ShardPlan, ...] = field(repr=False)

    @property
    def tensors(self) -> list[OutputTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors: the index's `total_size`."""
        return sum(shard.nbytes for shard in self.shards)

    def config_for(self, kept: Mapping[int, Sequence[int]]) -> Mapping[str, Any]:
        """config.json of the output with the experts `kept`, by layer: the formats may name experts in it."""
        config = self.config
        for storage in dict.fromkeys(tensor.format for tensor in self.tensors):
            config = storage.pruned_config(config, kept)
        return config


def make_plan(
    layout: Layout, loading: LoadingFacts, checkpoint: Checkpoint, counts: Mapping[int, int], max_shard_bytes: int
) -> PrunePlan:
    """Plan the output for the experts that stay in every layer.

    Raises UnsupportedModelError where layers of different numbers could not be loaded, CheckpointError for a config
    that does not state the number of experts.
    """
    rewritten = rewrite_config(checkpoint.config, layout.spec, layout.count_names, max(counts.values()))
    if rewritten == checkpoint.config and max(counts.values()) < layout.spec.count:
        raise CheckpointError(f"{checkpoint.folder} has a config.json that names no {layout.spec.count} experts.")
    config = config_of_per_layer_experts(drop_missing_code(rewritten, checkpoint.folder), loading, counts)
    files = {loading.file_name: modeling_source(loading).encode()} if has_per_layer_experts(counts) else {}
    tensors = output_tensors(layout, checkpoint.tensors, counts)
    return PrunePlan(layout, dict(counts), config, files, plan_shards(tensors, layout.layer_count, max_shard_bytes))


def plan_shards(tensors: Sequence[OutputTensor], layer_count: int, max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Divide the output among files: every layer starts a file of its own, and none exceeds `max_shard_bytes`.

    (A single tensor larger than that gets a file to itself.) A layer's files are thus complete as soon as the layer is
    decided, and are never opened again.
    """
    groups: list[tuple[int | None, list[OutputTensor]]] = []
    for layer in (None, *range(layer_count)):
        size = 0
        fresh = True
        for tensor in tensors:
            if tensor.layer != layer:
                continue
            if fresh or size + tensor.nbytes > max_shard_bytes:
                groups.append((layer, []))
                size, fresh = 0, False
            groups[-1][1].append(tensor)
            size += tensor.nbytes
    return tuple(
        ShardPlan(f"model-{number:05d}-of-{len(groups):05d}.safetensors", layer, _aligned(members))
        for number, (layer, members) in enumerate(groups, start=1)
    )


def _aligned(tensors: Sequence[OutputTensor]) -> tuple[OutputTensor, ...]:
    """Wider dtypes first, as the safetensors library writes them: else a reader would meet unaligned values."""
    return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype]))
