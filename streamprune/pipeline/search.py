"""`search`: many candidates for a memory, measured in one pass over the source.

The result is a folder with `search.json` (see `reporting.search`), the scores of all layers, and `report.html`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from streamprune.calibration.sequences import Calibration
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import RunSettings, SearchSettings
from streamprune.distributed.processes import launched
from streamprune.errors import ProcessesError, ResumeError, UnsupportedModelError
from streamprune.evaluation.evaluate import about
from streamprune.evaluation.held_out import save_held_out
from streamprune.evaluation.metrics import summary_of, sums_by_source
from streamprune.files.durable import kill_point, sync_folder, writing
from streamprune.fit.answer import Budget, resolve_budget
from streamprune.fit.estimate import Fit
from streamprune.fit.footprint import read_headers
from streamprune.formats.quantization import Quantization
from streamprune.hardware.device import describe_host
from streamprune.hardware.memory import format_bytes, peak_resident_bytes
from streamprune.output.plan import OutputSource
from streamprune.output.search_folder import check_search_output
from streamprune.output.source import output_source
from streamprune.output.writer import check_place
from streamprune.pipeline.messages import print_prepared
from streamprune.pipeline.resume import FREE_SETTINGS, check_same, describe_run, provenance_of, tokens_of
from streamprune.pipeline.run import device_of
from streamprune.pipeline.search_layers import SearchLayers
from streamprune.pipeline.search_text import SearchText, search_text
from streamprune.pipeline.status import ended
from streamprune.planning.candidates import (
    AUTO,
    Candidate,
    Layout,
    Searchable,
    bytes_per_token,
    lay_out,
    read_candidates,
)
from streamprune.planning.memory_needs import plan_memory
from streamprune.planning.prepare import PreparedModel, PruningPlan, calibrate, prepare, read_config, with_footprint
from streamprune.planning.refit import refit_demand
from streamprune.planning.search_needs import search_needs
from streamprune.progress import Progress
from streamprune.reporting.search import marked
from streamprune.reporting.search_page import write_search_result
from streamprune.saliency.hooks import recorded_width
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import SCORES_NAME, write_scores
from streamprune.streaming.batches import Runtime
from streamprune.streaming.down_tensors import down_tensors
from streamprune.streaming.predictions import find_head
from streamprune.streaming.written_tensors import written_tensors
from streamprune.work.enter import StopRequest, begin, listening, on_exit, open_work_folder
from streamprune.work.folder import WorkFolder
from streamprune.work.records import RecordedRun, command_of, file_states, read_run, with_changes, write_run

#: Settings that do not decide a run, where they are recorded otherwise, but a search.
_DECIDING = {"budget_gib", "gpu", "context", "batch", "kv_dtype", "anchor"}


def search(settings: SearchSettings, quiet: bool = False) -> dict[str, Any]:
    """Measure the candidates of a search, or resume an interrupted one; returns what `--json` prints.

    On any error finished work is kept, so that the same command goes on. Raises a StreampruneError.
    """
    if launched().count > 1:
        raise ProcessesError("search runs in one process. Start it without a launcher.")
    device = device_of(settings)
    with ExitStack() as stack:
        return _Search(settings, device, stack).run(quiet)


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


def request_of(settings: SearchSettings, whole: Calibration) -> dict[str, Any]:
    """What decides the result of a search, as JSON: its settings, the files of the model, and the text."""
    model = resolve_model(settings.model, settings.revision, settings.trust_remote_code)
    free = FREE_SETTINGS - _DECIDING
    return {
        "settings": {name: value for name, value in command_of(settings).items() if name not in free},
        "files": file_states(open_checkpoint(model)),
        "calibration": whole.fingerprint,
    }


@dataclass(frozen=True)
class _Decided:
    """What is decided before a weight is read."""

    model: Searchable
    layout: Layout
    budget: Budget
    text: SearchText


class _Search:
    """A search; `stack` closes what it opens."""

    progress: Progress
    work: WorkFolder
    stop: StopRequest

    def __init__(self, settings: SearchSettings, device: torch.device, stack: ExitStack) -> None:
        self.settings, self.device, self.stack = settings, device, stack

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
        budget = resolve_budget(settings.budget_gib, settings.gpu)
        if recorded is not None and recorded.budget_bytes is not None:
            # Free GPU memory changes.
            budget = replace(budget, nbytes=recorded.budget_bytes)
        model, layout = self._candidates(plan, budget)
        # Read before tens of GiB are downloaded.
        whole = calibrate(settings, plan)
        tokenizer = resolve_model(settings.model, settings.revision, settings.trust_remote_code, tokenizer_only=True)
        text = search_text(settings, whole, layout.candidates, plan.skeleton, tokenizer)
        prepared = prepare(replace(settings, only_score=True), plan)
        candidates = self._prepare(prepared, layout)
        decided = _Decided(model, layout, budget, text)
        self._print(decided, prepared)
        runtime = self._plan(decided, prepared, recorded, whole)
        layers = SearchLayers(runtime, prepared, text, candidates, work)
        taken = layers.stream()
        return self._complete(decided, prepared, layers, {**taken, "request": request_of(settings, whole)})

    def _candidates(self, plan: PruningPlan, budget: Budget) -> tuple[Searchable, Layout]:
        settings, skeleton = self.settings, plan.skeleton
        headers = read_headers(settings.model, plan.folder)
        fits = {}
        for weights in _formats_of(plan):
            found = with_footprint(replace(plan, counts=None), replace(settings, weights=weights), skeleton, headers)
            if found.footprint is None:
                raise UnsupportedModelError(
                    f"The memory that {settings.model} takes cannot be estimated, because the size of its cache is "
                    "unknown. Prune it by --keep instead."
                )
            fits[weights] = Fit(found.footprint, replace(settings.serving, weights=weights), budget.nbytes)
        fixed_width, no_refit = _impossible(plan, settings)
        model = Searchable(skeleton.spec, skeleton.width, fits, fixed_width, no_refit)
        if settings.candidates == (AUTO,):
            return model, lay_out(model)
        return model, read_candidates(settings.candidates, model)

    def _prepare(self, prepared: PreparedModel, layout: Layout) -> dict[Candidate, PreparedModel]:
        """The model prepared for each candidate.

        Raises UnsupportedModelError for what the checkpoint, unlike the config, does not allow.
        """
        find_head(prepared.skeleton.model)
        found: dict[Candidate, PreparedModel] = {}
        sources: dict[str, OutputSource] = {}
        for candidate in layout.candidates:
            if candidate.width is not None and prepared.layout.width is None:
                raise UnsupportedModelError(
                    f"The experts of this checkpoint cannot be made narrower: {prepared.layout.fixed_width}. Name "
                    "candidates without a width: --candidates keep=N."
                )
            settings = self._run_of(candidate, prepared.layout.spec.count)
            if candidate.weights not in sources:
                # (Finding what of it is quantized takes a while.)
                sources[candidate.weights] = output_source(prepared, prepared.loading, settings.storage)
            full = prepared.layout.width.width if prepared.layout.width is not None else 0
            counts = candidate.counts(prepared.layout.expert_layers, full)
            found[candidate] = prepared.for_counts(counts, sources[candidate.weights])
            if candidate.refit:
                down_tensors(found[candidate], written_tensors(found[candidate], self.device))
        return found

    def _run_of(self, candidate: Candidate, experts: int) -> RunSettings:
        """The settings of a run of a candidate's own."""
        keep = candidate.keep if candidate.keep < experts else None
        return self.settings.run_of(keep, candidate.width, candidate.weights, candidate.refit)

    def _print(self, decided: _Decided, prepared: PreparedModel) -> None:
        """Print the candidates, what was left out, the text, and what the search will cost."""
        say, skeleton, candidates = self.progress.say, prepared.skeleton, decided.layout.candidates
        spec, calibration = skeleton.spec, decided.text.calibration
        say(
            f"{self.settings.model}: {skeleton.layer_count} layers, {len(skeleton.experts)} with {spec.count} experts "
            f"(top-{spec.top_k}); {len(candidates)} candidates for {format_bytes(decided.budget.nbytes)} "
            f"({decided.budget.label}), all with equally many experts in all layers:"
        )
        for candidate in candidates:
            fit = decided.model.fit_of(candidate)
            say(f"  {candidate.name}: {format_bytes(fit.weights_bytes)} of weights, {format_bytes(fit.total)} in all")
        for reason in decided.layout.left_out:
            say(f"  left out: {reason}")
        print_prepared(self.progress, self.settings, prepared, calibration, self.device)
        say(self._cost(decided).text())

    def _cost(self, decided: _Decided) -> SearchCost:
        calibration, candidates = decided.text.calibration, decided.layout.candidates
        held = calibration.held_out
        assert held is not None
        used = {shape: _tokens_used(part) for shape, part in decided.text.parts.items()}
        refits = [used[candidate.shape] for candidate in candidates if candidate.refit]
        return SearchCost(calibration.tokens, held.tokens, len(candidates), tuple(refits))

    def _plan(
        self, decided: _Decided, prepared: PreparedModel, recorded: RecordedRun | None, whole: Calibration
    ) -> Runtime:
        """Plan the memory, and record the search, or check that it equals the recorded one."""
        settings, text, work = self.settings, decided.text, self.work
        refitted = {each: text.parts[each.shape] for each in decided.layout.candidates if each.refit}
        needs = search_needs(settings, prepared, text.calibration, decided.layout.candidates, refitted)
        if recorded is not None and settings.batch_tokens is None:
            # With the same micro-batches the result has the same digits.
            settings = replace(settings, batch_tokens=recorded.batch_tokens)
        plan = plan_memory(settings, needs, 0, self.device, work.folder)
        self.progress.say(plan.describe())
        full = replace(whole, anchor=text.calibration.anchor)
        now = describe_run(settings, prepared, full, plan.batch_tokens)
        names = "; ".join(candidate.name for candidate in decided.layout.candidates)
        now = structs.replace(now, settings={**now.settings, "candidates": names}, budget_bytes=decided.budget.nbytes)
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
        provenance = provenance_of(settings, prepared, text, self.device, taken["batch_tokens"])
        facts, found = prepared.facts, tuple(each for _, each in sorted(layers.scored.items()))
        scores = Scores(found, text.sources, text.tokens_of, facts.layout.spec, provenance, facts.as_json())
        save_held_out(settings.output, held, self.progress)
        write_scores(work.staging / SCORES_NAME, scores)
        write_search_result(work.staging, result)
        self._rename(prepared.checkpoint.folder)
        taken = {name: value for name, value in taken.items() if name != "request"}
        run = {**taken, "peak_resident_bytes": peak_resident_bytes(), "seconds": round(self.progress.seconds, 3)}
        self.progress.say(
            f"done in {self.progress.seconds:.0f} s: {settings.output}, with the scores for `streamprune prune`"
        )
        return {"output": str(settings.output), **result, "run": {**run, "host": describe_host(self.device)}}

    def _result(self, decided: _Decided, prepared: PreparedModel, layers: SearchLayers) -> dict[str, Any]:
        """What `search.json` has."""
        settings, held = self.settings, decided.text.calibration.held_out
        assert held is not None
        rows = [self._row(decided, candidate, layers, held.sources) for candidate in decided.layout.candidates]
        head = about(None, settings.model, prepared, held, True, against_source=True)
        use = settings.serving
        return {
            **head,
            "budget_bytes": decided.budget.nbytes,
            "budget_from": decided.budget.label,
            "use": {"context": use.context, "batch": use.batch, "kv_dtype": use.kv_dtype},
            "experts_per_layer": prepared.layout.spec.count,
            "width": prepared.skeleton.width.width if prepared.skeleton.width is not None else None,
            "cost": self._cost(decided).as_json(),
            "left_out": list(decided.layout.left_out),
            **marked(rows),
        }

    def _row(
        self, decided: _Decided, candidate: Candidate, layers: SearchLayers, sources: tuple[str, ...]
    ) -> dict[str, Any]:
        fit = decided.model.fit_of(candidate)
        row: dict[str, Any] = {
            "name": candidate.name,
            "options": candidate.options,
            "keep": candidate.keep,
            "width": candidate.width,
            "weights": candidate.weights,
            "refit": candidate.refit,
            "weights_bytes": fit.weights_bytes,
            "total_bytes": fit.total,
            "max_context": fit.max_context,
            "bytes_per_token": bytes_per_token(fit, decided.model.spec),
        }
        if candidate.name in layers.given_up:
            return {**row, "given_up": layers.given_up[candidate.name]}
        return {**row, **summary_of(sums_by_source(layers.measured[candidate.name], sources), sources)}

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


