"""`run --dry-run`: what a run would do, from config and headers alone."""

from __future__ import annotations

from typing import Any

from streamprune.config import RunSettings
from streamprune.fit.answer import estimate_object
from streamprune.fit.footprint import read_headers
from streamprune.hardware.device import choose_device
from streamprune.hardware.memory import check_disk
from streamprune.pipeline import messages
from streamprune.planning.prepare import plan_pruning, with_footprint
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
    with Progress(plan.skeleton.layer_count, quiet) as progress:
        messages.print_plan(progress, settings, plan)
        refit = messages.print_refit_cost(progress, plan) if settings.refit else None
        progress.say("dry run: nothing was scored or written")
    if estimate is not None:
        check_disk(settings.output, estimate.weights_bytes)
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
