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
        ({"sampels": 3}, "Unknown key 'sampels' (did you mean 'samples'?)"),
        ({"xyzzy": 3}, "Unknown key 'xyzzy' (a recipe has sources, name, description,"),
        ({"samples": 0}, "samples: Expected `int` >= 1"),
        ({"samples": 2**80}, "samples: Expected `int` <= "),
        ({"samples": True}, "samples: Expected `int | null`, got `bool`"),
        ({"tokens": 9}, "Both 'samples' and 'tokens' are given"),
        ({"mode": "padded"}, "mode: Invalid enum value 'padded'; allowed: packed, documents, bucketed"),
        ({"sequence_length": 1}, "sequence_length: Expected `int` >= 2"),
        ({"seed": -1}, "seed: Expected `int` >= 0"),
        ({"name": "a=b"}, "name: Not a name: up to 100 characters, without '=', ',' and ':'"),
        ({"description": 7}, "description: Expected `str`, got `int` (numbers and dates that are meant as text need"),
        ({"sources": []}, "sources: Expected `array` of length >= 1"),
        ({"sources": "a.txt"}, "sources: Expected `array`, got `str`"),
        ({"sources": ["a.txt"]}, "sources[0]: Expected `object`, got `str`"),
        ({"sources": [{"name": "a"}]}, "source 'a': Exactly one of 'path', 'builtin' and 'dataset' is needed"),
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
        ({"sahre": 1}, "source 'a': Unknown key 'sahre' (did you mean 'share'?)"),
        ({"share": 0}, "source 'a'.share: Expected `float` > 0.0"),
        ({"share": -0.1}, "share: Expected `float` > 0.0"),
        ({"share": "half"}, "share: Expected `float | null`, got `str`"),
        ({"share": float("nan")}, "share: Expected"),
        ({"share": 10**400}, "share: "),
        ({"share": None}, "A value is empty (null): give one, or omit the key"),
        ({"split": "train"}, "source 'a': 'split' only goes with 'dataset'"),
        ({"thinking": True}, "'thinking' only goes with 'messages'"),
        ({"thinking": False}, "'thinking' only goes with 'messages'"),
        ({"messages": "m", "thinking": "on"}, "thinking: Expected `bool | null`, got `str`"),
        ({"text": "{{ a }}", "field": "b"}, "Both 'text' and 'field' say how a record becomes text"),
        ({"text": "{{ a"}, "not a template"),
        ({"text": "{a}"}, "{a} is plain text: write {{a}} for the field"),
        ({"text": "{{ a.__class__ }}"}, "has no 'a', which source 'a' needs"),
        ({"text": "{{ a() }}"}, "`call` is not allowed in a template: only fields"),
        ({"field": "a..b"}, "is not a field path"),
        ({"path": []}, "path: Expected `array` of length >= 1"),
        ({"path": "\0"}, "has characters that cannot be written to a file"),
        ({"path": "nowhere.jsonl"}, "There is no calibration file"),
        ({"name": "x" * 101}, "name: Not a name: up to 100 characters"),
        ({"messages": []}, "messages: Expected `array` of length >= 1"),
        ({"messages": [{"role": "user"}]}, "messages[0]: A message needs 'content' or 'tool_calls'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: Expected `str | null`, got `int`"),
        ({"messages": ["hello"]}, "messages[0]: Expected `object`, got `str`"),
        ({"messages": "m", "columns": {"rolle": "from"}}, "columns: Unknown key 'rolle' (did you mean 'role'?)"),
        (
            {"messages": "m", "template_options": {"tokenize": True}},
            "'tokenize' in 'template_options' is not a variable",
        ),
        ({"messages": "m", "template_options": {"a": [1]}}, "template_options[...]: Expected"),
        ({"filter": {"a": {}}}, "An empty filter: give a value, a list of values, or 'min' or 'max'"),
        ({"filter": {"a": []}}, "filter[...]: Expected `array` of length >= 1"),
        ({"filter": {"a": {"mni": 3}}}, "Unknown key 'mni' (did you mean 'min'?)"),
        ({"filter": {"a": [[]]}}, "filter[...][0]: Expected `bool | int | float | str`, got `array`"),
        ({"filter": ["a"]}, "filter: Expected `object`, got `array`"),
        ({"labels": {"a": []}}, "labels[...]: Expected `array` of length >= 1"),
        ({"labels": {"a" * 201: ["b"]}}, "is a key; keys are text of up to 200 characters"),
        ({"path": "x" * 1001}, "path: Expected `str` of length <= 1000"),
        ({"field": "x" * 201}, "is not a field path"),
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
        ([{"name": "a"}, {"name": "a"}], "Two sources are named 'a'"),
        ([{"share": 1, "name": "a"}, {"name": "b"}], "Source 'b' has no 'share', but others do"),
        ([{"samples": 5, "name": "a"}], "Both a total ('samples' or 'tokens') and 'samples' of every source"),
    ],
)
def test_sources_that_do_not_go_together(sources: list[dict[str, Any]], words: str, model: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, recipe(*({"path": "a.jsonl"} | each for each in sources)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "A value is empty (null)"),
        ("- a\n- b", "Expected `object`, got `array`"),
        ("a: [", "is not a recipe in YAML"),
        ("name: a\nname: b", "the key 'name' occurs twice"),
        ("a: &x [1]\nb: *x", "it has an alias (*)"),
        ("a: !!python/object/apply:os.system ['touch pwned']", "is not a recipe in YAML"),
        ("name: !!binary aGVsbG8=\nsources: [{path: a}]", "name: Expected `str`, got `bytes`"),
        ("description: 2024-01-01\nsources: [{path: a}]", "description: Expected `str`, got `date` (numbers and dates"),
        ("seed: 2024-13-45", "is not a recipe in YAML"),
        ('name: "\\ud800"\nsources: [{path: a}]', "'\\ud800' has characters that cannot be written"),
        ('"\\ud800": 1\nsources: [{path: a}]', "'\\ud800' has characters that cannot be written"),
        ("1: 2\nsources: [{path: a}]", "1 is a key; keys are text of"),
        ("sources: [{path: a, share: .nan}]", "share: Expected"),
        ("sources: [{path: a, share: .inf}]", "share: Expected"),
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
