"""From a choice to an output: write what is not written yet, prove it, record it, and give it its name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streamprune.choice.choose import Choice
from streamprune.choice.retention import Retention, retention_warnings, retentions
from streamprune.choice.selection import Selection
from streamprune.errors import InterruptedRunError
from streamprune.fit.estimate import Estimate
from streamprune.machine import format_bytes
from streamprune.model_facts import ModelFacts
from streamprune.output.card import model_card
from streamprune.output.plan import PrunePlan
from streamprune.output.record import run_report
from streamprune.output.uneven import engines_note, is_uneven
from streamprune.output.writer import OutputWriter
from streamprune.progress import Progress
from streamprune.quota import Quota
from streamprune.scores.file import SCORES_FOLDER, SCORES_NAME, write_scores
from streamprune.scores.scores import Scores
from streamprune.scores.statistics import LayerStatistics
from streamprune.settings import PruneSettings, RunSettings
from streamprune.source.checkpoint import Checkpoint
from streamprune.work.folder import WorkFolder
from streamprune.work.stop import StopRequest


@dataclass(frozen=True)
class Decided:
    """Everything that is decided about an output.

    `selection` is None for a choice that the user made, and `scores` if that was without any.
    """

    settings: RunSettings | PruneSettings
    checkpoint: Checkpoint
    facts: ModelFacts
    selection: Selection | None
    quota: Quota
    choice: Choice
    plan: PrunePlan
    provenance: Mapping[str, Any]
    scores: Scores | None

    @cached_property
    def retained(self) -> tuple[Retention, ...]:
        """What the choice keeps of each source of the calibration; empty without scores."""
        if self.scores is None:
            return ()
        return retentions(self.scores.layers, self.scores.sources, self.choice, self.scores.spec.groups)


def tell_choice(decided: Decided, progress: Progress) -> None:
    """Say what the choice keeps of each source, what to beware of, and who can load the result."""
    if is_uneven(decided.plan.counts):
        progress.say(f"note: {engines_note(True)}")
    if decided.retained:
        kept = ", ".join(f"{each.source} {each.kept:.1%} (at best {each.best:.1%})" for each in decided.retained)
        progress.say(f"domain retention, the share of each source's saliency that stays: {kept}")
    for warning in retention_warnings(decided.retained):
        progress.say(f"warning: {warning}")


def write_blocks(
    decided: Decided, writer: OutputWriter, work: WorkFolder, progress: Progress, stop: StopRequest, again: str
) -> None:
    """Write and record every block whose experts are chosen, unless it has been written before.

    Raises InterruptedRunError, with `again` as what to type to go on, when the user asks to stop.
    """
    kept = {layer.block: layer.kept for layer in decided.choice.layers}
    layers: Mapping[int, LayerStatistics] = {}
    if decided.scores is not None:
        layers = {layer.block: layer for layer in decided.scores.layers}
    count, blocks = decided.facts.layout.spec.count, decided.facts.layout.block_count
    for block in (None, *range(blocks)):
        if stop:
            raise InterruptedRunError(f"Stopped as asked; what is written is kept. Go on with: {again}")
        experts = kept.get(block, ()) if block is not None else ()
        record = work.read_block(block)
        if record is not None and writer.has_written(block, experts, record):
            continue
        shards = writer.write_block(block, experts)
        work.write_block(block, layers.get(block) if block is not None else None, experts, shards)
        if experts:
            progress.say(f"block {(block or 0) + 1}/{blocks}: written with {len(experts)}/{count} experts")


def complete(decided: Decided, writer: OutputWriter, work: WorkFolder, progress: Progress) -> Estimate | None:
    """Check what was written and give it its name; returns what the finished model will take, if that can be told."""
    settings, plan = decided.settings, decided.plan
    if settings.verify:
        # Of a large model this takes minutes.
        progress.say("comparing what was written with the source ...")
        proof = writer.verify({layer.block: layer.kept for layer in decided.choice.layers})
        progress.say(
            f"verified: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes"
        )
    if decided.scores is not None:
        write_scores(work.staging / SCORES_FOLDER / SCORES_NAME, decided.scores)
    report = run_report(
        decided.provenance, decided.choice, plan, decided.selection, decided.quota, settings.max_shard_bytes
    )
    headers = writer.headers()
    estimate = decided.facts.estimate(str(settings.output), plan, settings, decided.quota, headers)
    writer.finish(report, model_card(plan, report, decided.checkpoint, estimate))
    return estimate


def summary_of(decided: Decided, estimate: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """The result for people and for `--json`, as far as it does not depend on how the scores were taken."""
    plan, layers = decided.plan, decided.choice.layers
    counts = list(plan.counts.values())
    return {
        "output": str(decided.settings.output),
        "model": decided.settings.model,
        "experts_per_layer": counts[0] if len(set(counts)) == 1 else counts,
        "experts_in_all_layers": sum(counts),
        "source_experts_per_layer": plan.layout.spec.count,
        "moe_layers": len(counts),
        "source_bytes": decided.checkpoint.nbytes,
        "output_bytes": plan.output_bytes,
        "never_routed": [
            {"layer": layer.block, "experts": layer.tokens.count(0)} for layer in layers if 0 in layer.tokens
        ],
        "domain_retention": {
            each.source: {"kept": round(each.kept, 6), "best": round(each.best, 6)} for each in decided.retained
        },
        "dropped_tensors": len(plan.layout.dropped),
        "seconds": round(seconds, 3),
        "memory": estimate,
    }
