"""Tasks of lm-evaluation-harness on real models, offline, against accuracies worked out from the logits."""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.config import EvalSettings
from streamprune.errors import CheckpointError, ResourceError, SettingsError, TaskError
from streamprune.evaluation import tasks
from streamprune.evaluation.task_names import LIST_OF_TASKS
from streamprune.evaluation.task_settings import TaskSettings
from streamprune.evaluation.tasks import run_tasks
from streamprune.evaluation.terminal import tasks_lines
from streamprune.models import full_model as loading
from streamprune.progress import Progress
from tests.helpers import load_whole
from tests.local_tasks import DOCS, needs_harness, without_network, write_tasks
from tests.tiny import FAMILIES, make_model, tiny_config
from tests.tokenizer import save_tokenizer


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with without_network(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    folder = make_model(tmp_path_factory.mktemp("model"), tiny_config(family))
    save_tokenizer(folder, chat=False)
    return folder


@pytest.fixture(scope="module")
def included(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("included"))


def run(model: Path | str, names: list[str], said: io.StringIO | None = None, **settings: Any) -> dict[str, Any]:
    progress = Progress(0, said is None, said)
    return run_tasks(EvalSettings(model=str(model)), TaskSettings(tasks=tuple(names), **settings), progress)


def accuracies(folder: Path) -> tuple[float, float]:
    """Accuracy by the sum of the log-probabilities of each choice's tokens, and by that over its characters."""
    from transformers import AutoTokenizer

    model, tokenizer = load_whole(folder), AutoTokenizer.from_pretrained(folder)
    right = [0, 0]
    for doc in DOCS:
        start = tokenizer(doc["question"]).input_ids
        scores = []
        for choice in doc["choices"]:
            whole = tokenizer(f"{doc['question']} {choice}").input_ids
            with torch.inference_mode():
                logits = model(torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
            chosen = logits.gather(-1, torch.tensor(whole[1:])[:, None])[len(start) - 1 :]
            scores.append(float(chosen.sum()))
        by_length = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
        for place, each in enumerate((scores, by_length)):
            right[place] += each.index(max(each)) == doc["answer"]
    return right[0] / len(DOCS), right[1] / len(DOCS)


@needs_harness
def test_a_local_task_gives_what_the_logits_say(
    model: Path, included: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No checkout of git, of which git itself would complain.
    monkeypatch.chdir(included)
    said = io.StringIO()
    result = run(model, ["local_sums"], include_path=included, said=said)
    expected = accuracies(model)
    figures = result["results"]["local_sums"]
    assert (figures["acc,none"], figures["acc_norm,none"]) == expected
    # A task that every answer were right or wrong in would show little.
    assert 0 < expected[0] < 1
    assert expected[0] != expected[1]
    error = (expected[0] * (1 - expected[0]) / (len(DOCS) - 1)) ** 0.5
    assert figures["acc_stderr,none"] == pytest.approx(error)
    assert result["n-shot"] == {"local_sums": 0}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["model"], result["format"], result["config"]["batch_size"]) == (str(model), 1, tasks.CPU_BATCH)
    assert result["config"]["model_args"]["dtype"] == "auto"
    assert result["lm_eval_version"] == importlib.metadata.version("lm_eval")
    assert result["versions"] == {"local_sums": 1.0}
    assert "samples" not in result
    assert "pretty_env_info" not in result
    lines = tasks_lines(result)
    value = f"{expected[0]:.4f} ± {error:.4f}"
    assert ["local_sums", "acc", value, "20", "0"] in [
        [part.strip() for part in line.split("  ") if part] for line in lines
    ]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert f"tasks: local_sums; {model} is loaded on cpu" in said.getvalue().splitlines()


@needs_harness
def test_a_limit_takes_a_part(model: Path, included: Path) -> None:
    result = run(model, ["local_s*"], include_path=included, limit=5, batch_size=1)
    assert result["n-samples"]["local_sums"] == {"original": 20, "effective": 5}
    assert result["config"]["batch_size"] == 1
    assert tasks_lines(result)[-1].startswith("note: --limit 5: only a part")
    by_file = run(model, [str(included / "local_sums.yaml")], limit=5, include_path=included)
    assert by_file["results"]["local_sums"]["acc,none"] == result["results"]["local_sums"]["acc,none"]


@needs_harness
def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(
    model: Path, included: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks as harness

    monkeypatch.setattr(tasks, "load_full_model", lambda *_: pytest.fail("the model is loaded"))
    # To read the harness's own tasks takes seconds.
    monkeypatch.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))
    with pytest.raises(SettingsError, match="no task, group or tag named local_nought, other") as caught:
        run(model, ["local_sums", "local_nought", "other"], include_path=included)
    assert LIST_OF_TASKS in str(caught.value)
    assert "\n" not in str(caught.value)
    for name, words in (("local_lost", r"none\.jsonl"), ("local_far", "nobody/has-this")):
        with pytest.raises(TaskError, match=f"The tasks {name} cannot be loaded: .*{words}") as found:
            run(model, [name], include_path=included)
        assert "\n" not in str(found.value)
    with pytest.raises(SettingsError, match="is not a folder"):
        run(model, ["local_sums"], include_path=tmp_path / "none")
    with pytest.raises(SettingsError, match="--limit 0"):
        run(model, ["local_sums"], include_path=included, limit=0)
    with pytest.raises(CheckpointError, match="No folder"):
        run("./none", ["local_sums"], include_path=included)
    # One of the harness's own, whose data lie on the Hub.
    with pytest.raises(TaskError, match="The tasks arc_easy cannot be loaded"):
        run(model, ["arc_easy"], include_path=included)


@needs_harness
def test_a_model_that_does_not_fit_is_refused(model: Path, included: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"free are 1000 B in RAM"):
        run(model, ["local_sums"], include_path=included)


def test_without_the_harness_it_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(SettingsError, match=r"pip install 'streamprune\[tasks\]'"):
        run(model, ["local_sums"])


def test_figures_become_json() -> None:
    class Number:
        def item(self) -> float:
            return 0.5

    assert tasks._as_json({"a": Number(), 1: (float("nan"), {2}), "f": builtins.len, "p": Path("x")}) == {
        "a": 0.5, "1": [None, [2]], "f": "len", "p": "x",
    }  # fmt: skip


def test_nothing_heavy_is_imported_for_lines_and_settings() -> None:
    heavy = "{'torch', 'transformers', 'lm_eval'} & sys.modules.keys()"
    modules = ("terminal", "generation_figures", "task_settings")
    code = f"import sys, {', '.join(f'streamprune.evaluation.{each}' for each in modules)}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "set()"
