"""Tasks of lm-evaluation-harness on a model that is loaded in full, or behind a server.

The harness runs as it would from its own command line, but on a model that is loaded here, so that a model that does
not fit or cannot be loaded is reported as by the other commands.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from streamprune.calibration.chat import dated
from streamprune.calibration.tokens import load_tokenizer
from streamprune.checkpoint.hub import first_line, resolve_model
from streamprune.config import EvalSettings
from streamprune.errors import ResourceError, SettingsError, StreampruneError, TaskError
from streamprune.evaluation.evaluate import with_model_date
from streamprune.evaluation.generated_code import CONSENT, CPU_SECONDS, MEMORY_BYTES, running_code
from streamprune.evaluation.prompts import THINKING_SWITCHES
from streamprune.evaluation.served import check_server, served_model
from streamprune.evaluation.task_names import require_harness, unknown_tasks
from streamprune.evaluation.task_settings import THINKING_END, TOKEN_LIMITS, TaskSettings
from streamprune.hardware.device import free_after_failure, is_out_of_memory
from streamprune.hardware.memory import format_bytes
from streamprune.models.full_model import FullModel, find_full_model, load_full_model
from streamprune.models.open import load_config
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT

#: Batch size on a CPU. The harness's own "auto" looks for the largest batch that does not run out of memory, but on a
#: CPU the system would kill the process. The logits of 4 x 2,048 tokens of a vocabulary of 150,000 take 5 GB in
#: float32; the examples of usual tasks are ten times shorter.
CPU_BATCH = 4
#: The most that "auto" tries on a GPU, as from the harness's own command line.
MOST_BATCH = 64
#: Entries of the harness's result about the machine, which say nothing about the model.
_LEFT_OUT = ("samples", "pretty_env_info", "upper_git_hash", "git_hash")
#: Settings of tasks that results depend on.
_OPTIONS = ("apply_chat_template", "num_fewshot", "gen_kwargs", "max_new_tokens", "thinking", "allow_code")


def run_tasks(settings: EvalSettings, tasks: TaskSettings, progress: Progress) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model, and return its result as an object of JSON.

    What `tasks` does not set is as on published model cards: the shots that a task states, else 0; `dtype` auto. The
    result is the harness's own, without samples and facts about the machine, and with `format`, `model`, `tasks`,
    `options` (with the `date` that the chat template wrote, if it did), and `served_model` where a server has the
    model. Numbers that are not finite are null.

    Raises SettingsError without the harness, for unknown tasks, and for options that do not suit them; TaskError for
    tasks that cannot be loaded or run, and for servers that do not answer; CheckpointError, CalibrationError and
    ResourceError for models that cannot be.
    """
    require_harness()
    day = with_model_date(settings).day
    with running_code(tasks.allow_code), dated(day) as clock:
        model = _Served.find(settings, tasks) if tasks.server is not None else _Local.find(settings, tasks)
        # Read before the model, so that an unknown or unreachable task is reported in seconds.
        progress.say("reading lm-evaluation-harness's tasks and their data ...")
        with _quiet():
            manager, loaded = _load_tasks(tasks.tasks, tasks.include_path)
        _check_suited(loaded, tasks)
        for note in (*_notes(loaded, tasks), *_limit_answers(loaded, tasks)):
            progress.say(f"note: {note}")
        result = model.evaluate(_Chosen(manager, list(loaded), tasks), progress)
    found = {"format": RESULT_FORMAT, "model": settings.model, "tasks": list(tasks.tasks), **result}
    if clock.was_read:
        progress.say(f"note: The chat template writes the date, {day} here; --date {day} gives the same chats.")
        found["options"]["date"] = str(day)
    return found


def _check_suited(loaded: Mapping[str, Any], settings: TaskSettings) -> None:
    """Raise SettingsError where the tasks need a consent that is missing, or an option does not suit them."""
    code = _running_code(loaded)
    if code and not settings.allow_code:
        raise SettingsError(_consent_missing(code))
    scored = [name for name, task in loaded.items() if not _is_generating(task)]
    for option, used in (
        ("--thinking on", settings.thinking),
        ("--server with --apply-chat-template", settings.server is not None and settings.apply_chat_template),
    ):
        if scored and used:
            raise SettingsError(
                f"{', '.join(scored[:5])}: answers are given and scored there, none is written, so that {option} does "
                "not suit. Omit it, or choose tasks with written answers."
            )


def _notes(loaded: Mapping[str, Any], settings: TaskSettings) -> Iterator[str]:
    """What the user has to know of the tasks before they run."""
    code = _running_code(loaded)
    if code:
        yield (
            f"{', '.join(code)}: code that the model writes runs on this machine, with your rights. Each process may "
            f"take {CPU_SECONDS} s of CPU time and {format_bytes(MEMORY_BYTES)}."
        )
    fixed = [name for name, task in loaded.items() if settings.num_fewshot and task.get_config("num_fewshot") == 0]
    if fixed:
        yield f"--num-fewshot {settings.num_fewshot} is not for {', '.join(fixed)}, defined without shots."
    if settings.server is not None and settings.apply_chat_template:
        yield (
            "the server writes the chats: where its chat template has a date, that is the server's, whatever --date "
            "says."
        )


