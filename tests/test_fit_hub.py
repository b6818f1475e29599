"""`fit` of a model on the Hub: headers by range requests, and nothing of the weights. The Hub is `hub_server`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download

from streamprune.checkpoint.index import INDEX_NAME, SINGLE_NAME
from streamprune.cli import main
from tests.helpers import tree_bytes
from tests.hub_model import CODE, QWEN, SMALL, UNWANTED, hub_for_this_process
from tests.hub_server import HubServer
from tests.tiny import FAMILIES, Family, make_model, tiny_config

#: Wide enough for files that are much larger than the 100 kB which the library reads of each at first.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "vocab_size": 2048}
Files = dict[str, bytes]


def files_of(folder: Path, family: Family, **save: Any) -> Files:
    wide = replace(family, sizes=family.sizes | WIDE)
    return tree_bytes(make_model(folder, tiny_config(wide), **save)) | SMALL | CODE | UNWANTED


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(tmp_path_factory.mktemp("sharded"), QWEN, max_shard_size="2MB")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(tmp_path_factory.mktemp("single"), QWEN, max_shard_size="1GB")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        yield server


def fit(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["fit", *arguments, "--budget-gib", "24", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["fit", *arguments, "--budget-gib", "24"])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def local(files: Files, folder: Path) -> dict[str, Any]:
    """The answer for the same files in a local folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return fit(str(folder)) | {"model": "org/model"}


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and "snapshots" in path.parts}


def weight_bytes_sent(server: HubServer) -> dict[str, int]:
    sent: dict[str, int] = {}
    for asked in server.requests:
        if asked.file is not None and not asked.file.endswith(".json"):
            assert asked.range is not None or asked.method == "HEAD", asked
            sent[asked.file] = sent.get(asked.file, 0) + asked.sent
    return sent


@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_only_headers_are_transferred(
    layout: str, request: pytest.FixtureRequest, server: HubServer, tmp_path: Path
) -> None:
    files: Files = request.getfixturevalue(layout)
    server.add("org/model", files)
    answer = fit("org/model")
    weights = {name for name in files if name.startswith("model") and name.endswith(".safetensors")}
    index = {INDEX_NAME} if layout == "sharded" else set()
    assert set(server.fetched()) == {"config.json", *index, *weights}
    sent = weight_bytes_sent(server)
    assert sent.keys() == weights
    for name, count in sent.items():
        assert count <= 100_001 < len(files[name]) // 3, name
    assert cached(tmp_path) == {"config.json", *index}
    assert answer == local(files, tmp_path / "local")


@pytest.mark.parametrize("goal", [["--keep", "4"], ["--budget-gib", "0.5"]], ids=["keep", "budget"])
def test_a_dry_run_downloads_no_weights(goal: list[str], sharded: Files, server: HubServer, tmp_path: Path) -> None:
    server.add("org/model", sharded)
    out = ["-o", str(tmp_path / "out"), "--context", "128", "--dry-run", "--json"]
    result = CliRunner().invoke(main, ["run", "org/model", *goal, *out])
    # Nothing fits half a GiB, of which the CUDA context takes all: also that is known from the headers alone.
    assert result.exit_code == (0 if goal[0] == "--keep" else 3), result.output
    if goal[0] == "--keep":
        assert json.loads(result.stdout)["experts_per_layer"] == 4
    weights = {name for name in sharded if name.startswith("model") and name.endswith(".safetensors")}
    assert weight_bytes_sent(server).keys() == weights
    assert cached(tmp_path) == {"config.json", INDEX_NAME}
    assert not (tmp_path / "out").exists()


def test_model_that_names_do_not_tell(server: HubServer, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.id == "granitemoe")
    files = files_of(tmp_path / "source", family, max_shard_size="2MB")
    server.add("org/model", files)
    assert fit("org/model") == local(files, tmp_path / "local")
    assert cached(tmp_path) == {"config.json", INDEX_NAME}


def test_revision(server: HubServer, sharded: Files, single: Files, tmp_path: Path) -> None:
    repo = server.add("org/model", sharded)
    other = {name: data for name, data in single.items() if name != "config.json"}
    config = json.loads(single["config.json"]) | {"max_position_embeddings": 77}
    commit = repo.push({**other, "config.json": json.dumps(config).encode()}, branch="other")
    assert fit("org/model")["max_context"] == 256
    assert fit("org/model", "--revision", "other")["max_context"] == 77
    assert fit("org/model", "--revision", commit)["max_context"] == 77
    assert "third" in refused("org/model", "--revision", "third")


