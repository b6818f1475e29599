"""What the commands share: how errors are told, what libraries may say, and options of more than one command."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from streamprune.config import DEFAULT_CONTEXT, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, RESUME
from streamprune.distributed.processes import is_first
from streamprune.errors import OtherProcessError, ProcessesError, SettingsError, StreampruneError, ToldElsewhereError
from streamprune.fit.cache import KV_DTYPES
from streamprune.saliency.methods import DEFAULT_METHOD, METHODS
from streamprune.selection.schedules import DEFAULT_SCHEDULE, DEFAULT_SPREAD, SCHEDULES

P = ParamSpec("P")
R = TypeVar("R")


_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?\s*$", re.IGNORECASE)
KEEP_FILE_HELP = (
    'Your own choice, as JSON: lists of experts by layer, {"0": [1, 5], ...}, a list of such lists, or the '
    "streamprune.json of another model."
)


def with_options(options: Sequence[Callable[..., Any]], command: Callable[P, R]) -> Callable[P, R]:
    """The command with these options, which its help shows in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors into one message on stderr and their exit status."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ToldElsewhereError as error:
            sys.exit(error.exit_code)
        except OtherProcessError as error:
            # Past the silence of all processes but the first: nobody else knows of it.
            print(f"Error: {error}", file=sys.__stderr__, flush=True)
            sys.exit(error.exit_code)
        except StreampruneError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. No output was written.", err=True)
            sys.exit(130)

    return wrapper


class OneVoice(click.Group):
    """A command line with which several processes may be launched at once: only the first of them is heard.

    Of the others, what the first one cannot know still comes out: an OtherProcessError, and errors nobody foresaw.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parse and run a command, silently in all processes but the first."""
        try:
            first = is_first()
        except ProcessesError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        if first:
            return super().main(*args, **extra)
        # torch's own complaints, once the first process is gone, are no news.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            try:
                return super().main(*args, **extra)
            except Exception:
                traceback.print_exc(file=sys.__stderr__)
                sys.exit(1)


def quiet_downloads() -> None:
    """Keep the Hub's progress bars off the terminal."""
    import huggingface_hub.utils

    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]


def quiet_libraries(downloads: bool) -> None:
    """Keep other libraries' hints off the terminal, and with `downloads` the Hub's progress bars as well.

    Their errors still come as exceptions.
    """
    import logging
    import warnings

    import transformers

    if downloads:
        quiet_downloads()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch)\b")


def selection_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that say how experts are ranked and divided among the layers, in the order of the help text."""
    options = [
        click.option(
            "--method", type=click.Choice(tuple(METHODS)), default=DEFAULT_METHOD, show_default=True,
            help="How experts are scored.",
        ),
        click.option(
            "--mix", metavar="SOURCE=SHARE,…",
            help="Shares of the calibration's sources, e.g. code=0.5,general=0.5.  [default: as they are]",
        ),
        click.option(
            "--schedule", metavar="|".join(SCHEDULES) + "|FILE", default=DEFAULT_SCHEDULE, show_default=True,
            help="How experts are divided among the layers; a JSON file lists a number for each.",
        ),
        click.option(
            "--spread", type=float,
            help=f"For the linear schedules: how much the share removed rises and falls.  [default: {DEFAULT_SPREAD}]",
        ),
        click.option("--floor", type=int, metavar="N", help="Fewest experts in any layer.  [default: what it needs]"),
        click.option("--protect-super-experts", is_flag=True, help="Keep experts whose outputs peak far above all."),
    ]  # fmt: skip
    return with_options(options, command)


def calibration_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that say what text a model is scored on."""
    return click.option(
        "--calibration", multiple=True, default=("builtin",), show_default=True, metavar="RECIPE|FILE",
        help="A recipe; text, JSONL or parquet files or folders; or builtin:code,prose,… Any number of times.",
    )(sampling_options(command))  # fmt: skip


def sampling_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that say how much of a calibration is taken, instead of what its recipe says."""
    options = [
        click.option("--samples", type=int, help=f"Sequences.  [default: the recipe's own, or {DEFAULT_SAMPLES}]"),
        click.option(
            "--seq-len", type=int,
            help=f"Tokens per sequence.  [default: the recipe's own, or {DEFAULT_SEQ_LEN}, or the model's limit]",
        ),
        click.option("--seed", type=int, help="Chooses which text is used.  [default: the recipe's own, or 0]"),
    ]  # fmt: skip
    return with_options(options, command)


def place_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options about where the model comes from, and where the result and the work on it go."""
    options = [
        click.option("--revision", help="Branch, tag or commit of a Hub model."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
        click.option("--overwrite", is_flag=True, help="Replace what is there under the output's name."),
        click.option(
            "--work-dir", type=click.Path(path_type=Path),
            help="Folder for what is needed to go on.  [default: OUT.work]",
        ),
        click.option(
            "--resume", type=click.Choice(RESUME), default="auto", show_default=True,
            help="Go on with an earlier run of this command; insist on it; or begin anew.",
        ),
    ]  # fmt: skip
    return with_options(options, command)


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
    return with_options(options, command)


def parse_size(text: str) -> int:
    """Bytes in a size such as "5GB" (10⁹) or "4GiB" (2³⁰); a bare number is bytes. SettingsError otherwise."""
    match = _SIZE.match(text)
    if match is None:
        raise SettingsError(f"{text!r} is not a size. Write for example 5GB or 4GiB.")
    unit = (match.group(2) or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match.group(1)) * base ** "BKMGT".index(unit[0]))


def report_option(command: Callable[P, R]) -> Callable[P, R]:
    """The option of commands that make a report at their end."""
    return click.option(
        "--report/--no-report", "with_report", default=True, show_default=True, envvar="STREAMPRUNE_REPORT",
        show_envvar=True, help="Make OUT/report.html at the end.",
    )(command)  # fmt: skip
