"""What the commands share: how errors are told, what libraries may say, and options of more than one command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from streamprune.choice.selection import DEFAULT_SPREAD, SCHEDULES
from streamprune.errors import StreampruneError
from streamprune.fit.kv_cache import KV_DTYPES
from streamprune.settings import DEFAULT_CONTEXT, METHODS

P = ParamSpec("P")
R = TypeVar("R")


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
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


def quiet_libraries(downloads: bool) -> None:
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


def selection_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that say how experts are ranked and divided among the layers, in the order of the help text."""
    options = [
        click.option(
            "--method", type=click.Choice(METHODS), default="reap", show_default=True, help="How experts are scored."
        ),
        click.option(
            "--mix", metavar="SOURCE=SHARE,…",
            help="Shares of the calibration's sources, e.g. code=0.5,general=0.5.  [default: as they are]",
        ),
        click.option(
            "--schedule", metavar="|".join(SCHEDULES) + "|FILE", default="uniform", show_default=True,
            help="How experts are divided among the layers; a JSON file lists a number for each.",
        ),
        click.option(
            "--spread", type=float,
            help=f"For the linear schedules: how much the share removed rises and falls.  [default: {DEFAULT_SPREAD}]",
        ),
        click.option("--floor", type=int, metavar="N", help="Fewest experts in any layer.  [default: what it needs]"),
        click.option("--protect-super-experts", is_flag=True, help="Keep experts whose outputs peak far above all."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def goal_options(command: Callable[P, R]) -> Callable[P, R]:
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
