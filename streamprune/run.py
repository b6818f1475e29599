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
from streamprune.machine import choose_device, describe_host, format_bytes, peak_device_bytes
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
    device = choose_device(settings.device)
    prepared = prepare(settings)
    with Progress(prepared.plan.block_count, quiet) as progress:
        with OutputWriter(prepared.plan, prepared.checkpoint, settings.output, settings.overwrite) as writer:
            _announce_model(progress, settings, prepared)
            calibration = calibrate(settings, prepared)
            _announce_calibration(progress, settings, prepared, calibration, device)
            scorer = BlockScorer(settings, prepared, calibration, device, progress)
            layers = _stream(prepared, scorer, device, progress, writer)
            report = run_report(settings, prepared, calibration, layers, device)
            writer.finish(report, model_card(prepared.plan, report, prepared.checkpoint))
        # The output is complete from here on, whatever happens to the log or the terminal.
        summary = run_summary(settings, prepared, calibration, layers, progress.seconds)
        progress.log("summary", {**summary, "host": describe_host(device)})
        progress.write_log(settings.output.with_name(settings.output.name + LOG_SUFFIX))
        _tell(progress, summary, calibration)
    return RunResult(settings.output, tuple(layers), summary)


def score(settings: RunSettings, prepared: Prepared, quiet: bool = False) -> list[LayerResult]:
    """Only score: the layers' results as `run` would have them, with nothing written."""
    device = choose_device(settings.device)
    with Progress(prepared.plan.block_count, quiet) as progress:
        scorer = BlockScorer(settings, prepared, calibrate(settings, prepared), device, progress)
        results = [scorer.score_block(index) for index in range(prepared.plan.moe_blocks[-1] + 1)]
    return [layer for layer in results if layer is not None]


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


def _announce_model(progress: Progress, settings: RunSettings, prepared: Prepared) -> None:
    plan, spec = prepared.plan, prepared.plan.spec
    progress.say(
        f"{settings.model}: {plan.block_count} blocks, {len(plan.moe_blocks)} with {spec.count} experts "
        f"(top-{spec.top_k}); keeping {plan.keep} of {spec.count}: "
        f"{format_bytes(prepared.checkpoint.nbytes)} -> {format_bytes(plan.output_bytes)}"
    )
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
