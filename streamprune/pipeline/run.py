"""`run` and `score`: plan, stream the layers, choose, write the output, print what came of it.

Every process takes the same steps; rank 0 alone reads the user's files, writes and prints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings, sibling_path
from streamprune.distributed.joining import joined
from streamprune.distributed.processes import ALONE, Processes
from streamprune.errors import ProcessesError
from streamprune.evaluation.held_out import save_held_out, split_held_out
from streamprune.fit.answer import estimate_object
from streamprune.fit.footprint import read_headers
from streamprune.hardware.device import choose_device, describe_host
from streamprune.hardware.memory import check_disk, peak_resident_bytes
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.models.config import versions
from streamprune.output.plan import make_plan
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
    write_layers,
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
from streamprune.pipeline.run_layers import OutputTarget, RunLayers
from streamprune.pipeline.status import ended
from streamprune.planning.expert_counts import ExpertCounts
from streamprune.planning.memory_needs import agree, plan_memory
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
from streamprune.planning.pruning_plan import plan_pruning, plan_with_counts, with_footprint
from streamprune.progress import LOG_SUFFIX, Progress
from streamprune.saliency.hooks import tap_experts
from streamprune.saliency.scores import LayerStatistics, Scores
from streamprune.saliency.scores_file import check_scores_file
from streamprune.selection.select import Selection, Selector
from streamprune.streaming.batches import Runtime
from streamprune.streaming.forward import ORIGINAL
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.predictions import find_head
from streamprune.streaming.stages import ForwardStage, LayerErrors, PrunedForwardStage, ScoreStage, Scoring
from streamprune.work.enter import StopRequest, begin, listening, on_exit, open_work_folder
from streamprune.work.folder import WorkFolder
from streamprune.work.records import with_changes


def print_dry_run(settings: RunSettings, quiet: bool = False) -> dict[str, Any]:
    """Decide and print what `run` would do, from config and headers alone. Downloads and writes nothing large.

    Returns the result of `--dry-run --json`. Raises like `run`, also where the disk is too small for the output.
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
    """Prune a model, or only score it: one layer after the other, going on where an earlier run stopped.

    Once a layer is finished, the work folder stays whatever this raises, so that nothing finished is lost. Where
    several processes were launched together, each has to call this, and all get the result.
    """
    with joined(settings.device) as processes:
        return _run(settings, quiet, processes)


def resume(work_folder: Path, quiet: bool = False, **changes: Any) -> RunResult:
    """Go on with the run recorded in a work folder. `changes` are settings that may differ: device, caps and the like.

    Raises ResumeError when there is none, or when what decides the result has changed. Several processes as for `run`.
    """
    with joined(changes.get("device", "auto")) as processes:
        found = processes.on_first(lambda: _settings_to_resume(work_folder, changes))
        return found if isinstance(found, RunResult) else _run(found, quiet, processes, resuming=True)


def _settings_to_resume(work_folder: Path, changes: Mapping[str, Any]) -> RunSettings | RunResult:
    """The settings of a recorded run, or its result if the output is complete already."""
    settings = with_changes(settings_of(run_to_resume(work_folder), work_folder), work_folder, changes)
    if ended(work_folder, settings.output):
        return RunResult(settings.output, (), {"output": str(settings.output), "complete": True})
    return settings


def _run(settings: RunSettings, quiet: bool, processes: Processes, resuming: bool = False) -> RunResult:
    device = processes.on_each(lambda: device_of(settings, processes))
    with ExitStack() as stack:
        run_steps = _Run(processes, device, stack)
        job = processes.on_first(lambda: run_steps.begin(settings, quiet, resuming))
        return run_steps.go(job)


@dataclass(frozen=True)
class _Job:
    """What rank 0 reads and decides for all ranks."""

    settings: RunSettings
    calibration: Calibration
    counts: ExpertCounts | None
    fingerprint: str
    versions: Mapping[str, str]


