"""The command line: parse, call, print. Commands import heavy libraries only when they need them."""

from __future__ import annotations

from pathlib import Path

import click

from streamprune import __version__
from streamprune.cli import options as opt
from streamprune.cli.evaluate import evaluate
from streamprune.cli.fit import calibration, devices, fit
from streamprune.cli.group import Commands
from streamprune.cli.help import Command
from streamprune.cli.outputs import clean, push, report, status, verify
from streamprune.cli.run import prune, resume, run, score
from streamprune.cli.scores import inspect
from streamprune.cli.search import search
from streamprune.distributed.processes import is_first
from streamprune.hardware.memory import limit_library_memory

#: The commands that several processes share. Only the first process runs the others.
_SHARED = {"run", "score", "resume"}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamprune")
@click.pass_context
def main(context: click.Context) -> None:
    """Prune Mixture-of-Experts models one layer at a time."""
    if context.invoked_subcommand not in _SHARED and not is_first():
        context.exit()


@main.command(cls=Command)
@click.option(
    "-o", "--output", default="demo-output", show_default=True, type=opt.PATH,
    help="Folder for the trained and the pruned model.",
)  # fmt: skip
@opt.report_option()
def demo(output: Path, report: bool) -> None:
    """Prune a small trained model, and show what was lost.

    Needs no download, no GPU and less than a minute: the model comes with the package.
    """
    click.echo("Loading torch and transformers ...")
    limit_library_memory()
    from streamprune.demo.demo import run_demo, shipped_model
    from streamprune.reporting.write import write_report

    opt.quiet_libraries(downloads=False)
    result = run_demo(output, shipped_model(output, echo=click.echo), echo=click.echo)
    if report:
        page = write_report(result.output).absolute()
        click.echo(f"\nWhat was removed and what was lost, with pictures: open {page} in a browser.")


for command in (
    run, score, prune, search, resume, status, verify, clean, fit, devices, inspect, calibration, evaluate, report,
    push,
):  # fmt: skip
    main.add_command(command)
