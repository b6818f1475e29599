"""`run` and `score` again, where their output is in place: what the record and the scores in it have to say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from msgspec import to_builtins

from streamprune.calibration.sequences import Calibration, with_date, with_day
from streamprune.config import RunSettings
from streamprune.errors import OutputError, ScoresError, StreampruneError
from streamprune.evaluation.held_out import split_held_out
from streamprune.models.open import versions
from streamprune.output.plan import make_plan
from streamprune.pipeline.finish import RunResult, SelectionResult
from streamprune.pipeline.imatrix import planned_imatrix
from streamprune.pipeline.repeated import (
    difference_lines,
    made_otherwise,
    may_be_finished,
    print_versions,
    refuse_other,
    repeated,
)
from streamprune.pipeline.resume import calibration_facts, recorded_refit, recorded_rounding
from streamprune.pipeline.status import nothing_to_redo, remove_leftovers
from streamprune.planning.facts import check_scores_match
from streamprune.planning.imatrix import gguf_names
from streamprune.planning.prepare import PreparedModel, calibrate, computed_in, plan_pruning, prepare
from streamprune.planning.text_uses import with_uses
from streamprune.progress import Progress
from streamprune.reporting.make_record import check_provenance, check_scores_of
from streamprune.reporting.record import read_record
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, check_scores_file, read_scores
from streamprune.selection.select import Selector


def repeated_run(settings: RunSettings, quiet: bool) -> RunResult | None:
    """The result of an earlier run with these settings, if it is in place; None if the output is yet to be made.

    Reads the model's headers and the text, but no weight unless the result is verified. Raises OutputError, naming the
    differences, for an output that was made otherwise, VerifyError for a damaged one, and like `run` for settings that
    make none, or for --from-layer.
    """
    if not may_be_finished(settings):
        return None
    if settings.from_layer is not None:
        raise nothing_to_redo(settings.output)
    with Progress(0, quiet) as progress:
        progress.say(f"{settings.output} exists: comparing it with what this command makes ...")
        # The place is taken by what may be the result.
        plan = plan_pruning(replace(settings, overwrite=True))
        recipes, dtype = _made_from(settings)
        plan, settings = computed_in(plan, with_day(with_date(settings, *recipes)), dtype)
        text = calibrate(settings, plan)
        text = split_held_out(text) if settings.evaluate else text
        prepared = prepare(settings, plan)
        path = settings.output if settings.only_score else settings.output / SCORES_FOLDER / SCORES_NAME
        try:
            scores = read_scores(path)
            check_provenance(scores)
            found = [] if settings.scores else _differences(settings, prepared, text, scores)
        except ScoresError as error:
            found = [str(error)]
        if settings.only_score:
            return _repeated_scores(settings, prepared, found, scores if not found else None, progress)
        if found:
            refuse_other(settings, prepared.checkpoint.folder, found)
            return None
        return repeated(_decided(settings, prepared, text, scores), progress, versions())


def _made_from(settings: RunSettings) -> tuple[list[Any], str]:
    """How the texts of what is in the output's place were made, and its dtype, as far as it says so."""
    try:
        record = read_scores(settings.output).provenance if settings.only_score else read_record(settings.output)
    except StreampruneError:
        return [], ""
    stated = to_builtins(record)
    computed = [stated[name] for name in ("refit", "rounding") if stated.get(name)]
    facts = [stated.get("calibration"), *(each.get("calibration") for each in computed)]
    recipes = [each.get("recipe") for each in facts if isinstance(each, Mapping)]
    return recipes, str((stated.get("settings") or {}).get("dtype", ""))


def _differences(settings: RunSettings, prepared: PreparedModel, text: Calibration, scores: Scores) -> list[str]:
    """How scores differ from those that the settings give of this model on this text."""
    now = {
        "source": {"fingerprint": prepared.checkpoint.fingerprint()},
        "settings": {
            "propagate": settings.propagate,
            "dtype": prepared.dtype_name,
            "channels": settings.channels,
        },
        "calibration": _of_text(calibration_facts(text)),
    }
    then = json.loads(json.dumps(scores.provenance))
    stated = {name: then["settings"].get(name) for name in ("propagate", "dtype")}
    then = {
        "source": {"fingerprint": then["source"]["fingerprint"]},
        "settings": {**stated, "channels": then["settings"].get("channels", True)},
        "calibration": _of_text(then["calibration"] or {}),
    }
    return list(difference_lines(then, now))


def _of_text(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What says whether two texts are the same. (The recipe may be another, or be worded otherwise.)"""
    held_back = facts.get("held_back") or {}
    return {
        "tokens": facts.get("tokens"),
        "fingerprint": facts.get("fingerprint"),
        "held_back": {"tokens": held_back.get("tokens"), "fingerprint": held_back.get("fingerprint")},
    }


def _decided(settings: RunSettings, prepared: PreparedModel, text: Calibration, own: Scores) -> SelectionResult:
    """What the run would decide, by the scores in its output or those that it is given."""
    counts = prepared.plan.counts
    assert counts is not None
    scores = own
    if settings.scores is not None:
        scores = read_scores(settings.scores)
        check_provenance(scores)
        check_scores_of(settings.scores, prepared.checkpoint, scores)
        check_scores_match(settings.scores, scores, prepared.layout)
    if settings.sends_text:
        text = with_uses(settings, text, prepared.skeleton, counts)
    sources, tokens, spec = scores.sources, scores.source_tokens, scores.spec
    selector = Selector(settings.selection, spec, sources, tokens, counts.total, counts.per_layer, counts.width)
    selection = selector.all(scores.layers, scores.mtp)
    plan = make_plan(prepared.written, selection.counts_by_layer, settings.max_shard_bytes, counts.width)
    scored = scores.provenance["calibration"]
    imatrix = None
    if settings.imatrix is not None:
        imatrix = planned_imatrix(settings.imatrix, gguf_names(prepared.skeleton), text)
    return SelectionResult(
        settings, prepared.checkpoint, prepared.facts, counts, selection, plan, scores.provenance, scores,
        recorded_refit(settings, text, scored) if settings.refit else None,
        recorded_rounding(text, scored) if settings.needs_text else None,
        imatrix,
    )  # fmt: skip


def _repeated_scores(
    settings: RunSettings, prepared: PreparedModel, found: list[str], scores: Scores | None, progress: Progress
) -> RunResult | None:
    """The same of `score`, whose output is a file."""
    if scores is None:
        try:
            check_scores_file(settings.output, prepared.checkpoint.folder, settings.overwrite)
        except OutputError as error:
            raise OutputError(f"{error}{made_otherwise(found)}") from None
        return None
    progress.say(f"{settings.output} is finished already: it has the scores of this model on this text.")
    print_versions(progress, scores.provenance["versions"], versions())
    remove_leftovers(settings)
    summary = {
        "output": str(settings.output),
        "model": settings.model,
        "moe_layers": len(scores.layers),
        "source_experts_per_layer": scores.spec.count,
        "sources": dict(zip(scores.sources, scores.source_tokens, strict=True)),
        "seconds": round(progress.seconds, 3),
        "complete": True,
    }
    return RunResult(settings.output, (), summary)
