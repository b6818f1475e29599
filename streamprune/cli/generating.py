"""Options of `eval` for what needs a model whole: generation health, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from streamprune.cli.common import with_options

P = ParamSpec("P")
R = TypeVar("R")


def generation_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options of generation health, in the order of the help text. None: the default of `GenerationSettings`."""
    options = [
        click.option("--generate", is_flag=True, help="Let the model continue prompts, and say whether it loops."),
        click.option(
            "--prompts", type=click.Path(path_type=Path), metavar="FILE",
            help='Prompts of your own, JSON lines: {"prompt": "…"} or {"messages": […]}, perhaps with "source".',
        ),
        click.option("--prompts-per-source", type=int, metavar="N", help="Prompts of each source of --data."),
        click.option("--prompt-tokens", type=int, metavar="N", help="Tokens of each of them."),
        click.option("--max-new-tokens", type=int, metavar="N", help="Most tokens that are generated for a prompt."),
    ]  # fmt: skip
    return with_options(options, command)


def task_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options of lm-evaluation-harness, in the order of the help text."""
    options = [
        click.option("--tasks", metavar="NAME,…", help="Tasks of lm-evaluation-harness, such as hellaswag,arc_easy."),
        click.option(
            "--include-path", type=click.Path(path_type=Path), metavar="FOLDER", help="Where tasks of your own are.",
        ),
        click.option("--limit", type=float, metavar="N", help="Only so many examples of each task, or that share."),
        click.option("--batch-size", type=int, metavar="N", help="Examples at a time.  [default: auto; on a CPU 4]"),
    ]  # fmt: skip
    return with_options(options, command)
