"""The layout of a checkpoint, found by bringing its tensors together with the model's structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamprune.output.cuts import find_cuts, next_token_prediction
from streamprune.output.layout import Layout
from streamprune.source.architecture import count_names
from streamprune.source.checkpoint import TensorEntry
from streamprune.source.rewrite import mtp_layers
from streamprune.source.skeleton import Skeleton, Target, map_checkpoint, source_role


def survey(
    config: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry],
    targets: Mapping[str, Target | None] | None = None,
    counts: Mapping[int, int] | None = None,
) -> Layout:
    """Find out about the tensors of a checkpoint with this raw config; `targets` if they have been mapped already.

    `counts` are the experts by block; None where each has as many as the skeleton.

    Raises CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced.
    """
    targets = map_checkpoint(skeleton.model, tensors) if targets is None else targets
    roles = {name: source_role(target, skeleton) for name, target in targets.items()}
    dropped = tuple(next_token_prediction(roles, skeleton.block_count, mtp_layers(config)))
    cuts = find_cuts(tensors, roles, dropped, counts or dict.fromkeys(skeleton.experts, skeleton.spec.count))
    names = count_names(skeleton.model.config, skeleton.spec)
    return Layout(skeleton.spec, skeleton.block_count, tuple(skeleton.experts), names, dropped, cuts)
