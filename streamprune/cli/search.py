"""The command that finds the best model for a memory: `search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from streamprune.cli import options as opt
from streamprune.cli.help import Command
from streamprune.config import DEFAULT_CHECKPOINT_EVERY, DEFAULT_DROP_ABOVE, SearchSettings
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory
from streamprune.saliency.methods import DEFAULT_METHOD, METHODS

#: The options of `resume` that a search has no use for.
_NOT_OF_SEARCH = ("from_layer", "stop_if_kl", "verify")


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=opt.PATH,
    help="Folder for the result: search.json, report.html, and the scores for `prune`.",
)  # fmt: skip
@opt.BUDGET
@opt.ENGINE
@click.option(
    "--candidates", multiple=True, default=("auto",), show_default=True, metavar="auto|keep=N,…",
    help="What is measured: keep=N, width=W, weights=FORMAT and refit, with commas. May be repeated.",
)  # fmt: skip
@click.option(
    "--drop-above", type=float, default=DEFAULT_DROP_ABOVE, show_default=True, metavar="FACTOR",
    help="Give up candidates whose KL divergence within the model is so many times the best one's, and above 0.01. "
    "0: none.",
)  # fmt: skip
@opt.CALIBRATION
@click.option(
    "--method", type=click.Choice(tuple(METHODS)), default=DEFAULT_METHOD, show_default=True,
    help="The score of an expert, as for `run`.",
)  # fmt: skip
@click.option("--mix", metavar="SOURCE=SHARE,…", help="Weights of the calibration's sources, as for `run`.")
@opt.ANCHOR
@opt.MTP_LAYERS
@opt.CHANNELS
@opt.DTYPE
@opt.PLACE
@opt.device_option()
@opt.memory_options()
@click.option(
    "--checkpoint-every", type=float, metavar="SECONDS", default=DEFAULT_CHECKPOINT_EVERY, show_default=True,
    help="Seconds between saves of the hidden states. 0: after every layer.",
)  # fmt: skip
@opt.QUIET
@opt.JSON_OBJECT
def search(quiet: bool, as_json: bool, **given: Any) -> None:
    """Measure many ways to prune MODEL for a memory, in one pass over it, and say which loses least.

    Candidates are numbers of experts, narrower experts, formats of the weights, and refitted ones, as far as they fit
    the budget. Each layer is read once; the held-out text, a tenth of the calibration, goes through every candidate.
    """
    settings = SearchSettings(**given)
    opt.refuse_early(settings, quiet)
    opt.say_loading(quiet)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune.pipeline import search as engine

    opt.quiet_libraries(downloads=quiet)
    _print(engine.search(settings, quiet), as_json)


def resume_search(workdir: Path, quiet: bool, as_json: bool, changes: Mapping[str, Any]) -> None:
    """Resume the search in a work folder, for `resume`. Raises SettingsError for options that it does not have."""
    refuse_of_search(workdir, changes, "search")
    opt.say_loading(quiet)
    limit_library_memory(tight=changes.get("ram_gib") is not None)
    from streamprune.pipeline import search as engine

    opt.quiet_libraries(downloads=quiet)
    _print(engine.resume_search(workdir, quiet, **changes), as_json)


def refuse_of_search(workdir: Path, changes: Mapping[str, Any], command: str, but: tuple[str, ...] = ()) -> None:
    """Raise SettingsError for options of `resume` that a search, or the `command` with one, does not have."""
    unused = [name for name in _NOT_OF_SEARCH if name in changes and name not in but]
    if unused:
        raise SettingsError(
            f"{workdir} has an unfinished `streamprune {command}`. Leave out "
            f"{', '.join('--' + name.replace('_', '-') for name in unused)}."
        )


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(opt.json_text(result))
    elif "candidates" in result:
        from streamprune.reporting.search import search_lines, search_result

        for line in search_lines(search_result(result)):
            click.echo(line)
