"""Everything about a run that is decided before a weight is read: the model is opened, understood and planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from streamprune.decision import Decision, decide, with_footprint
from streamprune.errors import CheckpointError
from streamprune.output.plan import PrunePlan, plan_shards
from streamprune.output.survey import survey
from streamprune.settings import RunSettings
from streamprune.source.architecture import config_from_dict, drop_missing_code, rewrite_config
from streamprune.source.checkpoint import Checkpoint, open_checkpoint
from streamprune.source.hub import resolve_model
from streamprune.source.integrity import check_fit, check_pruned
from streamprune.source.skeleton import (
    Skeleton,
    Target,
    build_model,
    build_skeleton,
    map_checkpoint,
)
from streamprune.text.calibration import Calibration, load_calibration


@dataclass(frozen=True)
class Prepared:
    """A model opened and planned, nothing of its weights read yet. `pruned` is the model of the rewritten config.

    `decision` is what was decided before it was opened, with the footprint of the checkpoint's own tensors.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    targets: Mapping[str, Target | None] = field(repr=False)
    pruned: PreTrainedModel = field(repr=False)
    plan: PrunePlan
    dtype: torch.dtype
    decision: Decision

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""
        return int(self.skeleton.model.get_input_embeddings().weight.shape[0])


def prepare(settings: RunSettings) -> Prepared:
    """Open the model and decide everything; raises a StreampruneError for whatever cannot work."""
    # Config and headers alone rule out most of what cannot work, before tens of GiB are downloaded.
    decision = decide(settings)
    checkpoint = open_checkpoint(resolve_model(settings.model, settings.revision, settings.trust_remote_code))
    if checkpoint.config != decision.raw:
        raise CheckpointError(
            f"The config of {settings.model} changed while it was opened. Run the same command again."
        )
    dtype, skeleton, keep = decision.dtype, decision.skeleton, decision.keep
    if dtype is None:
        dtype = _dtype_of_weights(checkpoint)
        skeleton = build_skeleton(decision.config, dtype, settings.trust_remote_code)
    rewritten = rewrite_config(decision.raw, decision.config, skeleton.spec, keep)
    pruned_config = drop_missing_code(rewritten, checkpoint.folder)
    pruned = build_model(config_from_dict(decision.config, pruned_config), dtype, settings.trust_remote_code)
    check_pruned(skeleton, pruned, keep)
    targets = map_checkpoint(skeleton.model, checkpoint.tensors)
    check_fit(skeleton, targets, checkpoint.tensors)
    plan = _plan(settings, checkpoint, skeleton, targets, keep, pruned_config)
    decision = with_footprint(settings, decision, skeleton, checkpoint.tensors)
    return Prepared(checkpoint, skeleton, targets, pruned, plan, dtype, decision)


def _plan(
    settings: RunSettings,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    targets: Mapping[str, Target | None],
    keep: int,
    pruned_config: Mapping[str, Any],
) -> PrunePlan:
    found = survey(checkpoint.config, skeleton, checkpoint.tensors, targets)
    tensors = found.output(skeleton.spec.count, keep)
    return PrunePlan(
        spec=skeleton.spec,
        keep=keep,
        block_count=skeleton.block_count,
        moe_blocks=tuple(skeleton.experts),
        dropped=found.dropped,
        config=pruned_config,
        shards=plan_shards(tensors, skeleton.block_count, settings.max_shard_bytes),
    )


def calibrate(settings: RunSettings, prepared: Prepared) -> Calibration:
    """Read the calibration data for a prepared model."""
    text_config = prepared.skeleton.model.config.get_text_config(decoder=True)
    return load_calibration(
        settings.calibration,
        prepared.checkpoint.folder,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
        vocab_size=prepared.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        trust_remote_code=settings.trust_remote_code,
    )


def _dtype_of_weights(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that most bytes of the weights have."""
    sizes = {"BF16": 0, "F16": 0, "F32": 0}
    for entry in checkpoint.tensors.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.nbytes
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[max(sizes, key=lambda key: sizes[key])]
