"""Broken checkpoints through the command line: one message, status 1, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamprune.checkpoint.index import INDEX_NAME
from streamprune.cli import main
from streamprune.output.writer import OutputWriter
from streamprune.streaming.layer_weights import LayerWeights
from tests.tiny import FAMILIES, make_model, tiny_config, write_token_ids


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    qwen = next(family for family in FAMILIES if family.name == "qwen3_moe")
    return make_model(tmp_path_factory.mktemp("sharded"), tiny_config(qwen))


def invoke(folder: Path, tmp_path: Path, keeps_work: bool = False) -> str:
    """The message of a run that must fail with status 1 and leave nothing behind but finished blocks."""
    ids = write_token_ids(tmp_path / "ids.jsonl")
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["run", str(folder), "-o", str(out), "--keep", "5", "--calibration", str(ids)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    assert not out.exists()
    assert (tmp_path / "out.work").exists() is keeps_work
    assert not (tmp_path / "out.streamprune.log").exists()
    return errors[0]


def cut_a_shard(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def lose_a_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    name, file = next(iter(index["weight_map"].items()))
    shutil.copy(folder / file, folder.parent / "outside.safetensors")
    index["weight_map"][name] = "../outside.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))


def lose_a_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.9.weight"] = max(index["weight_map"].values())
    (folder / INDEX_NAME).write_text(json.dumps(index))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'\xff{"model_type": "qwen3_moe"}')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut_a_shard, "it is cut short"),
        (lose_a_shard, "shards are missing"),
        (point_outside, "outside the model folder"),
        (lose_a_tensor, "'model.layers.9.weight' is in"),
        (break_config, "cannot be read as JSON"),
    ],
)
def test_run_refuses_before_any_weight_is_read(
    harm: Callable[[Path], None], reason: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    harm(folder)
    started: list[str] = []
    monkeypatch.setattr(LayerWeights, "__init__", lambda *args: started.append("loading"))
    monkeypatch.setattr(OutputWriter, "__init__", lambda *args: started.append("writing"))
    assert reason in invoke(folder, tmp_path)
    assert not started


@pytest.mark.parametrize(
    ("when", "reason"),
    [("before", "ends at byte 100, but bytes"), ("after", "ends at byte 100, but bytes")],
    ids=["before a block is written", "after it"],
)
def test_shard_cut_in_the_middle_of_a_run(
    when: str, reason: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    write_layer = OutputWriter.write_layer

    def cut(self: OutputWriter, block: int | None, *what: Any) -> Any:
        shards = write_layer(self, block, *what) if when == "after" else None
        if block == 1:
            for path in folder.glob("*.safetensors"):
                os.truncate(path, 100)
        return write_layer(self, block, *what) if when == "before" else shards

    monkeypatch.setattr(OutputWriter, "write_layer", cut)
    message = invoke(folder, tmp_path, keeps_work=True)
    assert reason in message
    assert f"{folder}/model-0000" in message