def test_branch_that_moves_in_between(server: HubServer, sharded: Files, single: Files) -> None:
    """Config and headers are of one commit, whatever is pushed while they are read."""
    repo = server.add("org/model", sharded)
    expected = fit("org/model")
    repo = server.add("org/second", sharded)
    config = json.loads(single["config.json"]) | {"max_position_embeddings": 77}

    def push(path: str) -> None:
        if path.endswith("config.json") and len(repo.commits) == 1:
            repo.push({**single, "config.json": json.dumps(config).encode()})

    server.before = push
    assert fit("org/second") | {"model": "org/model"} == expected


def test_no_access(server: HubServer, sharded: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/model", sharded, gated=True, members={"hf_friend"})
    assert "log in with `hf auth login`" in refused("org/model")
    assert "org/missing" in refused("org/missing")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert "org/model" in refused("org/model")
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    assert fit("org/model")["fits"]


def test_offline(server: HubServer, sharded: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/model", sharded)
    expected = fit("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.forget()
    # Headers are not kept: what they said is not known without a connection.
    message = refused("org/model")
    assert "HF_HUB_OFFLINE" in message
    assert "is not in the Hub cache" in refused("org/unknown")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.forget()
    assert fit("org/model") == expected
    assert not server.requests


def test_complete_copy_is_not_asked_for_again(server: HubServer, sharded: Files) -> None:
    server.add("org/model", sharded)
    snapshot_download("org/model")
    server.forget()
    assert fit("org/model")["fits"]
    assert not weight_bytes_sent(server)


def test_hub_out_of_order(server: HubServer, sharded: Files) -> None:
    server.add("org/model", sharded)
    server.outage = 503
    assert "org/model" in refused("org/model")


def test_pickles_and_unfinished_uploads(server: HubServer, sharded: Files) -> None:
    weights = [name for name in sharded if name.startswith("model-") and name.endswith(".safetensors")]
    kept = {name: data for name, data in sharded.items() if name not in (*weights, INDEX_NAME)}
    server.add("org/pickled", kept)
    assert "only pickled weights ('pytorch_model.bin')" in refused("org/pickled")
    server.add("org/config", {"config.json": sharded["config.json"]})
    assert f"neither {INDEX_NAME} nor {SINGLE_NAME}" in refused("org/config")
    server.add("org/partial", {name: data for name, data in sharded.items() if name != weights[0]})
    assert "is incomplete on the Hub" in refused("org/partial")
    assert not [asked for asked in server.requests if asked.file and asked.file.endswith(".bin")]


def header(value: object) -> bytes:
    encoded = json.dumps(value).encode()
    return len(encoded).to_bytes(8, "little") + encoded


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changed


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 200,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
        (50).to_bytes(8, "little") + b"{" * 50,
        header([1, 2]),
        header({"a": 3}),
        header({"a": entry(dtype="F13")}) + bytes(64),
        header({"a": entry(dtype=["F32"])}) + bytes(64),
        header({"a": entry(data_offsets=[0, 10**15])}) + bytes(64),
        header({"a": entry(data_offsets=[64, 0])}) + bytes(64),
        header({"a": entry(data_offsets=[0])}) + bytes(64),
        header({"a": entry(shape=[-4, -4])}) + bytes(64),
        header({"a": entry(shape="4")}) + bytes(64),
        header({}),
    ],
    ids=lambda data: repr(data[8:60]),
)
def test_damaged_header(data: bytes, server: HubServer, single: Files) -> None:
    server.add("org/model", {**single, SINGLE_NAME: data})
    message = refused("org/model")
    assert "org/model" in message
    # Of an empty file no range can be served.
    assert any(words in message for words in ("damaged", "has no tensors", "HTTP status 416")), message
    assert len(message.splitlines()) == 1


def test_index_and_headers_that_disagree(server: HubServer, sharded: Files) -> None:
    index = json.loads(sharded[INDEX_NAME])
    index["weight_map"]["model.more.weight"] = next(iter(index["weight_map"].values()))
    server.add("org/model", {**sharded, INDEX_NAME: json.dumps(index).encode()})
    result = CliRunner().invoke(main, ["fit", "org/model", "--budget-gib", "24"])
    assert result.exit_code == 0, result.output
    assert f"{INDEX_NAME} names 'model.more.weight', but no file has that: ignored" in result.stdout


def test_subprocess(server: HubServer, sharded: Files, tmp_path: Path) -> None:
    """The whole way, through HF_ENDPOINT, in a process of its own."""
    server.add("org/model", sharded)
    base = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    code = (
        "import sys; sys.argv = ['streamprune', 'fit', 'org/model', '--budget-gib', '24', '--json']\n"
        "from streamprune.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1],
        env=base | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == local(sharded, tmp_path / "local")
    assert all(count <= 100_001 for count in weight_bytes_sent(server).values())
