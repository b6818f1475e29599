"""What the Hub does not give, or should not have given: one message, status 1, and nothing large fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from streamprune.checkpoint import hub as hub_module
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import INDEX_NAME, SINGLE_NAME, open_checkpoint
from tests.hub_model import hub_for_this_process, published_model, refused, weights
from tests.hub_server import HubServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return published_model(tmp_path_factory.mktemp("source"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        yield server


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"pytorch_model.bin": b"x" * 9999}, "only pickled weights ('pytorch_model.bin')"),
        ({"model-q8.gguf": b"x" * 9999}, "only GGUF files ('model-q8.gguf'), which are for llama.cpp"),
        ({}, f"neither {INDEX_NAME} nor {SINGLE_NAME}."),
        (
            {INDEX_NAME: b'{"weight_map": {"a": "gone.safetensors"}}'},
            "1 of 2 files are missing, first 'gone.safetensors'",
        ),
    ],
    ids=["pickled", "gguf", "nothing", "shard missing"],
)
def test_no_weights_that_can_be_read(server: HubServer, tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    server.add("org/model", {"config.json": b"{}", "tokenizer.json": b"{}", **files})
    message = refused(tmp_path, "org/model")
    assert reason in message
    assert message.startswith("Error: org/model ")
    assert set(server.fetched()) <= {INDEX_NAME}


def test_without_config(server: HubServer, tmp_path: Path) -> None:
    server.add("org/model", {SINGLE_NAME: b"x" * 9999})
    assert "first 'config.json'" in refused(tmp_path, "org/model")
    assert server.fetched() == []


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b'{"weight_map": {', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b'["weight_map"]', "a JSON list, not an object"),
        (b"{}", "no valid 'weight_map'"),
        (b'{"weight_map": ["x.safetensors"]}', "no valid 'weight_map'"),
        (b'{"weight_map": {"a": 1}}', "no valid 'weight_map'"),
        (b'{"weight_map": {}}', "lists no tensors"),
        (b'{"weight_map": {"a": "../../x.safetensors"}}', "'../../x.safetensors', outside the model folder"),
        (b'{"weight_map": {"a": "/etc/x.safetensors"}}', "'/etc/x.safetensors', outside the model folder"),
        (b'{"weight_map": {"a": "..\\\\x.safetensors"}}', "outside the model folder"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "'pytorch_model.bin', which is not a safetensors file"),
    ],
)
def test_index_of_a_stranger(server: HubServer, tmp_path: Path, index: bytes, reason: str) -> None:
    server.add("org/model", {"config.json": b"{}", "pytorch_model.bin": b"pickle", INDEX_NAME: index})
    assert reason in refused(tmp_path, "org/model")
    assert server.fetched() == [INDEX_NAME]


@pytest.mark.parametrize("token", [None, "somebody"])
def test_unknown_model(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refused(tmp_path, "org/nobody")
    assert f"neither a folder 'org/nobody' here nor a public model of that name at {server.url}" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("sharded", [True, False])
def test_gated_model(
    server: HubServer, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    files = model if sharded else {"config.json": model["config.json"], SINGLE_NAME: b"x"}
    server.add("org/model", files, gated=True, members={"member"})
    for token in (None, "stranger"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        message = refused(tmp_path, "org/model")
        assert f"org/model is gated. Ask for access at {server.url}/org/model" in message
    assert all(asked.status in (401, 403) for asked in server.requests if asked.file or "/resolve/" in asked.path)
    monkeypatch.setenv("HF_TOKEN", "member")
    assert (resolve_model("org/model") / "config.json").read_bytes() == model["config.json"]


def test_hub_out_of_order(server: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    server.add("org/model", model)
    server.outage = 503
    message = refused(tmp_path, "org/model")
    assert (
        f"{server.url} answered the request for org/model with HTTP status 503 (The stand-in is out of order)"
        in message
    )


@pytest.mark.parametrize("revision", ["main", "commit"])
def test_hub_fails_in_between(server: HubServer, model: dict[str, bytes], tmp_path: Path, revision: str) -> None:
    repo = server.add("org/model", model)

    def fail_after_index(path: str) -> None:
        if INDEX_NAME in server.fetched():
            server.outage = 500

    server.before = fail_after_index
    message = refused(tmp_path, "org/model", "--revision", repo.refs["main"] if revision == "commit" else "main")
    # Some versions of the library fall back on the folder that holds nothing but the index.
    assert "for org/model with HTTP status 500" in message or "is incomplete: 1 of 1 files are missing" in message
    server.before, server.outage = None, None
    assert open_checkpoint(resolve_model("org/model")).files == weights(model)


def test_branch_that_moves_during_the_download(server: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    repo = server.add("org/model", model)

    def move(path: str) -> None:
        if path.endswith(INDEX_NAME) and repo.refs["main"] == old:
            repo.push(model | {"LICENSE": b"new"})

    old = repo.refs["main"]
    server.before = move
    message = refused(tmp_path, "org/model")
    assert f"changed on the Hub during the download, from commit {old} to {repo.refs['main']}" in message
    assert resolve_model("org/model").name == repo.refs["main"]


def test_hub_cannot_be_reached(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as other:
        url = other.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    message = refused(tmp_path, "org/model")
    assert f"There is no folder 'org/model' here, and fetching org/model from {url} failed" in message
    assert "Connection refused" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_hub_that_does_not_answer(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.2)
    server.silent = True
    message = refused(tmp_path, "org/model")
    assert f"fetching org/model from {server.url} failed: timed out" in message


def test_connection_that_keeps_breaking(server: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    server.add("org/model", model)
    shard = weights(model)[-1]
    server.break_off[shard] = (1000, 99)
    message = refused(tmp_path, "org/model")
    assert f"fetching org/model from {server.url} failed" in message
    assert "downloaded files are kept" in message
    sent = [asked.sent for asked in server.requests if asked.method == "GET" and asked.file == shard]
    assert set(sent) == {1000}
    arrived = set(server.fetched()) - {shard}
    server.break_off.clear()
    server.forget()
    folder = resolve_model("org/model")
    assert (folder / shard).read_bytes() == model[shard]
    assert not arrived & set(server.fetched())


def test_offline_without_a_copy(
    server: HubServer, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add("org/model", model)
    commit = repo.push(model | {"LICENSE": b"dev"}, "dev")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "org/model (revision main) is not in the Hub cache" in refused(tmp_path, "org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = resolve_model("org/model", "dev")
    server.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model", "dev") == resolve_model("org/model", commit) == folder
    assert "(revision main) is not in the Hub cache" in refused(tmp_path, "org/model")
    assert not server.requests


@pytest.mark.parametrize("lost", ["tokenizer.json", "weights", INDEX_NAME, "config.json"])
def test_offline_with_half_a_copy(
    server: HubServer, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    server.add("org/model", model)
    lost = weights(model)[1] if lost == "weights" else lost
    (resolve_model("org/model") / lost).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(tmp_path, "org/model")
    assert lost in message or (lost == "config.json" and "not in the Hub cache" in message)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.forget()
    resolve_model("org/model")
    assert server.fetched() == []  # It is still among the cache's blobs.


def test_what_the_config_rules_out_costs_no_download(
    server: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    quantized = json.loads(model["config.json"]) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    server.add("org/quantized", model | {"config.json": json.dumps(quantized).encode()})
    server.add("org/model", model)
    assert "is quantized (bitsandbytes)" in refused(tmp_path, "org/quantized")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("x")
    assert "is not empty" in refused(tmp_path, "org/model", "-o", str(taken))
    assert not any(name.endswith(".safetensors") for name in server.fetched())
