"""What a run would do, told from config and headers alone.

The run: plan it, stream the blocks, write the output, tell the user. `streamprune score` does the first half.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings, beside
from streamprune.distributed.processes import ALONE, Processes
from streamprune.evaluation.held_out import save_held_out, split_held_out
from streamprune.fit.answer import estimate_object
from streamprune.fit.footprint import read_headers
from streamprune.hardware.device import choose_device, describe_host
from streamprune.hardware.memory import check_disk, peak_resident_bytes
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.output.plan import PrunePlan, make_plan
from streamprune.output.writer import OutputWriter, check_place
from streamprune.pipeline.finish import (
    RunResult,
    SelectionResult,
    complete,
    complete_scores,
    print_selection,
    select_all,
    summary_of,
    summary_of_scores,
    write_blocks,
)
from streamprune.pipeline.messages import (
    NO_ESTIMATE,
    print_calibration,
    print_memory,
    print_model,
    print_plan,
    print_processes,
    print_result,
    print_scores,
    print_work,
)
from streamprune.pipeline.resume import (
    calibration_of,
    check_same,
    describe_run,
    provenance_of,
    run_to_resume,
    settings_of,
)
from streamprune.pipeline.run_evaluation import RunEvaluation
from streamprune.pipeline.status import ended
from streamprune.planning.memory_needs import plan_memory
from streamprune.planning.model_facts import ModelFacts
from streamprune.planning.prepare import (
    PreparedModel,
    calibrate,
    check_schedule,
    facts_of,
    prepare,
    selector_of,
    vocabulary_of,
)
from streamprune.planning.pruning_plan import PruningPlan, plan_pruning, with_footprint
from streamprune.progress import LOG_SUFFIX, Progress
from streamprune.saliency.scores import LayerStatistics, Scores
from streamprune.saliency.scores_file import check_scores_file
from streamprune.selection.select import Selection
from streamprune.streaming.layer_loop import LayerLoop, OutputTarget
from streamprune.streaming.predictions import find_head
from streamprune.streaming.shared import LeadingScorer, call_in, together
from streamprune.work.enter import StopRequest, begin, listening, on_exit, open_work_folder
from streamprune.work.folder import WorkFolder
from streamprune.work.records import with_changes


def print_dry_run(settings: RunSettings, quiet: bool = False) -> dict[str, Any]:
    """Decide and tell what `run` would do, from config and headers alone. Downloads and writes nothing large.

    Returns what `--dry-run --json` prints. Raises like `run`, also where the disk is too small for the output.
    """
    settings.check_device(choose_device(settings.device).type)
    plan = plan_pruning(settings)
    if plan.footprint is None:
        plan = with_footprint(plan, settings.model, plan.skeleton, read_headers(settings.model, plan.folder))
    planned, estimate = plan.counts, plan.estimate(settings)
    assert planned is not None
    with Progress(plan.skeleton.layer_count, quiet) as progress:
        print_plan(progress, settings, plan)
        if estimate is not None:
            print_memory(progress, estimate)
        else:
            progress.say(NO_ESTIMATE)
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
        "memory": estimate_object(estimate) if estimate else None,
    }


def run(settings: RunSettings, quiet: bool = False) -> RunResult:
    """Prune a model, or only score it: one block after the other, going on where an earlier run stopped.

    Once a block is finished, the work folder stays whatever this raises, so that nothing done is lost.
    Where several processes were launched together, each has to call this, and all get the result (`streaming.shared`).
    """
    return together(settings.device, lambda processes: _run(settings, quiet, None, processes))


def resume(work_folder: Path, quiet: bool = False, **changes: Any) -> RunResult:
    """Go on with the run recorded in a work folder. `changes` are settings that may differ: device, caps and the like.

    Raises ResumeError when there is none, or when what decides the result has changed. Several processes as for `run`.
    """
    return together(changes.get("device", "auto"), lambda processes: _resume(work_folder, quiet, changes, processes))


def _resume(work_folder: Path, quiet: bool, changes: Mapping[str, Any], processes: Processes) -> RunResult:
    recorded = run_to_resume(work_folder)
    settings = with_changes(settings_of(recorded, work_folder), work_folder, changes)
    if ended(work_folder, settings.output):
        return RunResult(settings.output, (), {"output": str(settings.output), "complete": True})
    return _run(settings, quiet, recorded, processes)


def _run(settings: RunSettings, quiet: bool, recorded: Mapping[str, Any] | None, processes: Processes) -> RunResult:
    device = device_of(settings, processes)
    plan = plan_pruning(settings)
    with Progress(plan.skeleton.layer_count, quiet) as progress, ExitStack() as stack:
        work = open_work_folder(stack, settings)
        stop = stack.enter_context(listening())
        with on_exit(work, progress.say):
            run = _Run(settings, plan, device, progress, work, stop, processes)
            result = run.go(tokens_recorded=recorded is not None)
        # The output is complete: there is nothing left to be stopped.
        stop.patient = True
        work.remove()
        shutil.rmtree(settings.folder_beside, ignore_errors=True)
    return result


@dataclass(frozen=True)
class _Run:
    """A run, led by the first or only process."""

    settings: RunSettings
    plan: PruningPlan
    device: torch.device
    progress: Progress
    work: WorkFolder
    stop: StopRequest
    processes: Processes

    def go(self, tokens_recorded: bool) -> RunResult:
        check_place(self.settings)
        if self.settings.only_score:
            # Again: an old output may just have been put back.
            check_scores_file(self.settings.output, self.plan.folder, self.settings.overwrite)
        recorded = begin(self.settings, self.work)
        # Before tens of GiB are downloaded: text that is of no use should cost no time.
        if recorded is not None and tokens_recorded:
            vocabulary = vocabulary_of(self.plan.skeleton)
            whole = calibration_of(recorded, self.work.read_tokens(), self.work.folder, vocabulary)
        else:
            whole = calibrate(self.settings, self.plan)
        calibration = split_held_out(whole) if self.settings.evaluate else whole
        prepared = prepare(self.settings, self.plan)
        if self.settings.evaluate:
            find_head(prepared.skeleton.model)
        facts = facts_of(prepared)
        check_schedule(self.settings, facts, prepared.counts)
        # Nothing is told before all is known to be in order: a refusal is one message and no more.
        print_plan(self.progress, self.settings, self.plan)
        print_model(self.progress, self.settings, prepared)
        print_calibration(self.progress, prepared, calibration, self.device)
        settings = self.settings
        if recorded is not None and settings.batch_tokens is None:
            # The same micro-batches, so that the same digits come out.
            settings = replace(settings, batch_tokens=recorded["batch_tokens"])
        streamed = _streamed(settings, calibration)
        # (With what is held back also where that is measured on only once all is scored.)
        memory = plan_memory(settings, prepared, calibration, self.device, self.work.folder, self.processes)
        memory = call_in(self.processes, settings, prepared, streamed, memory)
        print_processes(self.progress, self.processes, self.device)
        self.progress.say(memory.describe())
        now = describe_run(settings, prepared, whole) | {"batch_tokens": memory.batch_tokens}
        if recorded is not None:
            check_same(recorded, now, self.work.folder)
        else:
            print_work(self.progress, settings, prepared, memory, self.work)
            self.work.write_run(now, [sequence.tolist() for sequence in whole.sequences])
        return self._stream(settings, prepared, facts, calibration, memory)

    def _stream(
        self,
        settings: RunSettings,
        prepared: PreparedModel,
        facts: ModelFacts,
        calibration: Calibration,
        memory: MemoryPlan,
    ) -> RunResult:
        selector = selector_of(settings, prepared, calibration)
        writer = outlet = None
        if selector is not None and prepared.counts is not None and not selector.settings.needs_all_layers:
            writer = self._writer(settings, prepared, facts, prepared.counts)
            outlet = OutputTarget(writer, selector)
        self.stop.patient = True
        streamed, examination = _streamed(settings, calibration), None
        if calibration.held is not None:
            beside = streamed.held is not None
            examination = RunEvaluation(settings, prepared, calibration.held, self.work, self.progress, beside)
        with LeadingScorer(
            settings, prepared, streamed, memory, self.device, self.progress, self.work.folder, selector, self.stop,
            self.processes,
        ) as scorer:  # fmt: skip
            layers = LayerLoop(
                settings, facts.layout, scorer, calibration.tokens_of, outlet, self.work, self.progress, self.stop,
                examination,
            ).stream(self.device)  # fmt: skip
        provenance = provenance_of(settings, prepared, calibration, self.device, scorer.batch_tokens)
        scores = _scores(layers, calibration, facts, provenance)
        taken = {
            "processes": self.processes.count,
            "calibration_tokens": calibration.tokens,
            "batch_tokens": scorer.batch_tokens,
            "states": scorer.states_place,
            "shrinks": [asdict(shrink) for shrink in scorer.shrinks],
        }
        if selector is None:
            return self._leave_scores(prepared, scores, {**taken, "busy": scorer.busy.shares()})
        selection = select_all(selector, scores, settings, self.work)
        writer = writer or self._writer(settings, prepared, facts, selection.counts_by_layer)
        decided = _decided(settings, prepared, facts, selection, writer.plan, scores)
        print_selection(decided, self.progress)
        if calibration.held is not None:
            # Before the output has its name, or is refused one: nothing is left to be gone on with then.
            save_held_out(settings.output, calibration.held, self.progress)
        if examination is not None:
            examination.settle(decided, memory, self.device, self.stop)
        if outlet is None:
            with scorer.busy.at("write"):
                write_blocks(decided, writer, self.work, self.progress, self.stop)
        evaluation = examination.result if examination is not None else None
        return self._leave_model(decided, writer, {**taken, "busy": scorer.busy.shares()}, evaluation)

    def _writer(
        self, settings: RunSettings, prepared: PreparedModel, facts: ModelFacts, counts: Mapping[int, int]
    ) -> OutputWriter:
        plan = make_plan(facts.layout, facts.loading, prepared.checkpoint, counts, settings.max_shard_bytes)
        return OutputWriter(plan, prepared.checkpoint, settings, self.work)

    def _leave_scores(self, prepared: PreparedModel, scores: Scores, taken: Mapping[str, Any]) -> RunResult:
        self.stop.patient = False
        complete_scores(self.settings, prepared.checkpoint, scores, self.work)
        summary = {
            **summary_of_scores(self.settings, scores, self.progress.seconds),
            **taken,
            "peak_resident_bytes": peak_resident_bytes(),
        }
        self._log(summary)
        print_scores(self.progress, self.settings, scores, summary)
        return RunResult(self.settings.output, (), summary)

    def _leave_model(
        self,
        decided: SelectionResult,
        writer: OutputWriter,
        taken: Mapping[str, Any],
        evaluation: Mapping[str, Any] | None,
    ) -> RunResult:
        """Check what was written, give it its name, and tell the user."""
        self.stop.patient = False
        self.work.states.forget()
        estimate = complete(decided, writer, self.work, self.progress, evaluation)
        # The output is complete from here on, whatever happens to the log or the terminal.
        told = estimate_object(estimate) if estimate else None
        summary = {
            **summary_of(decided, told, self.progress.seconds),
            **({"evaluation": evaluation} if evaluation is not None else {}),
            **taken,
            "peak_resident_bytes": peak_resident_bytes(),
        }
        self._log(summary)
        print_result(self.progress, self.settings, summary)
        if estimate is not None:
            print_memory(self.progress, estimate)
        return RunResult(self.settings.output, decided.selection.layers, summary)

    def _log(self, summary: Mapping[str, Any]) -> None:
        self.progress.log("summary", {**summary, "host": describe_host(self.device)})
        self.progress.write_log(beside(self.settings.output, LOG_SUFFIX))


def _streamed(settings: RunSettings, calibration: Calibration) -> Calibration:
    """What goes through the blocks while they are scored: where experts are chosen once all are, not what is held."""
    return replace(calibration, held=None) if settings.needs_all_layers else calibration


def _scores(
    layers: Sequence[LayerStatistics], calibration: Calibration, facts: ModelFacts, provenance: Mapping[str, Any]
) -> Scores:
    sources, tokens = calibration.sources, calibration.tokens_of
    return Scores(tuple(layers), sources, tokens, facts.layout.spec, provenance, facts.as_json())


def _decided(
    settings: RunSettings,
    prepared: PreparedModel,
    facts: ModelFacts,
    selection: Selection,
    plan: PrunePlan,
    scores: Scores,
) -> SelectionResult:
    counts, provenance = prepared.plan.counts, scores.provenance
    assert counts is not None  # only where nothing is pruned
    return SelectionResult(settings, prepared.checkpoint, facts, counts, selection, plan, provenance, scores)


def device_of(settings: RunSettings, processes: Processes = ALONE) -> torch.device:
    """The device that a process of a run computes on. Raises SettingsError where a setting makes no sense on it."""
    device = choose_device(settings.device, processes.local_rank)
    settings.check_device(device.type)
    return device
