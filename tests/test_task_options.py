"""`eval --tasks`: generated code, chats, shots, limits, servers, and the original beside the model."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamprune.cli import main
from streamprune.config import EvalSettings
from streamprune.errors import SettingsError, TaskError
from streamprune.evaluation import generated_code
from streamprune.evaluation import tasks as tasks_module
from streamprune.evaluation.command import _save
from streamprune.evaluation.served import check_server
from streamprune.evaluation.task_settings import MOST_NEW_TOKENS, TaskSettings
from streamprune.evaluation.tasks import run_tasks
from streamprune.progress import Progress
from streamprune.reporting.evaluations import TaskFigure
from tests.helpers import known_family, load_whole
from tests.local_tasks import PROGRAMS, ModelServer, needs_harness, without_network, write_tasks
from tests.tiny import make_model, tiny_config
from tests.tokenizer import CHAT, save_tokenizer

needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "aiohttp", "tenacity")),
    reason="needs lm-evaluation-harness with what it calls servers with",
)
THINKING = CHAT + "{% if add_generation_prompt and enable_thinking %}<think>{% endif %}"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with without_network(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that answer differently, with a chat template that has a switch for thinking."""
    folders = []
    for scale in (1, 10):
        folder = make_model(tmp_path_factory.mktemp("model"), tiny_config(known_family("qwen3_moe")))
        model = load_whole(folder)
        for parameter in model.parameters():
            parameter.data *= scale
        model.save_pretrained(folder)
        folders.append(folder)
        tokenizer = save_tokenizer(folder)
        tokenizer.chat_template = THINKING
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def included(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("included"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of the harness that were asked, each with its requests; every answer is `answer = 2`."""
    from lm_eval.models.huggingface import HFLM

    found: list[Any] = []

    def generate_until(self: Any, requests: list[Any], **_: Any) -> list[str]:
        found.append((self, [each.args for each in requests]))
        return ["answer = 2"] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return found


def run(model: Path, included: Path, *names: str, **settings: Any) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    given = TaskSettings(tasks=names, include_path=included, **settings)
    return run_tasks(EvalSettings(model=str(model), device="cpu"), given, Progress(0, False, said)), said.getvalue()


@needs_harness
def test_generated_code_runs_with_consent_only_and_within_limits(
    models: list[Path], included: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=r"local_code: code that the model writes would run .* --allow-code"):
        run(models[0], included, "local_code")
    assert asked == []
    monkeypatch.setattr(generated_code, "CPU_SECONDS", 1)
    result, said = run(models[0], included, "local_code", allow_code=True)
    # Only the first program may end well: the others want more memory and time than there is.
    assert result["results"]["local_code"]["passed,none"] == pytest.approx(1 / len(PROGRAMS))
    assert "note: local_code: code that the model writes runs on this machine" in said
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    assert result["options"]["allow_code"] is True


@needs_harness
def test_the_limits_end_with_the_tasks() -> None:
    def limited_in_child() -> int:
        if (child := os.fork()) == 0:
            import resource

            os._exit(int(resource.getrlimit(resource.RLIMIT_CPU)[0] == generated_code.CPU_SECONDS))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert limited_in_child() == 0
    with generated_code.running_code(True):
        assert limited_in_child() == 1
    assert limited_in_child() == 0


@needs_harness
def test_answers_end_after_a_number_of_tokens(models: list[Path], included: Path, asked: list[Any]) -> None:
    """The task states 5,000, under another of the harness's names."""
    given = {"gen_kwargs": "max_new_tokens=9,temperature=0.5", "allow_code": True, "limit": 1}
    _, said = run(models[0], included, "local_code", **given)
    ((_, kwargs),) = asked[0][1]
    assert kwargs == {"until": ["\n\n"], "do_sample": False, "temperature": 0.5, "max_gen_toks": 9}
    assert "note: local_code: answers end after 9 new tokens; the task would allow 5,000" in said


def test_the_limit_of_an_answer_is_strict_by_default() -> None:
    def most(stated: dict[str, Any], **given: Any) -> tuple[int, int]:
        return TaskSettings(tasks=("a",), **given).new_tokens(stated)

    assert most({}) == (256, 256)
    assert most({"max_gen_toks": 1024, "max_tokens": 7}) == (1024, 1024)
    assert most({"max_new_tokens": 32768}) == (MOST_NEW_TOKENS, 32768)
    assert most({"max_tokens": 32768}, max_new_tokens=9000) == (9000, 32768)
    assert most({"max_gen_toks": 64}, gen_kwargs='{"max_gen_toks": 128}') == (128, 64)


@needs_harness
def test_a_real_model_writes_the_answers(models: list[Path], included: Path) -> None:
    result, _ = run(models[0], included, "local_fixed", allow_code=True, limit=1, max_new_tokens=4)
    assert result["results"]["local_fixed"]["passed,none"] == 0
    assert result["config"]["model"] == "hf"


@needs_harness
def test_chats_shots_and_thinking_reach_the_model(models: list[Path], included: Path, asked: list[Any]) -> None:
    options = {"apply_chat_template": True, "thinking": True, "num_fewshot": 1, "allow_code": True, "limit": 1}
    result, said = run(models[0], included, "local_code", "local_fixed", **options)
    ((model, requests),) = asked
    shot, plain = sorted((context for context, _ in requests), key=len, reverse=True)
    assert plain == "<user>two<think>"
    assert shot.startswith("<user>")
    assert shot.count("<user>") == 2
    assert shot.endswith("<user>two<think>")
    assert "note: --num-fewshot 1 is not for local_fixed, defined without shots." in said
    assert result["n-shot"] == {"local_code": 1, "local_fixed": 0}
    # Thoughts are no part of an answer.
    assert model.think_end_token == "</think>"
    assert result["options"] == {
        "apply_chat_template": True, "num_fewshot": 1, "gen_kwargs": None, "max_new_tokens": None, "thinking": True,
        "allow_code": True,
    }  # fmt: skip
    run(models[0], included, "local_fixed", **options | {"thinking": False, "num_fewshot": None})
    assert asked[1][1][0][0] == "<user>two"


@needs_harness
def test_a_chat_template_that_writes_the_date_gets_one_day(
    models: list[Path], included: Path, asked: list[Any], tmp_path: Path
) -> None:
    model = shutil.copytree(models[0], tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHAT)
    given = TaskSettings(
        tasks=("local_code",), include_path=included, apply_chat_template=True, allow_code=True, limit=1
    )
    said = io.StringIO()
    settings = EvalSettings(model=str(model), device="cpu", date="2024-07-26")
    result = run_tasks(settings, given, Progress(0, False, said))
    assert asked[0][1][0][0].startswith("26 Jul 2024")
    assert result["options"]["date"] == "2024-07-26"
    assert "writes the date, 2024-07-26 here; --date 2024-07-26 gives the same chats" in said.getvalue()


@needs_harness
def test_options_that_do_not_suit_are_refused_before_the_model_is_loaded(
    models: list[Path], included: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "load_full_model", lambda *_: pytest.fail("the model is loaded"))
    bare = make_model(tmp_path / "bare", tiny_config(known_family("qwen3_moe")))
    tokenizer = save_tokenizer(bare, chat=False)
    with pytest.raises(SettingsError, match=r"the tokenizer of .* has no chat template"):
        run(bare, included, "local_sums", apply_chat_template=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(bare)
    with pytest.raises(SettingsError, match="has no switch for it"):
        run(bare, included, "local_fixed", apply_chat_template=True, thinking=True, allow_code=True)
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    tokenizer.save_pretrained(bare)
    with pytest.raises(SettingsError, match=r"--thinking: the chat template of .* refuses a chat: a system message"):
        run(bare, included, "local_fixed", apply_chat_template=True, thinking=True, allow_code=True)
    with pytest.raises(SettingsError, match="local_sums: answers are given and scored there"):
        run(models[0], included, "local_sums", apply_chat_template=True, thinking=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_fewshot": -1}, "--num-fewshot -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"thinking": True}, "add --apply-chat-template"),
        ({"gen_kwargs": "temperature"}, "neither name=value"),
        ({"gen_kwargs": "{temperature}"}, "neither name=value"),
        ({"gen_kwargs": "max_tokens=3", "max_new_tokens": 4}, "Give one of them"),
        ({"server": "http://127.0.0.1:1"}, "belong together"),
        ({"served_model": "a"}, "belong together"),
        ({"server": "localhost:8000", "served_model": "a"}, "is no address"),
        ({"server": "http://[", "served_model": "a"}, "is no address"),
        (
            {"server": "http://a", "served_model": "a", "apply_chat_template": True, "batch_size": 2},
            "one chat at a time",
        ),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        TaskSettings(tasks=("a",), **settings)


def test_generation_options_are_read_as_the_harness_reads_them() -> None:
    texts = ("temperature=0.6,do_sample=true,top_k=20,stop=x=y", '{"temperature": 0.6, "until": ["a"]}')
    assert [TaskSettings(tasks=("a",), gen_kwargs=text).generation for text in texts] == [
        {"temperature": 0.6, "do_sample": True, "top_k": 20, "stop": "x=y"},
        {"temperature": 0.6, "until": ["a"]},
    ]


@needs_server
def test_a_server_is_asked_for_what_the_model_says(models: list[Path], included: Path) -> None:
    """The log-probabilities that it gives lead to the same score as the model itself."""
    here, _ = run(models[0], included, "local_sums")
    with ModelServer(load_whole(models[0]), lambda _: "") as server:
        result, said = run(models[0], included, "local_sums", server=f"{server.url}/", served_model="tiny")
    assert result["results"]["local_sums"] == here["results"]["local_sums"]
    assert (result["config"]["model"], result["served_model"]) == ("local-completions", "tiny")
    assert server.url not in json.dumps(result)
    assert server.asked[0]["model"] == "tiny"
    assert f"tasks: local_sums; tiny answers at {server.url}/" in said


@needs_server
def test_a_server_writes_answers_in_chats(models: list[Path], included: Path) -> None:
    options = {"apply_chat_template": True, "thinking": False, "allow_code": True, "limit": 1, "max_new_tokens": 30}
    with ModelServer(None, lambda body: f"answer = {len(body['messages'])}") as server:
        address = {"server": f"{server.url}/v1", "served_model": "tiny"}
        result, said = run(models[0], included, "local_code", num_fewshot=0, **address, **options)
        assert "where its chat template has a date, that is the server's" in said
        assert result["results"]["local_code"]["passed,none"] == 0
        with pytest.raises(SettingsError, match="local_sums: answers are given and scored there"):
            run(models[0], included, "local_sums", **address, apply_chat_template=True)
        with pytest.raises(SettingsError, match=r"--served-model other: http.* serves tiny\."):
            run(models[0], included, "local_code", **address | {"served_model": "other"}, **options)
    (body,) = server.asked
    assert [each["role"] for each in body["messages"]] == ["user"]
    assert (body["max_tokens"], body["temperature"], body["chat_template_kwargs"]["enable_thinking"]) == (30, 0, False)
    assert result["config"]["model"] == "local-chat-completions"
    with pytest.raises(TaskError, match=r"does not list its models at http.*/v1/models .*Start the server first"):
        run(models[0], included, "local_code", **address, **options)


@needs_server
def test_a_server_may_want_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the harness shows it too."""
    with ModelServer(None, lambda _: "", key="secret") as server:
        settings = TaskSettings(tasks=("a",), server=server.url, served_model="tiny")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(TaskError, match=r"401.*if it wants a key, set OPENAI_API_KEY"):
            check_server(settings)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        check_server(settings)


@needs_harness
def test_the_original_is_measured_too_and_what_was_lost_is_said(
    models: list[Path], included: Path, tmp_path: Path
) -> None:
    given = ["eval", str(models[0]), "--tasks", "local_sums", "--include-path", str(included), "--device", "cpu"]
    given += ["--against", str(models[1]), "-o", str(tmp_path / "results")]
    shown = CliRunner().invoke(main, given)
    assert shown.exit_code == 0, shown.output
    saved = json.loads((tmp_path / "results" / "tasks.json").read_text())
    own, original = (run(model, included, "local_sums")[0]["results"]["local_sums"] for model in models)
    assert own["acc,none"] != original["acc,none"]
    assert saved["original_results"] == {"local_sums": original}
    assert saved["against"] == models[1].name
    lost, kept = 100 * (original["acc,none"] - own["acc,none"]), own["acc,none"] / original["acc,none"]
    row = next(line.split() for line in reversed(shown.stdout.splitlines()) if " acc " in line)
    assert row[-3:] == [f"{original['acc,none']:.4f}", f"{lost:+.2f}", f"{kept:.1%}"]

    # Where the original cannot be run, the result of the model is kept.
    (tmp_path / "bare").mkdir()
    shutil.copy(models[1] / "config.json", tmp_path / "bare")
    given[given.index("--against") + 1] = str(tmp_path / "bare")
    shown = CliRunner().invoke(main, [*given[:-1], str(tmp_path / "alone")])
    assert shown.exit_code == 0, shown.output
    assert f"note: tasks are run on {models[0]} alone: " in shown.stderr
    assert "original_results" not in json.loads((tmp_path / "alone" / "tasks.json").read_text())


def test_a_comparison_stays_until_the_next_one_is_complete(tmp_path: Path) -> None:
    def saved(*original: str, against: str | None) -> str:
        result = {"format": 1, "results": {}, **dict.fromkeys(original, "m")}
        return _save(tmp_path, "tasks.json", result, against, replace_better=False)

    kept = f"note: {tmp_path / 'tasks.json'} is not replaced, since it compares with the original"
    assert saved("against", against="m").startswith("results: ")
    assert saved(against="m") == f"{kept}, as this does not yet."
    assert saved(against=None) == f"{kept}. Add --against, or -o."
    assert saved("against", against="m").startswith("results: ")


def test_points_and_recovery_are_of_shares_of_which_more_is_better() -> None:
    def figure(value: float, original: float | None, higher: bool | None = True) -> tuple[float | None, float | None]:
        each = TaskFigure("task", "metric", value, None, original, higher)
        return each.points_lost, each.recovery

    assert figure(0.6, 0.8) == pytest.approx((20, 0.75))
    assert figure(0.8, 0.6) == pytest.approx((-20, 4 / 3))
    assert figure(0.1, 0.0) == (10 * -1, None)
    assert figure(12.0, 16.0) == (None, 0.75)
    assert figure(0.5, 0.4, higher=False) == figure(0.5, 0.4, higher=None) == figure(0.5, None) == (None, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allow-code"], "--allow-code needs --tasks"),
        (["--thinking", "on"], "--thinking needs --tasks"),
        (["--max-new-tokens", "5"], "--max-new-tokens needs --generate or --tasks"),
        (["--tasks", "a", "--prompts", "x"], "--prompts needs --generate"),
    ],
)
def test_options_need_what_they_are_for(words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["eval", "./nowhere", *words])
    assert result.exit_code == SettingsError.exit_code
    assert said in result.stderr
