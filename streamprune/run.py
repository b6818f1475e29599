"""The run: plan it, stream the blocks, write the output, tell the user."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration import Calibration
from streamprune.card import model_card
from streamprune.decision import Decision, decide, estimate_of_written, with_footprint
from streamprune.fit import Estimate, Fit
from streamprune.fit_report import estimate_object, terms_lines
from streamprune.footprint import read_headers
from streamprune.hub import resolve_model
from streamprune.machine import (
    check_disk,
    choose_device,
    describe_host,
    existing_folder,
    format_bytes,
    peak_device_bytes,
)
from streamprune.memory_facts import plan_memory
from streamprune.prepare import Prepared, calibrate, prepare
from streamprune.progress import BlockLine, Progress
from streamprune.record import run_report, run_summary
from streamprune.scoring import BlockScorer, LayerResult
from streamprune.settings import RunSettings
from streamprune.writer import OutputWriter

#: The log's name is the output's with this behind it. (OUT.log may well be where the user sends our messages.)
LOG_SUFFIX = ".streamprune.log"


@dataclass(frozen=True)
class RunResult:
    """A finished run. `summary` is what `--json` prints."""

    output: Path
    layers: tuple[LayerResult, ...]
    summary: Mapping[str, Any]


def run(settings: RunSettings, quiet: bool = False) -> RunResult:
    """Prune a model: read, score and write one block after the other. Leaves nothing behind when it raises."""
    device = _device(settings)
    prepared = prepare(settings)
    with Progress(prepared.plan.block_count, quiet) as progress:
        with OutputWriter(prepared.plan, prepared.checkpoint, settings.output, settings.overwrite) as writer:
            _announce_model(progress, settings, prepared)
            calibration = calibrate(settings, prepared)
            _announce_calibration(progress, settings, prepared, calibration, device)
            memory = plan_memory(settings, prepared, calibration, device, writer.work_folder)
            progress.say(memory.describe())
            folder = writer.work_folder
            with BlockScorer(settings, prepared, calibration, memory, device, progress, folder) as scorer:
                layers = _stream(prepared, scorer, device, progress, writer)
            report = run_report(settings, prepared, calibration, layers, device, scorer.batch_tokens)
            estimate = estimate_of_written(settings, prepared.decision, prepared.plan.config, writer.headers())
            writer.finish(report, model_card(prepared.plan, report, prepared.checkpoint, estimate))
        # The output is complete from here on, whatever happens to the log or the terminal.
        summary = run_summary(settings, prepared, calibration, layers, scorer, progress.seconds)
        summary["memory"] = estimate_object(estimate) if estimate else None
        progress.log("summary", {**summary, "host": describe_host(device)})
        if settings.ram_bytes is not None and summary["peak_resident_bytes"] > settings.ram_bytes:
            progress.say(
                f"note: resident memory rose to {format_bytes(summary['peak_resident_bytes'])} for a moment, above "
                f"--ram-gib {settings.ram_gib:g}. A smaller --batch-tokens or a shorter --seq-len lowers it."
            )
        progress.write_log(settings.output.with_name(settings.output.name + LOG_SUFFIX))
        _tell(progress, summary, calibration)
        if estimate is not None:
            _tell_memory(progress, estimate)
    return RunResult(settings.output, tuple(layers), summary)


def dry_run(settings: RunSettings, quiet: bool = False) -> dict[str, Any]:
    """Decide and tell what `run` would do, from config and headers alone. Downloads and writes nothing large.

    Returns what `--dry-run --json` prints. Raises like `run`, also where the disk is too small for the output.
    """
    _device(settings)
    decision = decide(settings)
    if decision.footprint is None:
        folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
        decision = with_footprint(settings, decision, decision.skeleton, read_headers(settings.model, folder))
    estimate = decision.estimate(settings)
    with Progress(decision.skeleton.block_count, quiet) as progress:
        _announce_plan(progress, settings, decision, estimate)
        progress.say("dry run: nothing was scored or written")
    if estimate is not None:
        check_disk(settings.output, estimate.weights_bytes)
    return {
        "model": settings.model,
        "output": str(settings.output),
        "experts_per_layer": decision.keep,
        "source_experts_per_layer": decision.skeleton.spec.count,
        "memory": estimate_object(estimate) if estimate else None,
    }


def score(settings: RunSettings, prepared: Prepared, quiet: bool = False) -> list[LayerResult]:
    """Only score: the layers' results as `run` would have them, with nothing written."""
    device = _device(settings)
    with Progress(prepared.plan.block_count, quiet) as progress:
        calibration = calibrate(settings, prepared)
        folder = existing_folder(settings.output)
        memory = plan_memory(settings, prepared, calibration, device, folder)
        with BlockScorer(settings, prepared, calibration, memory, device, progress, folder) as scorer:
            results = [scorer.score_block(index) for index in range(prepared.plan.moe_blocks[-1] + 1)]
    return [layer for layer in results if layer is not None]