class _Run:
    """The steps of a run in one process. `work`, `facts`, `whole` and `recorded` are rank 0's alone.

    What it opens is closed with `stack`; on any exit, what is finished is kept.
    """

    work: WorkFolder | None = None
    facts: ModelFacts
    whole: Calibration
    recorded: dict[str, Any] | None

    def __init__(self, processes: Processes, device: torch.device, stack: ExitStack) -> None:
        self.processes, self.device, self.stack = processes, device, stack
        self.prepared: PreparedModel | None = None
        self.progress = Progress(0, quiet=True)
        if not processes.is_first:
            # A request to stop is rank 0's to answer: it is passed on once layers are streamed.
            self.stop: StopRequest = stack.enter_context(listening())
            self.stop.patient = True

    def begin(self, settings: RunSettings, quiet: bool, resuming: bool) -> _Job:
        """Decide, take hold of the work folder, read the calibration, open the model. Rank 0."""
        plan = plan_pruning(settings)
        self.progress = self.stack.enter_context(Progress(plan.skeleton.layer_count, quiet))
        self.work = work = open_work_folder(self.stack, settings)
        self.stop = self.stack.enter_context(listening())
        self.stack.push(lambda kind, *_: self._remove_work(settings) if kind is None else None)
        self.stack.enter_context(on_exit(work, self.progress.say))
        check_place(settings)
        if settings.only_score:
            # Again: an old output may just have been put back.
            check_scores_file(settings.output, plan.folder, settings.overwrite)
        self.recorded = recorded = begin(settings, work)
        # Before tens of GiB are downloaded: text that cannot be used should cost no time.
        if recorded is not None and resuming:
            self.whole = calibration_of(recorded, work.read_tokens(), work.folder, vocabulary_of(plan.skeleton))
        else:
            self.whole = calibrate(settings, plan)
        calibration = split_held_out(self.whole) if settings.evaluate else self.whole
        self.prepared = prepared = prepare(settings, plan)
        if settings.evaluate:
            find_head(prepared.skeleton.model)
        self.facts = facts_of(prepared)
        check_schedule(settings, self.facts, prepared.counts)
        # Nothing is printed before all is known to be in order: a refusal is one message and no more.
        print_plan(self.progress, settings, plan)
        print_model(self.progress, settings, prepared)
        print_calibration(self.progress, prepared, calibration, self.device)
        if recorded is not None and settings.batch_tokens is None:
            # The same micro-batches, so that the same digits come out.
            settings = replace(settings, batch_tokens=recorded["batch_tokens"])
        fingerprint = prepared.checkpoint.fingerprint() if self.processes.count > 1 else ""
        return _Job(settings, calibration, prepared.plan.counts, fingerprint, versions())

    def go(self, job: _Job) -> RunResult:
        """Stream the layers, and complete the output. All ranks."""
        settings, processes, calibration = job.settings, self.processes, job.calibration
        prepared = processes.on_each(lambda: self.prepared or _prepare_alike(job))
        # What goes through the layers while they are scored: not the held-out text where all are scored first.
        streamed = replace(calibration, held_out=None) if settings.needs_all_layers else calibration
        if self.work is not None:
            folder = self.work.folder
        else:
            # On another machine the work folder need not be there, and nothing that has a name is written anyway.
            folder = settings.work_folder if settings.work_folder.is_dir() else Path(gettempdir())
        # (With the held-out text also where that is measured only once all layers are scored.)
        plan = processes.on_each(lambda: plan_memory(settings, prepared, calibration, self.device, folder, processes))
        plan = agree(processes, streamed, plan)
        processes.on_first(lambda: self._record(settings, prepared, plan))
        self.stop.patient = True
        runtime = Runtime(settings, plan, self.device, self.progress, folder, self.stop, processes=processes)
        return self._stream(runtime, prepared, calibration, streamed)

    def _record(self, settings: RunSettings, prepared: PreparedModel, plan: MemoryPlan) -> None:
        """Print the plan of memory, and record the run, or make sure that it is the recorded one. Rank 0."""
        assert self.work is not None
        print_processes(self.progress, self.processes, self.device)
        self.progress.say(plan.describe())
        now = describe_run(settings, prepared, self.whole) | {"batch_tokens": plan.batch_tokens}
        if self.recorded is not None:
            check_same(self.recorded, now, self.work.folder)
        else:
            print_work(self.progress, settings, prepared, plan, self.work)
            self.work.write_run(now, [sequence.tolist() for sequence in self.whole.sequences])

    def _stream(
        self, runtime: Runtime, prepared: PreparedModel, calibration: Calibration, streamed: Calibration
    ) -> RunResult:
        settings = runtime.settings
        assert isinstance(settings, RunSettings)
        selector = selector_of(settings, prepared, calibration)
        target = evaluation = None
        if selector is not None and prepared.counts is not None and not selector.settings.needs_all_layers:
            writer = self._writer(settings, prepared, prepared.counts) if self.work is not None else None
            target = OutputTarget(writer, selector)
        if calibration.held_out is not None:
            evaluation = RunEvaluation(
                runtime, prepared, calibration.held_out, self.work, during_run=streamed.held_out is not None
            )
        errors = evaluation.errors if evaluation is not None and evaluation.during_run else None
        with LayerLoop(runtime, stages_of(runtime, prepared, streamed, target, errors), streamed) as loop:
            layers = RunLayers(runtime, prepared.layout, loop, target, self.work, evaluation)
            found = layers.stream(calibration.tokens_of)
            batches = loop.batches
            taken = {
                "processes": self.processes.count,
                "calibration_tokens": calibration.tokens,
                "batch_tokens": batches.batch_tokens,
                "states": batches.place,
                "shrinks": [asdict(shrink) for shrink in batches.all_shrinks()],
            }
        finish = _Finish(self, runtime, prepared, calibration, taken)
        if selector is None:
            return self.processes.on_first(lambda: finish.write_scores(found))
        selection = self.processes.on_first(lambda: finish.select(found, selector, target))
        if evaluation is not None:
            evaluation.complete(selection)
        return self.processes.on_first(lambda: finish.write_model(evaluation))

    def _writer(self, settings: RunSettings, prepared: PreparedModel, counts: Mapping[int, int]) -> OutputWriter:
        assert self.work is not None
        plan = make_plan(self.facts.layout, self.facts.loading, prepared.checkpoint, counts, settings.max_shard_bytes)
        return OutputWriter(plan, prepared.checkpoint, settings, self.work)

    def _remove_work(self, settings: RunSettings) -> None:
        """The output is complete: there is nothing left to be stopped or resumed."""
        assert self.work is not None
        self.stop.patient = True
        self.work.remove()
        shutil.rmtree(settings.output_work_folder, ignore_errors=True)


