"""`streamprune calibration show`: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from streamprune.calibration.sequences import load_calibration
from streamprune.cli import main
from tests.recipes import write_lines, write_recipe, write_texts
from tests.tiny import FAMILIES, make_model, tiny_config
from tests.tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    model = make_model(folder / "model", tiny_config(FAMILIES[0]))
    save_tokenizer(model)
    # Config and tokenizer are all that is needed.
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    write_texts(folder / "a.jsonl", "a")
    write_lines(folder / "b.jsonl", *({"text": "b\x1b[31mred\x07 \n" * 9} for _ in range(99)))
    sources = [{"name": "first", "path": "a.jsonl", "share": 3}, {"name": "second", "path": "b.jsonl", "share": 1}]
    write_recipe(
        folder / "mix.yaml", {"description": "two letters", "sequence_length": 32, "samples": 40, "sources": sources}
    )
    return folder


def show(place: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["calibration", "show", *arguments, "--model", str(place / "model")])


def test_shares_counts_and_samples_are_printed(place: Path) -> None:
    result = show(place, str(place / "mix.yaml"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "mix: two letters"
    assert lines[1] == "40 sequences, 1,280 tokens; packed, at most 32 tokens each; seed 0"
    assert lines[3].split() == ["first", "75.0%", "75.0%", "960", "30", "10"]
    assert lines[4].split()[:5] == ["second", "25.0%", "25.0%", "320", "10"]
    calibration = load_calibration([str(place / "mix.yaml")], place / "model", vocab_size=256, max_positions=None)
    assert f"fingerprint {calibration.fingerprint}" in lines
    assert "first:\n  | aaaaaaaa" in result.stdout
    # A stranger's text does nothing to the terminal.
    assert "second:\n  | b?[31mred? \n  | b?" in result.stdout
    assert "\x1b" not in result.stdout
    assert str(place) not in result.stdout


def test_as_json_and_with_other_numbers(place: Path) -> None:
    options = ["--samples", "8", "--seq-len", "16", "--seed", "5", "--json"]
    told = json.loads(show(place, str(place / "mix.yaml"), *options).stdout)
    assert (told["sequences"], told["tokens"], told["sequence_length"], told["seed"]) == (8, 128, 16, 5)
    assert [(each["name"], each["share"], each["share_of_tokens"]) for each in told["sources"]] == [
        ("first", 0.75, 0.75), ("second", 0.25, 0.25),
    ]  # fmt: skip
    assert told["sources"][0]["sample"] == "a" * 16
    files = json.loads(show(place, str(place / "a.jsonl"), str(place / "b.jsonl"), *options).stdout)
    assert [each["name"] for each in files["sources"]] == ["a.jsonl", "b.jsonl"]
    assert files["sources"][0]["share"] is None


def test_token_ids_of_a_model_without_a_tokenizer(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((place / "model" / "config.json").read_text())
    write_lines(tmp_path / "ids.jsonl", {"input_ids": [5, 6, 7]})
    result = show(tmp_path, str(tmp_path / "ids.jsonl"), "--samples", "1")
    assert result.exit_code == 0, result.output
    assert "ids.jsonl:\n  | 5 6 7" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere.yaml"], 1, "There is no calibration file nowhere.yaml"),
        (["agentik"], 1, "Did you mean 'agentic'?"),
        (["builtin", "--samples", "0"], 2, "--samples 0 is too small: at least 1"),
        (["builtin", "--seq-len", "1"], 2, "--seq-len 1 is too small: at least 2"),
        (["builtin:poems"], 1, "unknown domain 'poems'"),
    ],
)
def test_refusals(arguments: list[str], status: int, words: str, place: Path) -> None:
    result = show(place, *arguments)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_help_names_the_command() -> None:
    assert "calibration" in CliRunner().invoke(main, ["--help"]).stdout
    assert "show" in CliRunner().invoke(main, ["calibration", "--help"]).stdout
