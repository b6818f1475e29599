"""What a run would do, told from config and headers alone."""

from __future__ import annotations

from typing import Any

from streamprune.decision import decide, with_footprint
from streamprune.fit.footprint import read_headers
from streamprune.fit.report import estimate_object
from streamprune.machine import check_disk, choose_device
from streamprune.progress import Progress
from streamprune.settings import RunSettings
from streamprune.tell import NO_ESTIMATE, announce_plan, tell_memory


def foretell(settings: RunSettings, quiet: bool = False) -> dict[str, Any]:
    """Decide and tell what `run` would do, from config and headers alone. Downloads and writes nothing large.

    Returns what `--dry-run --json` prints. Raises like `run`, also where the disk is too small for the output.
    """
    settings.check_device(choose_device(settings.device).type)
    decision = decide(settings)
    if decision.footprint is None:
        headers = read_headers(settings.model, decision.folder)
        decision = with_footprint(settings, decision, decision.skeleton, headers)
    quota, estimate = decision.quota, decision.estimate(settings)
    assert quota is not None
    with Progress(decision.skeleton.block_count, quiet) as progress:
        announce_plan(progress, settings, decision)
        if estimate is not None:
            tell_memory(progress, estimate)
        else:
            progress.say(NO_ESTIMATE)
        progress.say("dry run: nothing was scored or written")
    if estimate is not None:
        check_disk(settings.output, estimate.weights_bytes)
    counts = list(decision.counts.values()) if decision.counts else None
    return {
        "model": settings.model,
        "output": str(settings.output),
        "experts_per_layer": quota.keep if quota.even else counts,
        "experts_in_all_layers": quota.total,
        "source_experts_per_layer": decision.skeleton.spec.count,
        "memory": estimate_object(estimate) if estimate else None,
    }
