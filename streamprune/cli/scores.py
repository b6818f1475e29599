"""The command that shows scores: `inspect`. Needs no torch, no model and no GPU."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from streamprune.cli.options import KEEP_FILE_HELP, reports_errors, selection_options
from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.models.config_json import resolve_keep
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores
from streamprune.selection.inspect import (
    Inspection,
    comparison_lines,
    inspect_scores,
    inspection_lines,
    inspection_object,
    layer_lines,
)
from streamprune.selection.keep_file import read_keep_file
from streamprune.selection.retention import (
    Comparison,
    changed_selection,
    compare_choices,
    comparison_object,
    retentions,
)
from streamprune.selection.select import Choice, choose, choose_kept
from streamprune.selection.settings import Selection


@click.command()
@click.argument("scores", metavar="S", type=click.Path(path_type=Path))
@click.option("--keep", type=int, help="Experts to keep per layer; with a schedule, the mean.")
@click.option("--ratio", type=float, help="Share of experts to remove, e.g. 0.5 for half.")
@click.option("--total", type=int, help="Experts to keep in all layers together.")
@click.option("--keep-file", type=click.Path(path_type=Path), help=KEEP_FILE_HELP)
@selection_options
@click.option("--seed", type=int, default=0, show_default=True, help="For --method random.")
@click.option(
    "--compare", multiple=True, metavar="CHANGE",
    help="Compare with another choice: mix=code=1, method=frequency, … May be given several times.",
)  # fmt: skip
@click.option("--layer", type=int, metavar="K", help="Show every expert of layer K.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@reports_errors
def inspect(
    scores: Path,
    keep: int | None,
    ratio: float | None,
    total: int | None,
    keep_file: Path | None,
    compare: tuple[str, ...],
    layer: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what S, a file of scores, says: the experts of each layer, those at the boundary, those never seen.

    With --keep, --ratio, --total or --keep-file also what that choice keeps of each source, and what to beware of.
    """
    # Names in the file may have characters that the terminal lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    selection = Selection(**options)
    found = read_scores(scores)
    choice = _choice(found, selection, (keep, ratio, total), keep_file)
    inspection = inspect_scores(found, selection, choice)
    comparisons = [_compared(inspection, text, (keep, ratio, total)) for text in compare]
    if layer is not None and layer not in found.blocks:
        raise SettingsError(
            f"--layer {layer} has no experts. Layers with experts: {', '.join(map(str, found.blocks))}."
        )
    if as_json:
        body = {"scores": str(scores), **inspection_object(inspection)}
        body["layers"] = [each for each in body["layers"] if layer in (None, each["index"])]
        body["comparisons"] = [comparison_object(comparison) for comparison in comparisons]
        click.echo(json.dumps(body, indent=2))
    else:
        click.echo("\n".join(_lines(inspection, comparisons, _title(found, scores), layer)))


def _choice(
    scores: Scores, selection: Selection, goals: tuple[int | None, float | None, int | None], keep_file: Path | None
) -> Choice | None:
    given = sum(goal is not None for goal in (*goals, keep_file))
    if given > 1:
        raise SettingsError("Say in one way how many experts stay: --keep, --ratio, --total or --keep-file.")
    if keep_file is not None:
        kept = read_keep_file(keep_file, scores.spec, scores.blocks)
        return choose_kept(scores.layers, scores.sources, scores.source_tokens, selection, kept)
    if not given and not selection.has_schedule_file:
        if selection.schedule != "uniform" or selection.floor is not None or selection.protect_super_experts:
            raise SettingsError(
                "--schedule, --floor and --protect-super-experts divide and keep experts: say with --keep, --ratio or "
                "--total how many stay."
            )
        return None
    return _chosen(scores, selection, goals)


def _chosen(scores: Scores, selection: Selection, goals: tuple[int | None, float | None, int | None]) -> Choice:
    keep, ratio, total = goals
    if keep is not None or ratio is not None:
        if ratio is not None and not 0 < ratio < 1:
            raise SettingsError(f"--ratio {ratio:g} is not between 0 and 1. It is the share of experts to remove.")
        total = resolve_keep(scores.spec, keep, ratio) * len(scores.layers)
    every = scores.spec.count * len(scores.layers)
    if total is not None and total >= every:
        raise SettingsError(f"--total {total:,}: there are {every:,} experts in all, so nothing would be removed.")
    return choose(scores.layers, scores.sources, scores.source_tokens, selection, scores.spec, total=total)


def _compared(inspection: Inspection, text: str, goals: tuple[int | None, float | None, int | None]) -> Comparison:
    if inspection.choice is None:
        raise SettingsError(
            "--compare holds two choices side by side: say with --keep, --ratio or --total how many stay."
        )
    scores, choice = inspection.scores, inspection.choice
    selection = changed_selection(inspection.selection, text)
    if selection.has_schedule_file:
        other = _chosen(scores, selection, (None, None, None))
    else:
        # Where a file said it, as many in all as that.
        stated = all(goal is None for goal in goals)
        other = _chosen(scores, selection, (None, None, sum(choice.counts)) if stated else goals)
    after = retentions(scores.layers, scores.sources, other, scores.spec.groups)
    return compare_choices(text, selection, (choice, other), inspection.retention, after)


def _title(scores: Scores, path: Path) -> str:
    model = scores.provenance.get("model")
    return f"{path} ({show(model).strip(chr(39))})" if isinstance(model, str) else str(path)


def _lines(inspection: Inspection, comparisons: Sequence[Comparison], title: str, layer: int | None) -> Iterator[str]:
    if layer is None:
        yield from inspection_lines(inspection, title)
    else:
        view = next(view for view in inspection.layers if view.block == layer)
        yield from layer_lines(inspection, title, view)
    for comparison in comparisons:
        yield from comparison_lines(comparison, layer)
