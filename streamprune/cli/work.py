"""The commands about work folders and results: `status`, `clean` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from streamprune.cli.options import FOLDER, JSON_OBJECT, REVISION, TRUST_REMOTE_CODE, quiet_libraries, reports_errors
from streamprune.hardware.memory import limit_library_memory


@click.command()
@click.argument("workdir", type=FOLDER)
@JSON_OBJECT
@reports_errors
def status(workdir: Path, as_json: bool) -> None:
    """Show what is done and what is left of the `run`, `score` or `prune` in WORKDIR."""
    from streamprune.pipeline.status import status_of, status_text

    found = status_of(workdir)
    click.echo(json.dumps(found, indent=2) if as_json else status_text(found))


@click.command()
@click.argument("workdir", type=FOLDER)
@click.option("--all", "everything", is_flag=True, help="Remove everything, also what resuming needs.")
@reports_errors
def clean(workdir: Path, everything: bool) -> None:
    """Remove what is no longer needed from WORKDIR. Once the run is complete, that is all of it."""
    from streamprune.hardware.memory import format_bytes
    from streamprune.pipeline.status import clean_up

    click.echo(f"{format_bytes(clean_up(workdir, everything))} removed from {workdir}")


@click.command()
@click.argument("output", metavar="OUT", type=FOLDER)
@click.option("--source", required=True, help="The model that OUT was made from: a folder or a Hub id.")
@REVISION
@TRUST_REMOTE_CODE
@reports_errors
def verify(output: Path, source: str, revision: str | None, trust_remote_code: bool) -> None:
    """Verify that every tensor of OUT is identical to the source's, byte by byte, as its record says."""
    limit_library_memory()
    from streamprune.checkpoint.hub import resolve_model
    from streamprune.hardware.memory import format_bytes
    from streamprune.output.verify import verify as prove

    quiet_libraries(downloads=False)
    proof = prove(output, resolve_model(source, revision, trust_remote_code), trust_remote_code)
    click.echo(
        f"{output} is right: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes."
    )
