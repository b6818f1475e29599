"""`search`: many candidates for a memory, measured in one pass over the source.

The result is a folder with `search.json` (see `reporting.search`), the scores of all layers, and `report.html`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from streamprune.calibration.sequences import Calibration, date_of, with_date, with_day
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import open_checkpoint, read_json
from streamprune.config import RunSettings, SearchSettings
from streamprune.distributed.processes import launched
from streamprune.errors import CalibrationError, OutputError, ProcessesError, ResumeError
from streamprune.evaluation.evaluate import about
from streamprune.evaluation.held_out import save_held_out
from streamprune.evaluation.metrics import summary_of, sums_by_source
from streamprune.files.durable import kill_point, sync_folder, writing
from streamprune.fit.answer import Budget, resolve_budget
from streamprune.fit.estimate import Fit
from streamprune.hardware.device import describe_host
from streamprune.hardware.memory import format_bytes, peak_resident_bytes
from streamprune.output.search_folder import BEST_COMMAND, SEARCH_NAME, check_search_output
from streamprune.output.writer import check_place
from streamprune.pipeline.candidate_command import writing_command
from streamprune.pipeline.messages import print_prepared
from streamprune.pipeline.repeated import difference_lines, made_otherwise, may_be_finished
from streamprune.pipeline.resume import FREE_SETTINGS, check_same, describe_run, provenance_of, tokens_of
from streamprune.pipeline.run import device_of
from streamprune.pipeline.search_layers import SearchLayers, Side
from streamprune.pipeline.search_plan import SearchCost, candidates_for, sides_of
from streamprune.pipeline.search_text import SearchText, search_text
from streamprune.pipeline.status import ended, remove_leftovers
from streamprune.planning.candidates import AUTO, Candidate, Searchable, bytes_per_token
from streamprune.planning.memory_needs import plan_memory
from streamprune.planning.prepare import PreparedModel, PruningPlan, calibrate, computed_in, prepare, read_config
from streamprune.planning.search_needs import OwnNeeds, search_needs
from streamprune.progress import Progress, stage
from streamprune.reporting.search import marked, notes_on, search_result
from streamprune.reporting.search_page import write_search_result
from streamprune.saliency.scores import Scores, apart_from_mtp
from streamprune.saliency.scores_file import SCORES_NAME, write_scores
from streamprune.streaming.batches import Runtime
from streamprune.streaming.predictions import find_head
from streamprune.work.enter import StopRequest, begin, listening, on_exit, open_work_folder
from streamprune.work.folder import WorkFolder
from streamprune.work.records import RecordedRun, command_of, file_states, read_run, with_changes, write_run

#: The settings that give the budget.
_BUDGET = ("budget_gib", "gpu")
#: Settings that do not decide a run, where they are recorded otherwise, but a search.
_DECIDING = {*_BUDGET, "context", "batch", "kv_dtype", "anchor", "for_engine", "round_for"}


def search(settings: SearchSettings, quiet: bool = False, best: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Measure the candidates of a search, or resume an interrupted one; returns what `--json` prints.

    A finished search of the same settings, model and text is kept. `best` is the command of the `run --best` that it
    is made for, which is recorded with it.
    On any error finished work is kept, so that the same command goes on. Raises a StreampruneError.
    """
    if launched().count > 1:
        raise ProcessesError("search runs in one process. Start it without a launcher.")
    device = device_of(settings)
    if may_be_finished(settings):
        with Progress(0, quiet) as progress:
            progress.say(f"{settings.output} exists: comparing it with the search that is asked for ...")
            found = finished_search(settings)
            if found is not None:
                progress.say(f"{settings.output} is finished already: it is this search, of this model on this text.")
                remove_leftovers(settings)
                return {"output": str(settings.output), **found, "complete": True}
    with ExitStack() as stack:
        return _Search(settings, device, stack, best).run(quiet)


def finished_search(settings: SearchSettings) -> Mapping[str, Any] | None:
    """The result of a search with these settings that is in place; None if there is none, or it is to be replaced.

    Raises OutputError, naming the differences, if the folder has another search, and ReportError if it is damaged.
    """
    path = settings.output / SEARCH_NAME
    if not path.is_file():
        return None
    found = read_json(path)
    settings = with_date_of(found, settings)
    plan = read_config(replace(settings, only_score=True))
    # (As it is read back: JSON has no tuples.)
    dtype = found.get("dtype") if settings.dtype == "auto" else settings.dtype
    request = json.loads(json.dumps(request_of(settings, calibrate(settings, plan), dtype)))
    differing = list(difference_lines(found.get("request"), request))
    if not differing:
        search_result(found)
        return found
    try:
        check_search_output(settings.output, plan.folder, settings.overwrite)
    except OutputError as error:
        raise OutputError(f"{error}{made_otherwise(differing)}") from None
    return None


