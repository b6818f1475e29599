"""Layers for multi-token prediction (MTP) keep what the last layer with experts keeps, or it is said that they go."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamprune.config import PruneSettings
from streamprune.errors import VerifyError
from streamprune.fit.estimate import Fit
from streamprune.output.verify import verify
from streamprune.pipeline.prune import prune as prune_by_scores
from streamprune.planning.counts import ExpertCounts
from streamprune.planning.forms import read_forms
from streamprune.targets import MTP, PruningTarget, ServingSpec, Storage
from tests.helpers import known_family, prune, read_tensors, tree_bytes
from tests.mtp import COUNTS, add_mtp, check_mtp
from tests.quantized import make_quantized
from tests.test_run import invoke
from tests.tiny import make_model, tiny_config, write_token_ids

GIB = 2**30
STYLES = [("deepseek_v3", "further"), ("glm4_moe", "further"), ("qwen3_next", "mtp"), ("qwen3_5_moe", "mtp")]


def make_source(folder: Path, family: str = "glm4_moe", style: str = "further") -> tuple[Path, str]:
    """A tiny model with an MTP layer, and the path of that."""
    source = make_model(folder / "model", tiny_config(known_family(family)))
    return source, add_mtp(source, style)


def text_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    part: dict[str, Any] = config.get("text_config", config)
    return part


@pytest.mark.parametrize(("family", "style"), STYLES)
def test_it_keeps_what_the_last_layer_keeps(tmp_path: Path, family: str, style: str) -> None:
    source, path = make_source(tmp_path, family, style)
    result = prune(source, tmp_path / "out", keep=6)
    check_mtp(tmp_path / "out", path)
    assert text_config(tmp_path / "out")[COUNTS[style]] == 1
    record = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert record["mtp"] == {"tensors": result.summary["mtp_tensors"], "experts_of": 3}
    assert record["dropped"] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and what `run` makes of it."""
    folder = tmp_path_factory.mktemp("made")
    make_source(folder)
    prune(folder / "model", folder / "out", keep=6)
    return folder


