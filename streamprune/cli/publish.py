"""The command that shows an output: `report`, and what makes it at the end of `run`, `prune` and `resume`.

The command that publishes an output: `push`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from streamprune.cli.options import quiet_downloads, quiet_libraries, reports_errors
from streamprune.distributed.processes import is_first
from streamprune.errors import StreampruneError
from streamprune.hardware.memory import limit_library_memory

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
    from streamprune.reporting.write import write_report

    return write_report(output)


@click.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--repo-id", required=True, metavar="NAME/REPO", help="The model repository; made if it does not exist.")
@click.option(
    "--source",
    help="The model that OUT was made from, to compare with.  [default: what OUT names, if it is in the Hub cache]",
)
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH", default="main", show_default=True, help="Branch to upload to.")
@click.option("--dry-run", is_flag=True, help="Verify, list what would be uploaded, and stop there. Asks nobody.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Upload only what is proved to be whole.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model, to verify it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def push(as_json: bool, quiet: bool, **options: Any) -> None:
    """Upload OUT, a model that streamprune wrote, to the Hugging Face Hub, once it is proved to be whole.

    Needs a token that may write (`hf auth login`, or HF_TOKEN). After an interruption the same command goes on: what
    has arrived is not sent again.
    """
    limit_library_memory()
    from streamprune.publish.push import PushSettings
    from streamprune.publish.push import push as publish

    settings = PushSettings(**options)
    if settings.verify:
        quiet_libraries(downloads=quiet)
    elif quiet:
        quiet_downloads()
    # What a dry run lists is its result.
    beside_result = as_json or not settings.dry_run
    told = publish(settings, lambda line: None if quiet else click.echo(line, err=beside_result))
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif not quiet and not settings.dry_run:
        click.echo(told["url"])
