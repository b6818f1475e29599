"""From a choice to an output: write what is not written yet, prove it, record it, and give it its name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.config import OutputSettings, PruneSettings, RunSettings, beside
from streamprune.errors import InterruptedRunError, SettingsError, VerifyError
from streamprune.files.durable import reached, sync_folder, writing
from streamprune.fit.estimate import Estimate
from streamprune.hardware.memory import format_bytes
from streamprune.models.per_layer_experts import engines_note, has_per_layer_experts
from streamprune.output.plan import PrunePlan
from streamprune.output.writer import OutputWriter
from streamprune.planning.expert_counts import ExpertCounts
from streamprune.planning.model_facts import ModelFacts
from streamprune.progress import Progress
from streamprune.reporting.card import model_card
from streamprune.reporting.evaluations import TEXT_NAME, results_folder, write_result
from streamprune.reporting.record import make_record
from streamprune.saliency.scores import LayerStatistics, Scores
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, check_scores_file, write_scores
from streamprune.selection.retention import Retention, retention_warnings, retentions
from streamprune.selection.select import LayerSelection, Selection, Selector
from streamprune.selection.settings import token_shares
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder, resume_command

#: Where the scores go of a run whose choice could not be made: the output's name with this behind it.
SCORES_SUFFIX = ".scores.safetensors"


@dataclass(frozen=True)
class RunResult:
    """A finished command. `layers` are empty where it only scored; `summary` is what `--json` prints."""

    output: Path
    layers: tuple[LayerSelection, ...]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class SelectionResult:
    """Everything that is decided about an output. `scores` is None for the user's own selection without any."""

    settings: RunSettings | PruneSettings
    checkpoint: Checkpoint
    facts: ModelFacts
    counts: ExpertCounts
    selection: Selection
    plan: PrunePlan
    provenance: Mapping[str, Any]
    scores: Scores | None

    @cached_property
    def retained(self) -> tuple[Retention, ...]:
        """What the choice keeps of each source of the calibration; empty without scores."""
        if self.scores is None:
            return ()
        return retentions(self.scores, self.selection)


def select_all(selector: Selector, scores: Scores, settings: RunSettings, work: WorkFolder) -> Selection:
    """The choice of a run whose blocks are all scored.

    Raises SettingsError where there is none. Then the scores are left beside the output, for a choice of another kind:
    they are right, and took all the time. The work folder is emptied, since no resume could end otherwise.
    """
    try:
        return selector.all(scores.layers)
    except SettingsError as error:
        kept = save_scores(settings, scores)
        work.start_afresh()
        raise SettingsError(
            f"{error} All blocks are scored; choose otherwise with `streamprune prune` and --scores {kept}."
        ) from None


def save_scores(settings: OutputSettings, scores: Scores | None) -> Path:
    """Leave the scores of a run beside its output, for a choice of another kind; returns the file."""
    kept = beside(settings.output, SCORES_SUFFIX)
    assert scores is not None
    write_scores(kept, scores)
    return kept


def print_selection(decided: SelectionResult, progress: Progress) -> None:
    """Say what the choice keeps of each source, what to beware of, and who can load the result."""
    if has_per_layer_experts(decided.plan.counts) and isinstance(decided.settings, PruneSettings):
        # (A run has said so before it began.)
        progress.say(f"note: {engines_note(True)}")
    if not decided.retained or decided.scores is None:
        return
    kept = ", ".join(f"{each.source} {each.kept:.1%} (at best {each.best:.1%})" for each in decided.retained)
    progress.say(f"domain retention, the share of each source's saliency that stays: {kept}")
    shares = None
    if decided.selection.settings is not None:
        shares = token_shares(decided.selection.settings.mix, decided.scores.sources, decided.scores.source_tokens)
    for warning in retention_warnings(decided.retained, shares):
        progress.say(f"warning: {warning}")


def write_blocks(
    decided: SelectionResult, writer: OutputWriter, work: WorkFolder, progress: Progress, stop: StopRequest
) -> None:
    """Write and record every block whose experts are chosen, unless it has been written before.

    Raises InterruptedRunError when the user asks to stop; what is written is kept.
    """
    kept = decided.selection.kept
    layers: Mapping[int, LayerStatistics] = {}
    if decided.scores is not None:
        layers = {layer.index: layer for layer in decided.scores.layers}
    count, blocks = decided.facts.layout.spec.count, decided.facts.layout.layer_count
    for block in (None, *range(blocks)):
        _heed(stop, work)
        experts = kept.get(block, ()) if block is not None else ()
        record = work.read_layer(block)
        if record is not None and record.shards:
            # Of tens of GiB this takes a while, and is silent otherwise.
            progress.say(f"resuming: checking what was written of {_name(block, blocks)} ...")
            if writer.has_written(block, experts, record):
                continue
        shards = writer.write_layer(block, experts)
        work.write_layer(block, layers.get(block) if block is not None else None, experts, shards)
        if experts:
            progress.say(f"{_name(block, blocks)}: written with {len(experts)}/{count} experts")
    _heed(stop, work)


