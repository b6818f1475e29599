"""Opening checkpoints: what transformers saves opens as it is; what is broken or leads astray is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from streamprune.checkpoint.index import INDEX_NAME, SINGLE_NAME, open_checkpoint
from tests.shards import DATA, GOOD, METADATA, refusal, shard, single, two_shards, write_index
from tests.tiny import FAMILIES, make_model, tiny_config

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")


@pytest.fixture(scope="module", params=["200KB", "1GB"], ids=["sharded", "single"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("saved"), tiny_config(QWEN), max_shard_size=request.param)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("sharded"), tiny_config(QWEN))


def test_opens_what_transformers_saves(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.config == json.loads((saved / "config.json").read_text())
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert checkpoint.files == shards
    seen = {}
    for name in shards:
        raw = (saved / name).read_bytes()
        with safe_open(saved / name, framework="pt") as reader:
            for tensor_name in reader.keys():  # noqa: SIM118 (not a dict)
                tensor, entry = reader.get_tensor(tensor_name), checkpoint.tensors[tensor_name]
                seen[tensor_name] = tensor
                assert (entry.name, entry.file, entry.shape) == (tensor_name, name, tuple(tensor.shape))
                assert (entry.dtype, tensor.dtype) == ("F32", torch.float32)
                assert raw[entry.begin : entry.end] == tensor.numpy().tobytes()
    assert seen.keys() == checkpoint.tensors.keys()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in seen.values())


def test_tensors_stand_in_file_order(saved: Path) -> None:
    places = [(entry.file, entry.begin) for entry in open_checkpoint(saved).tensors.values()]
    assert places == sorted(places)


def test_opening_imports_no_torch(sharded: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from streamprune.checkpoint.index import open_checkpoint;"
        "open_checkpoint(Path(sys.argv[1])).fingerprint(); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(sharded)], check=True, cwd=root, timeout=60)


def test_single_file_counts_where_there_is_also_an_index(tmp_path: Path) -> None:
    """As in transformers: what is pruned must be the model that people load."""
    folder = single(two_shards(tmp_path), shard(GOOD))
    assert open_checkpoint(folder).files == [SINGLE_NAME]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "config.json is missing"),
        (b"", "cannot be read as JSON"),
        (b'{"model_type": ', "cannot be read as JSON"),
        (b'{"name": "\xff"}', "cannot be read as JSON: 'utf-8' codec"),
        (b'{"name": "\\udfff"}', "cannot be read as JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"n":' * 100_000, "cannot be read as JSON"),
        (b'["qwen3_moe"]', "has a JSON list, not an object"),
        (b"null", "has a JSON NoneType, not an object"),
        (b'{"transformers_weights": "other.safetensors"}', "'transformers_weights'"),
    ],
)
def test_broken_config(config: bytes | None, reason: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert reason in message


def test_enormous_json_is_not_read(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    os.truncate(folder / INDEX_NAME, 2**40)
    assert "1,099,511,627,776 bytes, more than 100,000,000" in refusal(folder)


@pytest.mark.parametrize(
    "file",
    ["../two.safetensors", "x/../../two.safetensors", "..", "/etc/two.safetensors", "//two.safetensors",
     "..\\two.safetensors", "C:\\two.safetensors", "two.safetensors\0", ""],
)  # fmt: skip
def test_index_that_points_outside(file: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    shutil.copy(folder / "two.safetensors", tmp_path / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": file})
    message = refusal(folder)
    assert "puts tensor 'c' in" in message
    assert "outside the model folder" in message


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (None, "has no valid 'weight_map'"),
        (["one.safetensors"], "has no valid 'weight_map'"),
        ({"a": 1}, "has no valid 'weight_map'"),
        ({}, "lists no tensors"),
        ({"a": "pytorch_model.bin"}, "'pytorch_model.bin', which is not a safetensors file"),
        ({"a": "one.safetensors", "c": "three.safetensors"}, "1 of 2 shards are missing, first 'three.safetensors'"),
        ({"a": "one.safetensors", "c": "folder.safetensors"}, "1 of 2 shards are missing, first 'folder.safetensors'"),
        ({"a": "one.safetensors", "b": "copy.safetensors"}, "tensor 'b' is in both copy.safetensors and one.safeten"),
        ({"a": "n" * 300 + ".safetensors"}, "cannot be read: File name too long"),
    ],
)
def test_index_that_does_not_fit(weight_map: Any, reason: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "copy.safetensors").write_bytes(shard(METADATA | GOOD, DATA[:-1] + b"x"))
    (folder / "folder.safetensors").mkdir()
    write_index(folder, weight_map)
    message = refusal(folder)
    assert reason in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("weight_map", "note"),
    [
        ({"a": "one.safetensors", "d": "two.safetensors"}, f"{INDEX_NAME} names 'd', but no file has that: ignored"),
        ({"a": "two.safetensors", "b": "one.safetensors", "d": "two.safetensors", "e": ""}, "names 'd' and 1 other"),
        ({"a": "one.safetensors", "b": "copy.safetensors", "c": "two.safetensors"},
         "'a' and 1 other: in two files, with the same bytes (copy.safetensors, one.safetensors). One copy is used."),
        ({"a": "one.safetensors", "b": "./one.safetensors", "c": "two.safetensors"}, "'a' and 1 other: in two files"),
        (None, f"has both {SINGLE_NAME} and {INDEX_NAME}: {SINGLE_NAME} is read, as transformers does, and not"),
    ],
)  # fmt: skip
def test_what_transformers_does_not_mind_is_noted(weight_map: Any, note: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    shutil.copy(folder / "one.safetensors", folder / "copy.safetensors")
    if weight_map is None:
        shutil.copy(folder / "one.safetensors", folder / SINGLE_NAME)
    else:
        write_index(folder, {name: file or "one.safetensors" for name, file in weight_map.items()})
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == ({"a", "b"} if weight_map is None else {"a", "b", "c"})
    (found,) = checkpoint.notes
    assert note in found


def test_folders_without_safetensors(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "config.json is missing: the folder has the model as GGUF, for llama.cpp" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path} has the model as GGUF, for llama.cpp" in refusal(tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").unlink()
    assert f"has neither {INDEX_NAME} nor {SINGLE_NAME}" in refusal(tmp_path)
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    message = refusal(tmp_path)
    assert "pickled weights only (pytorch_model-00001-of-00002.bin, …)" in message
    assert "convert it" in message
    (tmp_path / SINGLE_NAME).write_bytes(shard({}, b""))
    assert "has no tensors" in refusal(tmp_path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever for somebody to write into it."""
    folder = two_shards(tmp_path / "model")
    for name, reason in (("two.safetensors", "1 of 2 shards"), (INDEX_NAME, "regular"), ("config.json", "regular")):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert reason in refusal(folder)
    folder = single(tmp_path / "other", b"")
    (folder / SINGLE_NAME).unlink()
    os.mkfifo(folder / SINGLE_NAME)
    assert "1 of 1 shards are missing" in refusal(folder)


