"""Broken checkpoints through the command line: one message, status 1, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import INDEX_NAME, open_checkpoint
from streamprune.cli import main
from streamprune.config import PruneSettings
from streamprune.fit.footprint import read_footprint
from streamprune.output.verify import verify
from streamprune.output.writer import OutputWriter
from streamprune.pipeline.prune import prune
from streamprune.reporting.facts import Memory, read_facts
from streamprune.streaming.layer_weights import LayerWeights
from tests.helpers import read_tensors
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
    """One that the model needs, and that is still in the index."""
    change_shard(folder, lambda tensors: tensors.pop("model.norm.weight"))


def change_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the shard that has the last norm."""
    path = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'\xff{"model_type": "qwen3_moe"}')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut_a_shard, "it is cut short"),
        (lose_a_shard, "shards are missing"),
        (point_outside, "outside the model folder"),
        (
            lose_a_tensor,
            "first model.norm.weight. Complete the download. model.safetensors.index.json names 'model.norm",
        ),
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


@pytest.fixture(scope="module")
def plain(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the model as it should be."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert not [note for note in told(sharded, out) if "ignored" in note or "left out" in note]
    return out


def told(source: Path, out: Path) -> list[str]:
    """The notes of a run that keeps 5 experts and leaves a model that loads clean."""
    words = ["run", source, "-o", out, "--keep", 5, "--calibration", write_token_ids(out.parent / "ids.jsonl")]
    result = CliRunner().invoke(main, [*map(str, words), "--no-report"])
    assert result.exit_code == 0, result.output
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return [line for line in result.stderr.splitlines() if line.startswith("note: ")]


def test_what_the_model_does_not_use_changes_nothing(sharded: Path, plain: Path, tmp_path: Path) -> None:
    """Stock transformers' rule: tensors without a place in the model are ignored. Each kind of them is said."""
    folder, expert = tmp_path / "model", "model.layers.0.mlp.experts.3.up_proj"
    shutil.copytree(sharded, folder)
    unused = {"tower.logit_scale": torch.ones(3), "tower.weight": torch.ones(2, 3).to(torch.float8_e4m3fn)}
    some = {f"{expert}.extra": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_shard(folder, lambda tensors: tensors.update(unused | some))
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.9.weight"] = max(index["weight_map"].values())
    (folder / INDEX_NAME).write_text(json.dumps(index))
    change_config(folder, quantization_config={})
    notes = " ".join(told(folder, tmp_path / "out"))
    for words in (
        "names 'model.layers.9.weight', but no file has that: ignored",
        "an empty quantization_config, with which transformers refuses it: taken as plain",
        "has no place for 'tower.logit_scale' and 1 other: ignored",
        f"only some experts have, are left out: '{expert}.extra'",
    ):
        assert words in notes
    assert "inv_freq" not in notes, "transformers says nothing of it"
    wanted, found = read_tensors(plain), read_tensors(tmp_path / "out")
    assert found.keys() - wanted.keys() == {*unused, "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "out" / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    verify(tmp_path / "out", folder)
    # From the scores alone, without the model's code.
    scores = PruneSettings(model=str(folder), output=tmp_path / "more", scores=tmp_path / "out", keep=5)
    prune(scores, quiet=True)
    assert read_tensors(tmp_path / "more").keys() == found.keys()


def test_layers_beyond_those_of_the_config_are_left_out(sharded: Path, tmp_path: Path) -> None:
    """People shorten models so for a first try, and transformers loads them."""
    folder, whole = tmp_path / "model", open_checkpoint(sharded).tensors
    shutil.copytree(sharded, folder)
    change_config(folder, num_hidden_layers=3)
    (note,) = [note for note in told(folder, tmp_path / "out") if "beyond" in note]
    assert "layers beyond the 3 that config.json describes are left out, as transformers ignores them: 'model." in note
    assert not any(".layers.3." in name for name in read_tensors(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    beyond = [entry.nbytes for name, entry in whole.items() if ".layers.3." in name]
    assert f"{len(beyond)} tensors of the source that transformers' model does not use were left out." in card
    assert "multi-token-prediction tensors were dropped" not in card
    assert read_footprint(str(folder)).weights.nbytes == open_checkpoint(folder).nbytes - sum(beyond)
    # Nor are they weights of the source, or layers for multi-token prediction, in the report.
    memory = read_facts(tmp_path / "out").memory
    assert isinstance(memory, Memory)
    assert memory.before is not None
    assert memory.before.weights_bytes == open_checkpoint(folder).nbytes - sum(beyond)
    assert "weights: MTP" not in {term.name for term in memory.before.terms}


@pytest.mark.parametrize("declared", ["float64", None])
def test_float64_is_computed_in_float32(declared: str | None, sharded: Path, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    change_config(folder, dtype=declared)
    notes = " ".join(told(folder, tmp_path / "out"))
    assert "float64 weights ('lm_head.weight' and 134 others) are computed in float32." in notes
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.float64}
    ours, theirs = (json.loads((each / "streamprune.json").read_text()) for each in (tmp_path / "out", plain))
    assert ours["layers"] == theirs["layers"], "the same values, the same scores"


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
