"""The commands that show and publish an output: `report` (also at the end of `run`, `prune` and `resume`), `push`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from streamprune.cli.options import quiet_downloads, quiet_libraries, reports_errors
from streamprune.distributed.processes import is_first
from streamprune.errors import StreampruneError
from streamprune.hardware.memory import limit_library_memory


@click.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def report(output: Path, quiet: bool) -> None:
    """Make the report of OUT, a model that streamprune wrote: OUT/report.html, and OUT/pictures for the model card.

    It is made from the files in OUT and the run's log next to it; the source model is not needed.
    """
    made = _write(output)
    if not quiet:
        click.echo(f"report: {made}")


def report_after(output: Path, quiet: bool) -> None:
    """Make the report of a model that has just been finished, and print where it is.

    Errors are printed as notes: the model is complete without its report.
    """
    if not is_first():
        return
    again = f"`streamprune report {output}` makes it."
    try:
        message = f"report: {_write(output)}"
    except StreampruneError as error:
        message = f"note: there is no report: {error} {again}"
    except KeyboardInterrupt:
        message = f"note: the report was interrupted. {again}"
    except Exception as error:
        message = f"note: there is no report: {type(error).__name__}: {error}. Please report this error."
    if not quiet:
        click.echo(message, err=True)


def _write(output: Path) -> Path:
    # Where the model has to be built to know its memory, transformers would print warnings.
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
@click.option("--dry-run", is_flag=True, help="Verify and list what would be uploaded, without a connection.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Upload only an output that was verified to be complete.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model, to verify it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def push(as_json: bool, quiet: bool, **options: Any) -> None:
    """Upload OUT, a model that streamprune wrote, to the Hugging Face Hub, after verifying it.

    Needs a token that may write (`hf auth login`, or HF_TOKEN). After an interruption the same command resumes: files
    that have arrived are not sent again.
    """
    limit_library_memory()
    from streamprune.publish.push import PushSettings
    from streamprune.publish.push import push as publish

    settings = PushSettings(**options)
    if settings.verify:
        quiet_libraries(downloads=quiet)
    elif quiet:
        quiet_downloads()
    # The list of a dry run is its result.
    to_stderr = as_json or not settings.dry_run
    result = publish(settings, lambda line: None if quiet else click.echo(line, err=to_stderr))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif not quiet and not settings.dry_run:
        click.echo(result["url"])