def resume_search(work_folder: Path, quiet: bool = False, **changes: Any) -> dict[str, Any]:
    """Resume the search recorded in a work folder. `changes` are settings that may differ, such as device and memory.

    Raises ResumeError if there is none, or if anything that decides the result has changed.
    """
    recorded = read_run(work_folder)
    if recorded is None:
        raise ResumeError(f"{work_folder} has no search to resume.")
    settings = with_changes(recorded.settings_in(work_folder), work_folder, changes)
    assert isinstance(settings, SearchSettings)
    if ended(work_folder, settings.output):
        return {"output": str(settings.output), "complete": True}
    return search(settings, quiet)


def request_of(settings: SearchSettings, whole: Calibration, dtype: Any) -> dict[str, Any]:
    """What decides the result of a search, as JSON: its settings, the files of the model, the text and the `dtype`."""
    model = resolve_model(settings.model, settings.revision, settings.trust_remote_code)
    free = FREE_SETTINGS - _DECIDING
    return {
        "settings": {name: value for name, value in command_of(settings).items() if name not in free},
        "files": file_states(open_checkpoint(model)),
        "calibration": whole.fingerprint,
        "dtype": dtype,
        # (Only where it decides the text.)
        **({"date": date} if (date := date_of(whole.recipe)) is not None else {}),
    }


def with_date_of(found: Mapping[str, Any], settings: SearchSettings) -> SearchSettings:
    """Settings with the date in the text of a search's result, unless they state one."""
    request = found.get("request")
    return with_date(settings, {"given": request} if isinstance(request, Mapping) else None)


@dataclass(frozen=True)
class _Decided:
    """What is decided before a weight is read."""

    model: Searchable
    sides: tuple[Side, ...]
    left_out: tuple[str, ...]
    budget: Budget
    text: SearchText

    def memory_of(self, side: Side) -> tuple[Fit, int, int]:
        """The memory of a candidate against the budget, with the bytes of its weights and of all."""
        fit, weights = self.model.fit_of(side.candidate), side.nbytes
        # Counted to the byte now that the checkpoint is open.
        return fit, weights, fit.total - fit.weights_bytes + weights


