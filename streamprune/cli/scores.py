"""The command that shows scores: `inspect`. Needs no torch, no model and no GPU."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from streamprune.cli import options as opt
from streamprune.cli.help import Command
from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.fit.estimate import Footprint
from streamprune.models.config_json import resolve_keep
from streamprune.planning.counts import ExpertCounts, plan_counts
from streamprune.planning.facts import prunable_from_scores
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores
from streamprune.selection.compare import changed_settings, compare_selections, comparison_lines, naming_compare
from streamprune.selection.inspect import inspect_scores, inspection_lines
from streamprune.selection.schedules import DEFAULT_SCHEDULE
from streamprune.selection.select import Selection, Selector, listed_selection, stated_counts
from streamprune.selection.settings import SelectionSettings
from streamprune.selection.user_files import read_keep_file
from streamprune.selection.widths import width_for_share
from streamprune.targets import PruningTarget

#: Shares of the channels, of which the energy is shown where nothing says how many stay.
_SHOWN_SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Targets:
    """How many experts and channels stay: the options of the same names."""

    keep: int | None = None
    ratio: float | None = None
    total: int | None = None
    width: int | None = None
    by: str = "experts"
    width_multiple: int | None = None

    @property
    def is_narrower(self) -> bool:
        """Whether experts are to become narrower."""
        return self.width is not None or self.by != "experts"


@click.command(cls=Command)
@click.argument("scores", metavar="SCORES", type=opt.PATH)
@click.option("--keep", type=int, help="Experts to keep per layer; with a schedule, the mean.")
@click.option("--ratio", type=float, help="Share of experts to remove, e.g. 0.5 for half.")
@click.option("--total", type=int, help="Experts to keep in all layers together.")
@opt.width_options("What --ratio removes")
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
    """Show scores: the experts of each layer, those at the boundary, those that no token was routed to.

    SCORES is a file that `score` wrote, or the folder of a pruned model, which has one.

    With --keep, --ratio, --total or --keep-file it also shows how much of each source's saliency is kept, with --width
    how much of the energy of its channels, and warnings.
    """
    # Names in the file may have characters that the terminal lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    targets = Targets(**{name: given.pop(name) for name in Targets.__dataclass_fields__})
    keep_file = given.pop("keep_file")
    settings = SelectionSettings(**given)
    found = read_scores(scores)
    counts = _narrower(found, settings, targets)
    selection = _selection(found, settings, targets, counts, keep_file)
    widths = _shown_widths(found) if selection is None else []
    inspection = inspect_scores(found, settings, selection, widths, counts.notes if counts is not None else ())
    comparisons = [_compared(found, settings, selection, text) for text in compare]
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


def _narrower(scores: Scores, settings: SelectionSettings, targets: Targets) -> ExpertCounts | None:
    """How many experts stay, with how many channels each; None if they keep all channels.

    Raises ScoresError for scores without channels, UnsupportedModelError for experts that cannot be made narrower.
    """
    if targets.by != "experts" and targets.ratio is None:
        raise SettingsError(f"--by {targets.by} says what --ratio removes, which is not given.")
    target = PruningTarget(
        **vars(settings), keep=targets.keep, ratio=targets.ratio, width=targets.width, by=targets.by,
        width_multiple=targets.width_multiple,
    )  # fmt: skip
    if not targets.is_narrower:
        return None

    def footprint() -> Footprint:
        raise AssertionError("only a budget asks for it, and there is none")

    return plan_counts(target, prunable_from_scores(scores), footprint)


def _shown_widths(scores: Scores) -> list[int]:
    """Some widths that the experts may get, if they can be made narrower and their channels are scored."""
    widths: list[int] = []
    if scores.channel_bytes and (spec := prunable_from_scores(scores).width) is not None:
        # Experts may have no smaller width that shared experts allow.
        with suppress(SettingsError):
            widths = [width_for_share(spec, share) for share in _SHOWN_SHARES]
    return list(dict.fromkeys(widths))


def _selection(
    scores: Scores,
    settings: SelectionSettings,
    targets: Targets,
    counts: ExpertCounts | None,
    keep_file: Path | None,
) -> Selection | None:
    given = sum(target is not None for target in (targets.keep, targets.ratio, targets.total, keep_file))
    if given > 1:
        raise SettingsError("Say in one way how many experts stay: --keep, --ratio, --total or --keep-file.")
    if keep_file is not None and counts is not None:
        raise SettingsError("--keep-file lists complete experts. Omit --width.")
    if keep_file is not None:
        return listed_selection(read_keep_file(keep_file, scores.spec, scores.layer_indices), scores, settings)
    if not given and not settings.has_schedule_file and counts is None:
        if settings.schedule != DEFAULT_SCHEDULE or settings.floor is not None or settings.protect_super_experts:
            raise SettingsError(
                "--schedule, --floor and --protect-super-experts divide and keep experts: say with --keep, --ratio or "
                "--total how many stay."
            )
        return None
    return _selected(scores, settings, targets, counts)


def _selected(scores: Scores, settings: SelectionSettings, targets: Targets, counts: ExpertCounts | None) -> Selection:
    """The selection; `counts` are those of `_narrower`."""
    total = targets.total
    per_layer = targets.keep is not None or targets.ratio is not None
    if per_layer and (counts is None or settings.has_schedule_file):
        keep = resolve_keep(scores.spec, targets.keep, targets.ratio, all_may_stay=counts is not None)
        total = keep * len(scores.layers)
    elif counts is not None and total is None:
        total = counts.total
    every = scores.spec.count * len(scores.layers)
    if total is not None and total >= every + (counts is not None):
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
    width = counts.width if counts is not None else None
    return Selector(settings, scores.spec, sources, tokens, total, stated, width).all(scores.layers)


def _compared(scores: Scores, base: SelectionSettings, first: Selection | None, text: str) -> dict[str, Any]:
    if first is None:
        raise SettingsError(
            "--compare shows two selections side by side: say with --keep, --ratio or --total how many stay."
        )
    settings, width = changed_settings(base, text)
    channels = first.layers[0].channels
    if width is None and channels is not None:
        width = channels.kept_width
    # With another schedule too, as many experts stay in total.
    targets = Targets(total=None if settings.has_schedule_file else sum(first.counts), width=width)
    with naming_compare(text):
        other = _selected(scores, settings, targets, _narrower(scores, settings, targets))
    return compare_selections(text, settings, scores, first, other)