def test_files_without_permission(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "tokenizer.json").touch(0)
    if os.access(folder / "tokenizer.json", os.R_OK):
        pytest.skip("root may read everything")
    assert f"{folder / 'tokenizer.json'} is a file that cannot be read" in refusal(folder)
    (folder / "two.safetensors").chmod(0)
    assert f"{folder / 'two.safetensors'} cannot be read: Permission denied" in refusal(folder)
    folder.chmod(0)
    assert str(folder) in refusal(folder)
    assert "Permission denied" in refusal(folder)
    folder.chmod(0o700)


def test_hub_cache_of_links(tmp_path: Path, sharded: Path) -> None:
    """The layout of the Hub cache: the snapshot holds nothing but links to blobs outside of it."""
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    checkpoint, direct = open_checkpoint(snapshot), open_checkpoint(sharded)
    assert checkpoint.tensors == direct.tensors
    assert checkpoint.small_files() == direct.small_files()
    assert checkpoint.fingerprint() == direct.fingerprint()


def test_shard_on_another_disk(tmp_path: Path) -> None:
    folder, elsewhere = two_shards(tmp_path / "model"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder / "two.safetensors", elsewhere / "second")
    (folder / "two.safetensors").symlink_to(elsewhere / "second")
    (tmp_path / "link").symlink_to(folder)
    assert set(open_checkpoint(folder).tensors) == set(open_checkpoint(tmp_path / "link").tensors) == {"a", "b", "c"}
    (elsewhere / "second").unlink()
    message = refusal(folder)
    assert f"first 'two.safetensors' (a link to {elsewhere / 'second'})" in message


