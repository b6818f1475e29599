"""The commands that score and prune: `run`, `score`, `prune` and `resume`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamprune.cli import options as opt
from streamprune.cli.help import Command
from streamprune.cli.outputs import report_after
from streamprune.cli.search import refuse_of_search, resume_search
from streamprune.config import DEFAULT_CHECKPOINT_EVERY, PROPAGATE, PruneSettings, RunSettings
from streamprune.distributed.processes import is_first, launched
from streamprune.errors import ResumeError, SettingsError
from streamprune.hardware.memory import limit_library_memory
from streamprune.pipeline.best_results import best_command
from streamprune.pipeline.status import nothing_to_redo, nothing_to_resume, output_of
from streamprune.work.records import has_pruning, has_run, read_pruning, read_run

if TYPE_CHECKING:
    from streamprune.pipeline.finish import RunResult


def _run_options(resuming: bool = False) -> opt.Option:
    """The options that `resume` may change. With `resuming` their defaults are None: omitted ones stay unchanged."""
    default = None if resuming else "auto"
    return opt.together(
        opt.device_option(default),
        opt.memory_options(default),
        click.option(
            "--checkpoint-every", type=float, metavar="SECONDS",
            default=None if resuming else DEFAULT_CHECKPOINT_EVERY, show_default=not resuming,
            help="Seconds between saves of the hidden states. 0: after every layer.",
        ),
        click.option(
            "--from-layer", type=int, metavar="K",
            help="Redo layer K (counted from 0) and all later ones of an unfinished run.",
        ),
        opt.QUIET,
        opt.JSON_SUMMARY,
    )  # fmt: skip


@click.command(cls=Command)
@click.argument("model")
@opt.MODEL_OUTPUT
@opt.TARGET
@click.option(
    "--best", is_flag=True,
    help="With a budget: measure many ways to fit it, as `search` does, and write the one that loses least.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be done, without doing it.")
@opt.CALIBRATION
@opt.SELECTION
@click.option(
    "--propagate", type=click.Choice(PROPAGATE), default="original", show_default=True,
    help="Score each layer on the outputs of the original or of the pruned layers before it.",
)  # fmt: skip
@opt.CHANNELS
@click.option(
    "--refit",
    is_flag=True,
    help="Refit the down projections of the experts that stay, so that each layer gives what the original one gave.",
)
@opt.ANCHOR
@opt.DTYPE
@opt.SHARD_SIZE
@opt.WRITTEN_AS
@opt.PLACE
@_run_options()
@click.option(
    "--scores",
    type=opt.PATH,
    help="With --refit, --rounding gptq or --imatrix: select by these scores (of `score`, or an earlier output), not "
    "by new ones.",
)
@click.option(
    "--imatrix", type=opt.PATH, metavar="FILE",
    help="Also write an importance matrix of the result, for llama.cpp's llama-quantize. (All experts may stay. It "
    "sends more text through the pruned layers, which --refit and GPTQ then use too.)",
)  # fmt: skip
@click.option("--evaluate", is_flag=True, help="Hold out a tenth of the calibration text and measure the loss on it.")
@opt.STOP_IF_KL
@opt.verify_option(True)
@opt.report_option()
def run(max_shard_size: str, best: bool, dry_run: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL (a local folder or a Hub id) and write a standard checkpoint.

    MODEL is read one layer at a time, so that memory does not grow with its size. Exit status: below 75 the answer is
    final (0: done, 3: nothing fits, 4: refused by --stop-if-kl); 75 and above: stopped, and the same command goes on.
    """
    if best:
        _refuse_with_best(given, dry_run)
    # (In a run without --refit there is no anchor; with --best candidates are refitted.)
    anchor = given.pop("anchor") if best else None
    settings = RunSettings(max_shard_bytes=opt.parse_size(max_shard_size), **given)
    if dry_run and not is_first():
        return
    opt.refuse_early(settings, quiet)
    opt.say_loading(quiet)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune.pipeline import run as engine
    from streamprune.pipeline.best import run_best
    from streamprune.pipeline.dry_run import print_dry_run

    opt.quiet_libraries(downloads=quiet)
    summary: Mapping[str, Any]
    if dry_run:
        summary = print_dry_run(settings, quiet)
    else:
        summary = (run_best(settings, quiet, anchor) if best else engine.run(settings, quiet)).summary
    if settings.report and not dry_run:
        report_after(settings.output, quiet)
    if as_json:
        click.echo(opt.json_text(summary))


