"""The command that measures what a model lost: `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamprune.cli import options as opt
from streamprune.cli.help import Command
from streamprune.cli.outputs import report_after
from streamprune.errors import SettingsError
from streamprune.hardware.memory import limit_library_memory

if TYPE_CHECKING:
    from streamprune.config import EvalSettings
    from streamprune.evaluation.task_settings import TaskSettings

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
    click.option("--max-new-tokens", type=int, metavar="N", help="Most new tokens of a continuation or answer."),
)  # fmt: skip
_TASKS = opt.together(
    click.option("--tasks", metavar="NAME,…", help="Tasks of lm-evaluation-harness, such as hellaswag,arc_easy."),
    click.option("--include-path", type=opt.PATH, metavar="FOLDER", help="Folder with your own tasks."),
    click.option("--limit", type=float, metavar="N", help="Examples per task: a number, or a share below 1."),
    click.option("--batch-size", type=int, metavar="N", help="Examples per batch.  [default: auto; CPU: 4; server: 1]"),
    click.option("--num-fewshot", type=int, metavar="N", help="Shots.  [default: what the task states]"),
    click.option("--apply-chat-template", is_flag=True, default=None, help="Ask in chats, by the model's template."),
    click.option("--thinking", type=click.Choice(["on", "off"]), help="The chat template's switch for thinking."),
    click.option(
        "--gen-kwargs", metavar="NAME=VALUE,…", help="How answers are generated: temperature=0.6,do_sample=true"
    ),
    click.option(
        "--allow-code", is_flag=True, default=None,
        help="Run code that the model writes on this machine, as HumanEval needs; 60 s of CPU time and 4 GiB each.",
    ),
    click.option(
        "--server", metavar="URL", help="Ask a server with OpenAI's interface (vLLM, llama.cpp) that serves MODEL."
    ),
    click.option("--served-model", metavar="NAME", help="The server's name of MODEL."),
)  # fmt: skip
_OF_GENERATION = ("prompts", "prompts_per_source", "prompt_tokens")
_OF_TASKS = (
    "include_path", "limit", "batch_size", "num_fewshot", "apply_chat_template", "thinking", "gen_kwargs", "allow_code",
    "server", "served_model",
)  # fmt: skip


@click.command("eval", cls=Command)
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
    from streamprune.config import EvalSettings

    tasks = _task_settings(options)
    of_generation = _generation_options(options, tasks is not None)
    settings = EvalSettings(**options)
    _refuse_early(settings, tasks, (of_generation or {}).get("prompts"))
    opt.say_loading(quiet)
    limit_library_memory(tight=settings.ram_gib is not None)
    from streamprune.evaluation.command import evaluate_model
    from streamprune.evaluation.generation import GenerationSettings
    from streamprune.evaluation.held_out import pruned_folder

    opt.quiet_libraries(downloads=quiet)
    generation = None if of_generation is None else GenerationSettings(**of_generation)
    result = evaluate_model(settings, generation, tasks, output, quiet, None if as_json else click.echo)
    folder = pruned_folder(settings.model) if output is None else None
    if report and folder is not None:
        report_after(folder, quiet)
    if as_json:
        click.echo(opt.json_text(result))


def _refuse_early(settings: EvalSettings, tasks: TaskSettings | None, prompts: Path | None) -> None:
    """Raise what can be refused before torch is imported: models, texts, prompts and tasks that are not there."""
    from streamprune.evaluation.task_names import refuse_tasks
    from streamprune.pipeline.early import refuse_evaluation

    refuse_evaluation(settings, prompts)
    if tasks is not None:
        refuse_tasks(tasks.tasks, tasks.include_path)


def _task_settings(options: dict[str, Any]) -> TaskSettings | None:
    """The settings of --tasks, without which none of its options may be there: that is a SettingsError."""
    from streamprune.evaluation.task_settings import TaskSettings

    names, given = options.pop("tasks"), _given(options, _OF_TASKS)
    if names is None:
        _refuse_without("--tasks", given)
        return None
    if "thinking" in given:
        given["thinking"] = given["thinking"] == "on"
    tasks = tuple(name for name in names.split(",") if name)
    return TaskSettings(tasks=tasks, max_new_tokens=options["max_new_tokens"], **given)


def _generation_options(options: dict[str, Any], with_tasks: bool) -> dict[str, Any] | None:
    """What is given for --generate, None without it: SettingsError for an option without the one that it needs."""
    generate = options.pop("generate")
    limit, given = _given(options, ["max_new_tokens"]), _given(options, _OF_GENERATION)
    if generate:
        return given | limit
    _refuse_without("--generate", given)
    _refuse_without("--generate or --tasks", limit if not with_tasks else {})
    return None


def _given(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Take those of these names out of `options`; returns the ones that the user gave."""
    return {name: value for name in names if (value := options.pop(name)) is not None}


def _refuse_without(needed: str, given: Mapping[str, Any]) -> None:
    if given:
        raise SettingsError(f"--{next(iter(given)).replace('_', '-')} needs {needed}.")
