"""Input made to do harm: each ends in one message that names the file and the place, in time and in bounded memory.

What indexes, headers and configs of that kind meet is mostly in test_checkpoint, test_shard and test_fit_cli;
calibration is in test_hostile_calibration, what is random in test_fuzz.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import streamprune
from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.errors import CheckpointError, ResumeError, StreampruneError
from streamprune.files.durable import read_record
from streamprune.pipeline.run import resume
from streamprune.saliency.scores import FIELDS, pack, unpack, unpack_channels
from streamprune.work.saved_states import DATA_NAME, INDEX_NAME, BatchState, open_states, save_states
from tests.fuzz_targets import Place, write_signed
from tests.fuzzing import as_json, resident_bytes
from tests.helpers import prepare_whole, tree_bytes
from tests.shards import shard
from tests.tiny import FAMILIES, make_model, tiny_config

PACKAGE = Path(streamprune.__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tiny_config(FAMILIES[0]), max_shard_size="1GB")


def test_nothing_unpickles_or_evaluates() -> None:
    """No module of the package imports what unpickles, or calls what runs code that it read."""
    forbidden_modules = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    forbidden_calls = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            elif isinstance(node, ast.Call) and "allow_pickle=False" not in map(ast.unparse, node.keywords):
                names = [ast.unparse(node.func)]
            found += [(path.name, name) for name in names if name in forbidden_modules | forbidden_calls]
    assert found == []


# Config.json


ABSURD = [
    {"num_hidden_layers": 10**9},
    {"num_experts": 10**9, "num_local_experts": 10**9},
    {"num_local_experts": 10**9},
    {"hidden_size": 10**9},
    {"hidden_size": 2**62},
    {"vocab_size": 10**12},
    {"vocab_size": 2**62},
    {"intermediate_size": 10**18, "moe_intermediate_size": 10**18},
    {"num_attention_heads": 10**9},
    {"num_key_value_heads": 10**9},
    {"head_dim": 10**15},
    {"num_labels": 10**10},
    {"max_position_embeddings": 10**18},
    {"layer_types": ["full_attention"] * 1_000_000, "num_hidden_layers": 5},
    {"num_nextn_predict_layers": 10**9},
    {"mlp_only_layers": list(range(1_000_000))},
]


@pytest.mark.parametrize("absurd", ABSURD, ids=lambda value: str(value)[:50])
def test_run_builds_no_giant(absurd: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """As `run` meets it: with the weights of a sound model, that no config of such numbers describes."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | absurd))
    started, resident = time.monotonic(), resident_bytes()
    settings = RunSettings(model=str(folder), output=tmp_path / "out", keep=5)
    # A limit on positions is only stated: nothing is built by it.
    expected = nullcontext() if "max_position_embeddings" in absurd else pytest.raises(StreampruneError)
    with expected as caught:
        prepare_whole(settings)
    assert caught is None or ("config.json" in str(caught.value) and len(str(caught.value)) < 1000), caught
    assert time.monotonic() - started < 20
    assert resident_bytes() - resident < 2**30


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"text_config":' * 100_000, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"\xff{}",
     b'{"model_type": "\\ud800"}', b'{"model_type": "qwen3_moe\xed\xa0\x80"}', b"{}\0"],
    ids=["brackets", "objects", "closed", "bytes", "surrogate", "raw surrogate", "NUL"],
)  # fmt: skip
def test_configs_that_are_no_json(text: bytes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    for command in (["run", str(tmp_path), "-o", str(tmp_path.parent / "out"), "--keep", "5"],
                    ["fit", str(tmp_path), "--budget-gib", "8"]):  # fmt: skip
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {tmp_path / 'config.json'} cannot be read as JSON: ")
        assert len(result.stderr) < 1000


def test_nesting_that_json_allows(model: Path, tmp_path: Path) -> None:
    inner: Any = 1
    for _ in range(60):
        inner = [inner]
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"deep": inner}))
    with pytest.raises(CheckpointError, match=r"config\.json names parts nested more than 50 deep"):
        prepare_whole(RunSettings(model=str(tmp_path), output=tmp_path.parent / "out", keep=5))


# The work folder of somebody else


def test_saved_states_that_claim_more_than_there_is(tmp_path: Path) -> None:
    save_states(tmp_path / "1", 1, lambda _: BatchState(torch.ones(2, 3)), {"block": 0})
    index = read_record(tmp_path / "1" / INDEX_NAME)
    (size,) = {(tmp_path / "1" / DATA_NAME).stat().st_size}
    (entry,), data = index["states"], (tmp_path / "1" / DATA_NAME).read_bytes()
    assert entry["nbytes"] == size
    for nbytes in (size + 1, 2**50, 24, 0, -1, 1.5, None):
        write_signed(tmp_path / "1" / INDEX_NAME, index | {"states": [entry | {"nbytes": nbytes}]})
        assert open_states(tmp_path / "1") is None, nbytes
    for missing in index:
        write_signed(tmp_path / "1" / INDEX_NAME, {name: value for name, value in index.items() if name != missing})
        assert open_states(tmp_path / "1") is None, missing
    shapes: list[Any] = [[2**50], [0, 2**62, 2**62], [-2, -3], [2, 3.0], [2, 4], [1] * 5000 + [7], "ab", None]
    headers = [{"0": {"dtype": "F32", "shape": shape, "data_offsets": [0, 24]}} for shape in shapes]
    headers += [{"0": {"dtype": "F32", "shape": [2, 3], "data_offsets": ends}} for ends in ([-24, 0], [24, 48], [0])]
    headers += [{"0": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 24]}}, {"1": headers[0]["0"]}, {}]
    for header in headers:
        _load_forged(tmp_path, index, shard(as_json(header), data[-24:]))
    empty = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    _load_forged(tmp_path, index, shard({"0": empty}, b""))
    deep: Any = {"value": 1}
    for _ in range(400):
        deep = {"list": [deep]}
    structures: list[Any] = [
        {"tensor": 1}, {"tensor": -1}, {"tensor": None}, {"value": []}, {"list": 3}, {"dict": [[{"list": []}, {}]]},
        {"dict": [[1]]}, {"set": []}, [], None, {"list": [{"tuple": [5]}]}, {},
    ]  # fmt: skip
    for structure in structures:
        _load_forged(tmp_path, index, data, output=structure)
        _load_forged(tmp_path, index, data, carried=structure)
    _load_forged(tmp_path, index, data, carried=deep)
    write_signed(tmp_path / "1" / INDEX_NAME, index)
    (tmp_path / "1" / DATA_NAME).write_bytes(data)
    honest = open_states(tmp_path / "1")
    assert honest is not None
    assert torch.equal(honest.load(0).output, torch.ones(2, 3))


