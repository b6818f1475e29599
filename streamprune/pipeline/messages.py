"""Messages about a run: before it, what it will do and need; after it, the result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamprune.config import RunSettings
from streamprune.distributed.processes import Processes
from streamprune.fit.answer import terms_lines
from streamprune.fit.estimate import Estimate, Fit
from streamprune.hardware.memory import check_disk, core_count, existing_folder, format_bytes
from streamprune.models.per_layer_experts import engines_note
from streamprune.planning.expert_counts import ExpertCounts
from streamprune.progress import Progress, describe
from streamprune.saliency.scores import Scores

if TYPE_CHECKING:
    # These import torch; `streamprune prune` prints through this module too and needs no torch.
    import torch

    from streamprune.calibration.sequences import Calibration
    from streamprune.hardware.memory_plan import MemoryPlan
    from streamprune.planning.prepare import PreparedModel
    from streamprune.planning.pruning_plan import PruningPlan
    from streamprune.work.folder import WorkFolder


NO_ESTIMATE = "note: the memory of the result cannot be estimated, because the size of its cache is unknown."


def print_work(
    progress: Progress, settings: RunSettings, prepared: PreparedModel, memory: MemoryPlan, work: WorkFolder
) -> None:
    """Print how large the work folder may become. Raises ResourceError if the disk has no room for it."""
    written, states = prepared.planned_bytes, memory.needs.states
    # Two generations of states are kept, and a third exists while it is written.
    check_disk(work.folder, written + 3 * states)
    if existing_folder(settings.output).stat().st_dev != work.folder.stat().st_dev:
        # The output is copied there in the end.
        check_disk(settings.output, written)
    new = f"the new weights {format_bytes(written)}, " if written else ""
    progress.say(
        f"work folder: {work.folder}, up to {format_bytes(written + 3 * states)} ({new}saved hidden states up to "
        f"3 x {format_bytes(states)})"
    )


def print_plan(progress: Progress, settings: RunSettings, plan: PruningPlan) -> None:
    """Print the model, how many experts are kept, and notes on the budget."""
    skeleton, counts = plan.skeleton, plan.counts
    spec = skeleton.spec
    kept = f"; keeping {counts.text(spec.count)}" if counts else ""
    progress.say(
        f"{settings.model}: {skeleton.layer_count} layers, {len(skeleton.experts)} with {spec.count} experts "
        f"(top-{spec.top_k}){kept}"
    )
    print_budget(progress, counts)
    if counts and not counts.uniform:
        progress.say(f"note: {engines_note(True)}")


def print_budget(progress: Progress, counts: ExpertCounts | None) -> None:
    """Print the notes on the GPU that the budget is for."""
    for note in counts.budget.notes if counts and counts.budget else ():
        progress.say(f"note: {note}")


def print_dropped(progress: Progress, dropped: Sequence[str]) -> None:
    """Print which tensors the output leaves out, if any."""
    if dropped:
        progress.say(
            f"note: {len(dropped)} multi-token-prediction (MTP) tensors are left out, and the config says so. "
            "Without them, speculative decoding needs a separate draft model."
        )


def print_unseen_experts(progress: Progress, never_routed: Sequence[Mapping[str, int]], tokens: int) -> None:
    """Warn of experts that no calibration token was routed to: how many, in which layers."""
    if never_routed:
        where = ", ".join(f"layer {item['layer']}: {item['experts']}" for item in never_routed)
        progress.say(
            f"warning: the {tokens:,} calibration tokens never reached some experts ({where}), so these were removed "
            "first, although nothing is known of them. Calibrate on more or on other text: --calibration, --samples."
        )


def print_memory(progress: Progress, estimate: Estimate) -> None:
    """Print the memory of the result, and whether it fits the budget, if there is one."""
    for line in terms_lines(estimate):
        progress.say(line)
    if isinstance(estimate, Fit):
        verdict = "fits" if estimate.fits else "does not fit"
        progress.say(
            f"  {verdict} the budget of {format_bytes(estimate.budget)}, {format_bytes(abs(estimate.left))} "
            f"{'left' if estimate.fits else 'missing'}"
        )


def print_model(progress: Progress, settings: RunSettings, prepared: PreparedModel) -> None:
    """Print the estimated memory and the sizes of the weights, before and after."""
    if prepared.plan.counts is not None:
        estimate = prepared.plan.estimate(settings)
        if estimate is None:
            progress.say(NO_ESTIMATE)
        else:
            print_memory(progress, estimate)
        progress.say(f"weights: {format_bytes(prepared.checkpoint.nbytes)} -> {format_bytes(prepared.planned_bytes)}")
        print_dropped(progress, prepared.layout.dropped)
    if settings.calibration == ("builtin",):
        progress.say(
            "note: the built-in calibration text is meant for a first try. For a model that you will use, give text "
            "like that of your use: --calibration FILE."
        )


def print_calibration(
    progress: Progress, prepared: PreparedModel, calibration: Calibration, device: torch.device
) -> None:
    """Print what the model is calibrated on."""
    named = zip(calibration.sources, calibration.tokens_of, strict=True)
    progress.say(
        f"calibration: {len(calibration.sequences)} sequences, {calibration.tokens:,} tokens from "
        f"{', '.join(f'{name} ({tokens:,})' for name, tokens in named)}; "
        f"{str(prepared.dtype).removeprefix('torch.')} on {device}"
    )
    held = calibration.held_out
    if held is not None:
        progress.say(f"held out for measuring: {len(held.sequences)} sequences, {held.tokens:,} tokens")
    for note in calibration.notes:
        progress.say(f"note: {note}")


def print_processes(progress: Progress, processes: Processes, device: torch.device) -> None:
    """Print how many processes share the run, if several do, and whether they leave cores idle."""
    if processes.count == 1:
        return
    progress.say(f"{processes.count} processes, each with a share of the micro-batches")
    if device.type != "cpu":
        return
    import torch

    threads, cores = torch.get_num_threads(), core_count()
    if threads * processes.local_count < cores:
        progress.say(
            f"note: {processes.local_count} processes with {threads} threads each leave some of the {cores} cores "
            f"idle. Launchers set OMP_NUM_THREADS=1 by default: try {cores // processes.local_count}."
        )


def print_result(progress: Progress, settings: RunSettings, summary: Mapping[str, Any]) -> None:
    """Print the result of a run."""
    _print_utilisation(progress, settings, summary)
    print_unseen_experts(progress, summary["never_routed"], summary["calibration_tokens"])
    progress.say(
        f"done in {summary['seconds']:.0f} s: {summary['output']}, {format_bytes(summary['output_bytes'])} of weights "
        f"(source: {format_bytes(summary['source_bytes'])})"
    )


def print_scores(progress: Progress, settings: RunSettings, scores: Scores, summary: Mapping[str, Any]) -> None:
    """Print the result of scoring, and the commands that use it."""
    _print_utilisation(progress, settings, summary)
    size = format_bytes(settings.output.stat().st_size)
    progress.say(
        f"done in {summary['seconds']:.0f} s: {settings.output}, {size}: {len(scores.layers)} layers, "
        f"{scores.spec.count} experts each, {len(scores.sources)} sources"
    )
    name = shlex.quote(str(settings.output))
    progress.say(f"Look at them with `streamprune inspect {name}`; use them with `streamprune prune --scores {name}`.")


def _print_utilisation(progress: Progress, settings: RunSettings, summary: Mapping[str, Any]) -> None:
    progress.say(describe(summary["busy"]))
    if settings.ram_bytes is not None and summary["peak_resident_bytes"] > settings.ram_bytes:
        progress.say(
            f"note: resident memory rose to {format_bytes(summary['peak_resident_bytes'])} for a moment, above "
            f"--ram-gib {settings.ram_gib:g}. A smaller --batch-tokens or a shorter --seq-len lowers it."
        )
