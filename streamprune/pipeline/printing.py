"""What several commands print: the memory of the result, notes on what was planned, and bytes of weights. No torch."""

from __future__ import annotations

from streamprune.fit.answer import terms_lines
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.verdict import verdict_lines
from streamprune.hardware.memory import format_bytes
from streamprune.models.expert_layout import Layout
from streamprune.models.mtp import ignored_notes, mtp_note
from streamprune.models.per_layer_experts import engines_note
from streamprune.planning.counts import ExpertCounts
from streamprune.progress import Progress
from streamprune.saliency.scores import Scores
from streamprune.targets import PruningTarget


def print_channel_bytes(progress: Progress, scores: Scores) -> None:
    """Print how large a part of a scores file the channels are, if it has any."""
    if scores.channel_bytes:
        progress.say(
            f"of these, the scores of channels take {format_bytes(scores.channel_bytes)} (--no-channels: none)"
        )


def print_memory(progress: Progress, estimate: Estimate) -> None:
    """Print the memory of the result, and whether it fits the budget, if there is one."""
    for line in terms_lines(estimate):
        progress.say(line)
    if isinstance(estimate, Fit):
        progress.say(f"  {budget_text(estimate).removeprefix(', ')}")


def budget_text(estimate: Estimate) -> str:
    """Whether the result fits the budget, to follow on its memory; empty without a budget."""
    if not isinstance(estimate, Fit):
        return ""
    fits, left = ("fits", "left") if estimate.fits else ("does not fit", "over")
    return f", {fits} the budget of {format_bytes(estimate.budget)}, {format_bytes(abs(estimate.left))} {left}"


def print_verdict(progress: Progress, estimate: Estimate) -> None:
    """Print what is known to happen when so much is removed, and what would lose less."""
    for line in verdict_lines(estimate):
        progress.say(f"note: {line}")


def print_notes(progress: Progress, counts: ExpertCounts, is_uneven: bool) -> None:
    """Print notes on the budget's GPU, on the width, and on which engines load layers that keep different numbers."""
    notes = [
        *(counts.budget.notes if counts.budget else ()),
        *counts.notes,
        *([engines_note(True)] if is_uneven else []),
    ]
    for note in notes:
        progress.say(f"note: {note}")


def print_engine_notes(
    progress: Progress, target: PruningTarget, counts: ExpertCounts, unpruned: Footprint | None
) -> None:
    """Print what the programs that may serve the result make of it; `unpruned` says what an expert takes, if known."""
    for note in counts.engine_notes(target, unpruned):
        progress.say(f"note: {note}")


def print_weights(progress: Progress, source: int, output: int, storage: str) -> None:
    """Print the bytes of the weights before and after pruning, and how quantized ones are stored."""
    progress.say(f"weights: {format_bytes(source)} -> {format_bytes(output)}{f'; {storage}' if storage else ''}")


def print_left_out(progress: Progress, layout: Layout, scored: bool) -> None:
    """Print what happens to layers for multi-token prediction, if there are some, and what else is left out.

    `scored`: the experts of the MTP layer have scores of their own.
    """
    for note in filter(None, (mtp_note(layout, scored), *ignored_notes(layout))):
        progress.say(f"note: {note}")
