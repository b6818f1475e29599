"""Everything about a run that is decided before a weight is read: the model is opened, understood and planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from streamprune.architecture import config_from_dict, load_config, rewrite_config
from streamprune.calibration import Calibration, load_calibration
from streamprune.checkpoint import Checkpoint, open_checkpoint
from streamprune.errors import UnsupportedModelError
from streamprune.hub import resolve_model
from streamprune.machine import check_disk, check_memory
from streamprune.plan import PrunePlan, plan_shards, resolve_keep
from streamprune.settings import RunSettings
from streamprune.skeleton import (
    Skeleton,
    Target,
    build_model,
    build_skeleton,
    check_fit,
    check_pruned,
    map_checkpoint,
)
from streamprune.states import hidden_state_bytes
from streamprune.surgery import ExpertRows, SourceRole, next_token_prediction, output_tensors
from streamprune.writer import check_output


@dataclass(frozen=True)
class Prepared:
    """A model opened and planned, nothing of its weights read yet. `pruned` is the model of the rewritten config."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    targets: Mapping[str, Target | None] = field(repr=False)
    pruned: PreTrainedModel = field(repr=False)
    plan: PrunePlan
    dtype: torch.dtype


def prepare(settings: RunSettings) -> Prepared:
    """Open the model and decide everything; raises a StreampruneError for whatever cannot work."""
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code)
    checkpoint = open_checkpoint(folder)
    check_output(settings.output, folder, settings.overwrite)
    config = load_config(folder, settings.trust_remote_code)
    _refuse_quantized(checkpoint)
    dtype = _compute_dtype(settings.dtype, config, checkpoint)
    skeleton = build_skeleton(config, dtype, settings.trust_remote_code)
    keep = resolve_keep(skeleton.spec, settings.keep, settings.ratio)
    pruned_config = rewrite_config(checkpoint.config, config, skeleton.spec, keep)
    pruned = build_model(config_from_dict(config, pruned_config), dtype, settings.trust_remote_code)
    check_pruned(skeleton, pruned, keep)
    targets = map_checkpoint(skeleton.model, checkpoint.tensors)
    check_fit(skeleton, targets, {name: entry.shape for name, entry in checkpoint.tensors.items()})
    roles = {name: _role(target, skeleton) for name, target in targets.items()}
    dropped = next_token_prediction(roles, skeleton.block_count)
    tensors = output_tensors(checkpoint.tensors, roles, dropped, skeleton.spec.count, keep)
    plan = PrunePlan(
        spec=skeleton.spec,
        keep=keep,
        block_count=skeleton.block_count,
        moe_blocks=tuple(skeleton.experts),
        dropped=tuple(dropped),
        config=pruned_config,
        shards=plan_shards(tensors, skeleton.block_count, settings.max_shard_bytes),
    )
    check_disk(settings.output, plan.output_bytes)
    return Prepared(checkpoint, skeleton, targets, pruned, plan, dtype)


def calibrate(settings: RunSettings, prepared: Prepared) -> Calibration:
    """Read the calibration data for a prepared model, and check that its hidden states fit into memory."""
    text_config = prepared.skeleton.model.config.get_text_config(decoder=True)
    calibration = load_calibration(
        settings.calibration,
        prepared.checkpoint.folder,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
        vocab_size=prepared.skeleton.model.get_input_embeddings().weight.shape[0],
        max_positions=getattr(text_config, "max_position_embeddings", None),
        trust_remote_code=settings.trust_remote_code,
    )
    needed = hidden_state_bytes(calibration.sequences, text_config.hidden_size, prepared.dtype)
    check_memory(needed, f"The hidden states of {calibration.tokens:,} calibration tokens")
    return calibration


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    for part in (checkpoint.config, checkpoint.config.get("text_config") or {}):
        quantization = part.get("quantization_config") if isinstance(part, Mapping) else None
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
            raise UnsupportedModelError(
                f"{checkpoint.folder} is quantized ({method}). Quantized weights cannot be streamed yet: prune the "
                "bfloat16 or float16 original and quantize the result."
            )


def _compute_dtype(name: str, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype to compute in: what the user chose, else the config's, else that of most of the weights."""
    if name == "auto":
        declared = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        sizes = {"BF16": 0, "F16": 0, "F32": 0}
        for entry in checkpoint.tensors.values():
            if entry.dtype in sizes:
                sizes[entry.dtype] += entry.nbytes
        name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[max(sizes, key=lambda key: sizes[key])]
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _role(target: Target | None, skeleton: Skeleton) -> SourceRole:
    if target is None:
        return SourceRole(None, None)
    rows: ExpertRows | None = skeleton.expert_rows.get(target.name)
    shape = tuple(skeleton.model.get_parameter_or_buffer(target.name).shape) if rows else ()
    return SourceRole(skeleton.block_of(target.name), target.name, target.pattern, shape, rows)
