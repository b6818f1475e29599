"""Recipes that are refused: unknown keys, values of the wrong kind, files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import CalibrationError
from tests.recipes import calibrate, write_texts
from tests.tokenizer import save_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "model")
    write_texts(tmp_path / "a.jsonl", "a")
    return tmp_path / "model"


def recipe(*sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"samples": 100, "sequence_length": 32, "sources": list(sources)} | fields


def source(letter: str, **fields: Any) -> dict[str, Any]:
    return {"name": letter, "path": f"{letter}.jsonl"} | fields


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampels": 3}, "unknown key 'sampels' (did you mean 'samples'?)"),
        ({"xyzzy": 3}, "unknown key 'xyzzy' (there are name, description,"),
        ({"samples": 0}, "has 0 for 'samples', which is no whole number from 1"),
        ({"samples": 2**80}, "which is no whole number from 1"),
        ({"samples": True}, "has True for 'samples'"),
        ({"tokens": 9}, "has both 'samples' and 'tokens'"),
        ({"mode": "padded"}, "none of packed, documents, bucketed"),
        ({"sequence_length": 1}, "no whole number from 2"),
        ({"seed": -1}, "no whole number from 0"),
        ({"name": "a=b"}, "has 'a=b' for 'name'"),
        ({"description": 7}, "has 7 for 'description', which is no text"),
        ({"sources": []}, "has no 'sources'"),
        ({"sources": "a.txt"}, "has no 'sources'"),
        ({"sources": ["a.txt"]}, "source 1, holds a str where names with values are wanted"),
        ({"sources": [{"name": "a"}]}, "source 'a', must have exactly one of 'path', 'builtin' and 'dataset'"),
    ],
)
def test_recipes_that_are_refused(change: dict[str, Any], words: str, model: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, recipe(source("a")) | change)
    assert words in str(caught.value)
    assert str(model.parent / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sahre": 1}, "source 'a', has the unknown key 'sahre' (did you mean 'share'?)"),
        ({"share": 0}, "has 0 for 'share', which is no share"),
        ({"share": -0.1}, "which is no share"),
        ({"share": "half"}, "has 'half' for 'share', which is no number"),
        ({"share": float("nan")}, "has 'NaN' for 'share', which is no number"),
        ({"share": 10**400}, "which is no number"),
        ({"share": None}, "has None for 'share'"),
        ({"split": "train"}, "has 'split', which only goes with 'dataset'"),
        ({"thinking": True}, "has 'thinking', which only goes with 'messages'"),
        ({"messages": "m", "thinking": "on"}, "has 'on' for 'thinking', which is neither true nor false"),
        ({"text": "{a}", "field": "b"}, "says in two ways how a record becomes text: 'text' and 'field'"),
        ({"text": "{a"}, "a single '{'"),
        ({"text": "{}"}, "names no field"),
        ({"text": "{a.__class__!r:>9}"}, "has no 'a.__class__!r:>9'"),
        ({"text": "{a[b]}"}, "names no field"),
        ({"field": "a..b"}, "names no field"),
        ({"path": []}, "has [] for 'path', which is an empty list"),
        ({"path": "\0"}, "for 'path', which is no text"),
        ({"path": "nowhere.jsonl"}, "There is no calibration file"),
        ({"name": "x" * 101}, "no name: up to 100 characters"),
        ({"messages": []}, "an empty list of 'messages'"),
        ({"messages": [{"role": "user"}]}, "a message without a 'role', or with neither"),
        ({"messages": [{"role": "user", "content": 5}]}, "has 5 for 'content'"),
        ({"messages": ["hello"]}, "a message in 'messages': a str where names with values are wanted"),
        ({"messages": "m", "columns": {"rolle": "from"}}, "unknown key 'rolle' in 'columns' (did you mean 'role'?)"),
        ({"messages": "m", "template_options": {"tokenize": True}}, "'tokenize' in 'template_options'"),
        ({"messages": "m", "template_options": {"a": [1]}}, "has [1] for 'a' in 'template_options'"),
        ({"filter": {"a": {}}}, "an empty filter for 'a'"),
        ({"filter": {"a": {"mni": 3}}}, "unknown key 'mni' in the filter for 'a' (did you mean 'min'?)"),
        ({"filter": {"a": [[]]}}, "which is not a value, a list of them, or a range"),
        ({"filter": ["a"]}, "holds a list where names with values are wanted"),
        ({"labels": {"a": []}}, "has [] for 'a', which is an empty list"),
        ({"labels": {"a" * 201: ["b"]}}, "as a key, which is no text of up to 200 characters"),
        ({"path": "x" * 1001}, "for 'path', which is longer than 1000 characters"),
        ({"field": "x" * 201}, "names no field"),
        ({"text": "{" + "x" * 20_000 + "}"}, "names no field"),
    ],
)
def test_sources_that_are_refused(change: dict[str, Any], words: str, model: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, recipe(source("a") | change))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"name": "a"}, {"name": "a"}], "has two sources named 'a'"),
        ([{"share": 1, "name": "a"}, {"name": "b"}], "gives source 'b' no 'share', but others have one"),
        ([{"samples": 5, "name": "a"}], "has a total ('samples' or 'tokens') beside a number of 'samples'"),
    ],
)
def test_sources_that_do_not_go_together(sources: list[dict[str, Any]], words: str, model: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, recipe(*({"path": "a.jsonl"} | each for each in sources)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds nothing where names with values are wanted"),
        ("- a\n- b", "holds a list where"),
        ("a: [", "is not a recipe in YAML"),
        ("name: a\nname: b", "'name' stands twice"),
        ("a: &x [1]\nb: *x", "it has an alias (*)"),
        ("a: !!python/object/apply:os.system ['touch pwned']", "is not a recipe in YAML"),
        ("name: !!binary aGVsbG8=\nsources: [{path: a}]", "which is no name"),
        ("description: 2024-01-01\nsources: [{path: a}]", "which is no text (numbers and dates"),
        ("seed: 2024-13-45", "is not a recipe in YAML"),
        ('name: "\\ud800"\nsources: [{path: a}]', "has '\\ud800' for 'name'"),
        ('"\\ud800": 1\nsources: [{path: a}]', "has '\\ud800' as a key"),
        ("1: 2\nsources: [{path: a}]", "has 1 as a key, which is no text of"),
        ("sources: [{path: a, share: .nan}]", "has nan for 'share', which is no number"),
        ("sources: [{path: a, share: .inf}]", "has inf for 'share', which is no number"),
        ("seed: " + "9" * 5000, "is not a recipe in YAML"),
        ("[" * 3000, "is not a recipe in YAML"),
        ("\x07", "is not a recipe in YAML"),
        ("a: b\n" * 60_000, "has more than 256.00 KiB"),
    ],
)
def test_files_that_are_no_recipes(content: str, words: str, model: Path) -> None:
    path = model.parent / "r.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
