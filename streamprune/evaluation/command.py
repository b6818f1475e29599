"""`streamprune eval`: run the requested measurements, print and save each result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamprune.calibration.sequences import with_day
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import EvalSettings
from streamprune.errors import StreampruneError
from streamprune.evaluation.evaluate import evaluate_text, read_data, with_model_date
from streamprune.evaluation.generation import GenerationSettings, generation_health
from streamprune.evaluation.held_out import pruned_folder, read_record_of
from streamprune.evaluation.task_settings import TaskSettings
from streamprune.evaluation.tasks import run_tasks
from streamprune.evaluation.terminal import result_lines
from streamprune.progress import Progress, stage
from streamprune.reporting.evaluations import (
    GENERATION_NAME,
    TASKS_NAME,
    TEXT_NAME,
    check_writable,
    name_against,
    name_on,
    read_result,
    results_folder,
    without_folders,
    write_result,
)
from streamprune.reporting.record import public_name


def evaluate_model(
    settings: EvalSettings,
    generation: GenerationSettings | None,
    tasks: TaskSettings | None,
    output: Path | None,
    quiet: bool,
    show: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Measure a model on text, by its continuations (`generation`), on `tasks`; returns what `--json` prints.

    Text is used if `settings.data` names any, or if nothing else is requested. Each result is saved as soon as it is
    known, in `output`, or with the model if streamprune made it; there, those against another model than it was made
    from are kept apart. `show` prints the lines of the results; without it they are printed like the notes. Raises a
    StreampruneError if the measurements are impossible.
    """
    folder, other = output, None
    if folder is None and (model_folder := pruned_folder(settings.model)) is not None:
        folder, other = results_folder(model_folder), other_original(settings)
    if folder is not None:
        # Checked early: the first result may come after hours.
        check_writable(folder)
    # The same day for the model and the original, which may run after midnight.
    settings = with_day(with_model_date(settings))
    found: dict[str, Any] = {}
    with Progress(0, quiet) as progress:
        for name, result in _results(settings, generation, tasks, progress):
            for line in result_lines(name, result):
                (show or progress.say)(line)
            if folder is not None:
                kept = name if other is None or result.get("against") is None else name_against(name, *other)
                if kept == TEXT_NAME and output is None:
                    kept = _name_by_text(folder, result)
                progress.say(_save(folder, kept, result, settings.against, replace_better=output is not None))
            found |= result if name == TEXT_NAME else {Path(name).stem: result}
    return found


def _name_by_text(folder: Path, result: Mapping[str, Any]) -> str:
    """The file of a result on text: another than that of what the model's run held out, if this is of other text."""
    stored = read_result(folder, TEXT_NAME)
    of_run = stored is not None and _entry(_entry(stored, "data"), "held_back")
    if not of_run or result["data"]["held_back"]:
        return TEXT_NAME
    return name_on(TEXT_NAME, (each["name"] for each in result["sources"]), result["data"]["fingerprint"])


def other_original(settings: EvalSettings) -> tuple[str, str] | None:
    """The name and fingerprint of --against, if by its record the model was not made from that; else None."""
    record = read_record_of(settings.model)
    if settings.against is None or record is None or record.source.fingerprint is None:
        return None
    folder = resolve_model(settings.against, settings.against_revision, settings.trust_remote_code)
    fingerprint = open_checkpoint(folder).fingerprint()
    return None if fingerprint == record.source.fingerprint else (public_name(settings.against), fingerprint)


def _results(
    settings: EvalSettings, generation: GenerationSettings | None, tasks: TaskSettings | None, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The requested results, one after the other, with the names of their files."""
    on_text = bool(settings.data) or (generation is None and tasks is None)
    data = None
    if on_text or (generation is not None and generation.prompts is None):
        with stage(progress.say, "reading the text"):
            data = read_data(settings)
        # (`evaluate_text` prints them once everything is checked.)
        for note in () if on_text else data.notes:
            progress.say(f"note: {note}")
    if on_text and data is not None:
        yield TEXT_NAME, evaluate_text(settings, data, progress).result
    if generation is not None:
        yield GENERATION_NAME, generation_health(settings, generation, data, progress)
    if tasks is not None:
        if settings.against is not None:
            # One that is not there is refused before the tasks run, which may take hours.
            resolve_model(settings.against, settings.against_revision, settings.trust_remote_code, config_only=True)
        result = run_tasks(settings, tasks, progress)
        # Kept before the original runs, which may take as long, or fail.
        yield TASKS_NAME, result
        if settings.against is not None and (original := _original_on_tasks(settings, tasks, progress)) is not None:
            yield TASKS_NAME, result | {"against": settings.against, "original_results": original["results"]}


def _original_on_tasks(settings: EvalSettings, tasks: TaskSettings, progress: Progress) -> dict[str, Any] | None:
    """The original's result on the same tasks; None, with a note, if it is not to be had here."""
    assert settings.against is not None
    if tasks.server is not None:
        progress.say(
            f"note: tasks are run on {settings.model} alone: the server has no {settings.against}. To compare, serve "
            "that too, and run the same tasks there."
        )
        return None
    original = replace(
        settings, model=settings.against, revision=settings.against_revision, against=None, against_revision=None
    )
    try:
        return run_tasks(original, tasks, progress)
    except StreampruneError as error:
        progress.say(f"note: tasks are run on {settings.model} alone: {error}")
        return None


def _save(folder: Path, name: str, result: Mapping[str, Any], against: str | None, replace_better: bool) -> str:
    """Save a result in a folder, unless there is a better one; returns what to print about it."""
    stored = read_result(folder, name)
    better = None if replace_better or stored is None else _why_better(stored, result, against)
    if better is not None:
        return f"note: {folder / name} is not replaced, since {better}."
    write_result(folder, name, without_folders(result))
    texts = [_entry(_entry(each, "data"), "fingerprint") for each in (result, stored)]
    replaced = ", which replaces those on other text" if texts[1] is not None and texts[0] != texts[1] else ""
    return f"results: {folder / name}{replaced}"


def _why_better(stored: Mapping[str, Any], result: Mapping[str, Any], against: str | None) -> str | None:
    """Why a stored result must not be replaced by another; None if it may. `against` is what --against says."""
    if result.get("against") is None and stored.get("against") is not None:
        # (Tasks are run on the model first, then on the original.)
        return "it compares with the original" + (", as this does not yet" if against else ". Add --against, or -o")
    limits = [_entry(each.get("config"), "limit") for each in (result, stored)]
    if limits[0] is not None and limits[1] is None and result.get("tasks") == stored.get("tasks"):
        return "it is of all examples. Omit --limit, or add -o"
    return None


def _entry(value: Any, name: str) -> Any:
    """An entry of a JSON object; None if `value` is not an object."""
    return value.get(name) if isinstance(value, Mapping) else None
