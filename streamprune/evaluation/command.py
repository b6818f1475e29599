"""The course of `streamprune eval`: find the text, measure, tell, and leave the results where they belong."""

from __future__ import annotations

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
    results_folder,
    without_folders,
    write_result,
)
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
    with Progress(0, quiet) as progress:

        def keep(name: str, result: Mapping[str, Any], lines: Iterable[str]) -> None:
            for line in lines:
                progress.say(line)
            if folder is not None:
                write_result(folder, name, without_folders(result))
                progress.say(f"results: {folder / name}")

        data: Calibration | None = None
        if asked.on_text or (asked.generation is not None and (asked.prompts is None or settings.data)):
            settings = with_data(settings)
            data = read_data(settings)
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


def with_data(settings: EvalSettings) -> EvalSettings:
    """The settings with the text that a run held back, where none is named and there is such.

    Raises SettingsError if there is none.
    """
    if settings.data:
        return settings
    recipe = held_out_recipe(Path(settings.model))
    if not recipe.is_file():
        raise SettingsError(
            "Say on what text to measure: --data FILE or RECIPE, of text that the model was not scored on. "
            f"(`streamprune run --evaluate` holds some back, and would have left it in {recipe.parent}.)"
        )
    return replace(settings, data=(str(recipe),))


def made_by_us(model: str) -> Path | None:
    """The folder of a model that streamprune made; None for any other."""
    folder = Path(model).expanduser()
    return folder if (folder / REPORT_NAME).is_file() else None
