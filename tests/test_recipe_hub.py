"""Data sets of the Hub, streamed from the stand-in Hub: what is fetched of them, and everything that can be wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import INDEX_NAME
from streamprune.errors import CalibrationError
from tests.hub_model import SMALL, hub_for_this_process, published_model
from tests.hub_server import HubRepo, HubServer
from tests.recipes import calibrate, same_tokens, shares_of, texts_of
from tests.tokenizer import save_tokenizer

datasets = pytest.importorskip("datasets")

CARD = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train*}
  - {split: test, path: small/test*}
- config_name: large
  data_files: large/*
---
"""


def lines(text: str, count: int = 300) -> bytes:
    return b"".join(json.dumps({"text": f"{text} {number}", "n": number}).encode() + b"\n" for number in range(count))


FILES = {
    "README.md": CARD,
    "small/train-0.jsonl": lines("zero"),
    "small/train-1.jsonl": lines("one"),
    "small/test.jsonl": lines("test"),
    "large/a.jsonl": lines("large"),
    "helper.py": b"raise SystemExit('this code must not run')",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        server.add("datasets/org/data", FILES)
        server.add("datasets/org/script", {"script.py": b"raise SystemExit('this code must not run')"})
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def recipe(**source: Any) -> dict[str, Any]:
    return {"sequence_length": 32, "samples": 20, "sources": [{"dataset": "org/data"} | source]}


def test_a_subset_is_streamed_and_its_commit_recorded(hub: HubServer, model: Path) -> None:
    calibration = calibrate(model, recipe(subset="small"))
    assert shares_of(calibration) == [1.0]
    text = "".join(texts_of(model, calibration))
    assert "zero " in text
    assert "one " in text
    assert "large" not in text
    assert "test" not in text
    commit = hub.repos["datasets/org/data"].refs["main"]
    assert calibration.recipe["sources"][0] == {
        "name": "data", "dataset": "org/data", "subset": "small", "commit": commit, "share": 1.0,
        "records": calibration.recipe["sources"][0]["records"], "sequences": 20, "tokens": 640,
    }  # fmt: skip
    # No code is fetched, let alone run; nor files of other subsets and splits.
    assert hub.fetched() == ["README.md", "small/train-0.jsonl", "small/train-1.jsonl"]
    assert same_tokens(calibration, calibrate(model, recipe(subset="small")))
    assert not same_tokens(calibration, calibrate(model, recipe(subset="small"), seed=1))
    assert "test " in "".join(texts_of(model, calibrate(model, recipe(subset="small", split="test"))))


def test_files_and_folders_of_a_data_set(hub: HubServer, model: Path) -> None:
    for chosen in ({"data_files": "large/a.jsonl"}, {"data_dir": "large"}):
        assert "large " in "".join(texts_of(model, calibrate(model, recipe(**chosen))))


def test_a_revision_is_kept_to(hub: HubServer, model: Path) -> None:
    repo = hub.repos["datasets/org/data"]
    old = repo.refs["main"]
    repo.push(FILES | {"small/train-0.jsonl": lines("newer"), "small/train-1.jsonl": lines("newer")})
    assert "newer " in "".join(texts_of(model, calibrate(model, recipe(subset="small"))))
    before = calibrate(model, recipe(subset="small", revision=old))
    assert "newer " not in "".join(texts_of(model, before))
    assert before.recipe["sources"][0]["commit"] == old
    with pytest.raises(
        CalibrationError, match=r"org/data has no branch, tag or commit 'v9'\. Choose another 'revision'"
    ):
        calibrate(model, recipe(subset="small", revision="v9"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"subset": "medium"}, r"org/data \(subset 'medium', split 'train'\) cannot be read: .*medium"),
        ({"subset": "small", "split": "dev"}, r"\(subset 'small', split 'dev'\) cannot be read: .*dev"),
        ({}, r"\(split 'train'\) cannot be read: .*Config name is missing"),
        ({"subset": "small", "field": "body"}, r"'data' \(org/data\) record \d+ has no 'body', .* it has 'text', 'n'"),
        ({"dataset": "org/none"}, "org/none does not exist, or is private"),
        ({"dataset": "org/script"}, r"scripts are no longer supported.* with 'revision: refs/convert/parquet'"),
        ({"data_files": "nothing/*"}, "org/data .* cannot be read"),
    ],
)
def test_what_a_data_set_does_not_have(source: dict[str, Any], words: str, hub: HubServer, model: Path) -> None:
    with pytest.raises(CalibrationError, match=words) as caught:
        calibrate(model, recipe(**source))
    assert f"Source {source.get('dataset', 'org/data').partition('/')[2]!r}".lower() in str(caught.value).lower()
    assert len(str(caught.value).splitlines()) == 1


def test_gated_data_sets_are_told_before_anything_is_read(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["datasets/org/gated"] = HubRepo(gated=True, members={"hf_member"})
    hub.repos["datasets/org/gated"].push(FILES)
    mix = recipe(subset="small")
    mix["sources"].append({"name": "closed", "dataset": "org/gated", "subset": "large"})
    with pytest.raises(
        CalibrationError, match=r"Source 'closed': .* org/gated is gated\. Ask for access at http.*org/gated"
    ):
        calibrate(model, mix)
    assert not [name for name in hub.fetched() if name.endswith(".jsonl")]
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    assert calibrate(model, mix).tokens_of == (320, 320)


def test_a_hub_that_fails_and_broken_files(hub: HubServer, model: Path) -> None:
    hub.repos["datasets/org/data"].push(FILES | {"small/train-0.jsonl": b'{"text": "a"}\n{"text": \n' * 50})
    with pytest.raises(CalibrationError, match=r"Source 'data': .* org/data .* cannot be read: "):
        calibrate(model, recipe(subset="small"))
    hub.outage = 500
    with pytest.raises(CalibrationError, match=r"Source 'data': .* org/data .* cannot be read: .*500"):
        calibrate(model, recipe(subset="small"))


def test_without_the_library_the_user_is_told_how_to_get_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datasets" else find(name))
    mix = {"samples": 2, "sources": [{"path": "not-looked-at.txt"}, {"name": "hub", "dataset": "org/data"}]}
    with pytest.raises(CalibrationError, match=r"Source 'hub' is the Hub data set org/data.*streamprune\[datasets\]"):
        calibrate(model, mix)


def test_a_models_tokenizer_comes_without_its_weights(hub: HubServer, tmp_path: Path) -> None:
    files = published_model(tmp_path / "published", max_shard_size="100KB")
    hub.add("org/model", files)
    folder = resolve_model("org/model", tokenizer_only=True)
    wanted = sorted({*SMALL, "config.json", "generation_config.json", "README.md", INDEX_NAME})
    assert hub.fetched() == wanted
    assert all((folder / name).is_file() for name in wanted)
    assert not list(folder.glob("*.safetensors"))
    assert resolve_model("org/model") == folder
    assert list(folder.glob("*.safetensors"))


def test_a_models_tokenizer_from_the_cache_alone(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", published_model(tmp_path / "published", max_shard_size="100KB"))
    folder = resolve_model("org/model", tokenizer_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.forget()
    assert resolve_model("org/model", tokenizer_only=True) == folder
    assert hub.requests == []
