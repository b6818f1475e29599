"""The commands that score and prune: `run`, `score`, `prune` and `resume`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from streamprune.cli.options import (
    DTYPE,
    FOLDER,
    JSON_SUMMARY,
    KEEP,
    KEEP_FILE,
    MODEL_OUTPUT,
    QUIET,
    RATIO,
    REPORT,
    SHARD_SIZE,
    STOP_IF_KL,
    Option,
    budget_options,
    calibration_options,
    compute_options,
    parse_size,
    place_options,
    quiet_downloads,
    quiet_libraries,
    reports_errors,
    selection_options,
    verify_option,
    with_options,
)
from streamprune.cli.publish import report_after
from streamprune.config import DEFAULT_CHECKPOINT_EVERY, PROPAGATE, PruneSettings, RunSettings
from streamprune.distributed.processes import is_first, launched
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory
from streamprune.work.records import has_pruning, has_run

if TYPE_CHECKING:
    from streamprune.pipeline.finish import RunResult


P = ParamSpec("P")
R = TypeVar("R")


def _run_options(resuming: bool) -> Option[..., Any]:
    """The options that `resume` may change. When `resuming`, those that are not given stay as they were."""
    options = [
        *compute_options(resuming),
        click.option(
            "--checkpoint-every", type=float, metavar="SECONDS",
            default=None if resuming else DEFAULT_CHECKPOINT_EVERY, show_default=not resuming,
            help="Seconds between saves of the hidden states. 0: after every layer.",
        ),
        click.option("--from-layer", type=int, metavar="K", help="Redo layer K (counted from 0) and all later ones."),
        QUIET,
        JSON_SUMMARY,
    ]  # fmt: skip
    return lambda command: with_options(options, command)


@click.command()
@click.argument("model")
@MODEL_OUTPUT
@budget_options
@KEEP
@RATIO
@click.option("--dry-run", is_flag=True, help="Print what would be done, without doing it.")
@calibration_options
@selection_options
@click.option(
    "--propagate", type=click.Choice(PROPAGATE), default="original", show_default=True,
    help="Score each layer on the outputs of the original or of the pruned layers before it.",
)  # fmt: skip
@DTYPE
@SHARD_SIZE
@place_options
@_run_options(resuming=False)
@click.option("--evaluate", is_flag=True, help="Hold out a tenth of the calibration text and measure the loss on it.")
@STOP_IF_KL
@verify_option(True)
@REPORT
@reports_errors
def run(
    output: Path, max_shard_size: str, dry_run: bool, with_report: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Prune MODEL (a local folder or a Hub id) and write a standard checkpoint.

    MODEL is read one layer at a time, so that memory does not grow with its size.
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
@click.option("-o", "--output", required=True, type=FOLDER, help="File for the scores, such as scores.safetensors.")
@calibration_options
@DTYPE
@place_options
@_run_options(resuming=False)
@reports_errors
def score(output: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Score the experts of MODEL and write one small file, from which any number of pruned models can be made.

    The file has statistics for each source of the calibration, so that the mix, the method and the size can be chosen
    later. Look at it with `inspect`, and use it with `prune`.
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
@MODEL_OUTPUT
@click.option("--scores", type=FOLDER, help="A scores file, or the folder of a model that was pruned before.")
@budget_options
@KEEP
@RATIO
@click.option("--dry-run", is_flag=True, help="Print what would be done and lost, without doing it.")
@selection_options
@click.option("--seed", type=int, help="For --method random.  [default: 0]")
@KEEP_FILE
@SHARD_SIZE
@place_options
@verify_option(False)
@REPORT
@QUIET
@JSON_SUMMARY
@reports_errors
def prune(
    output: Path, max_shard_size: str, dry_run: bool, with_report: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Prune MODEL by scores from an earlier command. This needs no forward pass and no GPU, only a file copy.

    The result is identical to the byte to that of `run` with the same calibration and settings.
    """
    settings = PruneSettings(output=output, max_shard_bytes=parse_size(max_shard_size), **options)
    from streamprune.pipeline import prune as engine

    if settings.scores is None:
        # Then transformers builds the model.
        quiet_libraries(downloads=quiet)
    elif quiet:
        quiet_downloads()
    summary = engine.dry_run(settings, quiet) if dry_run else engine.prune(settings, quiet).summary
    if with_report and not dry_run:
        report_after(output, quiet)
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@click.command()
@click.argument("workdir", type=FOLDER)
@_run_options(resuming=True)
@STOP_IF_KL
@verify_option(None)
# The default None means "not given": then the earlier setting stays.
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run Python code that comes with the model.")
@REPORT
@reports_errors
def resume(workdir: Path, with_report: bool, quiet: bool, as_json: bool, **changes: Any) -> None:
    """Resume the `run`, `score` or `prune` in WORKDIR (usually OUT.work) where it stopped.

    Settings that decide the result stay as they were. The options below may be changed.
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
    # (The result of `score` is a file, which has no report.)
    if with_report and result.output.is_dir():
        report_after(result.output, quiet)
    if as_json:
        click.echo(json.dumps(result.summary, indent=2))


def _resume_pruning(workdir: Path, quiet: bool, given: dict[str, Any]) -> RunResult:
    if launched().count == 1:
        return _prune_on(workdir, quiet, given)
    # The other processes wait for rank 0, which has nothing for them to do.
    from streamprune.distributed.joining import joined

    with joined("cpu") as processes:
        return processes.on_first(lambda: _prune_on(workdir, quiet, given))


def _prune_on(workdir: Path, quiet: bool, given: dict[str, Any]) -> RunResult:
    from streamprune.pipeline import prune as engine

    unused = sorted(given.keys() - {"verify", "trust_remote_code"})
    if unused:
        raise SettingsError(
            f"{workdir} holds an unfinished `streamprune prune`, which computes nothing. Leave out "
            f"{', '.join('--' + name.replace('_', '-') for name in unused)}."
        )
    if quiet:
        quiet_downloads()
    return engine.resume(workdir, quiet, **given)
