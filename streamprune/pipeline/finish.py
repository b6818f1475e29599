"""From a selection to an output: write what is not written yet, compare it with the source, record it, and name it.

`run` and `prune` end alike; `score` ends with its scores. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.config import OutputSettings, PruneSettings, RunSettings, sibling_path
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
from streamprune.work.records import FinishedShard

#: Suffix of the file with the scores of a run whose selection could not be made, next to the output.
SCORES_SUFFIX = ".scores.safetensors"


@dataclass(frozen=True)
class RunResult:
    """A finished command. `layers` are empty where it only scored; `summary` is what `--json` prints."""

    output: Path
    layers: tuple[LayerSelection, ...]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class SelectionResult:
    """Everything that is decided about an output: which experts stay of which model, and the files that this gives.

    `scores` is None for the user's own selection without any.
    """

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
        """What the selection keeps of each source of the calibration; empty without scores."""
        return retentions(self.scores, self.selection) if self.scores is not None else ()

    @cached_property
    def statistics(self) -> Mapping[int, LayerStatistics]:
        """What is recorded of the experts, by layer; empty without scores."""
        return {layer.index: layer for layer in self.scores.layers} if self.scores is not None else {}

    @property
    def layers(self) -> Iterator[int | None]:
        """None for the weights outside the layers, then every layer's index, in the order in which they are written."""
        yield None
        yield from range(self.facts.layout.layer_count)


def select_all(selector: Selector, scores: Scores, settings: RunSettings, work: WorkFolder) -> Selection:
    """The selection of a run whose layers are all scored.

    Raises SettingsError where there is none. Then the scores, which took all the time, are saved next to the output, to
    select from them in another way; the work folder is emptied, since no resume could end otherwise.
    """
    try:
        return selector.all(scores.layers)
    except SettingsError as error:
        kept = save_scores(settings, scores)
        work.start_afresh()
        raise SettingsError(
            f"{error} All layers are scored; select in another way with `streamprune prune` and --scores {kept}."
        ) from None


def save_scores(settings: OutputSettings, scores: Scores | None) -> Path:
    """Save the scores of a run next to its output, to select from them in another way; returns the file."""
    kept = sibling_path(settings.output, SCORES_SUFFIX)
    assert scores is not None
    write_scores(kept, scores)
    return kept


def print_selection(decided: SelectionResult, progress: Progress) -> None:
    """Print what the selection keeps of each source, what to beware of, and who can load the result."""
    if has_per_layer_experts(decided.plan.counts) and isinstance(decided.settings, PruneSettings):
        # (A run has printed it before it began.)
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


def write_layers(
    decided: SelectionResult, writer: OutputWriter, work: WorkFolder, progress: Progress, stop: StopRequest
) -> None:
    """Write and record the weights outside the layers and every layer, unless they have been written before.

    Raises InterruptedRunError when the user asks to stop; what is written is kept.
    """
    for index in decided.layers:
        _check_stop(stop, work)
        experts = decided.selection.kept.get(index, ()) if index is not None else ()
        name = "weights outside the layers" if index is None else progress.name_of(index)
        record = work.read_layer(index)
        if record is not None and record.shards:
            # Of tens of GiB this takes a while, and prints nothing else.
            progress.say(f"resuming: checking what was written of {name} ...")
            if writer.has_written(index, experts, record):
                continue
        shards = writer.write_layer(index, experts)
        _record(decided, work, index, experts, shards)
        if experts:
            progress.say(f"{name}: written with {len(experts)}/{decided.facts.layout.spec.count} experts")
    _check_stop(stop, work)


def _record(
    decided: SelectionResult,
    work: WorkFolder,
    index: int | None,
    experts: Sequence[int],
    shards: list[FinishedShard],
) -> None:
    """Record in the work folder what is known and written of a layer (None: of the weights outside the layers)."""
    work.write_layer(index, decided.statistics.get(index) if index is not None else None, experts, shards)


def _check_stop(stop: StopRequest, work: WorkFolder) -> None:
    if stop:
        raise InterruptedRunError(
            f"Stopped as asked; what is written is kept. Go on with: {resume_command(work.folder)}"
        )


def complete(
    decided: SelectionResult,
    writer: OutputWriter,
    work: WorkFolder,
    progress: Progress,
    evaluation: Mapping[str, Any] | None = None,
) -> Estimate | None:
    """Compare what was written with the source, add record and model card, and give the output its name.

    `evaluation` is what was measured of the pruned model. Returns the memory that it takes, None where it is not known.
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
        # What was written before an interruption. Of a large model this takes minutes.
        progress.say("comparing what was written with the source ...")
    try:
        proof = writer.verify(kept)
    except VerifyError:
        # The records of what was written cannot be believed; the statistics of the experts are not affected.
        for index in decided.layers:
            _record(decided, work, index, (), [])
        raise
    progress.say(f"verified: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes")


def complete_scores(settings: OutputSettings, checkpoint: Checkpoint, scores: Scores, work: WorkFolder) -> None:
    """Write the scores and give them their name, complete or not at all.

    What is being written lies in a folder next to the output. Raises ScoresError, OutputError and ResourceError.
    """
    complete_file = settings.output_work_folder / SCORES_NAME
    write_scores(complete_file, scores)
    with writing(f"Completing {settings.output}", settings.output):
        # Hours may have passed: whatever came to lie there meanwhile is not ours to replace.
        check_scores_file(settings.output, checkpoint.folder, settings.overwrite)
        work.record_complete(complete_file)
        reached("scores written")
        complete_file.rename(settings.output)
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