@dataclass(frozen=True)
class SearchCost:
    """The forwards of a search: all text once, the held-out text once more for each of `candidates`, and for each refit
    its `refits` tokens twice: to fit, and to go on."""

    calibration: int
    held_out: int
    candidates: int
    refits: tuple[int, ...]

    @property
    def forwards(self) -> float:
        """In forwards of the whole text through the unpruned model."""
        total = self.calibration + self.held_out
        return 1 + (self.candidates * self.held_out + 2 * sum(self.refits)) / total

    def text(self) -> str:
        """In words."""
        share = self.held_out / (self.calibration + self.held_out)
        refits = ""
        if self.refits:
            refits = f", and {len(self.refits)} refits, each of which sends up to {max(self.refits):,} tokens twice"
        return (
            f"cost: about {self.forwards:.1f} forwards of the text: 1 + {self.candidates} candidates x {share:.1%} "
            f"held out{refits}"
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"forwards": round(self.forwards, 3), "calibration_tokens": self.calibration,
                "held_out_tokens": self.held_out, "refit_tokens": list(self.refits)}  # fmt: skip


def _tokens_used(text: Calibration) -> int:
    parts = [part for part in (text, text.anchor) if part is not None]
    return sum(len(ids) for part in parts for ids, use in zip(part.sequences, part.refit, strict=True) if use)


def _formats_of(plan: PruningPlan) -> tuple[str, ...]:
    """The ways in which the weights of a result can be stored."""
    return ("source", "bf16") if Quantization.of(plan.model.raw).method else ("source",)


def _impossible(plan: PruningPlan, settings: SearchSettings) -> tuple[str, str]:
    """Why experts cannot be made narrower, and why they cannot be refitted; empty if they can."""
    skeleton, method = plan.skeleton, Quantization.of(plan.model.raw).method
    if method:
        why = f"the source's weights are quantized ({method})"
        return why, why
    fixed_width = skeleton.fixed_width
    if not fixed_width and not settings.channels:
        fixed_width = "--no-channels leaves out what their channels are chosen by"
    elif not fixed_width and recorded_width(skeleton) is None:
        fixed_width = "their channels cannot be scored"
    try:
        refit_demand(skeleton, Candidate(skeleton.spec.count).counts(tuple(skeleton.experts), 0))
    except UnsupportedModelError as error:
        return fixed_width, str(error).rstrip(".")
    return fixed_width, ""
