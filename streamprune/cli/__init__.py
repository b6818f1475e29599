"""The command line: parse, call, print. Commands import heavy libraries only when they need them."""

from __future__ import annotations

from pathlib import Path

import click

from streamprune import __version__
from streamprune.cli.evaluate import evaluate
from streamprune.cli.fit import calibration, devices, fit
from streamprune.cli.options import FirstProcessPrints, quiet_libraries, reports_errors
from streamprune.cli.publish import push, report
from streamprune.cli.run import prune, resume, run, score
from streamprune.cli.scores import inspect
from streamprune.cli.work import clean, status, verify
from streamprune.distributed.processes import is_first
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory

#: The commands that several processes share. Only the first process runs the others.
_SHARED = {"run", "score", "resume"}


@click.group(cls=FirstProcessPrints, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamprune")
@click.pass_context
def main(context: click.Context) -> None:
    """Prune Mixture-of-Experts models one layer at a time."""
    if context.invoked_subcommand not in _SHARED and not is_first():
        context.exit()


@main.command()
@click.option(
    "-o", "--output", default="demo-output", show_default=True, type=click.Path(path_type=Path),
    help="Folder for the trained and the pruned model.",
)  # fmt: skip
@click.option("--train", is_flag=True, help="Train the model anew, which takes some minutes on two cores.")
@click.option("--steps", type=int, help="Training steps, with --train.  [default: 700]")
@click.option("--seed", type=int, help="Training text and first weights, with --train.  [default: 0]")
@reports_errors
def demo(output: Path, train: bool, steps: int | None, seed: int | None) -> None:
    """Prune a small trained model, and show what was lost.

    Needs no download, no GPU and less than a minute. The model comes with the package; --train trains such a model on
    the text of Python's own library, and a second call finds it.
    """
    for name, value in (("--steps", steps), ("--seed", seed)):
        if value is not None and not train:
            raise SettingsError(f"{name} goes with --train, which is missing.")
    click.echo("Loading torch and transformers ...")
    limit_library_memory()
    from streamprune.demo.demo import run_demo
    from streamprune.demo.train import DEFAULT_STEPS, shipped_model, trained_model

    quiet_libraries(downloads=False)
    # One thread: the same figures every time, and no stall when something else runs on the machine.
    if train:
        steps = DEFAULT_STEPS if steps is None else steps
        model = trained_model(output, steps, seed or 0, threads=1, echo=click.echo)
    else:
        model = shipped_model(output, echo=click.echo)
    run_demo(output, model, threads=1, echo=click.echo)


for command in (
    run, score, prune, resume, status, verify, clean, fit, devices, inspect, calibration, evaluate, report, push,
):  # fmt: skip
    main.add_command(command)
