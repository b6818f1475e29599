"""The course of `streamprune eval`: find the text, measure, tell, and leave the results where they belong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError
from streamprune.evaluation.evaluate import evaluate, read_data
from streamprune.evaluation.held_out import held_out_recipe
from streamprune.evaluation.settings import EvalSettings
from streamprune.evaluation.summary import table
from streamprune.generation.health import GenerationSettings, generation_health
from streamprune.generation.lines import generation_lines
from streamprune.harness.lines import tasks_lines
from streamprune.harness.tasks import run_tasks
from streamprune.output.writer import REPORT_NAME
from streamprune.progress import Progress
from streamprune.result.evaluations import (
    GENERATION_NAME,
    TASKS_NAME,
    TEXT_NAME,
    check_writable,
    read_result,
    results_folder,
    without_folders,
    write_result,
)
from streamprune.source.checkpoint import read_json
from streamprune.text.calibration import Calibration


@dataclass(frozen=True)
class Asked:
    """What is to be found out about a model: predictions on text (`on_text`), continuations, tasks; any of them.

    `tasks` are the arguments of `harness.tasks.run_tasks` beside the model's. `output` is where the results go.
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


def examine(settings: EvalSettings, asked: Asked, quiet: bool) -> Found:
    """Find out what is asked, one thing after the other; each result is left as soon as it is there.

    Raises a StreampruneError for whatever cannot work; SettingsError if nothing is asked.
    """
    told: dict[str, Any] = {}
    ours = made_by_us(settings.model)
    folder = asked.output or (results_folder(ours) if ours is not None else None)
    if folder is not None:
        # Hours may pass until there is something to write.
        check_writable(folder)
    with Progress(0, quiet) as progress:

        def keep(name: str, result: Mapping[str, Any], lines: Iterable[str]) -> None:
            for line in lines:
                progress.say(line)
            if folder is None:
                return
            if asked.output is None and says_less(result, read_result(folder, name)):
                progress.say(
                    f"note: {folder / name} stays as it is, since it compares with the original. Add --against, or -o."
                )
                return
            write_result(folder, name, without_folders(result))
            progress.say(f"results: {folder / name}")

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
            tasks = run_tasks(settings.model, progress=progress, **asked.tasks)
            keep(TASKS_NAME, tasks, tasks_lines(tasks))
            told["tasks"] = tasks
    return Found(told, ours if asked.output is None else None)


def says_less(result: Mapping[str, Any], stored: Mapping[str, Any] | None) -> bool:
    """Whether a result compares with no original, and the one that it would replace does."""
    return stored is not None and result.get("against") is None and stored.get("against") is not None


def read_held_out(settings: EvalSettings) -> Calibration:
    """The text that the run which made the model held back.

    Raises SettingsError if there is none, or if what lies in its place was held back for another model of that name:
    this one may have been scored on it.
    """
    recipe = held_out_recipe(Path(settings.model))
    if not recipe.is_file():
        raise SettingsError(
            "Say on what text to measure: --data FILE or RECIPE, of text that the model was not scored on. "
            f"(`streamprune run --evaluate` holds some back, and would have left it in {recipe.parent}.)"
        )
    data = read_data(replace(settings, data=(str(recipe),)))
    is_whole = settings.samples is None and settings.seq_len is None
    known = _held_back(settings.model)
    if known is None or (is_whole and data.fingerprint != known):
        raise SettingsError(
            f"The text in {recipe.parent} is not what was held back for {settings.model} as it is now, which may have "
            f"been scored on it. Say on what text to measure: --data FILE or RECIPE (or {recipe}, if you know better)."
        )
    return data


def _held_back(model: str) -> str | None:
    """The fingerprint of the text that was held back for a model, by its own record; None if none was."""
    ours = made_by_us(model)
    calibration = read_json(ours / REPORT_NAME).get("calibration") if ours is not None else None
    held = calibration.get("held_back") if isinstance(calibration, dict) else None
    fingerprint = held.get("fingerprint") if isinstance(held, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def made_by_us(model: str) -> Path | None:
    """The folder of a model that streamprune made; None for any other, also for names that no folder has."""
    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    return folder if os.path.isfile(folder / REPORT_NAME) else None  # noqa: PTH113
