"""Messages of `run` and `score`: the plan, what it needs, what was done to a layer, and how to use the scores."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from streamprune.calibration.refit_text import (
    JUDGE_EVERY,
    LEAST_IMATRIX_TOKENS,
    RECOMMENDED_PER_COLUMN,
    RECOMMENDED_PER_UNIT,
    fitted_tokens,
)
from streamprune.calibration.sequences import FIT, JUDGE, Calibration
from streamprune.config import RunSettings
from streamprune.distributed.processes import Processes
from streamprune.formats.pick import storage_text
from streamprune.hardware.memory import core_count, format_bytes
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.models.mtp import mtp_scoring_note
from streamprune.models.open import dtype_note
from streamprune.pipeline.finish import check_room
from streamprune.pipeline.printing import (
    print_channel_bytes,
    print_engine_notes,
    print_left_out,
    print_memory,
    print_notes,
    print_verdict,
    print_weights,
)
from streamprune.planning.prepare import PreparedModel, PruningPlan
from streamprune.planning.refit import anchor_name, refit_demand, refit_sizes
from streamprune.planning.rounding import rounding_demand
from streamprune.progress import Progress, describe
from streamprune.saliency.scores import Scores
from streamprune.work.folder import WorkFolder
from streamprune.work.layer_records import RefittedLayer, RoundedLayer


def print_plan(progress: Progress, settings: RunSettings, plan: PruningPlan) -> None:
    """Print the model, how many experts are kept, notes on the budget, and the memory of the result."""
    skeleton, counts = plan.skeleton, plan.counts
    spec = skeleton.spec
    kept = f"; keeping {counts.text(spec.count)}" if counts else ""
    progress.say(
        f"{settings.model}: {skeleton.layer_count} layers, {len(skeleton.experts)} with {spec.count} experts "
        f"(top-{spec.top_k}){kept}"
    )
    stated, known = plan.model.raw.get("model_type"), plan.model.config.model_type
    if stated is not None and stated != known:
        progress.say(
            f"note: {stated} is unknown to transformers {transformers.__version__}; it is read as {known}, by its "
            f"architecture {type(skeleton.model).__name__}."
        )
    if counts is None:
        return
    # A schedule may give all layers of a small model the same number.
    differ = counts.per_layer is None or len(set(counts.per_layer.values())) > 1
    print_notes(progress, counts, not counts.uniform and differ)
    print_engine_notes(progress, settings, counts, plan.footprint)
    estimate = plan.estimate(settings)
    if estimate is not None:
        print_memory(progress, estimate)
        print_verdict(progress, estimate)
    else:
        progress.say("note: the memory of the result cannot be estimated, because the size of its cache is unknown.")


def print_prepared(
    progress: Progress,
    settings: RunSettings,
    prepared: PreparedModel,
    calibration: Calibration,
    device: torch.device,
    given: Scores | None = None,
) -> None:
    """Print what of the checkpoint is ignored, the bytes of the weights before and after, and the calibration.

    `given` are the scores that the selection goes by; None if the model is scored.
    """
    slow = dtype_note(settings.dtype, prepared, device)
    for note in (*prepared.notes, *([slow] if slow is not None else [])):
        progress.say(f"note: {note}")
    if prepared.plan.counts is not None:
        storage = storage_text(prepared.formats, settings.weights == "bf16", prepared.new_format)
        print_weights(progress, prepared.checkpoint.nbytes, prepared.planned_bytes, storage)
        print_left_out(progress, prepared.written.layout, given is None or given.mtp is not None)
    elif prepared.formats:
        progress.say(f"weights: {format_bytes(prepared.checkpoint.nbytes)}; {' and '.join(prepared.formats)}")
    if given is None:
        tensors, layout = prepared.checkpoint.tensors, prepared.written.layout
        scoring = mtp_scoring_note(layout, sum(tensors[name].nbytes for name in layout.mtp if name in tensors))
        if scoring and (settings.only_score or layout.mtp_layer is not None):
            progress.say(f"note: {scoring}")
    if settings.calibration == ("builtin",):
        progress.say(
            "note: the built-in calibration text is meant for a first try. For a model that you will use, calibrate on "
            "text like your workload: --calibration FILE."
        )
    named = zip(calibration.sources, calibration.tokens_of, strict=True)
    progress.say(
        f"calibration: {len(calibration.sequences)} sequences, {calibration.tokens:,} tokens from "
        f"{', '.join(f'{name} ({tokens:,})' for name, tokens in named)}; "
        f"{prepared.dtype_name} on {device}"
    )
    held = calibration.held_out
    if held is not None:
        progress.say(f"held out for measuring: {len(held.sequences)} sequences, {held.tokens:,} tokens")
    if settings.refit:
        _print_refit(progress, settings, prepared, calibration)
    if settings.needs_text:
        _print_rounding(progress, prepared, calibration)
    if settings.imatrix is not None:
        _print_imatrix(progress, calibration)
    anchor_notes = calibration.anchor.notes if calibration.anchor is not None else ()
    for note in (*calibration.notes, *(f"anchor: {each}" for each in anchor_notes)):
        progress.say(f"note: {note}")


def _print_rounding(progress: Progress, prepared: PreparedModel, calibration: Calibration) -> None:
    """Print what text weights are rounded by, with a warning if it is little."""
    counts = prepared.plan.counts
    assert counts is not None
    tokens = sum(fitted_tokens(calibration, use) for use in (FIT, JUDGE))
    per_column = tokens / rounding_demand(prepared.skeleton, counts).per_column
    progress.say(
        f"rounding: GPTQ by {tokens:,} tokens, {per_column:.2g} routed ones for each input column of an expert that "
        "stays"
    )
    if per_column < RECOMMENDED_PER_COLUMN:
        progress.say(
            f"warning: that is less than {RECOMMENDED_PER_COLUMN} for each column, so GPTQ helps less than it could, "
            "and many experts may be rounded to nearest. Give more text: --samples, --calibration."
        )


def _print_imatrix(progress: Progress, calibration: Calibration) -> None:
    """Print what text the importance matrix is made from, with a warning if it is little."""
    tokens = sum(fitted_tokens(calibration, use) for use in (FIT, JUDGE))
    progress.say(f"importance matrix: of the pruned layers as they are written, from {tokens:,} tokens")
    if tokens < LEAST_IMATRIX_TOKENS:
        progress.say(
            f"warning: that is less than the {LEAST_IMATRIX_TOKENS:,} tokens that are usual for an importance matrix. "
            "Give more text: --samples, --calibration."
        )


def _print_refit(progress: Progress, settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> None:
    """Print what text down projections are refitted to, with a warning if it is little or of one kind."""
    counts, anchor = prepared.plan.counts, calibration.anchor
    assert counts is not None
    fitted, judging = (fitted_tokens(calibration, use) for use in (FIT, JUDGE))
    per_unit = fitted / refit_demand(prepared.skeleton, counts).units
    name = anchor_name(settings, calibration)
    general = f"; {anchor.tokens:,} of all these tokens are from {name}, the anchor" if anchor else ""
    progress.say(
        f"refit: fitted to {fitted:,} tokens, {per_unit:.0f} routed ones for each intermediate unit of an expert that "
        f"stays; {judging:,} others judge{general}"
    )
    if per_unit < RECOMMENDED_PER_UNIT:
        progress.say(
            f"warning: with {per_unit:.0f} tokens for each unit instead of {RECOMMENDED_PER_UNIT} or more, a refit "
            "mends less than it could. Give more text: --samples, --calibration."
        )
    if anchor is None and len(calibration.sources) == 1:
        progress.say(
            "warning: fitted to one source alone, the model loses more of what that source does not contain. Leave out "
            "--anchor none, or name general text with --anchor."
        )


def print_refit_cost(progress: Progress, plan: PruningPlan) -> dict[str, Any]:
    """Print the text, memory and arithmetic that a refit would take, from sizes alone; returned as JSON."""
    assert plan.counts is not None
    demand = refit_demand(plan.skeleton, plan.counts)
    itemsize = (plan.model.dtype or torch.bfloat16).itemsize
    sizes = refit_sizes(plan.skeleton, plan.counts, itemsize, demand.tokens, demand.tokens // JUDGE_EVERY)
    layers, needs = len(plan.skeleton.experts), sizes.needs
    per_layer = (sizes.model_flop + sizes.exact_flop) / 1e12
    progress.say(
        f"refit: {sizes.tokens:,} tokens; in each of {layers} layers {sizes.model_flop / 1e12:.3g} TFLOP in the "
        f"model's dtype and {sizes.exact_flop / 1e12:.3g} in float32 and float64, which are slower; "
        f"{per_layer * layers / 1000:.3g} PFLOP in all. Those in the model's dtype are as many as to score "
        f"{sizes.model_flop / sizes.layer_flop:,.0f} tokens. Memory for one layer: "
        f"{format_bytes(needs.collected + needs.factors)} of tokens and matrices, and {format_bytes(needs.work)} of "
        "workspace"
    )
    return {
        "tokens": sizes.tokens,
        "model_flop": sizes.model_flop * layers,
        "exact_flop": sizes.exact_flop * layers,
        "collected_bytes": needs.collected + needs.factors,
        "workspace_bytes": needs.work,
    }


def print_refitted(progress: Progress, layer: int, refit: RefittedLayer) -> None:
    """Print how many of a layer's experts were refitted, and by how much its error fell."""
    changed = sum(share > 0 for share in refit.shares)
    # (Other layers do not simply add their experts' output to the hidden states.)
    aim = "" if refit.catch_up else " of the experts' output alone"
    progress.say(
        f"{progress.name_of(layer)}: {changed} of {len(refit.shares)} experts refitted, relative error on text not "
        f"fitted to {refit.before:.3f} -> {refit.after:.3f}{aim}"
    )