def _device(settings: RunSettings) -> torch.device:
    device = choose_device(settings.device)
    settings.check_device(device.type)
    return device


def _stream(
    prepared: Prepared, scorer: BlockScorer, device: torch.device, progress: Progress, writer: OutputWriter
) -> list[LayerResult]:
    plan = prepared.plan
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
                experts=plan.spec.count if layer else 0,
                fewest_tokens=min(layer.counts) if layer else None,
                seconds=time.monotonic() - started,
                peak_bytes=peak_device_bytes(device),
            )
        )
    return layers


def _announce_plan(progress: Progress, settings: RunSettings, decision: Decision, estimate: Estimate | None) -> None:
    skeleton, keep = decision.skeleton, decision.keep
    count = skeleton.spec.count
    progress.say(
        f"{settings.model}: {skeleton.block_count} blocks, {len(skeleton.experts)} with {count} experts "
        f"(top-{skeleton.spec.top_k}); keeping {keep} of {count}"
    )
    if estimate is None:
        progress.say("note: the memory that the result will take cannot be told: its cache cannot be worked out.")
    else:
        _tell_memory(progress, estimate)
    for note in decision.budget.notes if decision.budget else ():
        progress.say(f"note: {note}")


def _tell_memory(progress: Progress, estimate: Estimate) -> None:
    for line in terms_lines(estimate):
        progress.say(line)
    if isinstance(estimate, Fit):
        verdict = "fits" if estimate.fits else "does not fit"
        progress.say(
            f"  {verdict} the budget of {format_bytes(estimate.budget)}, {format_bytes(abs(estimate.left))} "
            f"{'left' if estimate.fits else 'missing'}"
        )


def _announce_model(progress: Progress, settings: RunSettings, prepared: Prepared) -> None:
    plan = prepared.plan
    _announce_plan(progress, settings, prepared.decision, prepared.decision.estimate(settings))
    progress.say(f"weights: {format_bytes(prepared.checkpoint.nbytes)} -> {format_bytes(plan.output_bytes)}")
    if plan.dropped:
        progress.say(
            f"note: {len(plan.dropped)} multi-token-prediction (MTP) tensors are left out, and the config says so. "
            "Without them, speculative decoding needs a separate draft model."
        )
    if settings.calibration == ("builtin",):
        progress.say(
            "note: the built-in calibration text is good for a first try. For a model that you will use, give text "
            "like what you will ask of it: --calibration FILE."
        )


def _announce_calibration(
    progress: Progress, settings: RunSettings, prepared: Prepared, calibration: Calibration, device: torch.device
) -> None:
    progress.say(
        f"calibration: {len(calibration.sequences)} sequences, {calibration.tokens:,} tokens from "
        f"{', '.join(calibration.sources)}; {str(prepared.dtype).removeprefix('torch.')} on {device}"
    )
    for note in calibration.notes:
        progress.say(f"note: {note}")


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
