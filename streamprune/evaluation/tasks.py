"""The bridge to lm-evaluation-harness: its tasks on a model that fits in memory whole.

It runs as it would from its own command line, on a model that was loaded here, so that what does not fit or does not
load is told as everywhere.

Results of tasks for the terminal. No torch, and no lm-evaluation-harness.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune.calibration.records import load_tokenizer
from streamprune.checkpoint.hub import first_line
from streamprune.errors import ResourceError, SettingsError, StreampruneError, TaskError
from streamprune.hardware.device import is_out_of_memory
from streamprune.models.full_model import FullModel, LoadedModel, find_full_model, load_full_model, release
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT

#: Sequences at a time on a CPU. The harness's own "auto" looks for the most that find memory, and the CPU has no such
#: end: the system kills the process instead. The logits of 4 x 2,048 tokens of a vocabulary of 150,000 take 5 GB in
#: float32; the examples of usual tasks are ten times shorter.
CPU_BATCH = 4
#: The most that "auto" tries on a card, as from the harness's own command line.
MOST_BATCH = 64
LIST_OF_TASKS = "https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks"
_INSTALL = "pip install 'streamprune[tasks]'"
#: What the harness adds about the machine, which says nothing of the model.
_LEFT_OUT = ("samples", "pretty_env_info", "upper_git_hash", "git_hash")


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    device: str = "auto",
    limit: float | None = None,
    include_path: Path | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model, and return its result as an object of JSON.

    The settings are those of published model cards: the shots that a task asks for, else 0; `dtype` auto; batch size
    auto on a card and CPU_BATCH on a CPU, or `batch_size`. `tasks` are names or patterns of tasks, groups and tags, or
    YAML files; with `include_path` also those in that folder (its YAML may name Python code, which is then run).
    `limit` takes only so many examples of each task, or that share of them. The result is the harness's own, less
    samples and facts about the machine; added are `format`, `model` and `tasks`. Numbers that are not finite are
    null.

    Raises SettingsError without the harness, or for unknown tasks; TaskError for tasks that cannot be loaded or run;
    CheckpointError, CalibrationError and ResourceError for models that cannot be.
    """
    _check_installed()
    if limit is not None and not (limit > 0 and math.isfinite(limit)):
        raise SettingsError(f"--limit {limit:g} is not above 0. It is a number of examples, or a share below 1.")
    say = progress.say if progress is not None else lambda text: None
    whole = find_full_model(model, revision, trust_remote_code)
    tokenizer = load_tokenizer(whole.folder, trust_remote_code)
    with _quiet():
        # Before the model is: what is unknown or out of reach shows in seconds.
        manager, loaded_tasks = _load_tasks(tasks, include_path)
    loaded = load_full_model(whole, device)
    for note in loaded.notes:
        say(f"note: {note}")
    say(f"tasks: {', '.join(loaded_tasks['tasks'])}; {model} is loaded on {loaded.device}")
    batch: int | str = batch_size or (CPU_BATCH if loaded.device.type == "cpu" else "auto")
    with _quiet():
        result = _evaluate(whole, loaded, tokenizer, manager, loaded_tasks, limit, batch)
    place = loaded.device
    del loaded
    release(place)
    return {"format": RESULT_FORMAT, "model": model, "tasks": list(tasks), **result}


