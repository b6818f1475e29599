"""The commands that prune, and those for what a run leaves: `run`, `resume`, `status`, `clean` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from streamprune.cli.common import goal_options, quiet_libraries, reports_errors
from streamprune.machine import limit_library_memory
from streamprune.settings import (
    DEFAULT_CHECKPOINT_EVERY,
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    DTYPES,
    METHODS,
    PROPAGATE,
    RESUME,
    STATES,
    RunSettings,
    parse_size,
)

P = ParamSpec("P")
R = TypeVar("R")
_FOLDER = click.Path(path_type=Path)


def _sitting_options(resuming: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Options that may differ between the sittings of one run. Those that are not given again stay as they were."""

    def default(value: Any) -> dict[str, Any]:
        return {"default": None} if resuming else {"default": value, "show_default": True}

    options = [
        click.option("--device", metavar="auto|cpu|cuda:0", help="Where to compute.", **default("auto")),
        click.option(
            "--batch-tokens", type=int,
            help="Tokens per micro-batch at most.  [default: 1024 on a CPU, 32768 on a GPU; less if memory demands it]",
        ),
        click.option(
            "--states", type=click.Choice(STATES),
            help="Where hidden states lie between blocks: on the card, in RAM, or in a file.", **default("auto"),
        ),
        click.option("--vram-gib", type=float, help="Most that the run may take on the card.  [default: what is free]"),
        click.option("--ram-gib", type=float, help="Most that the run may take of RAM.  [default: what is available]"),
        click.option(
            "--checkpoint-every", type=float, metavar="SECONDS",
            help="Save the hidden states so often at most; 0: after every block.", **default(DEFAULT_CHECKPOINT_EVERY),
        ),
        click.option("--from-layer", type=int, metavar="K", help="Do block K (from 0) and all behind it again."),
        click.option("--verify/--no-verify", help="Compare the result with the source, byte by byte.", **default(True)),
        click.option("--quiet", is_flag=True, help="Print errors only."),
        click.option("--json", "as_json", is_flag=True, help="Print the final summary as JSON on stdout."),
    ]  # fmt: skip

    def add(command: Callable[P, R]) -> Callable[P, R]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the pruned model.")
@goal_options
@click.option("--keep", type=int, help="Instead of a budget: experts to keep in every block.")
@click.option("--ratio", type=float, help="Instead of a budget: share of experts to remove, e.g. 0.5 for half.")
@click.option("--dry-run", is_flag=True, help="Tell what would be done, and stop there.")
@click.option(
    "--calibration", multiple=True, default=("builtin",), show_default=True, metavar="FILE|RECIPE",
    help="Text or JSONL file; or builtin, builtin:code,prose,… May be given several times.",
)  # fmt: skip
@click.option("--samples", type=int, default=DEFAULT_SAMPLES, show_default=True, help="Calibration sequences.")
@click.option(
    "--seq-len", type=int, help=f"Tokens per packed sequence.  [default: {DEFAULT_SEQ_LEN}, or the model's limit]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses which calibration text is used.")
@click.option("--method", type=click.Choice(METHODS), default="reap", show_default=True, help="How experts are scored.")
@click.option(
    "--propagate", type=click.Choice(PROPAGATE), default="original", show_default=True,
    help="Whose output the next block is scored on: the original block's or the pruned one's.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="What to compute in.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest output file.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--overwrite", is_flag=True, help="Replace the model in the output folder.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), help="Folder for what a resume needs.  [default: OUT.work]"
)
@click.option(
    "--resume", type=click.Choice(RESUME), default="auto", show_default=True,
    help="Go on with an earlier run of this command; insist on it; or begin anew.",
)  # fmt: skip
@_sitting_options(resuming=False)
@reports_errors
def run(output: Path, max_shard_size: str, dry_run: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Prune MODEL (a local folder or a Hub id) and write a standard checkpoint.

    MODEL is read one decoder block at a time; memory does not grow with its size.
    """
    settings = RunSettings(output=output, max_shard_bytes=parse_size(max_shard_size), **options)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune import run as engine

    quiet_libraries(downloads=quiet)
    summary = engine.dry_run(settings, quiet) if dry_run else engine.run(settings, quiet).summary
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@click.command()
@click.argument("workdir", type=_FOLDER)
@_sitting_options(resuming=True)
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run Python code that comes with the model.")
@reports_errors
def resume(workdir: Path, quiet: bool, as_json: bool, **changes: Any) -> None:
    """Go on with the run in WORKDIR (usually OUT.work) where it stopped.

    Everything that decides the result is as it was when the run began; what is given here may differ.
    """
    limit_library_memory(tight=changes["ram_gib"] is not None)
    from streamprune import run as engine

    quiet_libraries(downloads=quiet)
    given = {name: value for name, value in changes.items() if value is not None}
    summary = engine.resume(workdir, quiet, **given).summary
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@click.command()
@click.argument("workdir", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@reports_errors
def status(workdir: Path, as_json: bool) -> None:
    """Tell what is done of the run in WORKDIR, what is left, and how large the folder is."""
    from streamprune.work.status import status_of, status_text

    found = status_of(workdir)
    click.echo(json.dumps(found, indent=2) if as_json else status_text(found))


@click.command()
@click.argument("workdir", type=_FOLDER)
@click.option("--all", "everything", is_flag=True, help="Also what an unfinished run needs to go on: give it up.")
@reports_errors
def clean(workdir: Path, everything: bool) -> None:
    """Remove what is no longer needed from WORKDIR: all of it once the run is complete."""
    from streamprune.machine import format_bytes
    from streamprune.work.status import clean_up

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
    from streamprune.machine import format_bytes
    from streamprune.output.verify import verify as prove
    from streamprune.source.hub import resolve_model

    quiet_libraries(downloads=False)
    proof = prove(output, resolve_model(source, revision, trust_remote_code), trust_remote_code)
    click.echo(
        f"{output} is right: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes."
    )