@dataclass
class _Finish:
    """From the statistics of all layers to the output. Rank 0; `taken` is how the scores were taken."""

    run_steps: _Run
    runtime: Runtime
    prepared: PreparedModel
    calibration: Calibration
    taken: dict[str, Any]
    decided: SelectionResult | None = None
    writer: OutputWriter | None = None
    written: bool = False

    def select(self, layers: Sequence[LayerStatistics], selector: Selector, target: OutputTarget | None) -> Selection:
        """Select the experts of all layers, print what that keeps, and save the held-out text beside the output."""
        run_steps, settings, counts = self.run_steps, self._settings, self.prepared.plan.counts
        assert run_steps.work is not None
        assert counts is not None  # only where nothing is pruned
        scores = self._scores(layers)
        selection = select_all(selector, scores, settings, run_steps.work)
        self.written = target is not None
        self.writer = target.writer if target is not None else None
        self.writer = self.writer or run_steps._writer(settings, self.prepared, selection.counts_by_layer)
        self.decided = SelectionResult(
            settings, self.prepared.checkpoint, run_steps.facts, counts, selection, self.writer.plan, scores.provenance,
            scores,
        )  # fmt: skip
        print_selection(self.decided, run_steps.progress)
        if self.calibration.held_out is not None:
            # Before the output has its name, or is refused one: nothing is left to go on with then.
            save_held_out(settings.output, self.calibration.held_out, run_steps.progress)
        return selection

    def write_model(self, evaluation: RunEvaluation | None) -> RunResult:
        """Write what is not written yet, check all of it, give it its name, and print the result."""
        run_steps, decided, writer, work = self.run_steps, self.decided, self.writer, self.run_steps.work
        assert decided is not None
        assert writer is not None
        assert work is not None
        if evaluation is not None:
            evaluation.judge(decided)
        if not self.written:
            with self.runtime.busy.at("write"):
                write_layers(decided, writer, work, run_steps.progress, run_steps.stop)
        run_steps.stop.patient = False
        work.states.forget()
        result = evaluation.result if evaluation is not None else None
        estimate = complete(decided, writer, work, run_steps.progress, result)
        # The output is complete from here on, whatever happens to the log or the terminal.
        memory = estimate_object(estimate) if estimate else None
        summary = {
            **summary_of(decided, memory, run_steps.progress.seconds),
            **({"evaluation": result} if result is not None else {}),
            **self._taken(),
        }
        self._log(summary)
        print_result(run_steps.progress, self._settings, summary)
        if estimate is not None:
            print_memory(run_steps.progress, estimate)
        return RunResult(self._settings.output, decided.selection.layers, summary)

    def write_scores(self, layers: Sequence[LayerStatistics]) -> RunResult:
        """Write the scores, where nothing is pruned."""
        run_steps, settings, scores = self.run_steps, self._settings, self._scores(layers)
        assert run_steps.work is not None
        run_steps.stop.patient = False
        complete_scores(settings, self.prepared.checkpoint, scores, run_steps.work)
        summary = {**summary_of_scores(settings, scores, run_steps.progress.seconds), **self._taken()}
        self._log(summary)
        print_scores(run_steps.progress, settings, scores, summary)
        return RunResult(settings.output, (), summary)

    @property
    def _settings(self) -> RunSettings:
        assert isinstance(self.runtime.settings, RunSettings)
        return self.runtime.settings

    def _scores(self, layers: Sequence[LayerStatistics]) -> Scores:
        text, facts = self.calibration, self.run_steps.facts
        provenance = provenance_of(self._settings, self.prepared, text, self.runtime.device, self.taken["batch_tokens"])
        return Scores(tuple(layers), text.sources, text.tokens_of, facts.layout.spec, provenance, facts.as_json())

    def _taken(self) -> dict[str, Any]:
        return {**self.taken, "busy": self.runtime.busy.utilisation(), "peak_resident_bytes": peak_resident_bytes()}

    def _log(self, summary: Mapping[str, Any]) -> None:
        progress = self.run_steps.progress
        progress.log("summary", {**summary, "host": describe_host(self.runtime.device)})
        progress.write_log(sibling_path(self._settings.output, LOG_SUFFIX))


