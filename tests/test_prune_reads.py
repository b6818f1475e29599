"""What pruning from scores reads of a model: of experts that go not a byte."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from streamprune.checkpoint.index import open_checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry
from tests.test_prune import Model


class Recorded:
    """A file of the model that is open: what is read of it through Python's stream is noted."""

    def __init__(self, stream: Any, reads: list[tuple[int, int]]) -> None:
        self._stream, self._reads = stream, reads

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, size: int = -1) -> bytes:
        begin = self._stream.tell()
        data: bytes = self._stream.read(size)
        self._reads.append((begin, begin + len(data)))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_no_byte_of_a_dropped_expert_is_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in tensors of their own, and as rows of one; verified. What tells models apart takes 16 pages of each."""
    model = Model(tmp_path, family)
    ranges: dict[str, list[tuple[int, int]]] = {path.name: [] for path in model.folder.glob("*.safetensors")}
    streams: dict[str, list[tuple[int, int]]] = {name: [] for name in ranges}
    preadv, open_ = os.preadv, Path.open

    def noted_preadv(file: int, buffers: list[memoryview], position: int) -> int:
        size = preadv(file, buffers, position)
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.parent == model.folder and path.name in ranges:
            ranges[path.name].append((position, position + size))
        return size

    def noted_open(path: Path, *arguments: Any, **named: Any) -> Any:
        stream = open_(path, *arguments, **named)
        return Recorded(stream, streams[path.name]) if path.parent == model.folder and path.name in streams else stream

    monkeypatch.setattr(os, "preadv", noted_preadv)
    monkeypatch.setattr(Path, "open", noted_open)
    result = model.prune(tmp_path / "out", keep=model.kind.keep, verify=True)
    monkeypatch.undo()
    kept = {layer.index: set(layer.kept) for layer in result.layers}
    entries = open_checkpoint(model.folder).tensors.values()
    dropped = [stretch for entry in entries for stretch in dropped_stretches(entry, kept)]
    assert sum(end - begin for _, begin, end in dropped) > 0.2 * sum(entry.nbytes for entry in entries)
    for file, begin, end in dropped:
        assert not [at for at in ranges[file] if at[0] < end and begin < at[1]], (file, begin, end)
    read = sum(end - begin for each in ranges.values() for begin, end in each)
    wanted = sum(entry.nbytes for entry in entries) - sum(end - begin for _, begin, end in dropped)
    assert read == 2 * wanted, "each byte that stays is read once, and once more to compare"
    for file, reads in streams.items():
        header = min(entry.begin for entry in entries if entry.file == file)
        assert all(end <= header or end - begin <= 4096 for begin, end in reads)


def dropped_stretches(entry: TensorEntry, kept: dict[int, set[int]]) -> list[tuple[str, int, int]]:
    """Which bytes of a tensor belong to experts that go, by its name and shape alone."""
    block = re.search(r"layers\.(\d+)\.", entry.name)
    if block is None or not re.search(r"\.(experts|router|gate)\.", entry.name):
        return []
    stay, number = kept[int(block.group(1))], re.search(r"experts\.(\d+)\.", entry.name)
    if number is not None:
        return [] if int(number.group(1)) in stay else [(entry.file, entry.begin, entry.end)]
    # All eight experts, one after the other.
    assert entry.shape[0] == 8
    size = entry.nbytes // 8
    return [(entry.file, entry.begin + expert * size, entry.begin + (expert + 1) * size)
            for expert in range(8) if expert not in stay]  # fmt: skip
