"""The commands that score and prune: `run`, `score`, `prune` and `resume`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from streamprune.cli.options import (
    KEEP_FILE_HELP,
    calibration_options,
    goal_options,
    parse_size,
    place_options,
    quiet_downloads,
    quiet_libraries,
    report_option,
    reports_errors,
    selection_options,
    with_options,
)
from streamprune.cli.publish import report_after
from streamprune.config import DEFAULT_CHECKPOINT_EVERY, DTYPES, PROPAGATE, STATES, PruneSettings, RunSettings
from streamprune.distributed.processes import is_first, launched
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory
from streamprune.work.records import has_pruning, has_run

if TYPE_CHECKING:
    from streamprune.pipeline.finish import RunResult


P = ParamSpec("P")
R = TypeVar("R")
_FOLDER = click.Path(path_type=Path)
_STOP_IF_KL = "With --evaluate: no result whose KL divergence is above X nats per token; ends early if hopeless."
_VERIFY = "Compare the result with the source, byte by byte."


def _sitting_options(resuming: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Options that may differ between the sittings of one run. Those that are not given again stay as they were."""

    def default(value: Any) -> dict[str, Any]:
        return {"default": None} if resuming else {"default": value, "show_default": True}

    options = [
        click.option("--device", metavar="auto|cpu|cuda:0", help="Where to compute.", **default("auto")),
        click.option(
            "--batch-tokens", type=int,
            help="Tokens per micro-batch at most.  [default: 4096 on a CPU, 32768 on a GPU; less if memory demands it]",
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
        click.option("--quiet", is_flag=True, help="Print errors only."),
        click.option("--json", "as_json", is_flag=True, help="Print the final summary as JSON on stdout."),
    ]  # fmt: skip

    return lambda command: with_options(options, command)


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=_FOLDER, help="Folder for the pruned model.")
@goal_options
@click.option("--keep", type=int, help="Instead of a budget: experts to keep in every block.")
@click.option("--ratio", type=float, help="Instead of a budget: share of experts to remove, e.g. 0.5 for half.")
@click.option("--dry-run", is_flag=True, help="Tell what would be done, and stop there.")
@calibration_options
@selection_options
@click.option(
    "--propagate", type=click.Choice(PROPAGATE), default="original", show_default=True,
    help="Whose output the next block is scored on: the original block's or the pruned one's.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="What to compute in.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest output file.")
@place_options
@_sitting_options(resuming=False)
@click.option("--evaluate", is_flag=True, help="Hold back a tenth of the calibration, and measure what is lost on it.")
@click.option("--stop-if-kl", type=float, metavar="X", help=_STOP_IF_KL)
@click.option("--verify/--no-verify", default=True, show_default=True, help=_VERIFY)
@report_option
@reports_errors
def run(
    output: Path, max_shard_size: str, dry_run: bool, with_report: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Prune MODEL (a local folder or a Hub id) and write a standard checkpoint.

    MODEL is read one decoder block at a time; memory does not grow with its size.
    """
    settings = RunSettings(output=output, max_shard_bytes=parse_size(max_shard_size), **options)
    if dry_run and not is_first():
        return
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune.pipeline import run as engine
    from streamprune.pipeline.run import print_dry_run

    quiet_libraries(downloads=quiet)
    summary = print_dry_run(settings, quiet) if dry_run else engine.run(settings, quiet).summary
    if with_report and not dry_run:
        report_after(output, quiet)
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=_FOLDER, help="File for the scores, such as scores.safetensors.")
@calibration_options
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="What to compute in.")
@place_options
@_sitting_options(resuming=False)
@reports_errors
def score(output: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Score the experts of MODEL, and write one small file from which any number of pruned models can be made.

    Statistics are kept for each source of the calibration, so that mixes, methods and sizes are chosen afterwards:
    look at them with `inspect`, use them with `prune`.
    """
    settings = RunSettings(output=output, only_score=True, **options)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune.pipeline import run as engine

    quiet_libraries(downloads=quiet)
    summary = engine.run(settings, quiet).summary
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=_FOLDER, help="Folder for the pruned model.")
@click.option("--scores", type=_FOLDER, help="File of `score`, or the folder of a model that was pruned before.")
@goal_options
@click.option("--keep", type=int, help="Instead of a budget: experts to keep in every block.")
@click.option("--ratio", type=float, help="Instead of a budget: share of experts to remove, e.g. 0.5 for half.")
@click.option("--dry-run", is_flag=True, help="Tell what would be done, and what would be lost, and stop there.")
@selection_options
@click.option("--seed", type=int, help="For --method random.  [default: 0]")
@click.option("--keep-file", type=_FOLDER, help=KEEP_FILE_HELP)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest output file.")
@place_options
@click.option("--verify/--no-verify", default=False, show_default=True, help=_VERIFY)
@report_option
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the final summary as JSON on stdout.")
@reports_errors
def prune(
    output: Path, max_shard_size: str, dry_run: bool, with_report: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Prune MODEL by scores that were taken before: no forward pass, no GPU, the time of a file copy.

    The result is the same to the byte as that of `run` with the same calibration and settings.
    """
    settings = PruneSettings(output=output, max_shard_bytes=parse_size(max_shard_size), **options)
    from streamprune.pipeline import prune as engine

    if settings.scores is None:
        # Then the model is built, and transformers has its say.
        quiet_libraries(downloads=quiet)
    elif quiet:
        quiet_downloads()
    summary = engine.dry_run(settings, quiet) if dry_run else engine.prune(settings, quiet).summary
    if with_report and not dry_run:
        report_after(output, quiet)
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@click.command()
@click.argument("workdir", type=_FOLDER)
@_sitting_options(resuming=True)
@click.option("--stop-if-kl", type=float, metavar="X", help=_STOP_IF_KL)
@click.option("--verify/--no-verify", default=None, help=_VERIFY)
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run Python code that comes with the model.")
@report_option
@reports_errors
def resume(workdir: Path, with_report: bool, quiet: bool, as_json: bool, **changes: Any) -> None:
    """Go on with the run, scoring or pruning in WORKDIR (usually OUT.work) where it stopped.

    Everything that decides the result is as it was when the run began; what is given here may differ.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    # The folder may be on the first process's machine only.
    if is_first() and has_pruning(workdir) and not has_run(workdir):
        result = _resume_pruning(workdir, quiet, given)
    else:
        limit_library_memory(tight="ram_gib" in given)
        from streamprune.pipeline import run as engine

        quiet_libraries(downloads=quiet)
        result = engine.resume(workdir, quiet, **given)
    # (Scores are a file.)
    if with_report and result.output.is_dir():
        report_after(result.output, quiet)
    if as_json:
        click.echo(json.dumps(result.summary, indent=2))


def _resume_pruning(workdir: Path, quiet: bool, given: dict[str, Any]) -> RunResult:
    if launched().count == 1:
        return _go_on_pruning(workdir, quiet, given)
    # The other processes wait for rank 0, which has nothing for them to do.
    from streamprune.distributed.joining import joined

    with joined("cpu") as processes:
        return processes.on_first(lambda: _go_on_pruning(workdir, quiet, given))


def _go_on_pruning(workdir: Path, quiet: bool, given: dict[str, Any]) -> RunResult:
    from streamprune.pipeline import prune as engine

    odd = sorted(given.keys() - {"verify", "trust_remote_code"})
    if odd:
        raise SettingsError(
            f"{workdir} holds what `streamprune prune` began, which computes nothing: leave out "
            f"{', '.join('--' + name.replace('_', '-') for name in odd)}."
        )
    if quiet:
        quiet_downloads()
    return engine.resume(workdir, quiet, **given)