def stages_of(
    runtime: Runtime,
    prepared: PreparedModel,
    streamed: Calibration,
    target: OutputTarget | None,
    errors: LayerErrors | None,
) -> list[ForwardStage]:
    """The stages of a run: score each layer, and where anything sees the pruned model, run the pruned layer too.

    `errors` collects how far held-out text in the pruned model is off, where some is streamed.
    """
    settings, skeleton = runtime.settings, prepared.skeleton
    assert isinstance(settings, RunSettings)
    weights = LayerWeights(prepared, runtime.device, runtime.busy, runtime.plan.ahead)
    taps = tap_experts({i: skeleton.layers[i].get_submodule(path) for i, path in skeleton.experts.items()})
    choose = target.kept if target is not None else None
    scoring = Scoring(taps, prepared.layout.spec.count, streamed.tokens_of, choose)
    pruned_stream = target is not None and settings.propagate == "pruned"
    stages: list[ForwardStage] = [ScoreStage(weights, ORIGINAL, scoring, pruned_stream)]
    if pruned_stream or errors is not None:
        experts = skeleton.experts
        stages.append(PrunedForwardStage(weights, experts, prepared.pruned_layer, pruned_stream, errors=errors))
    return stages


def device_of(settings: RunSettings, processes: Processes = ALONE) -> torch.device:
    """The device that a process of a run computes on. Raises SettingsError where a setting makes no sense on it."""
    device = choose_device(settings.device, processes.local_rank)
    settings.check_device(device.type)
    return device


def _prepare_alike(job: _Job) -> PreparedModel:
    """The model as rank 0 opened it. Raises ProcessesError for another model or other libraries on this machine."""
    prepared = prepare(job.settings, plan_with_counts(job.settings, job.counts))
    if prepared.checkpoint.fingerprint() != job.fingerprint:
        raise ProcessesError(
            f"{job.settings.model} is another model here than where rank 0 runs: its files differ. Copy them, or name "
            "a --revision."
        )
    here = versions()
    for name, there in job.versions.items():
        if here[name] != there:
            raise ProcessesError(f"{name} is {here[name]} here and {there} where rank 0 runs. Install the same.")
    return prepared
