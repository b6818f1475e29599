"""The command that measures what a model lost: `eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamprune.cli import options as opt
from streamprune.cli.outputs import report_after
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory

if TYPE_CHECKING:
    from streamprune.config import EvalSettings
    from streamprune.evaluation.generation import GenerationSettings
    from streamprune.evaluation.tasks import TaskSettings

_MODELS = opt.together(
    click.option("--against", metavar="ORIGINAL", help="The model that MODEL was made from: a folder or a Hub id."),
    opt.REVISION,
    click.option("--against-revision", help="Branch, tag or commit of ORIGINAL."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the models."),
)
_GENERATION = opt.together(
    click.option("--generate", is_flag=True, help="Let the model continue prompts, and report whether it loops."),
    click.option(
        "--prompts", type=opt.PATH, metavar="FILE",
        help='Your own prompts, as JSON lines: {"prompt": "…"} or {"messages": […]}, optionally with "source".',
    ),
    click.option("--prompts-per-source", type=int, metavar="N", help="Prompts from each source of --data."),
    click.option("--prompt-tokens", type=int, metavar="N", help="Tokens per prompt."),
    click.option("--max-new-tokens", type=int, metavar="N", help="Most tokens to generate for a prompt."),
)  # fmt: skip
_TASKS = opt.together(
    click.option("--tasks", metavar="NAME,…", help="Tasks of lm-evaluation-harness, such as hellaswag,arc_easy."),
    click.option("--include-path", type=opt.PATH, metavar="FOLDER", help="Folder with your own tasks."),
    click.option("--limit", type=float, metavar="N", help="Examples per task: a number, or a share below 1."),
    click.option("--batch-size", type=int, metavar="N", help="Examples per batch.  [default: auto; CPU: 4]"),
)
_OF_GENERATION = ("prompts", "prompts_per_source", "prompt_tokens", "max_new_tokens")
_OF_TASKS = ("include_path", "limit", "batch_size")


@click.command("eval")
@click.argument("model")
@_MODELS
@click.option(
    "--data", multiple=True, metavar="RECIPE|FILE",
    help="Held-out text, as for --calibration. May be repeated.  [default: what `run --evaluate` held out]",
)  # fmt: skip
@opt.SAMPLING
@_GENERATION
@_TASKS
@click.option("-o", "--output", type=opt.PATH, help="Folder for the results.  [default: MODEL, if streamprune made it]")
@opt.device_option()
@opt.DTYPE
@opt.memory_options()
@opt.report_option()
@click.option("--quiet", is_flag=True, help="Print the results and errors only.")
@opt.JSON_OBJECT
def evaluate(output: Path | None, report: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure MODEL (a local folder or a Hub id) on held-out text, one layer at a time.

    Prints loss and perplexity for each source. With --against it also prints the KL divergence from the original's
    predictions and the top-1 agreement. --generate and --tasks load the complete model, and skip the held-out text
    unless --data is given.
    """
    _refuse_early(options)
    opt.say_loading(quiet)
    limit_library_memory(tight=options["ram_gib"] is not None)
    settings, generation, tasks = _settings(options)
    from streamprune.evaluation.command import evaluate_model
    from streamprune.evaluation.held_out import pruned_folder

    opt.quiet_libraries(downloads=quiet)
    result = evaluate_model(settings, generation, tasks, output, quiet, None if as_json else click.echo)
    folder = pruned_folder(settings.model) if output is None else None
    if report and folder is not None:
        report_after(folder, quiet)
    if as_json:
        click.echo(opt.json_text(result))


def _refuse_early(options: Mapping[str, Any]) -> None:
    """Raise what can be refused before torch is imported: models, texts and tasks that are not there."""
    from streamprune.config import EvalSettings
    from streamprune.evaluation.task_names import refuse_tasks
    from streamprune.pipeline.early import refuse_evaluation

    refuse_evaluation(EvalSettings(**{each.name: options[each.name] for each in fields(EvalSettings)}))
    if options["tasks"] is not None:
        refuse_tasks(_names(options["tasks"]), options["include_path"])


def _names(tasks: str) -> tuple[str, ...]:
    return tuple(name for name in tasks.split(",") if name)


def _settings(options: dict[str, Any]) -> tuple[EvalSettings, GenerationSettings | None, TaskSettings | None]:
    """The settings that the options give. Raises SettingsError for an option without the one that it needs."""
    from streamprune.config import EvalSettings
    from streamprune.evaluation.generation import GenerationSettings
    from streamprune.evaluation.tasks import TaskSettings

    generate, tasks = options.pop("generate"), options.pop("tasks")
    of_generation, of_tasks = ({name: options.pop(name) for name in names} for names in (_OF_GENERATION, _OF_TASKS))
    for needed, given, others in (("--generate", generate, of_generation), ("--tasks", tasks, of_tasks)):
        for name, value in others.items():
            if value is not None and not given:
                raise SettingsError(f"--{name.replace('_', '-')} needs {needed}.")
    settings = EvalSettings(**options)
    generation = None
    if generate:
        generation = GenerationSettings(**{name: value for name, value in of_generation.items() if value is not None})
    if tasks is None:
        return settings, generation, None
    return settings, generation, TaskSettings(tasks=_names(tasks), **of_tasks)
