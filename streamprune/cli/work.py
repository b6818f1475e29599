"""The commands for what a run leaves: `status`, `clean` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from streamprune.cli.options import quiet_libraries, reports_errors
from streamprune.hardware.memory import limit_library_memory

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("workdir", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@reports_errors
def status(workdir: Path, as_json: bool) -> None:
    """Tell what is done of the run, scoring or pruning in WORKDIR, what is left, and how large the folder is."""
    from streamprune.pipeline.status import status_of, status_text

    found = status_of(workdir)
    click.echo(json.dumps(found, indent=2) if as_json else status_text(found))


@click.command()
@click.argument("workdir", type=_FOLDER)
@click.option("--all", "everything", is_flag=True, help="Also what an unfinished run needs to go on: give it up.")
@reports_errors
def clean(workdir: Path, everything: bool) -> None:
    """Remove what is no longer needed from WORKDIR: all of it once the run is complete."""
    from streamprune.hardware.memory import format_bytes
    from streamprune.pipeline.status import clean_up

    click.echo(f"{format_bytes(clean_up(workdir, everything))} removed from {workdir}")


@click.command()
@click.argument("output", metavar="OUT", type=_FOLDER)
@click.option("--source", required=True, help="The model that OUT was made from: a folder or a Hub id.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@reports_errors
def verify(output: Path, source: str, revision: str | None, trust_remote_code: bool) -> None:
    """Prove that OUT is what its record says: every kept tensor identical to the source's, byte by byte."""
    limit_library_memory()
    from streamprune.checkpoint.hub import resolve_model
    from streamprune.hardware.memory import format_bytes
    from streamprune.output.verify import verify as prove

    quiet_libraries(downloads=False)
    proof = prove(output, resolve_model(source, revision, trust_remote_code), trust_remote_code)
    click.echo(
        f"{output} is right: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes."
    )