def _load_forged(folder: Path, index: dict[str, Any], data: bytes, **structure: Any) -> None:
    """States with these bytes and this structure, with every checksum right, are refused when they are loaded."""
    (folder / "1" / DATA_NAME).write_bytes(data)
    entry = index["states"][0] | {"nbytes": len(data)} | structure
    forged = {"states": [entry], "sha256": hashlib.sha256(data).hexdigest()}
    write_signed(folder / "1" / INDEX_NAME, index | forged)
    saved = open_states(folder / "1")
    assert saved is not None
    with pytest.raises(ValueError, match="no hidden states"):
        saved.load(0)


def test_states_of_another_model_are_told(place: Place) -> None:
    """Whole by every checksum, and of a shape that the model's blocks do not take."""
    work = place.work_with("cursor.json", {"generations": [9]})
    states = open_states(max((place.work / "states").iterdir()))
    assert states is not None
    save_states(work / "states" / "9", len(states), lambda _: BatchState(torch.ones(4, 24, 3)), states.facts)
    with pytest.raises(ResumeError, match=r"hidden states saved in .*out\.work do not fit this model.*--from-layer 0"):
        resume(work, quiet=True)


@pytest.mark.parametrize(
    "change",
    [
        {"kept": [0, 1, 2, 3, 4]}, {"kept": [7, 6, 5, 4, 3]}, {"kept": []}, {"kept": ["0"] * 5}, {"kept": None},
        {"result": None}, {"result": []}, {"block": 3}, {"block": "1"}, {"statistics": None}, {"statistics": ""},
        {"statistics": "AAAA"}, {"statistics": "?" * 768}, {"tokens": -1.0}, {"tokens": 1.5}, {"tokens": 1e300},
        {"norms": math.nan}, {"norms": -1.0}, {"cosines": math.inf}, {"channels": None}, {"channels": "AAAA"},
        {"channels": "?" * 1368}, {"channels": [1.0]}, {"energy": math.nan}, {"energy": -1.0}, {"energy": math.inf},
    ],
    ids=str,
)  # fmt: skip
def test_a_block_that_no_scoring_gave_is_done_again(change: dict[str, Any], place: Place) -> None:
    record = json.loads(json.dumps(place.records["layers/00001.json"]))
    ((name, value),) = change.items()
    if name in FIELDS:
        values = unpack(record["result"]["statistics"], 1, 8)
        values[list(FIELDS).index(name), 0, 3] = value
        name, value = "statistics", pack(values)
    if name == "energy":
        energies = unpack_channels(record["result"]["channels"], (1, 8, 32), "f4")
        energies[0, 3, 5] = value
        name, value = "channels", pack(energies)
    # (`channels` in the record itself are those that stay.)
    (record["result"] if name in record["result"] else record)[name] = value
    work = place.work_with("layers/00001.json", record)
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    resume(work, quiet=True)
    report = place.report
    assert json.loads((place.folder / "out" / "streamprune.json").read_text())["layers"] == report["layers"]


def test_tokens_that_the_model_does_not_know(place: Place) -> None:
    for tokens in ([[5, 256]], [[-1]], [[]], [], [[1.5]], [["1"]], {"a": 1}, [[2**70]], [[True, 3]]):
        work = place.work_with("tokens.json", tokens)
        with pytest.raises(ResumeError, match=r"out\.work"):
            resume(work, quiet=True)


def test_a_file_alone_does_not_make_code_run(place: Place) -> None:
    run = place.records["run.json"]
    trusting = run | {"command": run["command"] | {"trust_remote_code": True}}
    work = place.work_with("run.json", trusting)
    result = CliRunner().invoke(main, ["resume", str(work)])
    assert result.exit_code == 1
    assert "a file alone must not enable a model's code" in result.stderr
    assert tree_bytes(work).keys() == tree_bytes(place.work).keys(), "nothing was touched"


def test_pipes_in_a_work_folder_are_not_waited_for(place: Place) -> None:
    work = place.work_with("run.json", place.records["run.json"])
    for name in ("run.json", "cursor.json", "layers/00000.json"):
        (work / name).unlink()
        os.mkfifo(work / name)
    result = CliRunner().invoke(main, ["status", str(work), "--json"])
    assert result.exit_code == 0, result.output
    assert 0 in json.loads(result.stdout)["left"]
