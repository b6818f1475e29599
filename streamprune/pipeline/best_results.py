"""What `run --best` leaves in the folder of its search: results for its output, and its command. No torch.

What the output has in its folder `evaluation/` from the search is noted in the folder of the search before the output
is written, so that whatever completes the output, also `streamprune resume`, adds it before the output gets its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import read_json
from streamprune.common_settings import WORK_SUFFIX, OutputSettings
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import CheckpointError, ReportError
from streamprune.files.json_text import show
from streamprune.files.names import sibling_path
from streamprune.output.search_folder import BEST_COMMAND, SEARCH_NAME, SEARCH_SUFFIX
from streamprune.pipeline.status import is_complete, is_there
from streamprune.reporting.evaluations import TEXT_NAME, TextResult, write_result
from streamprune.reporting.record import checked, read_object
from streamprune.reporting.search import Measured
from streamprune.work.records import command_of, read_run

#: The note, in the folder of the search.
NOTE_NAME = "best.json"
_ADVICE = "Remove the folder of the search, and repeat the command."
#: The entries of a candidate in search.json that are a result on held-out text, with those of the head.
_FIGURES, _HEAD = ("sources", "all"), ("format", "model", "against", "against_source", "dtype", "data", "versions")
#: What may change between the note and the end without making it another output. (Of the dtype a run records what it
#: computes in.)
_FREE = {
    "work_dir", "date", "device", "dtype", "batch_tokens", "states", "vram_gib", "ram_gib", "overwrite", "resume",
    "checkpoint_every", "from_layer", "verify", "report", "trust_remote_code",
}  # fmt: skip


def note_results(settings: RunSettings | PruneSettings, found: Mapping[str, Any], best: Measured) -> None:
    """Note the results that belong to the output of `settings`, the `best` candidate of the search `found`.

    Raises ReportError if the search lacks any of them.
    """
    assert settings.scores is not None
    try:
        row = next(each for each in found["candidates"] if each["name"] == best.name)
        text = {**{name: found[name] for name in _HEAD}, **{name: row[name] for name in _FIGURES}}
    except KeyError as error:
        where = settings.scores / SEARCH_NAME
        raise ReportError(f"{where} has no {show(error.args[0])}. Was it changed? {_ADVICE}") from None
    checked(text, TextResult, settings.scores / SEARCH_NAME, _ADVICE)
    kept = {name: value for name, value in found.items() if name not in ("output", "run", "request", BEST_COMMAND)}
    note = {"command": _deciding(settings), "results": {SEARCH_NAME: kept, TEXT_NAME: text}}
    write_result(settings.scores, NOTE_NAME, note)


def noted_results(settings: RunSettings | PruneSettings) -> dict[str, Any]:
    """The results that were noted for the output of `settings`, by the names of their files; usually none.

    Raises ReportError for a note that was damaged.
    """
    if settings.scores is None or not (settings.scores / NOTE_NAME).is_file():
        return {}
    note = read_object(settings.scores / NOTE_NAME, _ADVICE)
    results = note.get("results")
    if note.get("command") != _deciding(settings) or not isinstance(results, dict):
        return {}
    return {name: results[name] for name in (SEARCH_NAME, TEXT_NAME) if name in results}


def best_command(folder: Path) -> Mapping[str, Any] | None:
    """The command of the unfinished `run --best` that a work folder belongs to; None if it is another's.

    It is the work folder of the search, which is gone once the search is finished, or that of the output, which is not
    there before. Raises ResumeError for a record of another version.
    """
    if (recorded := read_run(folder)) is not None:
        return recorded.best
    if not folder.name.endswith(WORK_SUFFIX):
        return None
    place = folder.with_name(folder.name.removesuffix(WORK_SUFFIX))
    if folder.exists() and not is_complete(folder, place):
        return None
    if (place / SEARCH_NAME).is_file():
        return _command_in(place)
    if is_there(place):
        return None
    search = sibling_path(place, SEARCH_SUFFIX)
    recorded = read_run(sibling_path(search, WORK_SUFFIX))
    return recorded.best if recorded is not None else _command_in(search)


def _command_in(search: Path) -> Mapping[str, Any] | None:
    """The command of `run --best` in a search's folder; None if it has none. (`run` refuses one that was damaged.)"""
    with suppress(CheckpointError):
        command = read_json(search / SEARCH_NAME).get(BEST_COMMAND)
        return command if isinstance(command, dict) else None
    return None


def _deciding(settings: OutputSettings) -> Any:
    """The settings of a command as JSON is read back, without those that are free."""
    return json.loads(json.dumps({name: value for name, value in command_of(settings).items() if name not in _FREE}))
