"""Every shipped recipe, run against small stand-ins of its data sets with the same names, splits and columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamprune.calibration.recipe import read_recipe, shipped_recipes
from streamprune.errors import CalibrationError
from tests.recipes import TOOL_CHAT, calibrate, redirect, same_tokens, shares_of, stand_in, texts_of
from tests.tokenizer import save_tokenizer

pytest.importorskip("datasets")

CONFIGS = Path(__file__).parents[1] / "configs" / "calibration"
TOOL = {"name": "find", "description": "finds", "parameters": {"what": {"type": "str", "description": "it"}}}


def places(folder: Path) -> dict[str, Path]:
    """The stand-ins by the data set's name on the Hub. Columns, splits and subsets are those of the originals."""
    chat = [{"role": "user", "content": "why? " * 40}, {"role": "assistant", "content": "because. " * 60}]
    trajectory = [
        {"role": "system", "content": "You are an agent. " * 9},
        {"role": "user", "content": "repair it " * 30},
        {"role": "assistant", "content": "I look.", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}]},
        {"role": "tool", "content": "a.py b.py", "tool_call_id": "1"},
    ]  # fmt: skip
    originals: dict[str, tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]] = {
        "theblackcat102/evol-codealpaca-v1": (
            {"train.jsonl": [{"instruction": f"write {n} " * 9, "output": f"code {n} " * 50} for n in range(120)]}, []
        ),
        "HuggingFaceH4/ultrachat_200k": (
            {f"data/{split}-00000-of-00001.parquet": [
                {"prompt": "why?", "prompt_id": str(n), "messages": chat} for n in range(60)]
             for split in ("train_sft", "test_sft", "train_gen", "test_gen")},
            [{"config_name": "default", "data_files": [
                {"split": split, "path": f"data/{split}-*"}
                for split in ("train_sft", "test_sft", "train_gen", "test_gen")]}],
        ),
        "togethercomputer/CoderForge-Preview": (
            {f"trajectories/{split}-00000-of-00002.parquet": [
                {"trajectory_id": f"{split}{n}", "finish_reason": "submit", "image": "x", "reward": 1.0,
                 "messages": json.dumps(trajectory), "tools": json.dumps([{"type": "function", "function": TOOL}]),
                 "license": "mit"} for n in range(60)]
             for split in ("SWE_Rebench", "filtered_reward1")},
            [{"config_name": "trajectories", "data_files": [
                {"split": split, "path": f"trajectories/{split}-*"} for split in ("SWE_Rebench", "filtered_reward1")]}],
        ),
        "bigcode/the-stack-smol": (
            {f"data/{language}/data.json": [
                {"content": f"def f{n}(): pass  # {language}\n" * 30, "avg_line_length": 9.5, "max_line_length": 30,
                 "alphanum_fraction": 0.7, "licenses": ["mit"], "repository_name": "a/b", "path": "f.py", "size": 900,
                 "lang": "Python"} for n in range(60)]
             for language in ("python", "java")}, [],
        ),
        "allenai/c4": (
            {f"{subset}/c4-train.{part:05d}-of-00002.json": [
                {"text": f"{subset} web text {n}. " * 40, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a"}
                for n in range(30)] for subset in ("en", "realnewslike") for part in (0, 1)},
            [{"config_name": subset, "data_files": [{"split": "train", "path": f"{subset}/c4-train.*"}]}
             for subset in ("en", "realnewslike")],
        ),
        "NeelNanda/pile-10k": (
            {"data/train-00000-of-00001.parquet": [
                {"text": f"the pile {n} " * 60, "meta": {"pile_set_name": "Github"}} for n in range(60)]},
            [],
        ),
        "bigcode/bigcodebench": (
            {f"data/{version}-00000-of-00001.parquet": [
                {"task_id": f"BigCodeBench/{n}", "complete_prompt": "def task():\n", "instruct_prompt": "Do it. " * 20,
                 "canonical_solution": "    return 1\n" * 9, "code_prompt": "def task():\n", "test": "assert",
                 "entry_point": "task", "doc_struct": "{}", "libs": "[]"} for n in range(40)]
             for version in ("v0.1.3", "v0.1.4")},
            [{"config_name": "default", "data_files": [
                {"split": version, "path": f"data/{version}-*"} for version in ("v0.1.3", "v0.1.4")]}],
        ),
        "princeton-nlp/SWE-bench": (
            {f"data/{split}-00000-of-00001.parquet": [
                {"repo": "a/b", "instance_id": f"a__b-{n}", "base_commit": "0", "patch": "--- a\n+++ b\n" * 40,
                 "test_patch": "", "problem_statement": "It fails. " * 40, "hints_text": "", "created_at": "",
                 "version": "1", "FAIL_TO_PASS": "[]", "PASS_TO_PASS": "[]", "environment_setup_commit": "0"}
                for n in range(40)] for split in ("dev", "test", "train")},
            [{"config_name": "default", "data_files": [
                {"split": split, "path": f"data/{split}-*"} for split in ("dev", "test", "train")]}],
        ),
        "Salesforce/xlam-function-calling-60k": (
            {"xlam_function_calling_60k.jsonl": [
                {"id": n, "query": f"find {n}", "tools": json.dumps([TOOL]),
                 "answers": json.dumps([{"name": "find", "arguments": {"what": n}}])} for n in range(60)]},
            [],
        ),
        "cais/mmlu": (
            {f"all/{split}-00000-of-00001.parquet": [
                {"question": f"How many? {n}", "subject": "algebra", "choices": ["one", "two", "three", "four"],
                 "answer": n % 4} for n in range(60)] for split in ("test", "validation")},
            [{"config_name": "all", "data_files": [
                {"split": split, "path": f"all/{split}-*"} for split in ("test", "validation")]}],
        ),
    }  # fmt: skip
    return {name: stand_in(folder / name, *original) for name, original in originals.items()}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer's folder; its template shows tools, calls and variables. The data sets are stand-ins."""
    redirect(monkeypatch, places(tmp_path / "hub"))
    tokenizer = save_tokenizer(tmp_path / "model", chat=False)
    tokenizer.chat_template = TOOL_CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_shipped_recipes_are_those_of_configs() -> None:
    names = ["agentic", "code-general-50-50", "code-general-70-30", "evol-codealpaca", "ultrachat"]
    assert list(shipped_recipes()) == names == sorted(path.stem for path in CONFIGS.iterdir())
    for name, path in shipped_recipes().items():
        recipe = read_recipe(path)
        assert (recipe.name, recipe.sequence_length, recipe.seed) == (name, 2048, 0)
        assert recipe.description
    assert read_recipe(CONFIGS / "evol-codealpaca.yaml").samples == 1024
    assert read_recipe(CONFIGS / "ultrachat.yaml").samples == 512
    assert read_recipe(CONFIGS / "agentic.yaml").samples == 1000
    published = [source.samples for source in read_recipe(CONFIGS / "code-general-70-30.yaml").sources]
    assert published == [700, 700, 700, 700, 600, 600]


@pytest.mark.parametrize(
    ("name", "shares"),
    [("evol-codealpaca", [1.0]), ("ultrachat", [1.0]), ("agentic", [0.4, 0.3, 0.1, 0.2])],
)
def test_shares_of_the_tokens_are_met(name: str, shares: list[float], model: Path) -> None:
    calibration = calibrate(model, name, samples=100, seq_len=128)
    assert calibration.tokens == 100 * 128
    assert shares_of(calibration) == pytest.approx(shares, abs=0.01)
    assert calibration.notes == ()
    assert same_tokens(calibration, calibrate(model, name, samples=100, seq_len=128))
    assert {source["commit"] for source in calibration.recipe["sources"]} == {"c0ffee"}
    json.dumps(calibration.recipe)
    assert str(model.parent) not in json.dumps(calibration.recipe)


@pytest.mark.parametrize(("name", "shares"), [("code-general-70-30", [0.175] * 4 + [0.15] * 2),
                                              ("code-general-50-50", [0.125] * 4 + [0.25] * 2)])  # fmt: skip
def test_shares_of_the_records_are_met(name: str, shares: list[float], model: Path) -> None:
    calibration = calibrate(model, name, samples=80, seq_len=512)
    met = [calibration.source_of.count(index) / 80 for index in range(6)]
    assert met == pytest.approx(shares, abs=0.01)
    code = sum(met[:4])
    assert code == pytest.approx(0.7 if "70" in name else 0.5, abs=0.01)
    assert [source["records"] for source in calibration.recipe["sources"]] == [round(80 * share) for share in shares]
    assert max(len(sequence) for sequence in calibration.sequences) <= 512


def test_what_records_look_like(model: Path) -> None:
    mix = calibrate(model, "code-general-70-30", samples=80, seq_len=2048)
    first = {name: texts_of(model, mix, index)[0] for index, name in enumerate(mix.sources)}
    assert first["evol-codealpaca"].startswith("<user>write ")
    assert "<assistant>code " in first["evol-codealpaca"]
    assert first["bigcodebench"].startswith("<user>Do it.")
    assert "<assistant>def task():\n    return 1" in first["bigcodebench"]
    assert first["swe-bench"].startswith("<user>It fails.")
    assert "<assistant>--- a" in first["swe-bench"]
    wrapped = json.dumps([{"type": "function", "function": TOOL}])
    assert first["xlam"].startswith(f"[{wrapped}]<user>find ")
    assert first["xlam"].split("<assistant>")[1].startswith('[find {"what": ')
    assert first["mmlu"].startswith("<user>How many? ")
    assert "\nA. one\nB. two\nC. three\nD. four<assistant>" in first["mmlu"]
    for text in texts_of(model, mix, 4):
        assert text[-1] == "ABCD"[int(text.split("?")[1].split()[0]) % 4]
    assert first["c4"].startswith("en web text ")
    agents = "".join(texts_of(model, calibrate(model, "agentic", samples=50, seq_len=512), 0))
    assert '<assistant>I look.[bash {"command": "ls"}]<tool>a.py b.py' in agents
    assert '"name": "find"' in agents
    python = "".join(texts_of(model, calibrate(model, "agentic", samples=50, seq_len=512), 1))
    assert "# python" in python
    assert "# java" not in python


def test_the_default_numbers_are_more_than_stand_ins_have(model: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"Source 'evol-codealpaca' .* is too short: it has .* tokens, \d+% of the"
    ):
        calibrate(model, "evol-codealpaca")
    with pytest.raises(CalibrationError, match="has 120 of the 700 required records"):
        calibrate(model, "code-general-70-30")
