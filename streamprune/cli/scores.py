"""The command that shows scores: `inspect`. Needs no torch, no model and no GPU."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from streamprune.cli import options as opt
from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.models.config_json import resolve_keep
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores
from streamprune.selection.inspect import (
    changed_settings,
    compare_selections,
    comparison_lines,
    inspect_scores,
    inspection_lines,
)
from streamprune.selection.schedules import DEFAULT_SCHEDULE
from streamprune.selection.select import Selection, Selector, listed_selection, stated_counts
from streamprune.selection.settings import SelectionSettings
from streamprune.selection.user_files import read_keep_file

#: --keep, --ratio and --total.
Targets = tuple[int | None, float | None, int | None]


@click.command()
@click.argument("scores", metavar="S", type=opt.PATH)
@click.option("--keep", type=int, help="Experts to keep per layer; with a schedule, the mean.")
@click.option("--ratio", type=float, help="Share of experts to remove, e.g. 0.5 for half.")
@click.option("--total", type=int, help="Experts to keep in all layers together.")
@opt.KEEP_FILE
@opt.SELECTION
@click.option("--seed", type=int, default=0, show_default=True, help="For --method random.")
@click.option(
    "--compare", multiple=True, metavar="CHANGE",
    help="Compare with another choice: mix=code=1, method=frequency, … May be given several times.",
)  # fmt: skip
@click.option("--layer", type=int, metavar="K", help="Show every expert of layer K.")
@opt.JSON_OBJECT
def inspect(scores: Path, compare: tuple[str, ...], layer: int | None, as_json: bool, **given: Any) -> None:
    """Show S, a scores file: the experts of each layer, those at the boundary, those that no token was routed to.

    With --keep, --ratio, --total or --keep-file it also shows how much of each source's saliency is kept, and warnings.
    """
    # Names in the file may have characters that the terminal lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    targets, keep_file = (given.pop("keep"), given.pop("ratio"), given.pop("total")), given.pop("keep_file")
    settings = SelectionSettings(**given)
    found = read_scores(scores)
    selection = _selection(found, settings, targets, keep_file)
    inspection = inspect_scores(found, settings, selection)
    comparisons = [_compared(found, settings, selection, text, targets) for text in compare]
    if layer is not None and layer not in found.layer_indices:
        raise SettingsError(
            f"--layer {layer} has no experts. Layers with experts: {', '.join(map(str, found.layer_indices))}."
        )
    if as_json:
        layers = [each for each in inspection["layers"] if layer in (None, each["index"])]
        body = {"scores": str(scores), **inspection, "layers": layers, "comparisons": comparisons}
        click.echo(opt.json_text(body))
        return
    model = found.provenance.get("model")
    title = f"{scores} ({show(model).strip(chr(39))})" if isinstance(model, str) else str(scores)
    lines = list(inspection_lines(inspection, title, found, selection, layer))
    lines += [line for comparison in comparisons for line in comparison_lines(comparison, layer)]
    click.echo("\n".join(lines))


def _selection(
    scores: Scores, settings: SelectionSettings, targets: Targets, keep_file: Path | None
) -> Selection | None:
    given = sum(target is not None for target in (*targets, keep_file))
    if given > 1:
        raise SettingsError("Say in one way how many experts stay: --keep, --ratio, --total or --keep-file.")
    if keep_file is not None:
        return listed_selection(read_keep_file(keep_file, scores.spec, scores.layer_indices), scores, settings)
    if not given and not settings.has_schedule_file:
        if settings.schedule != DEFAULT_SCHEDULE or settings.floor is not None or settings.protect_super_experts:
            raise SettingsError(
                "--schedule, --floor and --protect-super-experts divide and keep experts: say with --keep, --ratio or "
                "--total how many stay."
            )
        return None
    return _selected(scores, settings, targets)


def _selected(scores: Scores, settings: SelectionSettings, targets: Targets) -> Selection:
    keep, ratio, total = targets
    if keep is not None or ratio is not None:
        if ratio is not None and not 0 < ratio < 1:
            raise SettingsError(f"--ratio {ratio:g} is not between 0 and 1. It is the share of experts to remove.")
        total = resolve_keep(scores.spec, keep, ratio) * len(scores.layers)
    every = scores.spec.count * len(scores.layers)
    if total is not None and total >= every:
        raise SettingsError(f"--total {total:,}: there are {every:,} experts in all, so nothing would be removed.")
    stated = stated_counts(settings, scores.spec, scores.layer_indices)
    if stated is not None:
        in_file = sum(stated.values())
        if total is not None and in_file != total:
            raise SettingsError(
                f"--schedule {settings.schedule} keeps {in_file:,} experts in all, but {total:,} were asked for. "
                "Give the file alone, or choose a schedule by its name."
            )
        total = in_file
    assert total is not None
    sources, tokens = scores.sources, scores.source_tokens
    return Selector(settings, scores.spec, sources, tokens, total, stated).all(scores.layers)


def _compared(
    scores: Scores, base: SelectionSettings, first: Selection | None, text: str, targets: Targets
) -> dict[str, Any]:
    if first is None:
        raise SettingsError(
            "--compare shows two selections side by side: say with --keep, --ratio or --total how many stay."
        )
    settings = changed_settings(base, text)
    if settings.has_schedule_file:
        targets = (None, None, None)
    elif all(target is None for target in targets):
        # If a file lists the experts, compare with as many in total.
        targets = (None, None, sum(first.counts))
    return compare_selections(text, settings, scores, first, _selected(scores, settings, targets))
