"""The course of `streamprune eval`: find the text, measure, tell, and leave the results where they belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError
from streamprune.evaluation.evaluate import evaluate, read_data
from streamprune.evaluation.held_out import held_out_recipe
from streamprune.evaluation.settings import EvalSettings
from streamprune.evaluation.summary import table
from streamprune.output.writer import REPORT_NAME
from streamprune.progress import Progress
from streamprune.result.evaluations import TEXT_NAME, results_folder, write_result


def evaluate_text(settings: EvalSettings, output: Path | None, quiet: bool) -> dict[str, Any]:
    """Measure on text; returns what `--json` prints. Raises a StreampruneError for whatever cannot work."""
    settings = with_data(settings)
    folder = folder_of_results(settings.model, output)
    with Progress(0, quiet) as progress:
        data = read_data(settings)
        result = evaluate(settings, data, progress)
        for line in table(result):
            progress.say(line)
        if folder is not None:
            write_result(folder, TEXT_NAME, result)
            progress.say(f"results: {folder / TEXT_NAME}")
    return result


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


def folder_of_results(model: str, output: Path | None) -> Path | None:
    """Where results go: where the user says, else into a model's own folder, if we made it."""
    if output is not None:
        return output
    folder = Path(model).expanduser()
    return results_folder(folder) if (folder / REPORT_NAME).is_file() else None