def test_budgets_and_verification_count_it(made: Path) -> None:
    footprint = read_forms(str(made / "model"), None, False, Storage())
    nbytes = {keep: Fit(footprint, ServingSpec(keep=6, mtp=keep), GIB).weights_bytes for keep in MTP}
    summary = json.loads((made / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert nbytes["keep"] == summary["total_size"]
    assert nbytes["drop"] == summary["total_size"] - sum(
        tensor.nbytes for name, tensor in read_tensors(made / "out").items() if name.startswith("model.layers.4.")
    )
    assert "that layer 3 keeps by number" in (made / "out" / "README.md").read_text()
    assert verify(made / "out", made / "model").tensors == len(read_tensors(made / "out"))


def test_a_changed_byte_of_it_is_found(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    name = "model.layers.4.mlp.experts.0.up_proj.weight"
    file = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(tmp_path / "out" / file)
    tensors[name][3, 3] += 1
    save_file(tensors, tmp_path / "out" / file, {"format": "pt"})
    with pytest.raises(VerifyError, match=re.escape(name)):
        verify(tmp_path / "out", made / "model")


def test_it_is_pruned_again_with_the_model(made: Path, tmp_path: Path) -> None:
    prune(made / "out", tmp_path / "out", keep=4)
    check_mtp(tmp_path / "out", "model.layers.4")


@pytest.mark.parametrize("mtp", MTP)
def test_prune_does_what_run_does(made: Path, tmp_path: Path, mtp: str) -> None:
    text = (str(made / "calibration.jsonl"),)
    prune(made / "model", tmp_path / "run", keep=5, mtp=mtp, calibration=text)
    settings = PruneSettings(
        model=str(made / "model"), output=tmp_path / "prune", scores=made / "out", keep=5, mtp=mtp, verify=True
    )
    prune_by_scores(settings, quiet=True)
    assert tree_bytes(tmp_path / "run") == tree_bytes(tmp_path / "prune")
    names = {name for name in read_tensors(tmp_path / "run") if ".layers.4." in name}
    assert bool(names) == (mtp == "keep")
    assert text_config(tmp_path / "run")["num_nextn_predict_layers"] == (1 if mtp == "keep" else 0)
    assert "--mtp drop" in (tmp_path / "run" / "README.md").read_text() or mtp == "keep"
    verify(tmp_path / "run", made / "model")


def test_narrower_experts(tmp_path: Path) -> None:
    source, path = make_source(tmp_path)
    prune(source, tmp_path / "out", keep=5, width=16)
    check_mtp(tmp_path / "out", path)
    verify(tmp_path / "out", source)


def test_different_numbers_by_layer(tmp_path: Path) -> None:
    """It has as many as the last layer."""
    source, path = make_source(tmp_path)
    (tmp_path / "schedule.json").write_text(json.dumps([7, 6, 4]))
    prune(source, tmp_path / "out", keep=None, ratio=None, schedule=str(tmp_path / "schedule.json"))
    check_mtp(tmp_path / "out", path)
    assert read_tensors(tmp_path / "out")[f"{path}.mlp.gate.weight"].shape[0] == 4
    counts = ExpertCounts(17, 3, False, {1: 7, 2: 6, 3: 4})
    planned = counts.estimate(PruningTarget(), read_forms(str(source), None, False, Storage()))
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert planned.weights_bytes == written["total_size"]


def test_a_quantized_source(tmp_path: Path) -> None:
    """What lists name of it is renumbered, and it is decoded as the rest."""
    made = make_quantized(tmp_path, "fp8", "glm4_moe")
    path = add_mtp(made.source)
    config = json.loads((made.source / "config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    listed += [f"{path}.mlp.experts.{expert}.lora" for expert in range(8)]
    (made.source / "config.json").write_text(json.dumps(config))
    prune(made.source, tmp_path / "out", keep=5)
    check_mtp(tmp_path / "out", path, count=3)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = [name for name in written["modules_to_not_convert"] if name.startswith(f"{path}.mlp.experts")]
    assert names == [f"{path}.mlp.experts.{expert}.lora" for expert in range(5)]
    verify(tmp_path / "out", made.source)
    prune(made.source, tmp_path / "decoded", keep=5, weights="bf16")
    check_mtp(tmp_path / "decoded", path, count=3)


@pytest.mark.parametrize(("family", "style"), [STYLES[0], ("qwen3_5_moe_text", "mtp")])
def test_a_quantized_result_leaves_it_plain(tmp_path: Path, family: str, style: str) -> None:
    """And says so in the list that engines read, also where one tensor has all experts."""
    source, path = make_source(tmp_path, family, style)
    result = prune(source, tmp_path / "out", keep=6, weights="fp8-dynamic")
    own = {name: each for name, each in read_tensors(tmp_path / "out").items() if name.startswith(f"{path}.")}
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    ignored = text_ignored(tmp_path / "out")
    matrices = [name.removesuffix(".weight") for name, each in own.items() if each.dim() == 2]
    assert matrices
    assert [name for name in matrices if not is_ignored(name, ignored)] == []
    # As engines name the experts of one tensor.
    assert is_ignored(f"{path}.mlp.experts.0.gate_proj", ignored)
    assert not is_ignored("model.layers.3.mlp.experts.0.gate_proj", ignored)
    assert len(ignored) < 60
    assert verify(tmp_path / "out", source).tensors == len(read_tensors(tmp_path / "out"))
    found = Fit(
        read_forms(str(source), None, False, Storage("fp8-dynamic")), ServingSpec(keep=6, weights="fp8-dynamic"), 1
    )
    assert found.weights_bytes == result.summary["output_bytes"]


def text_ignored(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    ignored: list[str] = config["quantization_config"]["ignore"]
    return ignored


def is_ignored(name: str, ignored: list[str]) -> bool:
    """As compressed-tensors decides it."""
    return any(re.match(each[3:], name) if each.startswith("re:") else each == name for each in ignored)


def test_what_it_cannot_cut_is_dropped_and_said(tmp_path: Path) -> None:
    """One expert fewer than the layers have."""
    source, path = make_source(tmp_path)
    tensors = load_file(source / "mtp.safetensors")
    missing = [name for name in tensors if name.startswith(f"{path}.mlp.experts.7.")]
    save_file({name: each for name, each in tensors.items() if name not in missing}, source / "mtp.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in missing}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    text = tmp_path / "text.jsonl"
    result = invoke("run", source, "-o", tmp_path / "out", "--keep", 5, "--calibration", write_token_ids(text))
    assert result.exit_code == 0
    said = "multi-token-prediction (MTP) tensors are dropped (The checkpoint has only 7 of the 8 experts of"
    assert result.stderr.count(said) == 1
    assert not any(name.startswith(path) for name in read_tensors(tmp_path / "out"))
    assert text_config(tmp_path / "out")["num_nextn_predict_layers"] == 0
    footprint = read_forms(str(source), None, False, Storage())
    nbytes = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert Fit(footprint, ServingSpec(keep=5), GIB).weights_bytes == nbytes
