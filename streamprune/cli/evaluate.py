"""Options of `eval` for what needs a model whole: generation health, and tasks of lm-evaluation-harness.

The command that measures what a model lost: `eval`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from streamprune.cli.options import quiet_libraries, report_option, reports_errors, sampling_options, with_options
from streamprune.cli.publish import report_after
from streamprune.config import DTYPES, STATES
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory

if TYPE_CHECKING:
    from streamprune.config import EvalSettings
    from streamprune.evaluation.command import Asked


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


_FOLDER = click.Path(path_type=Path)


def _model_options(command: Callable[P, R]) -> Callable[P, R]:
    options = [
        click.option("--against", metavar="ORIGINAL", help="The model that MODEL was made from: a folder or a Hub id."),
        click.option("--revision", help="Branch, tag or commit of a Hub model."),
        click.option("--against-revision", help="The same for ORIGINAL."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the models."),
    ]
    return with_options(options, command)


def _computing_options(command: Callable[P, R]) -> Callable[P, R]:
    options = [
        click.option(
            "--device", default="auto", show_default=True, metavar="auto|cpu|cuda:0", help="Where to compute."
        ),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
            help="What predictions are computed in.",
        ),
        click.option("--batch-tokens", type=int, help="Tokens per micro-batch at most.  [default: as for `run`]"),
        click.option(
            "--states", type=click.Choice(STATES), default="auto", show_default=True,
            help="Where hidden states lie between blocks: on the card, in RAM, or in a file (in TMPDIR).",
        ),
        click.option("--vram-gib", type=float, help="Most that may be taken on the card.  [default: what is free]"),
        click.option("--ram-gib", type=float, help="Most that may be taken of RAM.  [default: what is available]"),
    ]  # fmt: skip
    return with_options(options, command)


@click.command("eval")
@click.argument("model")
@_model_options
@click.option(
    "--data", multiple=True, metavar="RECIPE|FILE",
    help="Held-out text, as for --calibration. Any number of times.  [default: what `run --evaluate` held back]",
)  # fmt: skip
@sampling_options
@generation_options
@task_options
@click.option("-o", "--output", type=_FOLDER, help="Folder for the results.  [default: in MODEL, if we made it]")
@_computing_options
@report_option
@click.option("--quiet", is_flag=True, help="Print the results and errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@reports_errors
def evaluate(model: str, output: Path | None, with_report: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure MODEL (a local folder or a Hub id) on held-out text, one block at a time.

    Tells loss and perplexity of each source, and with --against how far the predictions are from the original's: KL
    divergence, and how often both think the same token likeliest. --generate and --tasks need the model whole in
    memory; where they are given, --data is measured on only if it is too.
    """
    limit_library_memory(tight=options["ram_gib"] is not None)
    settings, asked = _asked(model, output, options)
    from streamprune.evaluation.command import examine

    quiet_libraries(downloads=quiet)
    found = examine(settings, asked, quiet, None if as_json else click.echo)
    if with_report and found.ours is not None:
        report_after(found.ours, quiet)
    if as_json:
        click.echo(json.dumps(found.told, indent=2))


def _asked(model: str, output: Path | None, options: dict[str, Any]) -> tuple[EvalSettings, Asked]:
    """What the options ask for. Raises SettingsError for those that go with another one that is missing."""
    from streamprune.config import EvalSettings
    from streamprune.evaluation.command import Asked
    from streamprune.evaluation.generation import GenerationSettings

    generate, tasks = options.pop("generate"), options.pop("tasks")
    of_generation = {
        name: options.pop(name) for name in ("prompts", "prompts_per_source", "prompt_tokens", "max_new_tokens")
    }
    of_tasks = {name: options.pop(name) for name in ("include_path", "limit", "batch_size")}
    for given, needed, others in ((generate, "--generate", of_generation), (tasks, "--tasks", of_tasks)):
        for name, value in others.items():
            if value is not None and not given:
                raise SettingsError(f"--{name.replace('_', '-')} goes with {needed}, which is missing.")
    settings = EvalSettings(model=model, **options)
    shared = {name: options[name] for name in ("device", "revision", "trust_remote_code")}
    prompts = of_generation.pop("prompts")
    generation = None
    if generate:
        chosen = {name: value for name, value in of_generation.items() if value is not None}
        seed: dict[str, Any] = {"seed": settings.seed} if settings.seed is not None else {}
        generation = GenerationSettings(**chosen, **shared, **seed, against_revision=settings.against_revision)
    names = None
    if tasks is not None:
        names = {"tasks": [name for name in tasks.split(",") if name], **of_tasks, **shared}
    on_text = bool(settings.data) or not (generate or tasks)
    return settings, Asked(on_text, generation, prompts, names, output)