def _heed(stop: StopRequest, work: WorkFolder) -> None:
    if stop:
        raise InterruptedRunError(
            f"Stopped as asked; what is written is kept. Go on with: {resume_command(work.folder)}"
        )


def _name(block: int | None, blocks: int) -> str:
    return "weights outside the layers" if block is None else f"layer {block}/{blocks - 1}"


def complete(
    decided: SelectionResult,
    writer: OutputWriter,
    work: WorkFolder,
    progress: Progress,
    evaluation: Mapping[str, Any] | None = None,
) -> Estimate | None:
    """Check what was written and give it its name, with what is known of the damage.

    Returns what the finished model will take, if that can be told.
    """
    settings, plan = decided.settings, decided.plan
    # All that lies there becomes the output.
    work.remove_other_shards(shard.file for shard in plan.shards)
    if settings.verify:
        _verify(decided, writer, work, progress)
    if decided.scores is not None:
        write_scores(work.staging / SCORES_FOLDER / SCORES_NAME, decided.scores)
    if evaluation is not None:
        write_result(results_folder(work.staging), TEXT_NAME, evaluation)
    small_files = [path.as_posix() for path in decided.checkpoint.small_files()]
    record = make_record(decided.provenance, decided.selection, plan, decided.counts, settings, small_files)
    headers = writer.headers()
    estimate = decided.facts.estimate(str(settings.output), plan, settings, decided.counts, headers)
    writer.finish(record.as_json(), model_card(plan, record, decided.checkpoint, estimate, decided.retained))
    return estimate


def _verify(decided: SelectionResult, writer: OutputWriter, work: WorkFolder, progress: Progress) -> None:
    kept = decided.selection.kept
    if not writer.has_proven(kept):
        # What earlier sittings wrote. Of a large model this takes minutes.
        progress.say("comparing what was written with the source ...")
    try:
        proof = writer.verify(kept)
    except VerifyError:
        # The records of what was written cannot be believed; what is known of the experts has nothing to do with it.
        layers = {layer.index: layer for layer in decided.scores.layers} if decided.scores is not None else {}
        for block in (None, *range(decided.facts.layout.layer_count)):
            work.write_layer(block, layers.get(block) if block is not None else None, (), [])
        raise
    progress.say(f"verified: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes")


def complete_scores(settings: OutputSettings, checkpoint: Checkpoint, scores: Scores, work: WorkFolder) -> None:
    """Write the scores and give them their name, whole or not at all. Raises ScoresError, OutputError, ResourceError.

    Nothing but the finished file ever lies beside the output: what is being written lies in the folder there.
    """
    whole = settings.folder_beside / SCORES_NAME
    write_scores(whole, scores)
    with writing(f"Completing {settings.output}", settings.output):
        # Hours may have passed: whatever came to lie there meanwhile is not ours to replace.
        check_scores_file(settings.output, checkpoint.folder, settings.overwrite)
        work.record_complete(whole)
        reached("scores written")
        whole.rename(settings.output)
        reached("output named")
        sync_folder(settings.output.absolute().parent)


def summary_of(decided: SelectionResult, estimate: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """The result for people and for `--json`, as far as it does not depend on how the scores were taken."""
    plan, layers = decided.plan, decided.selection.layers
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
            {"layer": layer.index, "experts": layer.tokens.count(0)} for layer in layers if 0 in layer.tokens
        ],
        "domain_retention": {
            each.source: {"kept": round(each.kept, 6), "best": round(each.best, 6)} for each in decided.retained
        },
        "dropped_tensors": len(plan.layout.dropped),
        # What was compared and differed would have raised an error.
        "verified": decided.settings.verify,
        "seconds": round(seconds, 3),
        "memory": estimate,
    }


def summary_of_scores(settings: RunSettings, scores: Scores, seconds: float) -> dict[str, Any]:
    """The same of scores, where no model was written."""
    return {
        "output": str(settings.output),
        "model": settings.model,
        "moe_layers": len(scores.layers),
        "source_experts_per_layer": scores.spec.count,
        "sources": dict(zip(scores.sources, scores.source_tokens, strict=True)),
        "seconds": round(seconds, 3),
    }
