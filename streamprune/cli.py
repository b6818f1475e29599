"""The command line: parse, call, print. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from streamprune import __version__
from streamprune.budget import resolve_budget
from streamprune.errors import DoesNotFitError, StreampruneError
from streamprune.fit import Fit, check_keep
from streamprune.fit_report import fit_object, fit_text, measured_lines, measured_object
from streamprune.kv_cache import KV_DTYPES
from streamprune.machine import limit_library_memory
from streamprune.settings import (
    DEFAULT_CONTEXT,
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    DTYPES,
    METHODS,
    PROPAGATE,
    STATES,
    RunSettings,
    Use,
    parse_size,
)
from streamprune.weights import WEIGHTS_DTYPES

P = ParamSpec("P")
R = TypeVar("R")


def _reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors into one message on stderr and their exit status."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except StreampruneError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. No output was written.", err=True)
            sys.exit(130)

    return wrapper


def _quiet_libraries(downloads: bool) -> None:
    """Keep other libraries' hints off the terminal, and with `downloads` the Hub's progress bars as well.

    Their errors still come as exceptions.
    """
    import logging
    import warnings

    import huggingface_hub.utils
    import transformers

    if downloads:
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch)\b")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamprune")
def main() -> None:
    """Prune Mixture-of-Experts models one decoder block at a time."""


def _goal_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that say what the model has to fit, in the order of the help text."""
    options = [
        click.option("--budget-gib", type=float, metavar="G", help="Memory that all of it may take, in GiB."),
        click.option("--gpu", metavar="NAME", help="A card instead, such as rtx-3090: what CUDA can use of it."),
        click.option(
            "--context", type=int, default=DEFAULT_CONTEXT, show_default=True, help="Tokens per sequence to plan for."
        ),
        click.option("--batch", type=int, default=1, show_default=True, help="Sequences at a time to plan for."),
        click.option(
            "--kv-dtype", type=click.Choice(KV_DTYPES), default="auto", show_default=True,
            help="Form of cached keys and values.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _measured(answer: Fit, device: str, trust_remote_code: bool) -> tuple[Any, ...]:
    limit_library_memory()
    from streamprune.hub import resolve_model
    from streamprune.measure import measure

    _quiet_libraries(downloads=False)
    return measure(str(resolve_model(answer.footprint.model)), answer, device, trust_remote_code)


@main.command()
@click.argument("model")
@_goal_options
@click.option(
    "--weights-dtype", type=click.Choice(WEIGHTS_DTYPES), default="source", show_default=True,
    help="Form of the weights: as they are, or quantized afterwards.",
)  # fmt: skip
@click.option("--keep", type=int, help="Experts kept in every block.  [default: all]")
@click.option("--measure", is_flag=True, help="Also load the model on the card, run such a prompt, and compare.")
@click.option("--device", default="cuda:0", show_default=True, help="The card for --measure.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@_reports_errors
def fit(
    model: str,
    budget_gib: float | None,
    gpu: str | None,
    keep: int | None,
    revision: str | None,
    trust_remote_code: bool,
    measure: bool,
    device: str,
    as_json: bool,
    **use: Any,
) -> None:
    """Say whether MODEL fits a card, and how many experts could stay.

    MODEL is a local folder, a Hub id (only its headers are read), or a folder with only a config.json. Without
    --budget-gib or --gpu, the card of this machine counts. Exit status 0: it fits; 3: it does not.
    """
    # The libraries, if they are needed at all, read these when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    wanted = Use(keep=keep, **use)
    budget = resolve_budget(budget_gib, gpu)
    from streamprune.footprint import read_footprint

    footprint = read_footprint(model, revision, trust_remote_code)
    if keep is not None:
        check_keep(footprint, keep)
    answer = Fit(footprint, wanted, budget.nbytes)
    found = _measured(answer, device, trust_remote_code) if measure else ()
    if as_json:
        extra = {"measured": measured_object(found)} if measure else {}
        click.echo(json.dumps({**fit_object(answer, budget), **extra}, indent=2))
    else:
        click.echo("\n".join([fit_text(answer, budget), *(["", *measured_lines(found)] if found else [])]))
    if not answer.fits:
        sys.exit(DoesNotFitError.exit_code)


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the pruned model.")
@_goal_options
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
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda:0", help="Where to compute.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="What to compute in.")
@click.option(
    "--batch-tokens", type=int,
    help="Tokens per micro-batch at most.  [default: 1024 on a CPU, 32768 on a GPU; less where memory asks for it]",
)  # fmt: skip
@click.option(
    "--states", type=click.Choice(STATES), default="auto", show_default=True,
    help="Where hidden states lie between blocks: on the card, in RAM, or in a file beside the output.",
)  # fmt: skip
@click.option("--vram-gib", type=float, help="Most that the run may take on the card.  [default: what is free]")
@click.option("--ram-gib", type=float, help="Most that the run may take of RAM.  [default: what is available]")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest output file.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--overwrite", is_flag=True, help="Replace the model in the output folder.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the final summary as JSON on stdout.")
@_reports_errors
def run(output: Path, max_shard_size: str, dry_run: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Prune MODEL (a local folder or a Hub id) and write a standard checkpoint.

    MODEL is read one decoder block at a time; memory does not grow with its size.
    """
    settings = RunSettings(output=output, max_shard_bytes=parse_size(max_shard_size), **options)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune import run as engine

    _quiet_libraries(downloads=quiet)
    summary = engine.dry_run(settings, quiet) if dry_run else engine.run(settings, quiet).summary
    if as_json:
        click.echo(json.dumps(summary, indent=2))


@main.command()
@click.option(
    "-o", "--output", default="demo-output", show_default=True, type=click.Path(path_type=Path),
    help="Folder for the trained and the pruned model.",
)  # fmt: skip
@click.option("--steps", type=int, default=700, show_default=True, help="Training steps; 700 take a few minutes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the training text and the first weights.")
@_reports_errors
def demo(output: Path, steps: int, seed: int) -> None:
    """Train a small model on the spot, prune it, and show what was lost.

    Needs no download, no GPU and a few minutes on two cores; a second call finds the model trained.
    """
    click.echo("Loading torch and transformers ...")
    limit_library_memory()
    from streamprune.demo import run_demo

    _quiet_libraries(downloads=False)
    # One thread: the same figures every time, and no stall when something else runs on the machine.
    run_demo(output, steps=steps, seed=seed, threads=1, echo=click.echo)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@_reports_errors
def devices(as_json: bool) -> None:
    """Show this machine's NVIDIA cards, its RAM and the disk of the current folder.

    What cannot be known is marked so, with the reason.
    """
    limit_library_memory()
    from streamprune.devices import list_cards
    from streamprune.devices_report import devices_object, devices_text

    cards = list_cards()
    click.echo(json.dumps(devices_object(cards, Path()), indent=2) if as_json else devices_text(cards, Path()))
