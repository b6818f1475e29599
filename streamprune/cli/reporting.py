"""The command that shows an output: `report`, and what makes it at the end of `run`, `prune` and `resume`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from streamprune.cli.common import reports_errors
from streamprune.errors import StreampruneError
from streamprune.together.launcher import is_first

P = ParamSpec("P")
R = TypeVar("R")


@click.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def report(output: Path, quiet: bool) -> None:
    """Make the report of OUT, a model that streamprune wrote: OUT/report.html, and OUT/pictures for the model card.

    It is made of what lies in OUT and of the log beside it; the source is not needed.
    """
    made = _write(output)
    if not quiet:
        click.echo(f"report: {made}")


def report_option(command: Callable[P, R]) -> Callable[P, R]:
    """The option of commands that make a report at their end."""
    return click.option(
        "--report/--no-report", "with_report", default=True, show_default=True, envvar="STREAMPRUNE_REPORT",
        show_envvar=True, help="Make OUT/report.html at the end.",
    )(command)  # fmt: skip


def report_after(output: Path, quiet: bool) -> None:
    """Make the report of a model that has just been finished, and say where it is.

    Whatever goes wrong is a note: the model is no worse for it.
    """
    if not is_first():
        return
    again = f"`streamprune report {output}` makes it."
    try:
        told = f"report: {_write(output)}"
    except StreampruneError as error:
        told = f"note: there is no report: {error} {again}"
    except KeyboardInterrupt:
        told = f"note: the report was interrupted. {again}"
    except Exception as error:
        told = f"note: there is no report: {type(error).__name__}: {error}. Please tell us of this."
    if not quiet:
        click.echo(told, err=True)


def _write(output: Path) -> Path:
    # Where the model has to be built to know its memory, transformers has nothing to say.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from streamprune.report.write import write_report

    return write_report(output)