class _Search:
    """A search, made for the command `best` of `run --best`, or by itself. `stack` closes what it opens."""

    progress: Progress
    work: WorkFolder
    stop: StopRequest

    def __init__(
        self, settings: SearchSettings, device: torch.device, stack: ExitStack, best: Mapping[str, Any] | None
    ) -> None:
        self.settings, self.device, self.stack = settings, device, stack
        self.best = dict(best) if best is not None else None

    def run(self, quiet: bool) -> dict[str, Any]:
        settings = self.settings
        plan = read_config(replace(settings, only_score=True))
        check_search_output(settings.output, plan.folder, settings.overwrite)
        self.progress = self.stack.enter_context(Progress(plan.skeleton.layer_count, quiet))
        self.work = work = open_work_folder(self.stack, settings)
        self.stop = self.stack.enter_context(listening())
        self.stack.push(lambda kind, *_: self._remove_work() if kind is None else None)
        self.stack.enter_context(on_exit(work, self.progress.say))
        check_place(settings)
        recorded = begin(settings, work)
        recipes = recorded.recipes if recorded is not None else []
        self.settings = settings = with_day(with_date(settings, *recipes))
        if recorded is not None:
            plan, self.settings = computed_in(plan, settings, recorded.dtype)
            settings = self.settings
        budget = resolve_budget(settings.budget_gib, settings.gpu)
        if recorded is not None and recorded.budget_bytes is not None:
            # Free GPU memory changes.
            budget = replace(budget, nbytes=_same_budget(settings, budget, recorded))
        model, layout = candidates_for(settings, plan, budget)
        # Read before tens of GiB are downloaded.
        with stage(self.progress.say, "reading the calibration text"):
            whole = calibrate(settings, plan)
        with stage(self.progress.say, f"reading the headers of {settings.model}"):
            prepared = prepare(replace(settings, only_score=True), plan)
        find_head(prepared.skeleton.model)
        sides, left_out = sides_of(settings, prepared, layout)
        sides, text, more = self._text(whole, sides, plan)
        decided = _Decided(model, tuple(sides), (*layout.left_out, *left_out, *more), budget, text)
        self._print(decided, prepared)
        runtime = self._plan(decided, prepared, recorded, whole)
        layers = SearchLayers(runtime, prepared, text, sides, work)
        taken = layers.stream()
        request = request_of(settings, whole, prepared.dtype_name)
        if recorded is not None:
            # As the user wrote it: `resume` is given the bytes that it came to.
            request["settings"] |= {name: recorded.command.get(name) for name in _BUDGET}
        return self._complete(decided, prepared, layers, {**taken, "request": request})

    def _text(
        self, whole: Calibration, sides: list[Side], plan: PruningPlan
    ) -> tuple[list[Side], SearchText, list[str]]:
        """The text, the candidates that there is text for, and which of those that were laid out there is none for.

        Raises CalibrationError.
        """
        settings = self.settings
        folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, tokenizer_only=True)
        plain = [side for side in sides if not side.candidate.refit]
        try:
            return sides, search_text(settings, whole, _runs(sides), plan.skeleton, folder), []
        except CalibrationError as error:
            if settings.candidates != (AUTO,) or len(plain) == len(sides):
                raise
            text = search_text(settings, whole, _runs(plain), plan.skeleton, folder)
            return plain, text, [f"refitted ones: {error}"]

    def _print(self, decided: _Decided, prepared: PreparedModel) -> None:
        """Print the candidates, what was left out, the text, and what the search will cost."""
        say, skeleton = self.progress.say, prepared.skeleton
        spec, calibration = skeleton.spec, decided.text.calibration
        say(
            f"{self.settings.model}: {skeleton.layer_count} layers, {len(skeleton.experts)} with {spec.count} experts "
            f"(top-{spec.top_k}); {len(decided.sides)} candidates for {format_bytes(decided.budget.nbytes)} "
            f"({decided.budget.label}), all with equally many experts in all layers:"
        )
        for side in decided.sides:
            _, weights, total = decided.memory_of(side)
            say(f"  {side.name}: {format_bytes(weights)} of weights, {format_bytes(total)} in all")
        for reason in decided.left_out:
            say(f"  left out: {reason}")
        print_prepared(self.progress, self.settings, prepared, calibration, self.device)
        say(SearchCost.of(decided.text, list(decided.sides)).text())

    def _plan(
        self, decided: _Decided, prepared: PreparedModel, recorded: RecordedRun | None, whole: Calibration
    ) -> Runtime:
        """Plan the memory, and record the search, or check that it equals the recorded one."""
        settings, text, work = self.settings, decided.text, self.work
        own = [OwnNeeds(side.settings, side.prepared, text.part_of(side.candidate)) for side in decided.sides]
        needs = search_needs(settings, prepared, text.calibration, own)
        if recorded is not None and settings.batch_tokens is None:
            # With the same micro-batches the result has the same digits.
            settings = replace(settings, batch_tokens=recorded.batch_tokens)
        plan = plan_memory(settings, needs, 0, self.device, work.folder)
        self.progress.say(plan.describe())
        full = replace(whole, anchor=text.calibration.anchor)
        now = describe_run(settings, prepared, full, plan.batch_tokens)
        names = "; ".join(side.name for side in decided.sides)
        named = {**now.settings, "candidates": names}
        now = structs.replace(now, settings=named, budget_bytes=decided.budget.nbytes, best=self.best)
        if recorded is not None:
            check_same(recorded, now, work.folder)
        else:
            write_run(work.folder, now, tokens_of(full))
        self.stop.patient = True
        return Runtime(settings, plan, self.device, self.progress, work.folder, self.stop)

    def _complete(
        self, decided: _Decided, prepared: PreparedModel, layers: SearchLayers, taken: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the result, rename it to the output, and print it."""
        self.stop.patient = False
        settings, work, text = self.settings, self.work, decided.text.calibration
        held = text.held_out
        assert held is not None
        result = {**self._result(decided, prepared, layers), "request": taken["request"]}
        if self.best is not None:
            result[BEST_COMMAND] = self.best
        provenance = provenance_of(settings, prepared, text, self.device, taken["batch_tokens"])
        facts, found = prepared.facts, [each for _, each in sorted(layers.scored.items())]
        own, mtp = apart_from_mtp(found, facts.layout.layer_count)
        scores = Scores(own, text.sources, text.tokens_of, facts.layout.spec, provenance, facts.as_json(), mtp)
        save_held_out(settings.output, held, self.progress)
        write_scores(work.staging / SCORES_NAME, scores)
        write_search_result(work.staging, result)
        self._rename(prepared.checkpoint.folder)
        taken = {name: value for name, value in taken.items() if name != "request"}
        run = {**taken, "peak_resident_bytes": peak_resident_bytes(), "seconds": round(self.progress.seconds, 3)}
        self.progress.say(
            f"done in {self.progress.seconds:.0f} s: {settings.output}, with the scores for `streamprune prune`"
        )
        best = next(side for side in decided.sides if side.name == result["best"])
        self.progress.say(f"the best one is written by: {writing_command(settings.output, best.settings)}")
        kill_point("result printed")
        return {"output": str(settings.output), **result, "run": {**run, "host": describe_host(self.device)}}

    def _result(self, decided: _Decided, prepared: PreparedModel, layers: SearchLayers) -> dict[str, Any]:
        """What `search.json` has."""
        settings, held = self.settings, decided.text.calibration.held_out
        assert held is not None
        rows = [_row(decided, side, layers, held.sources) for side in decided.sides]
        head = about(None, settings.model, prepared, held, True, against_source=True)
        use = next(iter(decided.model.fits.values())).use
        return {
            **head,
            "budget_bytes": decided.budget.nbytes,
            "budget_from": decided.budget.label,
            "use": {"context": use.context, "batch": use.batch, "kv_dtype": use.kv_dtype},
            "experts_per_layer": prepared.layout.spec.count,
            "width": prepared.skeleton.width.width if prepared.skeleton.width is not None else None,
            "cost": SearchCost.of(decided.text, list(decided.sides)).as_json(),
            "left_out": list(decided.left_out),
            "notes": notes_on(side.candidate.weights for side in decided.sides),
            **marked(rows),
        }

    def _rename(self, source: Path) -> None:
        """Rename the finished folder to the output. Raises OutputError, ResourceError."""
        output, staging = self.settings.output, self.work.staging
        with writing(f"Completing {output}", output):
            check_search_output(output, source, self.settings.overwrite)
            complete = self.settings.output_work_folder / "complete"
            shutil.rmtree(complete, ignore_errors=True)
            # (The work folder may be on another disk. The files are small.)
            shutil.copytree(staging, complete)
            sync_folder(complete)
            self.work.record_complete(complete)
            kill_point("search written")
            if output.is_dir():
                shutil.rmtree(output)
            complete.rename(output)
            kill_point("output renamed")
            sync_folder(output.absolute().parent)

    def _remove_work(self) -> None:
        self.stop.patient = True
        self.work.remove()
        shutil.rmtree(self.settings.output_work_folder, ignore_errors=True)


def _same_budget(settings: SearchSettings, budget: Budget, recorded: RecordedRun) -> int:
    """The bytes of the budget of the search that is resumed. Raises ResumeError if another one is asked for."""
    before = recorded.budget_bytes
    assert before is not None
    asked = {name: getattr(settings, name) for name in _BUDGET}
    if budget.nbytes != before and asked != {name: recorded.command.get(name) for name in _BUDGET}:
        raise ResumeError(
            f"The search in {settings.work_folder} is for a budget of {before:,} bytes, and now {budget.nbytes:,} are "
            "asked for. Give the budget that it was started with, or start over with --resume never."
        )
    return before


def _runs(sides: Sequence[Side]) -> dict[Candidate, RunSettings]:
    return {side.candidate: side.settings for side in sides}


def _row(decided: _Decided, side: Side, layers: SearchLayers, sources: Sequence[str]) -> dict[str, Any]:
    """What `search.json` has of a candidate."""
    candidate, (fit, weights, total) = side.candidate, decided.memory_of(side)
    row: dict[str, Any] = {
        "name": side.name,
        "options": candidate.options(decided.model.spec.count),
        "keep": candidate.keep,
        "width": candidate.width,
        "weights": candidate.weights,
        "rounding": side.settings.rounds_by if side.settings.is_quantizing else None,
        "refit": candidate.refit,
        "weights_bytes": weights,
        "total_bytes": total,
        "max_context": fit.max_context,
        "bytes_per_token": bytes_per_token(fit, decided.model.spec),
    }
    if side.name in layers.given_up:
        return {**row, "given_up": layers.given_up[side.name]}
    return {**row, **summary_of(sums_by_source(layers.measured[side.name], sources), sources)}
