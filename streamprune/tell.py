"""What the user is told about a run: before it, what it will do and need; after it, what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from streamprune.decision import Decision
from streamprune.fit.estimate import Estimate, Fit
from streamprune.fit.report import terms_lines
from streamprune.machine import check_disk, existing_folder, format_bytes
from streamprune.memory.plan import MemoryPlan
from streamprune.prepare import Prepared
from streamprune.progress import Progress
from streamprune.settings import RunSettings
from streamprune.text.calibration import Calibration
from streamprune.work.folder import WorkFolder


def announce_work(
    progress: Progress, settings: RunSettings, prepared: Prepared, memory: MemoryPlan, work: WorkFolder
) -> None:
    """Say how large the work folder may become, and refuse if the disk has no room for that."""
    written, states = prepared.plan.output_bytes, memory.needs.states
    # Two generations, and a third while it is written.
    check_disk(work.folder, written + 3 * states)
    if existing_folder(settings.output).stat().st_dev != work.folder.stat().st_dev:
        # It is copied there in the end.
        check_disk(settings.output, written)
    progress.say(
        f"work folder: {work.folder}, up to {format_bytes(written + 3 * states)} (the new weights "
        f"{format_bytes(written)}, saved hidden states up to 3 x {format_bytes(states)})"
    )


def announce_plan(progress: Progress, settings: RunSettings, decision: Decision, estimate: Estimate | None) -> None:
    skeleton, keep = decision.skeleton, decision.keep
    count = skeleton.spec.count
    progress.say(
        f"{settings.model}: {skeleton.block_count} blocks, {len(skeleton.experts)} with {count} experts "
        f"(top-{skeleton.spec.top_k}); keeping {keep} of {count}"
    )
    if estimate is None:
        progress.say("note: the memory that the result will take cannot be told: its cache cannot be worked out.")
    else:
        tell_memory(progress, estimate)
    for note in decision.budget.notes if decision.budget else ():
        progress.say(f"note: {note}")


def tell_memory(progress: Progress, estimate: Estimate) -> None:
    for line in terms_lines(estimate):
        progress.say(line)
    if isinstance(estimate, Fit):
        verdict = "fits" if estimate.fits else "does not fit"
        progress.say(
            f"  {verdict} the budget of {format_bytes(estimate.budget)}, {format_bytes(abs(estimate.left))} "
            f"{'left' if estimate.fits else 'missing'}"
        )


def announce_model(progress: Progress, settings: RunSettings, prepared: Prepared) -> None:
    plan = prepared.plan
    announce_plan(progress, settings, prepared.decision, prepared.decision.estimate(settings))
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


def announce_calibration(
    progress: Progress, settings: RunSettings, prepared: Prepared, calibration: Calibration, device: torch.device
) -> None:
    progress.say(
        f"calibration: {len(calibration.sequences)} sequences, {calibration.tokens:,} tokens from "
        f"{', '.join(calibration.sources)}; {str(prepared.dtype).removeprefix('torch.')} on {device}"
    )
    for note in calibration.notes:
        progress.say(f"note: {note}")


def tell_result(
    progress: Progress, settings: RunSettings, summary: Mapping[str, Any], calibration: Calibration
) -> None:
    if settings.ram_bytes is not None and summary["peak_resident_bytes"] > settings.ram_bytes:
        progress.say(
            f"note: resident memory rose to {format_bytes(summary['peak_resident_bytes'])} for a moment, above "
            f"--ram-gib {settings.ram_gib:g}. A smaller --batch-tokens or a shorter --seq-len lowers it."
        )
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
