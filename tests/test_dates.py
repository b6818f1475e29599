"""A chat template that writes today's date: the same command gives the same bytes on every day."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamprune.calibration.sequences import date_of
from streamprune.calibration.tokens import load_tokenizer
from streamprune.config import EvalSettings, SearchSettings
from streamprune.errors import ResumeError
from streamprune.evaluation import command
from streamprune.evaluation.evaluate import read_data
from streamprune.evaluation.prompts import collect_prompts
from streamprune.evaluation.task_settings import TaskSettings
from streamprune.pipeline.search import finished_search, search
from streamprune.work.records import read_run
from tests.faults import Case, Injected, breaking_at
from tests.helpers import known_family, tree_bytes
from tests.interruptions import call
from tests.recipes import write_lines
from tests.tiny import make_model, tiny_config
from tests.tokenizer import save_tokenizer

TEMPLATE = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@contextmanager
def on(day: str) -> Iterator[None]:
    """Within this context it is another day."""

    class Day(datetime.date):
        @classmethod
        def today(cls) -> Day:
            return cls.fromisoformat(day)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.common_settings.datetime", SimpleNamespace(date=Day))
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("dated")
    kind = known_family("qwen3_moe")
    config = tiny_config(kind)
    config.num_hidden_layers = 2
    model = make_model(folder / "model", config)
    save_tokenizer(model, chat=False).chat_template = None
    (model / "chat_template.jinja").write_text(TEMPLATE)
    chats = ({"messages": [{"role": "user", "content": f"number {number}"}]} for number in range(40))
    tokens = write_lines(folder / "chats.jsonl", *chats)
    settings: dict[str, Any] = {
        "keep": kind.keep,
        "batch_tokens": 64,
        "checkpoint_every": 0.0,
        "samples": 8,
        "seq_len": 24,
    }
    return Case(model, tokens, folder / "out", settings, {})


def test_a_run_goes_on_ends_well_and_is_made_again_on_another_day(case: Case, tmp_path: Path) -> None:
    undisturbed, case = case.at(tmp_path / "undisturbed"), case.at(tmp_path / "out")
    with on("2026-03-01"):
        undisturbed.run(date="2026-02-28")
    case.expected = tree_bytes(undisturbed.output)
    with on("2026-02-28"), breaking_at(1), pytest.raises(Injected):
        case.run()
    with on("2026-03-01"):
        with pytest.raises(ResumeError, match="date in the chat template: 2026-02-28 then, 2026-03-01 now"):
            case.run(date="2026-03-01")
        case.run()
        case.check()
        assert case.run().summary["complete"] is True
        card = (case.output / "README.md").read_text()
        assert "--date 2026-02-28" in card
        # What is measured on chats has the date that the experts were scored with.
        data = read_data(EvalSettings(model=str(case.output), data=(str(case.tokens),), samples=4, seq_len=24))
        assert data.recipe["given"]["date"] == "2026-02-28"


def test_scores_and_resumed_runs_too(case: Case, tmp_path: Path) -> None:
    for name, resumes in (("a", False), ("b", True)):
        scores = case.at(tmp_path / name)
        with on("2026-02-28"), breaking_at(1), pytest.raises(Injected):
            scores.run(only_score=True, keep=None)
        with on("2026-03-01"):
            scores.resume() if resumes else scores.run(only_score=True, keep=None)
            assert scores.run(only_score=True, keep=None).summary["complete"] is True
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_are_computed_from_text_of_the_day_of_the_scores(case: Case, tmp_path: Path) -> None:
    """As in a run that scores too."""
    scores, refitted = case.at(tmp_path / "scores"), case.at(tmp_path / "out")
    text: dict[str, Any] = {"samples": 30, "refit": True, "anchor": "none"}
    with on("2026-02-28"):
        scores.run(only_score=True, keep=None, samples=30)
    with on("2026-03-01"):
        refitted.run(scores=scores.output, **text)
        assert '"date": "2026-03-01"' not in (refitted.output / "streamprune.json").read_text()
    with on("2026-03-02"):
        assert refitted.run(scores=scores.output, **text).summary["complete"] is True


def test_a_search_too(case: Case, tmp_path: Path) -> None:
    settings = SearchSettings(
        model=str(case.model), output=tmp_path / "found", calibration=(str(case.tokens),), samples=20, seq_len=24,
        budget_gib=1.0, candidates=("keep=5",), context=64,
    )  # fmt: skip
    with on("2026-02-28"), breaking_at(1), pytest.raises(Injected):
        search(settings, quiet=True)
    with on("2026-03-01"):
        found = search(settings, quiet=True)
        assert found["request"]["date"] == "2026-02-28"
        assert finished_search(settings) is not None


def test_all_texts_of_a_command_have_one_date(case: Case, tmp_path: Path) -> None:
    """Also if midnight comes between them: here with every look at the calendar."""
    days = itertools.count(1)

    class Day(datetime.date):
        @classmethod
        def today(cls) -> Day:
            return cls(2026, 1, next(days))

    chats = ({"messages": [{"role": "user", "content": f"another {number}"}]} for number in range(40))
    anchor = write_lines(tmp_path / "anchor.jsonl", *chats)
    dated, asked = case.at(tmp_path / "out"), list[EvalSettings]()
    text: dict[str, Any] = {"samples": 30, "refit": True, "anchor": str(anchor)}

    def run_tasks(settings: EvalSettings, *_: Any) -> dict[str, Any]:
        asked.append(settings)
        return {"results": {}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.common_settings.datetime", SimpleNamespace(date=Day))
        with breaking_at(1), pytest.raises(Injected):
            dated.run(**text)
        patch.setattr(command, "run_tasks", run_tasks)
        patch.setattr(command, "result_lines", lambda *_: [])
        given = EvalSettings(model=str(case.model), against=str(case.model))
        command.evaluate_model(given, None, TaskSettings(tasks=("a",)), tmp_path / "results", True, None)
    recorded = read_run(dated.work)
    assert recorded is not None
    dates = [date_of(recipe) for recipe in recorded.recipes]
    assert len(dates) == 2
    assert dates[0] == dates[1] is not None
    assert len(asked) == 2
    assert asked[0].date == asked[1].date is not None


def test_prompts_too(case: Case, tmp_path: Path) -> None:
    """And their date is noted in the result."""
    tokenizer = load_tokenizer(case.model, trust_remote_code=False)
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "hello"})
    (text, chat), _, notes = collect_prompts(None, path, 1, 8, tokenizer, datetime.date(2024, 7, 26))
    assert (text.text, chat.text) == ("hello", "26 Jul 2024<user>hello")
    assert notes == ["The chat template writes the date, 2024-07-26 here; --date 2024-07-26 gives the same prompts."]


@pytest.mark.parametrize("text", ["2026-2-1", "20260201", "2026-02-30", "today", ""])
def test_dates_that_are_none(text: str, tmp_path: Path) -> None:
    done = call("score", tmp_path, "-o", tmp_path / "scores", "--date", text)
    assert done.exit_code == 2
    assert f"--date {text} is not a date. Write it as YYYY-MM-DD" in done.stderr


@pytest.mark.parametrize("text", ["1", "100%", "-1%", "x", "nan"])
def test_shares_that_are_none(text: str, tmp_path: Path) -> None:
    done = call("score", tmp_path, "-o", tmp_path / "scores", "--skip-bad", text)
    assert done.exit_code == 2
    assert f"{text} is not a share below 100%. Write for example 1%." in done.stderr
