"""`streamprune prune`: an output from an existing scores file, or from the user's own list. No forward pass.

With scores, neither torch nor transformers is needed: the file states where the experts are in the checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.config import PruneSettings
from streamprune.errors import OutputError, ResumeError, SettingsError
from streamprune.files.durable import kill_point
from streamprune.files.names import sibling_path
from streamprune.fit.estimate import Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.verdict import share_removed, verdict
from streamprune.formats.pick import refuse_quantized
from streamprune.formats.quantization import checkpoint_notes
from streamprune.hardware.memory import check_disk, peak_resident_bytes
from streamprune.models.per_layer_experts import has_per_layer_experts, refuse_per_layer_experts
from streamprune.output.dequantized import dequantized, dequantized_layout, refuse_plain
from streamprune.output.plan import OutputSource, make_plan, written_layout
from streamprune.output.writer import OutputWriter, check_output, check_place
from streamprune.pipeline import finish
from streamprune.pipeline.finish import RunResult, SelectionResult
from streamprune.pipeline.printing import print_engine_notes, print_left_out, print_memory, print_notes, print_weights
from streamprune.pipeline.repeated import may_be_finished, repeated
from streamprune.pipeline.status import ended
from streamprune.planning.counts import ExpertCounts, Prunable, plan_counts, refuse_new_values, with_engine
from streamprune.planning.facts import (
    ModelFacts,
    check_scores_match,
    facts_from_json,
    prunable_from_scores,
)
from streamprune.planning.sizes import PlainTensors, WrittenSizes
from streamprune.progress import LOG_SUFFIX, Progress
from streamprune.quantize.schemes import require_library
from streamprune.reporting.make_record import check_provenance, check_scores_of, provenance_by_hand
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores
from streamprune.selection.select import Selection, Selector, listed_selection
from streamprune.selection.settings import SelectionSettings
from streamprune.selection.user_files import read_keep_file
from streamprune.work import records
from streamprune.work.enter import listening, on_exit, open_work_folder
from streamprune.work.folder import WorkFolder, folder_bytes
from streamprune.work.records import has_pruning, has_run


def prune(settings: PruneSettings, quiet: bool = False) -> RunResult:
    """Write the pruned model, or resume an unfinished earlier call. A finished output of the same call is kept.

    Takes the time of a file copy, and memory for the scores and a few MiB. Raises a StreampruneError before anything
    is written if the settings, the model or the machine do not allow it.
    """
    in_place = may_be_finished(settings)
    # (Its place is taken by what may be the result.)
    decided = replace(_decide(replace(settings, overwrite=True) if in_place else settings), settings=settings)
    with Progress(decided.plan.layout.layer_count, quiet) as progress, ExitStack() as stack:
        if in_place and (result := repeated(decided, progress)) is not None:
            return result
        _print_plan(settings, decided, progress)
        work = open_work_folder(stack, settings)
        stop = stack.enter_context(listening())
        with on_exit(work, progress.say):
            check_place(settings)
            _begin(settings, decided, work)
            to_write = max(0, decided.plan.output_bytes - folder_bytes(work.staging))
            finish.check_room(settings, work, to_write, decided.plan.output_bytes)
            writer = OutputWriter(decided.plan, decided.checkpoint, settings, work)
            stop.patient = True
            finish.write_layers(decided, writer, work, progress, stop)
            stop.patient = False
            estimate = finish.complete(decided, writer, work, progress)
        # The output is complete: nothing is left to stop.
        stop.patient = True
        summary = decided.summary(estimate, progress.seconds)
        _write_log(settings, summary, progress)
        work.remove()
        shutil.rmtree(settings.output_work_folder, ignore_errors=True)
        finish.print_result(progress, decided, summary, estimate)
        kill_point("result printed")
    return RunResult(settings.output, decided.selection.layers, summary)


def _write_log(settings: PruneSettings, summary: Mapping[str, Any], progress: Progress) -> None:
    """Write the summary to the log next to the output, from which the report knows that the output was verified."""
    progress.log("summary", {"command": "prune", **summary, "peak_resident_bytes": peak_resident_bytes()})
    progress.write_log(sibling_path(settings.output, LOG_SUFFIX))


def dry_run(settings: PruneSettings, quiet: bool = False) -> dict[str, Any]:
    """Plan and print what `prune` would do, and write nothing. Returns what `--dry-run --json` prints.

    Raises like `prune`, also if the disk is too small for the output.
    """
    decided = _decide(settings)
    footprint = decided.facts.footprint
    estimate = decided.counts.estimate(settings, footprint) if footprint is not None else None
    with Progress(decided.plan.layout.layer_count, quiet) as progress:
        _print_plan(settings, decided, progress)
        if estimate is not None:
            print_memory(progress, estimate)
        progress.say("dry run: nothing was written")
        check_disk(settings.output, decided.plan.output_bytes)
        return decided.summary(estimate, progress.seconds)


def resume(work_folder: Path, quiet: bool = False, **changes: Any) -> RunResult:
    """Resume the pruning recorded in a work folder. `changes` are settings that do not change the result.

    Raises ResumeError if there is none, or if anything that decides the result has changed.
    """
    recorded = records.read_pruning(work_folder)
    if recorded is None:
        raise ResumeError(
            f"{work_folder} has no `streamprune prune` to resume: its record is missing or damaged. Run the same "
            "command again; only the time of the file copy is lost."
        )
    settings = records.with_changes(recorded.settings_in(work_folder), work_folder, changes)
    if ended(work_folder, settings.output):
        return RunResult(settings.output, (), {"output": str(settings.output), "complete": True})
    return prune(settings, quiet)


def _decide(settings: PruneSettings) -> SelectionResult:
    """Open the model and plan its output, before a byte is written."""
    scores = _read_scores(settings)
    # For a model on the Hub only the config is fetched at first, so that errors come before the download.
    config_folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    check_output(settings.output, config_folder, settings.overwrite)
    raw = read_json(config_folder / CONFIG_NAME)
    refuse_per_layer_experts(raw, settings.model)
    refuse_quantized(raw, config_folder)
    refuse_new_values(raw, settings)
    if settings.weights == "bf16":
        refuse_plain(raw, config_folder)
    # (Before tens of GiB are downloaded.)
    require_library(settings.weights)
    checkpoint = open_checkpoint(resolve_model(settings.model, settings.revision, settings.trust_remote_code))
    facts = _with_forms(settings, checkpoint, _facts(settings, checkpoint, scores))
    # Refuses more context than the model can have.
    _ = facts.serving(settings, raw)
    provenance: Mapping[str, Any] = (
        scores.provenance if scores else provenance_by_hand(settings.model, settings.revision, checkpoint)
    )

    def footprint() -> Footprint:
        if facts.footprint is not None:
            return facts.footprint
        # A model whose memory cannot be found is refused here, with the reason.
        return read_footprint(settings.model, settings.revision, settings.trust_remote_code)

    layout, itemsize = facts.layout, facts.footprint.itemsize if facts.footprint is not None else 2
    prunable = Prunable(layout.spec, layout.expert_layers, layout.width, layout.fixed_width, itemsize, raw)
    counts, selection = _select(settings, scores, prunable, footprint)
    written = _written(settings, checkpoint, facts, counts.width)
    plan = make_plan(written, selection.counts_by_layer, settings.max_shard_bytes, counts.width)
    return SelectionResult(settings, checkpoint, facts, counts, selection, plan, provenance, scores)


def _read_scores(settings: PruneSettings) -> Scores | None:
    """The scores, if any are given. Raises for settings that they do not allow, before tens of GiB are downloaded."""
    by = replace(settings.selection, seed=settings.seed or None)
    if settings.keep_file is not None and by != SelectionSettings():
        raise SettingsError(
            "--keep-file says itself which experts stay. Omit --method, --mix, --schedule, --spread, --floor, "
            "--protect-super-experts and --seed."
        )
    if settings.scores is None:
        return None
    scores = read_scores(settings.scores)
    check_provenance(scores)

    def footprint() -> Footprint:
        raise AssertionError("nothing but a budget asks for it")

    prunable = Prunable(scores.spec, scores.layer_indices, None, "")
    if settings.width is not None or settings.by != "experts":
        prunable = prunable_from_scores(scores)
    if settings.budget_gib is None and settings.gpu is None:
        _select(settings, scores, prunable, footprint)
    return scores


def _select(
    settings: PruneSettings,
    scores: Scores | None,
    model: Prunable,
    footprint: Callable[[], Footprint],
) -> tuple[ExpertCounts, Selection]:
    """How many experts stay, and which: by the user's own list or by scores. `footprint` is called for a budget."""
    if settings.keep_file is not None:
        selection = listed_selection(
            read_keep_file(settings.keep_file, model.spec, model.layers), scores, settings.selection
        )
        counts = ExpertCounts(
            sum(selection.counts), len(selection.counts), selection.is_uniform, selection.counts_by_layer
        )
        return with_engine(settings, model, counts), selection
    if scores is None:
        # Only the way in which weights are stored changes (PruneSettings).
        every = tuple(range(model.spec.count))
        selection = listed_selection(dict.fromkeys(model.layers, every), None, settings.selection)
        counts = ExpertCounts(sum(selection.counts), len(selection.counts), True, selection.counts_by_layer)
        return with_engine(settings, model, counts), selection
    counts = plan_counts(settings, model, footprint)
    by, sources, tokens = settings.selection, scores.sources, scores.source_tokens
    selector = Selector(by, model.spec, sources, tokens, counts.total, counts.per_layer, counts.width)
    return counts, selector.all(scores.layers, scores.mtp)


