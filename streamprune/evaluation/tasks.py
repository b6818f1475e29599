"""Tasks of lm-evaluation-harness on a model that is loaded in full.

The harness runs as it would from its own command line, but on a model that is loaded here, so that a model that does
not fit or cannot be loaded is reported as by the other commands.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from streamprune.calibration.tokens import load_tokenizer
from streamprune.checkpoint.hub import first_line
from streamprune.config import EvalSettings
from streamprune.errors import ResourceError, SettingsError, StreampruneError, TaskError
from streamprune.evaluation.task_names import require_harness, unknown_tasks
from streamprune.hardware.device import free_after_failure, is_out_of_memory
from streamprune.models.full_model import FullModel, LoadedModel, find_full_model, load_full_model
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


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which tasks to run, and how. Raises SettingsError for an impossible limit.

    `tasks` are names or patterns of tasks, groups and tags, or YAML files; with `include_path` also those in that
    folder (its YAML may name Python code, which is then run). `limit` is the number of examples of each task, or a
    share of them. `batch_size` is in examples; None is "auto" on a GPU and CPU_BATCH on a CPU.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise SettingsError(
                f"--limit {self.limit:g} is not above 0. It is a number of examples, or a share below 1."
            )


def run_tasks(settings: EvalSettings, tasks: TaskSettings, progress: Progress) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model, and return its result as an object of JSON.

    The other settings are those of published model cards: the shots that a task states, else 0; `dtype` auto. The
    result is the harness's own, without samples and facts about the machine, and with `format`, `model` and `tasks`.
    Numbers that are not finite are null.

    Raises SettingsError without the harness, or for unknown tasks; TaskError for tasks that cannot be loaded or run;
    CheckpointError, CalibrationError and ResourceError for models that cannot be.
    """
    require_harness()
    full = find_full_model(settings.model, settings.revision, settings.trust_remote_code)
    tokenizer = load_tokenizer(full.checkpoint.folder, settings.trust_remote_code)
    # Read before the model, so that an unknown or unreachable task is reported in seconds.
    progress.say("reading lm-evaluation-harness's tasks and their data ...")
    with _quiet():
        manager, names = _load_tasks(tasks.tasks, tasks.include_path)
    loaded = load_full_model(full, settings.device)
    for note in loaded.notes:
        progress.say(f"note: {note}")
    progress.say(f"tasks: {', '.join(names)}; {settings.model} is loaded on {loaded.device}")
    with _quiet():
        result = _evaluate(full, loaded, tokenizer, manager, names, tasks)
    device = loaded.device
    del loaded
    # Nothing refers to the model any more.
    free_after_failure(device)
    return {"format": RESULT_FORMAT, "model": settings.model, "tasks": list(tasks.tasks), **result}


def _load_tasks(names: Sequence[str], include: Path | None) -> tuple[Any, list[str]]:
    """The harness's task manager, with the tasks of those names and their data loaded, and the tasks' own names."""
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
        raise TaskError(
            f"The tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {first_line(str(error))}. Their "
            "data come from the Hub or from the files that they name: check the connection (HF_HUB_OFFLINE), or give "
            "tasks with local data by --include-path."
        ) from error
    # Do not load the tasks a second time.
    manager.load = lambda _: tasks
    return manager, list(tasks["tasks"])


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    return [name for name in names if not manager.match_tasks([name]) and not Path(name).is_file()]


def _evaluate(
    full: FullModel, loaded: LoadedModel, tokenizer: Any, manager: Any, names: list[str], settings: TaskSettings
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    batch = settings.batch_size or (CPU_BATCH if loaded.device.type == "cpu" else "auto")
    arguments = {"pretrained": full.name, "dtype": "auto", "trust_remote_code": full.trust_remote_code}
    try:
        model = HFLM(
            pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=batch,
            max_batch_size=MOST_BATCH, trust_remote_code=full.trust_remote_code,
        )  # fmt: skip
        made = simple_evaluate(
            model, model_args=arguments, tasks=names, task_manager=manager, limit=settings.limit,
            batch_size=batch, device=str(loaded.device), log_samples=False,
        )  # fmt: skip
    except Exception as error:
        reason = first_line(str(error)) or type(error).__name__
        if is_out_of_memory(error):
            raise ResourceError(
                f"Memory ran out with a batch size of {batch} ({reason}). Use a smaller --batch-size, or free memory."
            ) from error
        raise TaskError(f"lm-evaluation-harness failed: {type(error).__name__}: {reason}.") from error
    assert made is not None, "only other ranks get none"
    made["config"]["model"] = "hf"
    return _as_json({key: value for key, value in made.items() if key not in _LEFT_OUT})  # type: ignore[no-any-return]


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