def _limit_answers(loaded: Mapping[str, Any], settings: TaskSettings) -> Iterator[str]:
    """Set the most new tokens of an answer in every task; yields a note where that is less than the task states."""
    for name, task in loaded.items():
        if _is_generating(task):
            own = dict(task.get_config("generation_kwargs") or {})
            most, stated = settings.new_tokens(own)
            kept = {key: value for key, value in own.items() if key not in TOKEN_LIMITS}
            task.set_config(key="generation_kwargs", value=kept | {"max_gen_toks": most})
            if most < stated:
                yield (
                    f"{name}: answers end after {most:,} new tokens; the task would allow {stated:,}. --max-new-tokens "
                    "sets another number."
                )


def _is_generating(task: Any) -> bool:
    return bool(task.get_config("output_type") == "generate_until")


def _running_code(loaded: Mapping[str, Any]) -> list[str]:
    return [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]


def _consent_missing(names: Sequence[str]) -> str:
    return (
        f"--tasks {', '.join(names)}: code that the model writes would run on this machine, with your rights. Add "
        "--allow-code if it may, best in a container."
    )


@dataclass(frozen=True)
class _Chosen:
    """The tasks that were loaded, by name, with the harness's manager that has them."""

    manager: Any
    names: list[str]
    settings: TaskSettings


@dataclass(frozen=True)
class _Local:
    """A model that is to be loaded in full."""

    full: FullModel
    tokenizer: Any
    device: str
    thinking: Mapping[str, Any]

    @classmethod
    def find(cls, settings: EvalSettings, tasks: TaskSettings) -> _Local:
        full = find_full_model(settings.model, settings.revision, settings.trust_remote_code)
        tokenizer = load_tokenizer(full.checkpoint.folder, settings.trust_remote_code)
        if tasks.apply_chat_template and not tokenizer.chat_template:
            raise SettingsError(f"--apply-chat-template: the tokenizer of {settings.model} has no chat template.")
        return cls(full, tokenizer, settings.device, _thinking(settings.model, tokenizer, tasks.thinking))

    def evaluate(self, chosen: _Chosen, progress: Progress) -> dict[str, Any]:
        loaded = load_full_model(self.full, self.device)
        for note in loaded.notes:
            progress.say(f"note: {note}")
        progress.say(f"tasks: {', '.join(chosen.names)}; {self.full.name} is loaded on {loaded.device}")
        from lm_eval.models.huggingface import HFLM

        device = loaded.device
        batch = chosen.settings.batch_size or (CPU_BATCH if device.type == "cpu" else "auto")
        arguments = {"pretrained": self.full.name, "dtype": "auto", "trust_remote_code": self.full.trust_remote_code}
        with _quiet(), _explained(batch):
            model = HFLM(
                pretrained=loaded.model, tokenizer=self.tokenizer, backend="causal", batch_size=batch,
                max_batch_size=MOST_BATCH, trust_remote_code=self.full.trust_remote_code, **self.thinking,
            )  # fmt: skip
            result = _evaluate(model, "hf", chosen, model_args=arguments, batch_size=batch, device=str(device))
        del loaded, model
        # Nothing refers to the model any more.
        free_after_failure(device)
        return result


@dataclass(frozen=True)
class _Served:
    """A model behind a server; `folder` has its tokenizer."""

    folder: Path
    positions: int | None

    @classmethod
    def find(cls, settings: EvalSettings, tasks: TaskSettings) -> _Served:
        trusted = settings.trust_remote_code
        folder = resolve_model(settings.model, settings.revision, trusted, tokenizer_only=True)
        load_tokenizer(folder, trusted)
        positions = getattr(load_config(folder, trusted).get_text_config(decoder=True), "max_position_embeddings", None)
        check_server(tasks)
        return cls(folder, positions)

    def evaluate(self, chosen: _Chosen, progress: Progress) -> dict[str, Any]:
        settings = chosen.settings
        progress.say(f"tasks: {', '.join(chosen.names)}; {settings.served_model} answers at {settings.server}")
        kind = "local-chat-completions" if settings.apply_chat_template else "local-completions"
        with _quiet(), _explained(settings.batch_size or 1):
            model = served_model(settings, self.folder, self.positions)
            result = _evaluate(model, kind, chosen, model_args={"model": settings.served_model})
        return {"served_model": settings.served_model, **result}


