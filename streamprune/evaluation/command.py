"""`streamprune eval`: find the text, measure, print and save the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamprune.calibration.sequences import Calibration
from streamprune.config import EvalSettings
from streamprune.errors import SettingsError
from streamprune.evaluation.evaluate import config_folder, evaluate, read_data
from streamprune.evaluation.generation import GenerationSettings, generation_health
from streamprune.evaluation.generation_figures import generation_lines
from streamprune.evaluation.held_out import held_out_recipe, record_of
from streamprune.evaluation.metrics import table
from streamprune.evaluation.tasks import run_tasks, tasks_lines
from streamprune.progress import Progress
from streamprune.reporting.evaluations import (
    GENERATION_NAME,
    TASKS_NAME,
    TEXT_NAME,
    check_writable,
    read_result,
    results_folder,
    without_folders,
    write_result,
)


@dataclass(frozen=True)
class Asked:
    """What is to be found out about a model: predictions on text (`on_text`), continuations, tasks; any of them.

    `tasks` are the arguments of `evaluation.tasks.run_tasks`, except the model's. `output` is where the results go.
    """

    on_text: bool
    generation: GenerationSettings | None = None
    prompts: Path | None = None
    tasks: Mapping[str, Any] | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Found:
    """What was found out: `told` is what `--json` prints, `ours` the model's folder if streamprune made it."""

    told: dict[str, Any]
    ours: Path | None


def examine(settings: EvalSettings, asked: Asked, quiet: bool, show: Callable[[str], None] | None) -> Found:
    """Find out what is asked, one thing after the other; each result is left as soon as it is there.

    `show` takes the lines of the results; without it they go where the notes go. Raises a StreampruneError for whatever
    cannot work; SettingsError if nothing is asked.
    """
    told: dict[str, Any] = {}
    record = record_of(settings.model)
    ours = record.folder if record is not None else None
    folder = asked.output or (results_folder(ours) if ours is not None else None)
    if folder is not None:
        # Hours may pass until there is something to write.
        check_writable(folder)
    with Progress(0, quiet) as progress:

        def keep(name: str, result: Mapping[str, Any], lines: Iterable[str]) -> None:
            for line in lines:
                (show or progress.say)(line)
            if folder is not None:
                progress.say(_save(folder, name, result, replace_better=asked.output is not None))

        data: Calibration | None = None
        if asked.on_text or (asked.generation is not None and (asked.prompts is None or settings.data)):
            data = read_data(settings) if settings.data else read_held_out(settings)
        if asked.on_text and data is not None:
            result = evaluate(settings, data, progress)
            keep(TEXT_NAME, result, table(result))
            told |= result
        if asked.generation is not None:
            generation = generation_health(
                settings.model, settings.against, data, asked.prompts, asked.generation, progress
            )
            keep(GENERATION_NAME, generation, generation_lines(generation))
            told["generation"] = generation
        if asked.tasks is not None:
            if settings.against is not None:
                progress.say(f"note: tasks are run on {settings.model} alone; --against has no part in them.")
            tasks = run_tasks(settings.model, progress=progress, **asked.tasks)
            keep(TASKS_NAME, tasks, tasks_lines(tasks))
            told["tasks"] = tasks
    return Found(told, ours if asked.output is None else None)


def _save(folder: Path, name: str, result: Mapping[str, Any], replace_better: bool) -> str:
    """Leave a result in a folder, unless a better one is there; returns what is said of that."""
    stored = read_result(folder, name)
    better = None if replace_better else says_less(result, stored)
    if better is not None:
        return f"note: {folder / name} stays as it is, since {better}."
    write_result(folder, name, without_folders(result))
    return f"results: {folder / name}{_replaced(result, stored)}"


def says_less(result: Mapping[str, Any], stored: Mapping[str, Any] | None) -> str | None:
    """Why a result must not take the place of the one that is there; None if it may."""
    if stored is None:
        return None
    if result.get("against") is None and stored.get("against") is not None:
        return "it compares with the original. Add --against, or -o"
    limits = [each.get("config", {}).get("limit") if isinstance(each.get("config"), dict) else None
              for each in (result, stored)]  # fmt: skip
    if limits[0] is not None and limits[1] is None and result.get("tasks") == stored.get("tasks"):
        return "it is of all examples. Leave out --limit, or add -o"
    return None


def _replaced(result: Mapping[str, Any], stored: Mapping[str, Any] | None) -> str:
    """What is said where a result is of other text than the one whose place it takes."""
    told = [each.get("data") if each is not None else None for each in (result, stored)]
    texts = [each.get("fingerprint") if isinstance(each, dict) else None for each in told]
    return ", in the place of those on other text" if texts[1] is not None and texts[0] != texts[1] else ""


def read_held_out(settings: EvalSettings) -> Calibration:
    """The text that the run which made the model held back.

    Raises SettingsError if there is none, or if what lies in its place was held back for another model of that name:
    this one may have been scored on it.
    """
    recipe = held_out_recipe(Path(settings.model))
    if not recipe.is_file():
        # Refuse first what is no model at all.
        config_folder(settings.model, settings.revision, settings.trust_remote_code)
        raise SettingsError(
            "Say on what text to measure: --data FILE or RECIPE, of text that the model was not scored on. "
            f"(`streamprune run --evaluate` holds some back, and leaves it beside its output, here in {recipe.parent}; "
            "if the output was moved, name that folder.)"
        )
    data = read_data(replace(settings, data=(str(recipe),)))
    is_whole = settings.samples is None and settings.seq_len is None
    record = record_of(settings.model)
    known = record.held_back if record is not None else None
    if known is None or (is_whole and data.fingerprint != known):
        raise SettingsError(
            f"The text in {recipe.parent} is not what was held back for {settings.model} as it is now, which may have "
            f"been scored on it. Say on what text to measure: --data FILE or RECIPE (or {recipe}, if you know better)."
        )
    return data