def _refuse_with_best(given: Mapping[str, Any], dry_run: bool) -> None:
    """Raise SettingsError for what --best decides itself, or does not offer."""
    if dry_run:
        raise SettingsError(
            "--best is found by measuring, so --dry-run cannot say what it is. Use `streamprune search`."
        )
    # (Before the settings are made, which would advise about --weights.)
    names = [name for name in ("quantize", "rounding", "tensor_parallel") if given[name] is not None]
    if names:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise SettingsError(
            f"--best does not offer {listed} yet: candidates in a format are stored with its defaults. Omit {listed}, "
            "or find a size with `streamprune search` and write it with `streamprune run --keep N --weights FORMAT`, "
            "which takes these options."
        )
    if given["weights"] != "source":
        raise SettingsError(
            f"--best tries the formats that MODEL can be stored in, {given['weights']} among them. Leave out "
            "--weights. For candidates in one format, use `streamprune search --candidates`."
        )


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=opt.PATH, metavar="FILE",
    help="File for the scores, such as scores.safetensors.",
)  # fmt: skip
@opt.CALIBRATION
@opt.CHANNELS
@opt.DTYPE
@opt.PLACE
@_run_options()
def score(quiet: bool, as_json: bool, **given: Any) -> None:
    """Score the experts of MODEL and write one small file, from which any number of pruned models can be made.

    The file has statistics for each source of the calibration, so that the mix, the method and the size can be chosen
    later. Look at it with `inspect`, and use it with `prune`.
    """
    settings = RunSettings(only_score=True, **given)
    opt.refuse_early(settings, quiet)
    opt.say_loading(quiet)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune.pipeline import run as engine

    opt.quiet_libraries(downloads=quiet)
    summary = engine.run(settings, quiet).summary
    if as_json:
        click.echo(opt.json_text(summary))


