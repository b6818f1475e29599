"""`run --dry-run`: what a run would do, from config and headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamprune.config import RunSettings
from streamprune.fit.answer import estimate_object
from streamprune.fit.footprint import read_headers
from streamprune.hardware.device import choose_device
from streamprune.hardware.memory import check_disk
from streamprune.pipeline import messages
from streamprune.pipeline.printing import print_weights
from streamprune.planning.prepare import PruningPlan, plan_pruning, with_footprint
from streamprune.progress import Progress


def print_dry_run(settings: RunSettings, quiet: bool = False) -> dict[str, Any]:
    """Plan and print what `run` would do, from config and headers alone. Downloads and writes nothing large.

    Returns what `--dry-run --json` prints. Raises like `run`, also if the disk is too small for the output.
    """
    settings.check_device(choose_device(settings.device).type)
    plan = plan_pruning(settings)
    if plan.footprint is None:
        plan = with_footprint(plan, settings, plan.skeleton, read_headers(settings.model, plan.folder).tensors)
    planned, estimate = plan.counts, plan.estimate(settings)
    assert planned is not None
    before, after = _weights_bytes(settings, plan)
    with Progress(plan.skeleton.layer_count, quiet) as progress:
        messages.print_plan(progress, settings, plan)
        if before and after:
            print_weights(progress, before, after, "")
        refit = messages.print_refit_cost(progress, plan) if settings.refit else None
        progress.say("dry run: nothing was scored or written")
    if after:
        check_disk(settings.output, after)
    counts = list(planned.per_layer.values()) if planned.per_layer else None
    return {
        "model": settings.model,
        "output": str(settings.output),
        "experts_per_layer": planned.keep if planned.uniform else counts,
        "experts_in_all_layers": planned.total,
        "source_experts_per_layer": plan.skeleton.spec.count,
        **({"width": planned.width, "source_width": planned.full_width} if planned.width is not None else {}),
        "memory": estimate_object(estimate) if estimate else None,
    } | ({"refit": refit} if refit else {})


def _weights_bytes(settings: RunSettings, plan: PruningPlan) -> tuple[int, int]:
    """Bytes of the source's weights and of those that would be written; 0 where they are unknown."""
    estimate = plan.estimate(settings)
    if estimate is None:
        return 0, 0
    # (Not those that llama.cpp makes of it later.)
    written = replace(estimate, use=replace(estimate.use, weights=settings.stored_as))
    return estimate.footprint.weights.nbytes, written.weights_bytes