def _print_plan(settings: PruneSettings, decided: SelectionResult, progress: Progress) -> None:
    plan, scores = decided.plan, decided.scores
    experts = plan.layout.spec.count
    progress.say(
        f"{settings.model}: {plan.layout.layer_count} layers, {len(plan.counts)} with {experts} experts; keeping "
        f"{decided.counts.text(experts, plan.counts)}"
    )
    print_notes(progress, decided.counts, has_per_layer_experts(plan.counts))
    for note in checkpoint_notes(decided.checkpoint):
        progress.say(f"note: {note}")
    print_engine_notes(progress, settings, decided.counts, decided.facts.footprint)
    if scores is not None and scores.provenance["settings"]["propagate"] == "pruned":
        progress.say(
            "note: these scores were made with --propagate pruned: after the first layer with experts they are valid "
            "for that run's selection only."
        )
    if decided.facts.footprint is not None:
        # (What would lose less is not said: to know it the model would have to be built.)
        said = verdict(share_removed(decided.counts.estimate(settings, decided.facts.footprint)))
        if said is not None:
            progress.say(f"note: {said}")
    decided.print_retention(progress)
    decided.print_serving_notes(progress)
    print_weights(progress, decided.checkpoint.nbytes, plan.output_bytes, plan.storage)
    print_left_out(progress, plan.layout, decided.selection.mtp is not None)