def print_rounded(progress: Progress, layer: int, rounded: RoundedLayer) -> None:
    """Print a layer's error before and after rounding by text, and what was rounded to the nearest value instead."""
    few = ""
    if rounded.nearest or rounded.nearest_linears:
        linears = f" and {', '.join(rounded.nearest_linears)}" if rounded.nearest_linears else ""
        few = f"; {len(rounded.nearest)} of {len(rounded.tokens)} experts{linears} to nearest"
    progress.say(
        f"{progress.name_of(layer)}: rounded, relative error of a matrix's output {rounded.before:.3f} -> "
        f"{rounded.after:.3f}{few}"
    )


def print_processes(progress: Progress, processes: Processes, device: torch.device) -> None:
    """Print how many processes share the run, if several do, and a note if they leave cores idle."""
    if processes.count == 1:
        return
    progress.say(f"{processes.count} processes, each with a share of the micro-batches")
    threads, cores = torch.get_num_threads(), core_count()
    if device.type == "cpu" and threads * processes.local_count < cores:
        progress.say(
            f"note: {processes.local_count} processes with {threads} threads each leave some of the {cores} cores "
            f"idle. Launchers set OMP_NUM_THREADS=1 by default: try {cores // processes.local_count}."
        )


def print_work(
    progress: Progress, settings: RunSettings, prepared: PreparedModel, memory: MemoryPlan, work: WorkFolder
) -> None:
    """Print how large the work folder may become. Raises ResourceError if the disk has not enough free space."""
    written, states = prepared.planned_bytes, memory.needs.states
    # Two generations of states are kept, and a third exists while it is written.
    check_room(settings, work, written + 3 * states, written)
    new = f"the new weights {format_bytes(written)}, " if written else ""
    progress.say(
        f"work folder: {work.folder}, up to {format_bytes(written + 3 * states)} ({new}saved hidden states up to "
        f"3 x {format_bytes(states)})"
    )


def print_utilisation(progress: Progress, settings: RunSettings, summary: Mapping[str, Any]) -> None:
    """Print what the time was spent on, and a note if the run exceeded --ram-gib."""
    progress.say(describe(summary["busy"]))
    if settings.ram_bytes is not None and summary["peak_resident_bytes"] > settings.ram_bytes:
        progress.say(
            f"note: resident memory peaked at {format_bytes(summary['peak_resident_bytes'])}, above "
            f"--ram-gib {settings.ram_gib:g}. A smaller --batch-tokens or a shorter --seq-len lowers it."
        )


def print_scores(progress: Progress, output: Path, scores: Scores, summary: Mapping[str, Any]) -> None:
    """Print that scoring is finished, and the commands that use the scores."""
    progress.say(
        f"done in {summary['seconds']:.0f} s: {output}, {format_bytes(output.stat().st_size)}: {len(scores.layers)} "
        f"layers, {scores.spec.count} experts each, {len(scores.sources)} sources"
    )
    print_channel_bytes(progress, scores)
    name = shlex.quote(str(output))
    progress.say(f"Look at them with `streamprune inspect {name}`; use them with `streamprune prune --scores {name}`.")
