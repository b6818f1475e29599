"""`run --best`: a search of the candidates for a memory, then the one that loses least is written.

The search is kept next to the output, so that it is not made again if writing is interrupted, or a second candidate is
wanted later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from streamprune.checkpoint.hub import resolve_model
from streamprune.config import PruneSettings, RunSettings, SearchSettings
from streamprune.errors import OutputError, SettingsError
from streamprune.files.names import sibling_path
from streamprune.output.search_folder import SEARCH_SUFFIX
from streamprune.output.writer import check_output
from streamprune.pipeline.best_results import note_results
from streamprune.pipeline.finish import RunResult
from streamprune.pipeline.prune import prune
from streamprune.pipeline.repeated import may_be_finished
from streamprune.pipeline.run import run
from streamprune.pipeline.search import finished_search, search, with_date_of
from streamprune.pipeline.status import remove_leftovers
from streamprune.progress import Progress
from streamprune.reporting.search import search_result
from streamprune.work.records import command_of, settings_from, with_changes


def run_best(settings: RunSettings, quiet: bool = False, anchor: str | None = None) -> RunResult:
    """Search the candidates for the settings' budget, unless that was done, and write the best one.

    `anchor` is the text that refits also fit to, as in the settings of a run with a refit. Raises a StreampruneError;
    finished work is kept, and the same command goes on.
    """
    searched = settings_of_search(settings, anchor)
    found = _finished(searched)
    if found is not None:
        # (Killed before it had removed its work folder.)
        remove_leftovers(searched)
    if found is None or not may_be_finished(settings):
        folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
        check_output(settings.output, folder, settings.overwrite)
    with Progress(0, quiet) as progress:
        if found is not None:
            progress.say(f"the candidates were measured already: {searched.output}")
    if found is None:
        # (With the anchor as a path from any folder, like the others.)
        command = {**command_of(settings), "anchor": command_of(searched)["anchor"]}
        found = search(searched, quiet, command)
    best = search_result(found).best
    with Progress(0, quiet) as progress:
        progress.say(f"writing the best candidate: {best.name}, KL divergence {best.kl:.4f} nats per token")
    result = _write(searched, settings, found, quiet)
    return replace(result, summary={**result.summary, "best": best.name, "search": str(searched.output)})


def resume_best(place: Path, command: Mapping[str, Any], quiet: bool = False, **changes: Any) -> RunResult:
    """Go on with the `run --best` whose command was recorded in `place`: with its search, or with writing its output.

    `changes` are settings that may differ, such as device and memory. Raises ResumeError if the command makes no sense.
    """
    anchor = command.get("anchor")
    given = {**command, "anchor": None, "resume": "auto", "from_layer": None}
    settings = settings_from(RunSettings, given, place)
    # (The work folder of the search is not that of the run.)
    settings = replace(with_changes(settings, place, changes), work_dir=settings.work_dir)
    return run_best(settings, quiet, anchor if anchor is None else str(anchor))


def settings_of_search(settings: RunSettings, anchor: str | None = None) -> SearchSettings:
    """The settings of the search for a run's budget. Raises SettingsError for what the search decides itself."""
    if settings.refit:
        raise SettingsError("--best tries every candidate with and without a refit. Leave out --refit.")
    if settings.from_layer is not None or settings.stop_if_kl is not None:
        raise SettingsError(
            "--best measures all layers, and writes what loses least. Leave out --from-layer and --stop-if-kl."
        )
    given = {each.name: getattr(settings, each.name) for each in fields(RunSettings)}
    output = sibling_path(settings.output, SEARCH_SUFFIX)
    return SearchSettings(**{**given, "output": output, "work_dir": None, "evaluate": False, "anchor": anchor})


def _finished(settings: SearchSettings) -> Mapping[str, Any] | None:
    """The result of a search with these settings that was finished before; None if there is none.

    Raises OutputError if the folder has another search. (With --overwrite too: writing may have been interrupted.)
    """
    if settings.resume == "never":
        return None
    try:
        return finished_search(settings)
    except OutputError as error:
        raise OutputError(
            f"{error}\n--best keeps its search there; --overwrite makes it again, and then the output."
        ) from None


def _write(searched: SearchSettings, settings: RunSettings, found: Mapping[str, Any], quiet: bool) -> RunResult:
    """Write the best candidate, by the scores of the search, with its results."""
    result = search_result(found)
    best, searched = result.best, with_date_of(found, searched)
    own = replace(
        searched.run_of(
            best.keep if best.keep < result.experts_per_layer else None, best.width, best.weights, best.refit
        ),
        output=settings.output,
        work_dir=settings.work_dir,
        scores=None,
        # For the digits of the search, also on another machine.
        dtype=found["dtype"],
    )
    if own.refit or own.needs_text:
        # (The held-out text is held out of what weights are computed from, as in the search.)
        own = replace(own, scores=searched.output)
        note_results(own, found, best)
        return run(own, quiet)
    given = {each.name: getattr(own, each.name) for each in fields(PruneSettings) if hasattr(own, each.name)}
    pruning = PruneSettings(**{**given, "scores": searched.output})
    note_results(pruning, found, best)
    return prune(pruning, quiet)
