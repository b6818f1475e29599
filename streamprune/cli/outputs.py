"""The commands about results and work folders: `status`, `clean`, `verify`, `report` and `push`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from streamprune.cli import options as opt
from streamprune.cli.help import Command
from streamprune.distributed.processes import is_first
from streamprune.errors import StreampruneError
from streamprune.hardware.memory import format_bytes, limit_library_memory
from streamprune.progress import stage

_OUT = click.argument("output", metavar="OUT", type=opt.PATH)


@click.command(cls=Command)
@click.argument("workdir", type=opt.PATH)
@opt.JSON_OBJECT
def status(workdir: Path, as_json: bool) -> None:
    """Show what is done and what is left of the `run`, `score`, `prune` or `search` in WORKDIR."""
    from streamprune.pipeline.ended import ended_text, status_of_ended
    from streamprune.pipeline.status import status_of, status_text

    ended = status_of_ended(workdir)
    if as_json:
        click.echo(opt.json_text(ended or status_of(workdir)))
    else:
        click.echo(ended_text(ended) if ended is not None else status_text(status_of(workdir)))


@click.command(cls=Command)
@click.argument("workdir", type=opt.PATH)
@click.option("--all", "everything", is_flag=True, help="Remove everything, including what resuming needs.")
def clean(workdir: Path, everything: bool) -> None:
    """Remove what is no longer needed from WORKDIR. After a completed run this removes everything."""
    from streamprune.pipeline.status import clean_up
    from streamprune.work.folder import resume_command
    from streamprune.work.records import has_pruning, has_run

    click.echo(f"{format_bytes(clean_up(workdir, everything))} removed from {workdir}")
    if has_run(workdir) or has_pruning(workdir):
        click.echo(f"The rest is an unfinished run, which --all discards. Resume it with: {resume_command(workdir)}")


@click.command(cls=Command)
@_OUT
@click.option("--source", required=True, help="The model that OUT was made from: a folder or a Hub id.")
@opt.REVISION
@opt.TRUST_REMOTE_CODE
def verify(output: Path, source: str, revision: str | None, trust_remote_code: bool) -> None:
    """Verify OUT against its source: every tensor byte by byte, config.json and all other files."""
    limit_library_memory()
    from streamprune.checkpoint.hub import resolve_model
    from streamprune.output.verify import check_written
    from streamprune.output.verify import verify as verify_output

    # (Before the source is downloaded.)
    check_written(output)
    resolve_model(source, revision, trust_remote_code, config_only=True)
    opt.say_loading()
    opt.quiet_libraries(downloads=False)
    with stage(_to_stderr, f"comparing {output} with {source}"):
        verified = verify_output(output, resolve_model(source, revision, trust_remote_code), trust_remote_code)
    click.echo(f"{output} is verified: {verified.text}.")


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


@click.command(cls=Command)
@_OUT
@opt.QUIET
def report(output: Path, quiet: bool) -> None:
    """Make the report of OUT, a model that streamprune wrote: OUT/report.html, and OUT/pictures for the model card.

    It is made from the files in OUT and the run's log next to it; the source model is not needed.
    """
    with stage(_silent if quiet else _to_stderr, "drawing the report"):
        made = _write_report(output)
    if not quiet:
        click.echo(f"report: {made}")


def _silent(line: str) -> None:
    """In the place of `_to_stderr` with --quiet."""


def report_after(output: Path, quiet: bool) -> None:
    """Make the report of a model that has just been finished, and print where it is.

    Errors are printed as notes: the model is complete without its report.
    """
    if not is_first():
        return
    again = f"`streamprune report {output}` makes it."
    try:
        with stage(_silent if quiet else _to_stderr, "drawing the report"):
            message = f"report: {_write_report(output)}"
    except StreampruneError as error:
        message = f"note: there is no report: {error} {again}"
    except KeyboardInterrupt:
        message = f"note: the report was interrupted. {again}"
    except Exception as error:
        message = f"note: there is no report: {type(error).__name__}: {error}. Please report this error."
    if not quiet:
        click.echo(message, err=True)


def _write_report(output: Path) -> Path:
    # transformers would print warnings if it has to build the model to know its memory.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from streamprune.reporting.write import write_report

    return write_report(output)


@click.command(cls=Command)
@_OUT
@click.option("--repo-id", required=True, metavar="NAME/REPO", help="The model repository; made if it does not exist.")
@click.option(
    "--source",
    help="The model that OUT was made from, to compare with.  "
    "[default: the source in OUT's record, if it is in the Hub cache]",
)
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH", default="main", show_default=True, help="Branch to upload to.")
@click.option("--dry-run", is_flag=True, help="Verify and list what would be uploaded, without network access.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True,
    help="Upload only an output that was verified to be complete.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model, to verify it.")
@opt.JSON_OBJECT
@opt.QUIET
def push(as_json: bool, quiet: bool, **options: Any) -> None:
    """Upload OUT, a model that streamprune wrote, to the Hugging Face Hub, after verifying it.

    Needs a token that may write (`hf auth login`, or HF_TOKEN). After an interruption the same command resumes: files
    already uploaded are skipped.
    """
    limit_library_memory()
    from streamprune.publish.push import PushSettings
    from streamprune.publish.push import push as publish

    settings = PushSettings(**options)
    if settings.verify:
        opt.quiet_libraries(downloads=quiet)
    elif quiet:
        opt.quiet_downloads()
    # The result of a dry run is its list, which belongs on stdout.
    to_stderr = as_json or not settings.dry_run
    result = publish(settings, lambda line: None if quiet else click.echo(line, err=to_stderr))
    if as_json:
        click.echo(opt.json_text(result))
    elif not quiet and not settings.dry_run:
        click.echo(result["url"])
