"""What every tensor of a checkpoint becomes in the output: the model's structure brought together with surgery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamprune.output.surgery import OutputTensor, SourceRole, next_token_prediction, output_tensors
from streamprune.source.architecture import mtp_layers
from streamprune.source.checkpoint import TensorEntry
from streamprune.source.skeleton import Skeleton, Target, map_checkpoint, source_role


@dataclass(frozen=True)
class Survey:
    """The tensors of a checkpoint, what each feeds in the model, and which are left out as multi-token prediction."""

    tensors: Mapping[str, TensorEntry]
    roles: Mapping[str, SourceRole]
    dropped: tuple[str, ...]

    def output(self, count: int, keep: int) -> list[OutputTensor]:
        """Every tensor of the output, for `keep` of `count` experts per block. Raises like `output_tensors`."""
        return output_tensors(self.tensors, self.roles, self.dropped, count, keep)


def survey(
    config: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry],
    targets: Mapping[str, Target | None] | None = None,
) -> Survey:
    """Find out about the tensors of a checkpoint with this raw config; `targets` if they have been mapped already."""
    targets = map_checkpoint(skeleton.model, tensors) if targets is None else targets
    roles = {name: source_role(target, skeleton) for name, target in targets.items()}
    return Survey(tensors, roles, tuple(next_token_prediction(roles, skeleton.block_count, mtp_layers(config))))
