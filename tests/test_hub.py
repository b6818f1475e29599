"""Models from the Hub: what is fetched, and from which revision. The Hub is `hub_server`, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import INDEX_NAME, SINGLE_NAME, open_checkpoint
from streamprune.cli import main
from streamprune.errors import CheckpointError, SettingsError
from tests.helpers import check_bytes, tree_bytes
from tests.hub_model import (
    CODE,
    SMALL,
    UNWANTED,
    arguments,
    hub_for_this_process,
    published_model,
    refused,
    wanted,
    weights,
)
from tests.hub_server import HubServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return published_model(tmp_path_factory.mktemp("source"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        yield server


def test_end_to_end_and_again_offline(server: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    server.add("org/model", model)
    done = CliRunner().invoke(main, arguments("org/model", tmp_path, "first", "--json"))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "org/model"
    assert server.fetched() == wanted(model)

    first = tmp_path / "first"
    kept = {layer["index"]: layer["kept"] for layer in json.loads((first / "streamprune.json").read_text())["layers"]}
    source = tmp_path / "source"
    source.mkdir()
    for name in weights(model):
        (source / name).write_bytes(model[name])
    assert check_bytes(source, first, kept) > 0
    assert SMALL.items() <= tree_bytes(first).items()
    assert not (CODE | UNWANTED).keys() & tree_bytes(first).keys()
    card = (first / "README.md").read_text()
    assert "base_model: org/model" in card
    assert "license: apache-2.0" in card

    server.forget()
    # In a process of its own, for the library reads this when it is imported.
    words = [sys.executable, "-m", "streamprune", *arguments("org/model", tmp_path, "second", "--json")]
    base = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = base | {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    # The code is found beside the package, not in the folder where the command runs.
    env |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[1])}
    again = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["model"] == "org/model"
    assert not server.requests
    assert tree_bytes(tmp_path / "second") == tree_bytes(first)


def test_code_is_fetched_only_when_trusted(server: HubServer, model: dict[str, bytes]) -> None:
    server.add("org/model", model)
    folder = resolve_model("org/model")
    assert server.fetched() == wanted(model)
    assert sorted(tree_bytes(folder)) == wanted(model)
    assert sorted(map(str, open_checkpoint(folder).small_files())) == sorted({*SMALL, "generation_config.json"})
    resolve_model("org/model", trust_remote_code=True)
    assert server.fetched() == sorted({*wanted(model), *CODE})


def test_second_time_fetches_only_what_changed(server: HubServer, model: dict[str, bytes]) -> None:
    repo = server.add("org/model", model)
    first = resolve_model("org/model")
    server.forget()
    assert resolve_model("org/model") == first
    assert server.fetched() == []
    commit = repo.push(model | {"tokenizer.json": b'{"new": 1}'})
    second = resolve_model("org/model")
    assert second.name == commit
    assert server.fetched() == ["tokenizer.json"]
    assert (first / "tokenizer.json").read_bytes() == b"{}"
    assert (second / "tokenizer.json").read_bytes() == b'{"new": 1}'


def test_revision(server: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    repo = server.add("org/model", model)
    commits = {"main": repo.refs["main"]}
    for branch in ("dev", "v1.0", "refs/pr/1"):
        commits[branch] = repo.push(model | {"LICENSE": branch.encode()}, branch)
    for branch, commit in commits.items():
        for revision in (branch, commit):
            folder = resolve_model("org/model", revision)
            assert folder.name == commit
            assert (folder / "LICENSE").read_bytes() == repo.commits[commit]["LICENSE"]
    message = refused(tmp_path, "org/model", "--revision", "nope")
    assert "no branch, tag or commit 'nope'" in message


def test_single_file_model_wins_over_an_index(server: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    single = published_model(tmp_path / "single", max_shard_size="1GB")
    for name, files, index in (("org/single", single, set()), ("org/both", model | single, {INDEX_NAME})):
        server.forget()
        server.add(name, files)
        checkpoint = open_checkpoint(resolve_model(name))
        assert checkpoint.files == [SINGLE_NAME]
        assert len(checkpoint.notes) == len(index), "the index is fetched for a note only"
        assert server.fetched() == sorted({SINGLE_NAME, *wanted(model)} - {INDEX_NAME, *weights(model)} | index)


def test_file_names_are_names_and_not_patterns(server: HubServer, model: dict[str, bytes]) -> None:
    odd = {"[ab]?.txt": b"odd", "consolidated*": b"as a pattern, it is the weights again"}
    renamed = {name: name.replace("model-", "part[1]-") for name in weights(model)}
    index = json.loads(model[INDEX_NAME])
    index["weight_map"] = {tensor: renamed[file] for tensor, file in index["weight_map"].items()}
    files = {renamed.get(name, name): data for name, data in model.items()} | odd
    server.add("org/model", files | {INDEX_NAME: json.dumps(index).encode()})
    assert open_checkpoint(resolve_model("org/model")).files == sorted(renamed.values())
    assert server.fetched() == sorted(renamed.get(name, name) for name in [*wanted(model), *odd])


def test_connection_that_breaks_once_is_resumed(
    server: HubServer, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole pieces are kept; the library's own are of 10 MiB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.add("org/model", model)
    shard = max(weights(model), key=lambda name: len(model[name]))
    server.break_off[shard] = (50_000, 1)
    folder = resolve_model("org/model")
    assert (folder / shard).read_bytes() == model[shard]
    ranges = [asked.range for asked in server.requests if asked.method == "GET" and asked.file == shard]
    assert ranges == [None, "bytes=50000-"]


@pytest.mark.parametrize("name", ["org/mo del", "org/model..x", "-org/model", "a" * 97])
def test_name_that_cannot_be_a_model(server: HubServer, tmp_path: Path, name: str) -> None:
    if name.startswith("-"):
        with pytest.raises(CheckpointError, match="neither a local folder nor a valid Hub id"):
            resolve_model(name)
    else:
        assert "neither a local folder nor a valid Hub id" in refused(tmp_path, name)
    assert not server.requests


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nothing", "No folder './nothing' here"),
        ("/nothing/at/all", "No folder"),
        ("a/b/c", "No folder"),
        ("org/model/", "No folder"),
        ("models\\qwen", "No folder"),
        ("model-Q4_K_M.gguf", "No folder"),
        (" ", "No folder"),
        ("~no-such-user-here/model", "cannot be opened: Could not determine home directory"),
        ("a" * 300, "cannot be opened: File name too long"),
        ("calibration.jsonl", "calibration.jsonl is a file"),
    ],
)
def test_local_paths_never_reach_the_hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refused(tmp_path, name)
    assert not server.requests


def test_local_folder_comes_first(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")
    with pytest.raises(SettingsError, match="org/model is a local folder"):
        resolve_model("org/model", revision="main")
    assert not server.requests


def test_server_answers_ranges(server: HubServer) -> None:
    """What the stand-in promises to later tests that read headers without downloading files."""
    session = huggingface_hub.utils.get_session()
    server.add("org/model", {"a.safetensors": bytes(range(100))})
    url = f"{server.url}/org/model/resolve/main/a.safetensors"
    for header, begin, end in (
        ("bytes=0-7", 0, 8),
        ("bytes=90-", 90, 100),
        ("bytes=-5", 95, 100),
        ("bytes=8-999", 8, 100),
    ):
        answer = session.get(url, headers={"Range": header})
        assert answer.status_code == 206
        assert answer.content == bytes(range(begin, end))
        assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/100"
    assert session.get(url, headers={"Range": "bytes=100-"}).status_code == 416
    head = session.head(url)
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, "100", b"")
    assert [asked.range for asked in server.requests][:2] == ["bytes=0-7", "bytes=90-"]