@click.command(cls=Command)
@click.argument("model")
@opt.MODEL_OUTPUT
@click.option("--scores", type=opt.PATH, help="A scores file, or the folder of a model that was pruned before.")
@opt.TARGET
@click.option("--dry-run", is_flag=True, help="Print what would be done and lost, without doing it.")
@opt.SELECTION
@click.option("--seed", type=int, help="For --method random.  [default: 0]")
@opt.KEEP_FILE
@opt.SHARD_SIZE
@opt.WRITTEN_AS
@opt.PLACE
@opt.verify_option(False)
@opt.report_option()
@opt.QUIET
@opt.JSON_SUMMARY
def prune(max_shard_size: str, dry_run: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL by scores from an earlier command. This needs no forward pass and no GPU, only a file copy.

    The result is byte-identical to that of `run` with the same calibration and settings.
    """
    settings = PruneSettings(max_shard_bytes=opt.parse_size(max_shard_size), **given)
    from streamprune.pipeline import prune as engine

    if settings.scores is None:
        # transformers builds the model then, and would print warnings.
        opt.say_loading(quiet)
        opt.quiet_libraries(downloads=quiet)
    elif quiet:
        opt.quiet_downloads()
    summary = engine.dry_run(settings, quiet) if dry_run else engine.prune(settings, quiet).summary
    if settings.report and not dry_run:
        report_after(settings.output, quiet)
    if as_json:
        click.echo(opt.json_text(summary))


@click.command(cls=Command)
@click.argument("workdir", type=opt.PATH)
@_run_options(resuming=True)
@opt.STOP_IF_KL
@opt.verify_option(None)
# The default None means "not given": then the earlier setting stays.
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run Python code that comes with the model.")
@opt.report_option(None)
def resume(workdir: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Resume the `run`, `score`, `prune` or `search` in WORKDIR (usually OUT.work) where it stopped.

    Settings that decide the result stay as they were. The options below may be changed.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    alone = launched().count == 1
    best = _best_command(workdir) if alone else None
    if alone and best is None:
        if (finished := output_of(workdir)) is not None:
            if "from_layer" in changes:
                raise nothing_to_redo(finished)
            _nothing_left(workdir, finished, quiet, as_json)
            return
        if not has_run(workdir) and not has_pruning(workdir):
            # (Before torch is imported.)
            raise nothing_to_resume(workdir)
    command = {**(best or _recorded_command(workdir)), **changes}
    # (Among several processes the refusal has to reach all.)
    if alone and best is None and "candidates" in command:
        resume_search(workdir, quiet, as_json, changes)
        return
    # Only the first process looks: the folder may be on its machine only.
    if best is None and is_first() and has_pruning(workdir) and not has_run(workdir):
        result = _resume_pruning(workdir, quiet, changes)
    else:
        result = _resume_layers(workdir, quiet, best, changes, tight=command.get("ram_gib") is not None)
    if result.summary.get("complete") and not quiet:
        click.echo(f"Nothing is left to resume: {result.output} is complete.", err=True)
    # (The result of `score` is a file, which has no report.)
    if command.get("report", True) and result.output.is_dir():
        report_after(result.output, quiet)
    if as_json:
        click.echo(opt.json_text(result.summary))


def _resume_layers(
    workdir: Path, quiet: bool, best: Mapping[str, Any] | None, changes: dict[str, Any], tight: bool
) -> RunResult:
    """Resume what streams layers: a run or a scoring, or the `run --best` with the command `best`."""
    if best is not None:
        refuse_of_search(workdir, changes, "run --best", but=("verify",))
    opt.say_loading(quiet)
    limit_library_memory(tight=tight)
    from streamprune.pipeline import run as engine
    from streamprune.pipeline.best import resume_best

    opt.quiet_libraries(downloads=quiet)
    if best is not None:
        return resume_best(workdir, best, quiet, **changes)
    return engine.resume(workdir, quiet, **changes)


def _best_command(workdir: Path) -> Mapping[str, Any] | None:
    """The command of the `run --best` that a work folder belongs to; None if it is another's."""
    # A record that cannot be used is refused later.
    with suppress(ResumeError):
        return best_command(workdir)
    return None


def _nothing_left(workdir: Path, output: Path, quiet: bool, as_json: bool) -> None:
    """Say that a command has ended, whose work folder is gone. (It may have been killed before it said so.)"""
    if not quiet:
        click.echo(f"Nothing is left to resume: {workdir} is gone, and {output} is complete.", err=True)
    if as_json:
        click.echo(opt.json_text({"output": str(output), "complete": True}))


def _recorded_command(workdir: Path) -> Mapping[str, Any]:
    """The settings of what is in a work folder, as recorded; nothing if there is none."""
    # A record that cannot be used is refused later: for a run, once the ranks have joined.
    with suppress(ResumeError):
        recorded = read_run(workdir) or read_pruning(workdir)
        return recorded.command if recorded is not None else {}
    return {}


def _resume_pruning(workdir: Path, quiet: bool, changes: dict[str, Any]) -> RunResult:
    from streamprune.pipeline import prune as engine

    def resume() -> RunResult:
        unused = sorted(changes.keys() - {"verify", "report", "trust_remote_code"})
        if unused:
            raise SettingsError(
                f"{workdir} has an unfinished `streamprune prune`, which computes nothing. Leave out "
                f"{', '.join('--' + name.replace('_', '-') for name in unused)}."
            )
        if quiet:
            opt.quiet_downloads()
        return engine.resume(workdir, quiet, **changes)

    if launched().count == 1:
        return resume()
    # Only rank 0 prunes; the other processes wait for it.
    from streamprune.distributed.joining import joined

    with joined("cpu") as processes:
        return processes.on_first(resume)
