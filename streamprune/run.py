"""The run: prepare everything that can be decided without weights, then stream the blocks and write the output."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from streamprune import __version__
from streamprune.allocation import keep_highest
from streamprune.architecture import config_from_dict, load_config, rewrite_config
from streamprune.blocks import BlockLoader
from streamprune.calibration import Calibration, load_calibration
from streamprune.card import model_card
from streamprune.checkpoint import Checkpoint, open_checkpoint
from streamprune.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from streamprune.hub import resolve_model
from streamprune.machine import (
    check_disk,
    check_memory,
    choose_device,
    describe_host,
    format_bytes,
    peak_device_bytes,
    peak_resident_bytes,
)
from streamprune.plan import PrunePlan, plan_shards, resolve_keep
from streamprune.progress import BlockLine, Progress
from streamprune.saliency import ExpertsTap, ExpertStatistics, tap_experts
from streamprune.settings import RunSettings
from streamprune.skeleton import (
    Skeleton,
    Target,
    build_model,
    build_skeleton,
    check_pruned,
    map_checkpoint,
    unfed_parameters,
)
from streamprune.states import HiddenStates, hidden_state_bytes, non_finite_tokens
from streamprune.stream import BatchState, BlockStream
from streamprune.surgery import ExpertRows, SourceRole, next_token_prediction, output_tensors
from streamprune.writer import OutputWriter, check_output


@dataclass(frozen=True)
class Prepared:
    """A model opened and planned, nothing of its weights read yet. `pruned` is the model of the rewritten config."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    targets: Mapping[str, Target | None] = field(repr=False)
    pruned: PreTrainedModel = field(repr=False)
    plan: PrunePlan
    dtype: torch.dtype


@dataclass(frozen=True)
class LayerResult:
    """The scores of one MoE block: `scores` and `counts` over all source experts, `kept` the numbers that stay."""

    index: int
    kept: tuple[int, ...]
    scores: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class RunResult:
    """A finished run. `summary` is what `--json` prints."""

    output: Path
    layers: tuple[LayerResult, ...]
    summary: Mapping[str, Any]


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
    unfed = unfed_parameters(skeleton, targets)
    if unfed:
        raise CheckpointError(f"{folder} lacks the tensors for {len(unfed)} parameters, first {unfed[0]}. Complete it.")
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


def run(settings: RunSettings, progress_quiet: bool = False) -> RunResult:
    """Prune a model: read, score and write one block after the other. Peak memory: see `BlockLoader`, plus the
    embeddings, the hidden states of all calibration tokens, and one micro-batch's workspace."""
    device = choose_device(settings.device)
    prepared = prepare(settings)
    calibration = _calibrate(settings, prepared)
    with (
        Progress(prepared.plan.block_count, progress_quiet) as progress,
        OutputWriter(prepared.plan, prepared.checkpoint, settings.output) as writer,
    ):
        _announce(progress, settings, prepared, calibration, device)
        layers = _stream(settings, prepared, calibration, device, progress, writer)
        report = _report(settings, prepared, calibration, layers)
        card = model_card(prepared.plan, report, prepared.checkpoint.folder, prepared.checkpoint.nbytes)
        writer.finish(report, card)
        summary = _summary(settings, prepared, calibration, layers, progress.seconds)
        progress.log("summary", {**summary, "host": describe_host(device)})
        progress.write_log(settings.output.with_name(settings.output.name + ".log"))
        _tell(progress, summary, calibration)
    return RunResult(settings.output, tuple(layers), summary)