def _facts(settings: PruneSettings, checkpoint: Checkpoint, scores: Scores | None) -> ModelFacts:
    """The model's facts: read from the scores if they hold them, else found by building the model."""
    if scores is not None:
        assert settings.scores is not None
        check_scores_of(settings.scores, checkpoint, scores)
    if scores is not None and scores.layout is not None:
        facts = facts_from_json(scores.layout, scores.spec, settings.model, checkpoint)
    else:
        # Imported only here: it imports torch and transformers, which takes seconds.
        from streamprune.planning.prepare import facts_of_checkpoint

        facts = facts_of_checkpoint(settings.model, checkpoint, settings.trust_remote_code)
    if scores is not None:
        assert settings.scores is not None
        check_scores_match(settings.scores, scores, facts.layout)
    return facts


def _with_forms(settings: PruneSettings, checkpoint: Checkpoint, facts: ModelFacts) -> ModelFacts:
    """The facts, with what the weights take in every form."""
    footprint = facts.footprint
    if footprint is None:
        return facts

    def load() -> PlainTensors:
        # Imported only here, as in `_facts`.
        from streamprune.models.open import open_moe
        from streamprune.planning.written import plain_tensors

        skeleton = open_moe(checkpoint, settings.trust_remote_code).skeleton
        return plain_tensors(settings.storage, checkpoint.config, skeleton, checkpoint.tensors, footprint.weights)

    return replace(facts, footprint=replace(footprint, forms=WrittenSizes(load)))


def _written(settings: PruneSettings, checkpoint: Checkpoint, facts: ModelFacts, width: int | None) -> OutputSource:
    """What an output with `width` channels per expert (None: all) is cut from."""
    if settings.is_quantizing:
        # Imported only here, as in `_facts`: what is quantized follows from the model's modules.
        from streamprune.models.open import open_moe
        from streamprune.output.source import output_source

        opened = open_moe(checkpoint, settings.trust_remote_code)
        return output_source(opened, facts.loading, settings.storage, width)
    layout = written_layout(facts.layout, settings.storage)
    if settings.weights == "source":
        return OutputSource(checkpoint, layout, facts.loading)
    plain = dequantized(checkpoint)
    return OutputSource(plain, dequantized_layout(layout, plain), facts.loading)


def _begin(settings: PruneSettings, decided: SelectionResult, work: WorkFolder) -> None:
    """Keep the finished work of an earlier call if its selection was the same; otherwise start over."""
    folder, anew = work.folder, settings.resume == "never"
    if has_run(folder) and not anew:
        raise ResumeError(
            f"{folder} has an unfinished run. Resume it, discard it with `streamprune clean --all`, or add --resume "
            "never."
        )
    if not has_pruning(folder) and work.has_progress() and not anew:
        raise ResumeError(
            f"{folder} has finished layers, but no record of their model and settings. Start over with --resume never."
        )
    now = {
        "source": decided.provenance["source"]["fingerprint"],
        "files": records.file_states(decided.checkpoint),
        "kept": {str(layer.index): list(layer.kept) for layer in decided.selection.every},
        "channels": {
            str(layer.index): layer.channels.as_text()
            for layer in decided.selection.every
            if layer.channels is not None
        },
        "max_shard_bytes": settings.max_shard_bytes,
        **settings.storage.as_json(),
    }
    recorded = records.read_pruning(folder) if not anew else None
    if recorded is None or recorded.decided != now:
        if settings.resume == "required":
            raise ResumeError(
                f"{folder} has nothing to resume: it is empty, or was started with another selection of experts, "
                "another --max-shard-size, or other files of the model. Start over with `streamprune prune` and "
                "--resume never."
            )
        if work.keeps_old_output() and recorded is None:
            raise OutputError(f"{folder} holds an old output. Move it where you want it, then prune again.")
        work.start_afresh()
    layers = len(decided.plan.layout.written_layers)
    records.write_pruning(
        folder, records.RecordedPruning(command=records.command_of(settings), layers=layers, decided=now)
    )