def _check_installed() -> None:
    missing = [name for name in ("lm_eval", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"--tasks needs lm-evaluation-harness, of which {missing[0]} is not installed: {_INSTALL}")


def _load_tasks(names: Sequence[str], include: Path | None) -> tuple[Any, Any]:
    """The harness's task manager, and the tasks of those names with their data."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise SettingsError(f"--include-path {include} is no folder. Give the one that holds the tasks' YAML files.")
    # To read the harness's own thousands of tasks takes seconds, for which tasks of one's own need not wait.
    manager = None if include is None else TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or _unknown(names, manager):
        manager = TaskManager(include_path=None if include is None else str(include))
    unknown = _unknown(names, manager)
    if unknown or not names:
        told = f"knows no task, group or tag named {', '.join(unknown)}" if unknown else "was given no task"
        where = "" if include is None else f", and {include} has none that can be read"
        raise SettingsError(
            f"--tasks: lm-evaluation-harness {told}{where}. `python -m lm_eval ls tasks` lists them; see "
            f"{LIST_OF_TASKS}"
        )
    chosen = [match for name in names for match in (manager.match_tasks([name]) or [name])]
    try:
        return manager, manager.load(list(dict.fromkeys(chosen)))
    except StreampruneError:
        raise
    # Tasks are YAML and Python of many hands, and their data come from anywhere.
    except Exception as error:
        raise TaskError(
            f"The tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {first_line(str(error))}. Their "
            "data come from the Hub or from the files that they name: check the connection (HF_HUB_OFFLINE), or give "
            "tasks with local data by --include-path."
        ) from error


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    return [name for name in names if not manager.match_tasks([name]) and not Path(name).is_file()]


def _evaluate(
    whole: FullModel, loaded: LoadedModel, tokenizer: Any, manager: Any, tasks: Any, limit: float | None,
    batch: int | str,
) -> dict[str, Any]:  # fmt: skip
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # What it loaded once need not be fetched again.
    manager.load = lambda _: tasks
    arguments = {"pretrained": whole.name, "dtype": "auto", "trust_remote_code": whole.trust_remote_code}
    try:
        harnessed = HFLM(
            pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=batch,
            max_batch_size=MOST_BATCH, trust_remote_code=whole.trust_remote_code,
        )  # fmt: skip
        made = simple_evaluate(
            harnessed, model_args=arguments, tasks=list(tasks["tasks"]), task_manager=manager, limit=limit,
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
    return {key: _as_json(value) for key, value in made.items() if key not in _LEFT_OUT}


def _as_json(value: Any) -> Any:
    """The same as JSON can hold it: numbers of numpy as numbers, what is not finite as null, functions by name."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_as_json(item) for item in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness, its metrics and `datasets` off the terminal. Their errors still come as exceptions.

    What is running in other processes for it is kept off too: it asks git for the commit of the current folder.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logger = logging.getLogger("lm_eval")
    level, nowhere = logger.level, io.StringIO()
    # Progress bars and hints are printed to whatever sys.stdout and sys.stderr are at the time.
    python = contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)
    with _nothing_to(1), _nothing_to(2), python[0], python[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _nothing_to(number: int) -> Iterator[None]:
    """Let what is written to a file descriptor go nowhere."""
    (sys.stdout if number == 1 else sys.stderr).flush()
    kept = os.dup(number)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


_STDERR = "_stderr"


def tasks_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for each task and metric of what `run_tasks` gave: value ± standard error, as the harness names them."""
    rows = [("task", "metric", "value", "examples", "shots"), *_rows(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    versions = result["lm_eval_version"], result["transformers_version"]
    lines = [f"{result['model']}: lm-evaluation-harness {versions[0]}, transformers {versions[1]}"]
    for task, metric, value, examples, shots in rows:
        cells = (task.ljust(widths[0]), metric.ljust(widths[1]), value.rjust(widths[2]))
        lines.append("  " + "  ".join((*cells, examples.rjust(widths[3]), shots.rjust(widths[4]))))
    limit = result["config"].get("limit")
    if limit is not None:
        lines.append(f"note: --limit {limit:g}: only a part of each task, not to be compared with published figures.")
    return lines


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    for name, figures in result["results"].items():
        examples = str(result.get("n-samples", {}).get(name, {}).get("effective", ""))
        shots = str(result.get("n-shot", {}).get(name, ""))
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            # Numbers that are no metric, such as the sample count, have no filter behind their names.
            if not kind or metric.endswith(_STDERR) or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}{_STDERR},{kind}")
            told = f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")
            yield figures.get("alias", name), metric if kind == "none" else f"{metric} ({kind})", told, examples, shots