def test_link_that_leads_in_a_circle(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to("two.safetensors")
    assert "1 of 2 shards are missing" in refusal(folder)


def test_index_must_not_reach_through_a_linked_folder(tmp_path: Path) -> None:
    folder, private = two_shards(tmp_path / "model"), two_shards(tmp_path / "private")
    (folder / "sub").mkdir()
    shutil.copy(folder / "two.safetensors", folder / "sub")
    write_index(folder, {"a": "one.safetensors", "c": "sub/two.safetensors"})
    assert open_checkpoint(folder).tensors["c"].file == "sub/two.safetensors"
    shutil.rmtree(folder / "sub")
    (folder / "sub").symlink_to(private)
    assert f"through a link to the folder {private}, outside the model folder" in refusal(folder)


def test_small_files(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    small = [
        "LICENSE", "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja", "generation_config.json", "merges.txt", "modeling_own.py", "special_tokens_map.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    others = [
        ".gitattributes", ".cache/huggingface/tokenizer.json", ".git/config", "README.md", "streamprune.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.safetensors", "params.json",
        "flax_model.msgpack", "tf_model.h5", "optimizer.pt", "scheduler.pth", "last.ckpt", "model.onnx", "logo.PNG",
        "onnx/model.onnx_data", "original/tokenizer.model", "original/params.json", "metal/model.bin",
        "__pycache__/modeling_own.pyc", "additional_chat_templates/.hidden.jinja",
        "additional_chat_templates/deeper/x.jinja",
    ]  # fmt: skip
    for name in small + others:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    os.mkfifo(folder / "pipe")
    assert list(map(str, open_checkpoint(folder).small_files())) == small


def test_small_file_that_cannot_be_copied_is_told_at_once(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "tokenizer.json").symlink_to("/nowhere/tokenizer.json")
    message = refusal(folder)
    assert f"{folder / 'tokenizer.json'} is a link to /nowhere/tokenizer.json, which cannot be read" in message


def test_fingerprint(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    first = open_checkpoint(folder).fingerprint()

    shutil.copytree(folder, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert open_checkpoint(copy).fingerprint() == first, "the same model elsewhere"
    (copy / "config.json").write_text('{\n  "model_type": "made up"\n}\n')
    (copy / "tokenizer.json").write_text("{}")
    (copy / "unlisted.safetensors").write_bytes(shard(GOOD))
    assert open_checkpoint(copy).fingerprint() == first, "white space, small files and other weights do not matter"

    other = {name: dict(entry) for name, entry in GOOD.items()}
    other["a"]["shape"] = [3, 2]
    renamed = {"x" if name == "b" else name: entry for name, entry in GOOD.items()}
    longer = GOOD | {"b": {"dtype": "U8", "shape": [6], "data_offsets": [24, 30]}}
    for change in (
        lambda: (copy / "config.json").write_text('{"model_type": "made up", "new": 1}'),
        lambda: (copy / "one.safetensors").write_bytes(shard(METADATA | other)),
        lambda: (copy / "one.safetensors").write_bytes(shard(METADATA | longer, DATA + b"x")),
        lambda: (copy / "one.safetensors").write_bytes(shard(METADATA | GOOD, DATA[:-1] + b"x")),
        lambda: (
            (copy / "one.safetensors").write_bytes(shard(METADATA | renamed)),
            write_index(copy, {"a": "one.safetensors", "x": "one.safetensors", "c": "two.safetensors"}),
        ),
    ):
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        change()
        assert open_checkpoint(copy).fingerprint() != first
