"""Everything about a run that is decided before a weight is read: the model is opened, understood and planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from streamprune.architecture import config_from_dict, drop_missing_code, load_config, mtp_layers, rewrite_config
from streamprune.calibration import Calibration, load_calibration
from streamprune.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.hub import resolve_model
from streamprune.integrity import check_fit, check_pruned
from streamprune.machine import check_memory
from streamprune.plan import PrunePlan, plan_shards, resolve_keep
from streamprune.settings import RunSettings
from streamprune.skeleton import (
    Skeleton,
    Target,
    build_model,
    build_skeleton,
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
    # The config alone rules out most of what cannot work, before tens of GiB are downloaded.
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    check_output(settings.output, folder, settings.overwrite)
    raw = read_json(folder / CONFIG_NAME)
    _refuse_quantized(raw, folder)
    config = load_config(folder, settings.trust_remote_code)
    dtype = _declared_dtype(settings.dtype, config)
    skeleton = build_skeleton(config, dtype or torch.bfloat16, settings.trust_remote_code)
    keep = resolve_keep(skeleton.spec, settings.keep, settings.ratio)

    checkpoint = open_checkpoint(resolve_model(settings.model, settings.revision, settings.trust_remote_code))
    if checkpoint.config != raw:
        raise CheckpointError(
            f"The config of {settings.model} changed while it was opened. Run the same command again."
        )
    if dtype is None:
        dtype = _dtype_of_weights(checkpoint)
        skeleton = build_skeleton(config, dtype, settings.trust_remote_code)
    pruned_config = drop_missing_code(rewrite_config(raw, config, skeleton.spec, keep), checkpoint.folder)
    pruned = build_model(config_from_dict(config, pruned_config), dtype, settings.trust_remote_code)
    check_pruned(skeleton, pruned, keep)
    targets = map_checkpoint(skeleton.model, checkpoint.tensors)
    check_fit(skeleton, targets, checkpoint.tensors)
    plan = _plan(settings, checkpoint, skeleton, targets, keep, pruned_config)
    return Prepared(checkpoint, skeleton, targets, pruned, plan, dtype)


def _plan(
    settings: RunSettings,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    targets: Mapping[str, Target | None],
    keep: int,
    pruned_config: Mapping[str, Any],
) -> PrunePlan:
    roles = {name: _role(target, skeleton) for name, target in targets.items()}
    dropped = next_token_prediction(roles, skeleton.block_count, mtp_layers(checkpoint.config))
    tensors = output_tensors(checkpoint.tensors, roles, dropped, skeleton.spec.count, keep)
    return PrunePlan(
        spec=skeleton.spec,
        keep=keep,
        block_count=skeleton.block_count,
        moe_blocks=tuple(skeleton.experts),
        dropped=tuple(dropped),
        config=pruned_config,
        shards=plan_shards(tensors, skeleton.block_count, settings.max_shard_bytes),
    )


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


def _refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    for part in (config, config.get("text_config")):
        stated = part if isinstance(part, Mapping) else {}
        quantization = stated.get("quantization_config") or stated.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
            raise UnsupportedModelError(
                f"The model in {folder} is quantized ({method}). Quantized weights cannot be streamed yet: prune the "
                "bfloat16 or float16 original and quantize the result."
            )


def _declared_dtype(name: str, config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype to compute in: what the user chose, else the config's; None if neither names one."""
    if name != "auto":
        chosen = getattr(torch, name)
        assert isinstance(chosen, torch.dtype)
        return chosen
    declared = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else None


def _dtype_of_weights(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that most bytes of the weights have."""
    sizes = {"BF16": 0, "F16": 0, "F32": 0}
    for entry in checkpoint.tensors.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.nbytes
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[max(sizes, key=lambda key: sizes[key])]


def _role(target: Target | None, skeleton: Skeleton) -> SourceRole:
    if target is None:
        return SourceRole(None, None)
    rows: ExpertRows | None = skeleton.expert_rows.get(target.name)
    shape = tuple(skeleton.model.get_parameter_or_buffer(target.name).shape) if rows else ()
    return SourceRole(skeleton.block_of(target.name), target.name, target.pattern, shape, rows)