def _stream(
    settings: RunSettings,
    prepared: Prepared,
    calibration: Calibration,
    device: torch.device,
    progress: Progress,
    writer: OutputWriter,
) -> list[LayerResult]:
    plan, skeleton = prepared.plan, prepared.skeleton
    scorer = _Scorer(settings, prepared, calibration, device, progress)
    writer.write_block(None, ())
    layers = []
    for index in range(plan.block_count):
        started = time.monotonic()
        # Nothing needs the hidden states behind the last block that has experts.
        layer = scorer.score_block(index) if index <= plan.moe_blocks[-1] else None
        writer.write_block(index, layer.kept if layer else ())
        if layer is not None:
            layers.append(layer)
        progress.end_block(
            BlockLine(
                block=index,
                blocks=plan.block_count,
                kept=plan.keep if layer else 0,
                experts=skeleton.spec.count if layer else 0,
                fewest_tokens=min(layer.counts) if layer else None,
                seconds=time.monotonic() - started,
                peak_bytes=peak_device_bytes(device),
            )
        )
    return layers


class _Scorer:
    """Carries the calibration tokens through the blocks, and scores the blocks that have experts."""

    def __init__(
        self,
        settings: RunSettings,
        prepared: Prepared,
        calibration: Calibration,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._settings, self._prepared, self._device, self._progress = settings, prepared, device, progress
        skeleton = prepared.skeleton
        self._loader = BlockLoader(prepared.checkpoint, skeleton, prepared.targets, prepared.dtype, device)
        self._taps = tap_experts({i: skeleton.blocks[i].get_submodule(path) for i, path in skeleton.experts.items()})
        self._stream = BlockStream(skeleton)
        self._batches = calibration.micro_batches(settings.batch_tokens)
        self._states = HiddenStates(len(self._batches))
        self._loader.load_surroundings(head=False)

    def score_block(self, index: int) -> LayerResult | None:
        """Run block `index` on all micro-batches; its scores and kept experts, or None if it has no experts."""
        tap = self._taps.get(index)
        passes = 2 if tap is not None and self._settings.propagate == "pruned" else 1
        self._progress.start_block(index, passes * len(self._batches))
        with self._loader.block(index) as block:
            if tap is None:
                self._pass(index, block, store=True)
                return None
            tap.statistics = ExpertStatistics(self._prepared.plan.spec.count, self._device)
            try:
                self._pass(index, block, store=passes == 1)
                layer = self._decide(index, tap)
            finally:
                tap.statistics = None
            if passes == 2:
                twin = self._prepared.pruned.get_submodule(f"{self._prepared.skeleton.blocks_path}.{index}")
                with self._loader.pruned_block(index, block, twin, layer.kept) as pruned:
                    self._pass(index, pruned, store=True)
            return layer

    def _pass(self, index: int, block: torch.nn.Module, store: bool) -> None:
        for number, batch in enumerate(self._batches):
            state = self._states.load(number, self._device)
            state = self._stream.run_block(index, block, batch.to(self._device), state)
            self._check_finite(index, number, batch, state)
            if store:
                self._states.store(number, state)
            self._progress.step()

    def _decide(self, index: int, tap: ExpertsTap) -> LayerResult:
        assert tap.statistics is not None
        counts = tuple(int(count) for count in tap.statistics.counts.cpu())
        if not any(counts):
            raise UnsupportedModelError(
                f"Block {index} has experts, but its forward bypassed them, so they cannot be scored. "
                "Please report this model."
            )
        scores = tuple(float(score) for score in tap.statistics.reap())
        plan = self._prepared.plan
        return LayerResult(index, keep_highest(scores, plan.keep, plan.spec.groups), scores, counts)

    def _check_finite(self, index: int, number: int, batch: torch.Tensor, state: BatchState) -> None:
        bad = non_finite_tokens(state)
        if bad:
            raise NonFiniteError(
                f"Block {index}, batch {number}: {bad} of {batch.numel()} tokens have NaN or infinite hidden states, so "
                f"no score could be trusted. Computed in {self._prepared.dtype}; try --dtype float32 or bfloat16, and "
                "check that the model itself works."
            )


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


def _calibrate(settings: RunSettings, prepared: Prepared) -> Calibration:
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


def _announce(
    progress: Progress, settings: RunSettings, prepared: Prepared, calibration: Calibration, device: torch.device
) -> None:
    plan, spec = prepared.plan, prepared.plan.spec
    progress.say(
        f"{settings.model}: {plan.block_count} blocks, {len(plan.moe_blocks)} with {spec.count} experts "
        f"(top-{spec.top_k}); keeping {plan.keep} of {spec.count}: "
        f"{format_bytes(prepared.checkpoint.nbytes)} -> {format_bytes(plan.output_bytes)}"
    )
    progress.say(
        f"calibration: {len(calibration.sequences)} sequences, {calibration.tokens:,} tokens from "
        f"{', '.join(calibration.sources)}; {str(prepared.dtype).removeprefix('torch.')} on {device}"
    )
    if settings.calibration == ("builtin",):
        progress.say(
            "note: the built-in calibration text is good for a first try. For a model that you will use, give text "
            "like what you will ask of it: --calibration FILE."
        )
    for note in calibration.notes:
        progress.say(f"note: {note}")
    if plan.dropped:
        progress.say(
            f"note: {len(plan.dropped)} multi-token-prediction (MTP) tensors are left out, and the config says so. "
            "Without them, speculative decoding needs a separate draft model."
        )


def _report(
    settings: RunSettings, prepared: Prepared, calibration: Calibration, layers: list[LayerResult]
) -> dict[str, Any]:
    """The contents of `streamprune.json`: nothing in it varies between runs of the same input and settings."""
    plan = prepared.plan
    return {
        "format": 1,
        "settings": {
            # Names without folders: the file is published with the model, and is the same wherever it is made.
            "model": _public_name(settings.model),
            "revision": settings.revision,
            "keep": plan.keep,
            "method": settings.method,
            "propagate": settings.propagate,
            "samples": settings.samples,
            "seq_len": settings.seq_len,
            "seed": settings.seed,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "batch_tokens": settings.batch_tokens,
            "max_shard_bytes": settings.max_shard_bytes,
        },
        "versions": {
            "streamprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "source": {
            "fingerprint": prepared.checkpoint.fingerprint(),
            "bytes": prepared.checkpoint.nbytes,
            "experts": plan.spec.count,
            "top_k": plan.spec.top_k,
        },
        "calibration": {
            "sources": [_public_name(source) for source in calibration.sources],
            "sequences": len(calibration.sequences),
            "tokens": calibration.tokens,
            "fingerprint": calibration.fingerprint,
        },
        "dropped": list(plan.dropped),
        "layers": [
            {
                "index": layer.index,
                "kept": list(layer.kept),
                "scores": list(layer.scores),
                "counts": list(layer.counts),
            }
            for layer in layers
        ],
    }


def _public_name(name: str) -> str:
    """A Hub id or recipe as it is; of a local path only the last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def _summary(
    settings: RunSettings,
    prepared: Prepared,
    calibration: Calibration,
    layers: list[LayerResult],
    seconds: float,
) -> dict[str, Any]:
    plan = prepared.plan
    never = [{"layer": layer.index, "experts": layer.counts.count(0)} for layer in layers if 0 in layer.counts]
    return {
        "output": str(settings.output),
        "model": settings.model,
        "experts_per_layer": plan.keep,
        "source_experts_per_layer": plan.spec.count,
        "moe_layers": len(layers),
        "source_bytes": prepared.checkpoint.nbytes,
        "output_bytes": plan.output_bytes,
        "calibration_tokens": calibration.tokens,
        "never_routed": never,
        "dropped_tensors": len(plan.dropped),
        "seconds": round(seconds, 3),
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _tell(progress: Progress, summary: Mapping[str, Any], calibration: Calibration) -> None:
    never = summary["never_routed"]
    if never:
        where = ", ".join(f"layer {item['layer']}: {item['experts']}" for item in never)
        progress.say(
            f"warning: the {calibration.tokens:,} calibration tokens never reached some experts ({where}), so those "
            "were removed first without being known. Calibrate on more or on other text: --calibration, --samples."
        )
    progress.say(
        f"done in {summary['seconds']:.0f} s: {summary['output']}, {format_bytes(summary['output_bytes'])} of weights "
        f"(source: {format_bytes(summary['source_bytes'])})"
    )
