"""`run` and `score`: prepare, stream the layers, select the experts that stay, complete the output.

All processes run the same steps; only rank 0 reads the user's files, writes and prints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from streamprune.calibration.refit_text import only_refitted
from streamprune.calibration.sequences import Calibration, with_date, with_day
from streamprune.config import RunSettings
from streamprune.distributed.joining import joined
from streamprune.distributed.processes import ALONE, Processes
from streamprune.errors import SettingsError
from streamprune.evaluation.held_out import save_held_out, split_held_out
from streamprune.files.durable import kill_point
from streamprune.files.names import sibling_path
from streamprune.hardware.device import choose_device, describe_host
from streamprune.hardware.memory import peak_resident_bytes
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.models.open import versions
from streamprune.output.plan import make_plan
from streamprune.output.writer import OutputWriter, check_place
from streamprune.pipeline import finish, messages
from streamprune.pipeline.finish import RunResult, SelectionResult
from streamprune.pipeline.imatrix import PlannedImatrix, planned_imatrix
from streamprune.pipeline.job import Job, open_alike
from streamprune.pipeline.output_target import OutputTarget
from streamprune.pipeline.repeated_run import repeated_run
from streamprune.pipeline.resume import (
    check_same,
    describe_run,
    provenance_of,
    read_calibration,
    recorded_refit,
    recorded_rounding,
    settings_to_resume,
    tokens_of,
)
from streamprune.pipeline.run_evaluation import RunEvaluation, refuse_again, was_held_back
from streamprune.pipeline.run_layers import RunLayers, both_sweeps
from streamprune.planning.facts import check_scores_match
from streamprune.planning.imatrix import check_imatrix_file, gguf_names
from streamprune.planning.memory_needs import agree_on_batch_tokens, find_needs, plan_memory
from streamprune.planning.prepare import (
    PreparedModel,
    calibrate,
    check_schedule,
    computed_in,
    plan_pruning,
    prepare,
)
from streamprune.planning.text_uses import with_uses
from streamprune.progress import LOG_SUFFIX, Progress, stage
from streamprune.reporting.make_record import check_provenance, check_scores_of
from streamprune.saliency.combine import choices
from streamprune.saliency.scores import LayerStatistics, Scores, apart_from_mtp
from streamprune.saliency.scores_file import check_scores_file, read_scores
from streamprune.selection.select import Selection, Selector
from streamprune.streaming.batches import Runtime
from streamprune.streaming.down_tensors import down_tensors
from streamprune.streaming.predictions import find_head
from streamprune.streaming.written_tensors import written_tensors
from streamprune.work.enter import StopRequest, begin, listening, on_exit, open_work_folder
from streamprune.work.folder import WorkFolder
from streamprune.work.records import RecordedRun, write_run


def run(settings: RunSettings, quiet: bool = False) -> RunResult:
    """Prune a model, or only score it, one layer after the other; or resume an unfinished earlier run.

    An output of an earlier run with the same settings is checked and kept. On any error the work folder stays if a
    layer is finished, so that the run can be resumed. If several processes were launched together, each has to call
    this, and all get the result.
    """
    with joined(settings.device) as processes:
        return _run(settings, quiet, processes)


def resume(work_folder: Path, quiet: bool = False, **changes: Any) -> RunResult:
    """Resume the run recorded in a work folder. `changes` are settings that may differ, such as device and memory.

    Raises ResumeError if there is none, or if anything that decides the result has changed. With several processes
    each has to call this, as for `run`.
    """
    with joined(changes.get("device", "auto")) as processes:
        found = processes.on_first(lambda: settings_to_resume(work_folder, changes))
        return found if isinstance(found, RunResult) else _run(found, quiet, processes, resuming=True)


def _run(settings: RunSettings, quiet: bool, processes: Processes, resuming: bool = False) -> RunResult:
    device = processes.on_each(lambda: device_of(settings, processes))
    with ExitStack() as stack:
        process = _Run(processes, device, stack)
        job = processes.on_first(lambda: repeated_run(settings, quiet) or process.begin(settings, quiet, resuming))
        return job if isinstance(job, RunResult) else process.go(job)


def device_of(settings: RunSettings, processes: Processes = ALONE) -> torch.device:
    """The device that a process of a run computes on. Raises SettingsError if a setting makes no sense on it."""
    device = choose_device(settings.device, processes.local_rank)
    settings.check_device(device.type)
    return device


class _Run:
    """A run in one process: `begin` in rank 0, then `go` in all. They call the other methods in the order below.

    `stack` closes what it opens. On any exit, finished work is kept.
    """

    #: In rank 0 alone; `full_text` is the calibration with its held-out text, `recorded` the run to resume.
    work: WorkFolder
    full_text: Calibration
    recorded: RecordedRun | None
    writer: OutputWriter | None = None
    decided: SelectionResult
    #: The scores of --scores; only in rank 0.
    given: Scores | None = None
    #: In all ranks.
    prepared: PreparedModel
    settings: RunSettings
    calibration: Calibration
    runtime: Runtime

    def __init__(self, processes: Processes, device: torch.device, stack: ExitStack) -> None:
        self.processes, self.device, self.stack = processes, device, stack
        self.progress = Progress(0, quiet=True)
        if not processes.is_first:
            # Rank 0 gets the user's request to stop, and passes it on while layers are streamed.
            self.stop: StopRequest = stack.enter_context(listening())
            self.stop.patient = True

    def begin(self, settings: RunSettings, quiet: bool, resuming: bool) -> Job:
        """Decide what to prune, lock the work folder, read the calibration, open the model. Rank 0."""
        plan = plan_pruning(settings)
        self.progress = self.stack.enter_context(Progress(plan.skeleton.layer_count, quiet))
        self.work = work = open_work_folder(self.stack, settings)
        self.stop = self.stack.enter_context(listening())
        self.stack.push(lambda kind, *_: self._remove_work(settings) if kind is None else None)
        self.stack.enter_context(on_exit(work, self.progress.say))
        check_place(settings)
        if settings.only_score:
            # Checked again: locking the work folder may have moved an old output back.
            check_scores_file(settings.output, plan.folder, settings.overwrite)
        self.recorded = recorded = begin(settings, work)
        settings = self._dated(settings)
        if recorded is not None:
            plan, settings = computed_in(plan, settings, recorded.dtype)
        if settings.imatrix is not None:
            # (One that is there already may be that of this very run, which was killed before its output was renamed.)
            check_imatrix_file(settings.imatrix, settings.overwrite or recorded is not None)
        # Read the text before tens of GiB are downloaded, so that errors in it come early.
        if recorded is not None and resuming:
            self.full_text = read_calibration(recorded, work.folder, plan.vocabulary)
        else:
            with stage(self.progress.say, "reading the calibration text"):
                self.full_text = calibrate(settings, plan)
        calibration = split_held_out(self.full_text) if settings.evaluate else self.full_text
        with stage(self.progress.say, f"reading the headers of {settings.model}"):
            self.prepared = prepared = prepare(settings, plan)
        if settings.sends_text:
            calibration = self._with_uses(settings, calibration)
        if settings.scores is not None and self.given is not None:
            check_scores_of(settings.scores, prepared.checkpoint, self.given)
            check_scores_match(settings.scores, self.given, prepared.layout)
        if settings.evaluate:
            find_head(prepared.skeleton.model)
        check_schedule(settings, prepared)
        # Nothing is printed before everything is checked, so that a refusal is a single message.
        messages.print_plan(self.progress, settings, prepared.plan)
        messages.print_prepared(self.progress, settings, prepared, calibration, self.device, self.given)
        if recorded is not None and settings.batch_tokens is None:
            # With the same micro-batches the result has the same digits.
            settings = replace(settings, batch_tokens=recorded.batch_tokens)
        fingerprint = prepared.checkpoint.fingerprint() if self.processes.count > 1 else ""
        # (CPUs differ in what is quick: all processes compute in the same dtype, and so does a run that is resumed.)
        settings = replace(settings, dtype=prepared.dtype_name)
        return Job(settings, calibration, prepared.plan.counts, fingerprint, versions())

    def _dated(self, settings: RunSettings) -> RunSettings:
        """The settings, for text of the day of the run to resume, or of --scores, which are read here. Rank 0.

        So weights are computed from the same text as in a run that scores too. Raises ScoresError.
        """
        recipes: list[Any] = self.recorded.recipes if self.recorded is not None else []
        if settings.scores is not None:
            self.given = read_scores(settings.scores)
            check_provenance(self.given)
            recipes = [*recipes, (self.given.provenance["calibration"] or {}).get("recipe")]
        return with_day(with_date(settings, *recipes))

    def go(self, job: Job) -> RunResult:
        """Stream the layers, select, and complete the output. All ranks."""
        self.settings, self.calibration = job.settings, job.calibration
        is_first = self.processes.is_first
        self.prepared = self.processes.on_each(lambda: self.prepared if is_first else open_alike(job))
        # If the selection needs the scores of all layers, or has them already, everything else comes after it.
        after_all = self.settings.needs_all_layers or self.settings.scores is not None
        streamed = replace(self.calibration, held_out=None, anchor=None, refit=()) if after_all else self.calibration
        self.runtime = self._plan(streamed)
        selector = self._selector()
        target = evaluation = None
        if selector is not None and selector.per_layer is not None and not after_all:
            if is_first:
                self.writer = self._new_writer(selector.per_layer)
            target = OutputTarget(self.writer, selector)
        work = self.work if is_first else None
        if self.calibration.held_out is not None:
            during = not after_all or self.settings.sends_text
            held_out, given = self.calibration.held_out, self.given
            held_back = self.processes.on_first(lambda: was_held_back(held_out, given, self.progress))
            evaluation = RunEvaluation(self.runtime, self.prepared, held_out, work, during, held_back)
        if self.settings.scores is None:
            during_scoring = None if after_all else evaluation
            layers = RunLayers(self.runtime, self.prepared, streamed, target, work, during_scoring)
            found, taken = layers.stream()
            if selector is None:
                return self.processes.on_first(lambda: self._complete_scores(self._scores(found, taken), taken))
            selection = self.processes.on_first(lambda: self._select(self._scores(found, taken), selector))
        else:
            selection = self.processes.on_first(self._select_by_scores)
        if evaluation is not None and is_first:
            evaluation.scores = self.decided.scores
        if self.settings.sends_text and after_all:
            computed = self._compute_weights(selection, work, evaluation)
            taken = both_sweeps(taken, computed) if self.settings.scores is None else computed
        elif evaluation is not None:
            evaluation.complete(self._chosen(selection), selection)
        is_written = target is not None or (self.settings.sends_text and after_all)
        return self.processes.on_first(lambda: self._complete(is_written, evaluation, taken))

    def _with_uses(self, settings: RunSettings, calibration: Calibration) -> Calibration:
        """The calibration with what its sequences are for where weights are computed. Rank 0.

        Raises CalibrationError for too little text, UnsupportedModelError for weights that cannot be computed.
        """
        prepared, counts = self.prepared, self.prepared.plan.counts
        assert counts is not None
        if settings.refit:
            down_tensors(prepared, written_tensors(prepared, self.device))
        return with_uses(settings, calibration, prepared.skeleton, counts)

    def _chosen(self, selection: Selection) -> PreparedModel:
        """The prepared model with the numbers of experts that were selected."""
        counts = self.prepared.plan.counts
        assert counts is not None
        chosen = replace(counts, total=sum(selection.counts), per_layer=selection.counts_by_layer)
        return replace(self.prepared, plan=replace(self.prepared.plan, counts=chosen))

    def _compute_weights(
        self, selection: Selection, work: WorkFolder | None, evaluation: RunEvaluation | None
    ) -> dict[str, Any]:
        """Compute and write the layers in a sweep of its own, because all of them are scored before one is pruned.

        Returns how it was done, as JSON. All ranks.
        """
        prepared = self._chosen(selection)
        scored = self.processes.on_first(self._scored_layers)
        selector = Selector(self.settings.selection, prepared.layout.spec, (), (), sum(selection.counts))
        stays = prepared.written.layout.with_mtp(selection.stays)
        target = OutputTarget(self.writer, selector, stays, scored)
        self.progress.say(f"all experts are selected; {self._computing} the layers ...")
        layers = RunLayers(self.runtime, prepared, only_refitted(self.calibration), target, work, evaluation)
        return layers.stream()[1]

    @property
    def _computing(self) -> str:
        parts = ["refitting"] * self.settings.refit + ["rounding"] * self.settings.needs_text
        return " and ".join(parts) or "sending text through"

    def _scored_layers(self) -> Sequence[LayerStatistics]:
        assert self.decided.scores is not None
        return self.decided.scores.every

    def _select_by_scores(self) -> Selection:
        counts, scores = self.prepared.plan.counts, self.given
        assert counts is not None
        assert scores is not None
        by, spec = self.settings.selection, scores.spec
        selector = Selector(
            by, spec, scores.sources, scores.source_tokens, counts.total, counts.per_layer, counts.width
        )
        return self._select(scores, selector)

    def _plan(self, streamed: Calibration) -> Runtime:
        """Plan the use of memory together with the other ranks, and record the run."""
        settings, prepared, processes = self.settings, self.prepared, self.processes
        # On other machines the work folder may not exist. States on disk are unnamed files, so any folder will do.
        folder = settings.work_folder if settings.work_folder.is_dir() else Path(gettempdir())

        def plan_here() -> MemoryPlan:
            # (With the held-out text, even if it is measured only after all layers are scored.)
            needs = find_needs(settings, prepared, self.calibration, self.device)
            return plan_memory(settings, needs, prepared.planned_bytes, self.device, folder, processes)

        plan = agree_on_batch_tokens(processes, streamed, processes.on_each(plan_here))
        processes.on_first(lambda: self._record(plan))
        self.stop.patient = True
        return Runtime(settings, plan, self.device, self.progress, folder, self.stop, processes=processes)

    def _record(self, plan: MemoryPlan) -> None:
        """Print the memory plan, and record the run, or check that it equals the recorded one. Rank 0."""
        messages.print_processes(self.progress, self.processes, self.device)
        self.progress.say(plan.describe())
        now = describe_run(self.settings, self.prepared, self.full_text, plan.batch_tokens)
        if self.recorded is not None:
            check_same(self.recorded, now, self.work.folder)
            refuse_again(self.settings, self.work)
        else:
            messages.print_work(self.progress, self.settings, self.prepared, plan, self.work)
            write_run(self.work.folder, now, tokens_of(self.full_text))

    def _selector(self) -> Selector | None:
        """The selector of the experts; None if the run only scores."""
        counts, text, spec = self.prepared.plan.counts, self.calibration, self.prepared.layout.spec
        if counts is None or self.settings.scores is not None:
            return None
        by = self.settings.selection
        return Selector(by, spec, text.sources, text.tokens_of, counts.total, counts.per_layer, counts.width)

    def _scores(self, layers: Sequence[LayerStatistics], taken: Mapping[str, Any]) -> Scores:
        text, facts = self.calibration, self.prepared.facts
        provenance = provenance_of(self.settings, self.prepared, text, self.device, taken["batch_tokens"])
        own, mtp = apart_from_mtp(layers, facts.layout.layer_count)
        return Scores(own, text.sources, text.tokens_of, facts.layout.spec, provenance, facts.as_json(), mtp)

    def _select(self, scores: Scores, selector: Selector) -> Selection:
        """Select the experts of all layers, print the retention, and save the held-out text next to the output.

        Raises SettingsError if no selection is possible. Then the scores, which took all the time, are saved next to
        the output, and the work folder is emptied, since resuming would end in the same error. Rank 0.
        """
        counts = self.prepared.plan.counts
        assert counts is not None
        try:
            selection = selector.all(scores.layers, scores.mtp)
        except SettingsError as error:
            kept = finish.save_scores(self.settings, scores)
            self.work.start_afresh()
            raise SettingsError(
                f"{error} All layers are scored: change the selection with `streamprune prune --scores {kept}`."
            ) from None
        self.writer = self.writer or self._new_writer(selection.counts_by_layer)
        scored = scores.provenance["calibration"]
        refit = recorded_refit(self.settings, self.calibration, scored) if self.settings.refit else None
        rounding = recorded_rounding(self.calibration, scored) if self.settings.needs_text else None
        self.decided = SelectionResult(
            self.settings, self.prepared.checkpoint, self.prepared.facts, counts, selection, self.writer.plan,
            scores.provenance, scores, refit, rounding, self._planned_imatrix(),
        )  # fmt: skip
        self.decided.print_retention(self.progress)
        self.decided.print_serving_notes(self.progress)
        if self.calibration.held_out is not None:
            # Saved before the output is complete or --stop-if-kl ends the run, to allow measuring again.
            save_held_out(self.settings.output, self.calibration.held_out, self.progress)
        return selection

    def _planned_imatrix(self) -> PlannedImatrix | None:
        if self.settings.imatrix is None:
            return None
        return planned_imatrix(self.settings.imatrix, gguf_names(self.prepared.skeleton), self.calibration)

    def _complete(self, is_written: bool, evaluation: RunEvaluation | None, taken: Mapping[str, Any]) -> RunResult:
        """Write the layers that are not written yet, verify the output, rename it to its path, and print the result.

        `taken` says how the statistics were made, as JSON. Called in rank 0 only.
        """
        decided, writer, work, progress = self.decided, self.writer, self.work, self.progress
        assert writer is not None
        if evaluation is not None:
            evaluation.judge()
        if not is_written:
            with self.runtime.busy.at("write"):
                finish.write_layers(decided, writer, work, progress, self.stop)
        self.stop.patient = False
        work.states.forget()
        result = evaluation.result if evaluation is not None else None
        estimate = finish.complete(decided, writer, work, progress, result)
        # The output is complete from here on, even if the log or the terminal fails.
        measured = {"evaluation": result} if result is not None else {}
        summary = self._log({**decided.summary(estimate, progress.seconds), **measured}, taken)
        finish.print_result(progress, decided, summary, estimate)
        kill_point("result printed")
        return RunResult(self.settings.output, decided.selection.layers, summary)

    def _complete_scores(self, scores: Scores, taken: Mapping[str, Any]) -> RunResult:
        """Write the scores file of `score`. Rank 0."""
        self.stop.patient = False
        finish.complete_scores(self.settings, self.prepared.checkpoint, scores, self.work)
        summary = {
            "output": str(self.settings.output),
            "model": self.settings.model,
            "moe_layers": len(scores.layers),
            "source_experts_per_layer": scores.spec.count,
            "sources": dict(zip(scores.sources, scores.source_tokens, strict=True)),
            "seconds": round(self.progress.seconds, 3),
        }
        summary = self._log(summary, taken)
        messages.print_scores(self.progress, self.settings.output, scores, summary)
        kill_point("result printed")
        return RunResult(self.settings.output, (), summary)

    def _log(self, summary: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
        """The summary with how the scores were made and the utilisation. Prints and logs it."""
        busy = self.runtime.busy.utilisation()
        summary = {**summary, **taken, "busy": busy, "peak_resident_bytes": peak_resident_bytes()}
        self.progress.log("summary", {**summary, "host": describe_host(self.device), "pair_kernel": choices()})
        self.progress.write_log(sibling_path(self.settings.output, LOG_SUFFIX))
        messages.print_utilisation(self.progress, self.settings, summary)
        return summary

    def _new_writer(self, counts: Mapping[int, int]) -> OutputWriter:
        planned, most = self.prepared.plan.counts, self.settings.max_shard_bytes
        width = planned.width if planned is not None else None
        plan = make_plan(self.prepared.written, counts, most, width)
        return OutputWriter(plan, self.prepared.checkpoint, self.settings, self.work)

    def _remove_work(self, settings: RunSettings) -> None:
        """Remove the work folder: the output is complete, so nothing is left to stop or resume."""
        self.stop.patient = True
        self.work.remove()
        shutil.rmtree(settings.output_work_folder, ignore_errors=True)
