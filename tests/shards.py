"""Safetensors files and checkpoints made by hand, sound and broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamprune.checkpoint.index import INDEX_NAME, SINGLE_NAME, open_checkpoint
from streamprune.errors import CheckpointError

#: A header of two tensors, and the bytes that belong to it.
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
}
DATA = bytes(range(29))
METADATA = {"__metadata__": {"format": "pt"}}


def shard(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """The bytes of a safetensors file; `header` as JSON or as bytes, with an honest or another stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def single(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SINGLE_NAME).write_bytes(content)
    return folder


def two_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text('{"model_type": "made up"}')
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    (folder / "one.safetensors").write_bytes(shard(METADATA | GOOD))
    (folder / "two.safetensors").write_bytes(shard({"c": GOOD["a"]}, DATA[:24]))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 53}, "weight_map": weight_map}))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)
