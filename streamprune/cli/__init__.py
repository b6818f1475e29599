"""The command line: parse, call, print. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

from pathlib import Path

import click

from streamprune import __version__
from streamprune.cli.evaluate import evaluate
from streamprune.cli.fit import calibration, devices, fit
from streamprune.cli.options import OneVoice, quiet_libraries, reports_errors
from streamprune.cli.publish import push, report
from streamprune.cli.run import prune, resume, run, score
from streamprune.cli.scores import inspect
from streamprune.cli.work import clean, status, verify
from streamprune.distributed.processes import is_first
from streamprune.hardware.memory import limit_library_memory

#: The commands that several processes share. All others are the first one's alone.
_SHARED = {"run", "score", "resume"}


@click.group(cls=OneVoice, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamprune")
@click.pass_context
def main(context: click.Context) -> None:
    """Prune Mixture-of-Experts models one decoder block at a time."""
    if context.invoked_subcommand not in _SHARED and not is_first():
        context.exit()


@main.command()
@click.option(
    "-o", "--output", default="demo-output", show_default=True, type=click.Path(path_type=Path),
    help="Folder for the trained and the pruned model.",
)  # fmt: skip
@click.option("--steps", type=int, default=700, show_default=True, help="Training steps; 700 take a few minutes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the training text and the first weights.")
@reports_errors
def demo(output: Path, steps: int, seed: int) -> None:
    """Train a small model on the spot, prune it, and show what was lost.

    Needs no download, no GPU and a few minutes on two cores; a second call finds the model trained.
    """
    click.echo("Loading torch and transformers ...")
    limit_library_memory()
    from streamprune.demo.demo import run_demo

    quiet_libraries(downloads=False)
    # One thread: the same figures every time, and no stall when something else runs on the machine.
    run_demo(output, steps=steps, seed=seed, threads=1, echo=click.echo)


for command in (
    run, score, prune, resume, status, verify, clean, fit, devices, inspect, calibration, evaluate, report, push,
):  # fmt: skip
    main.add_command(command)