def _thinking(name: str, tokenizer: Any, thinking: bool | None) -> dict[str, Any]:
    """What the harness is to give the chat template, and the end of thoughts, which it cuts off the answers."""
    if thinking is None:
        return {}
    chat = [{"role": "user", "content": "1 + 1?"}]
    try:
        on, off = (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **_switches(value))
            for value in (True, False)
        )
    except Exception as error:
        # A chat template is a program, and may raise anything.
        raise SettingsError(
            f"--thinking: the chat template of {name} refuses a chat: {first_line(str(error))}"
        ) from None
    if on == off:
        raise SettingsError(
            f"--thinking: the chat template of {name} has no switch for it ({' or '.join(THINKING_SWITCHES)})."
        )
    end = tokenizer.get_vocab().get(THINKING_END, THINKING_END) if thinking else None
    return {"chat_template_args": _switches(thinking), "think_end_token": end}


def _switches(thinking: bool) -> dict[str, bool]:
    return dict.fromkeys(THINKING_SWITCHES, thinking)


def _load_tasks(names: Sequence[str], include: Path | None) -> tuple[Any, Mapping[str, Any]]:
    """The harness's task manager, with the tasks of those names and their data loaded, and the tasks by name."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise SettingsError(f"--include-path {include} is not a folder. Give the folder with the tasks' YAML files.")
    # Reading the harness's own thousands of tasks takes seconds; skip it if the user's folder has the tasks.
    manager = None if include is None else TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or _unknown(names, manager):
        manager = TaskManager(include_path=None if include is None else str(include))
    unknown = _unknown(names, manager)
    if unknown or not names:
        raise unknown_tasks(unknown, include)
    chosen = [match for name in names for match in (manager.match_tasks([name]) or [name])]
    try:
        tasks = manager.load(list(dict.fromkeys(chosen)))
    except StreampruneError:
        raise
    # Tasks are YAML and Python code from many authors, and may raise anything.
    except Exception as error:
        if CONSENT in str(error):
            raise SettingsError(_consent_missing(names)) from error
        raise TaskError(
            f"The tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {first_line(str(error))}. Their "
            "data come from the Hub or from the files that they name: check the connection (HF_HUB_OFFLINE), or give "
            "tasks with local data by --include-path."
        ) from error
    # Do not load the tasks a second time.
    manager.load = lambda _: tasks
    return manager, tasks["tasks"]


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    return [name for name in names if not manager.match_tasks([name]) and not Path(name).is_file()]


def _evaluate(model: Any, kind: str, chosen: _Chosen, **arguments: Any) -> dict[str, Any]:
    """The harness's result for a model of its own `kind`; it has errors of all kinds: see `_explained`."""
    from lm_eval import simple_evaluate

    settings = chosen.settings
    sampling = settings.sampling
    if settings.server is not None and settings.thinking is not None:
        sampling["chat_template_kwargs"] = _switches(settings.thinking)
    made = simple_evaluate(
        model, tasks=chosen.names, task_manager=chosen.manager, limit=settings.limit, log_samples=False,
        num_fewshot=settings.num_fewshot, apply_chat_template=settings.apply_chat_template,
        gen_kwargs=sampling or None, confirm_run_unsafe_code=settings.allow_code, **arguments,
    )  # fmt: skip
    assert made is not None, "only other ranks get none"
    made["config"]["model"] = kind
    kept = {key: value for key, value in made.items() if key not in _LEFT_OUT}
    used = {name: getattr(settings, name) for name in _OPTIONS}
    return _as_json({**kept, "options": used})  # type: ignore[no-any-return]


@contextlib.contextmanager
def _explained(batch: int | str) -> Iterator[None]:
    """Raise what the harness raises as ResourceError where memory ran out, else as TaskError."""
    try:
        yield
    except Exception as error:
        reason = first_line(str(error)) or type(error).__name__
        if is_out_of_memory(error):
            raise ResourceError(
                f"Memory ran out with a batch size of {batch} ({reason}). Use a smaller --batch-size, or free memory."
            ) from error
        raise TaskError(f"lm-evaluation-harness failed: {type(error).__name__}: {reason}.") from error


def _as_json(value: Any) -> Any:
    """The same as JSON values: numpy's numbers as numbers, NaN and infinity as null, functions by name."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=_plain))


def _plain(value: Any) -> Any:
    """The JSON value for an object that msgspec does not support."""
    if callable(getattr(value, "item", None)):
        return value.item()
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness, its metrics and `datasets` off the terminal. Their errors still come as exceptions.

    The output of its child processes is kept off too: it runs git for the commit of the current folder.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logger = logging.getLogger("lm_eval")
    level, nowhere = logger.level, io.StringIO()
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with Path(os.devnull).open("wb") as null:
            for number in kept:
                os.dup2(null.fileno(), number)
        # Progress bars and hints are printed to whatever sys.stdout and sys.stderr are at the time.
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL)
            yield
    finally:
        logger.setLevel(level)
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
