"""What is given up or failed to load is freed: weights that were read ahead, and what malloc keeps."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from streamprune.checkpoint import reader as reading_module
from streamprune.checkpoint.index import open_checkpoint
from streamprune.checkpoint.reader import Reading, ShardReader
from streamprune.hardware import memory as machine
from streamprune.models.open import OpenedModel, load_config
from streamprune.models.skeleton import build_skeleton, map_checkpoint
from streamprune.progress import Busy
from streamprune.streaming.conversion import Conversion
from streamprune.streaming.layer_weights import LayerWeights
from tests.helpers import CPU


@contextmanager
def loader_of(model: Path) -> Iterator[LayerWeights]:
    checkpoint, skeleton = open_checkpoint(model), build_skeleton(load_config(model), torch.float32)
    targets = map_checkpoint(skeleton, checkpoint.tensors, checkpoint.config)
    opened = OpenedModel(checkpoint, skeleton, targets, torch.float32)
    loader = LayerWeights(opened, CPU, Busy())
    try:
        yield loader
    finally:
        loader.close()


class Memories:
    """The memory of all that is read."""

    def __init__(self) -> None:
        self._found: list[StorageWeakRef] = []

    def add(self, tensor: torch.Tensor) -> None:
        self._found.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._found)

    @property
    def freed(self) -> int:
        return sum(each.expired() for each in self._found)  # type: ignore[no-untyped-call]


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> Memories:
    found = Memories()
    plain = ShardReader.start

    def start(self: ShardReader, *arguments: Any) -> Reading:
        reading = plain(self, *arguments)
        for memory in reading.memory.values():
            found.add(memory)
        return reading

    monkeypatch.setattr(ShardReader, "start", start)
    return found


def test_requests_that_are_given_up_hold_no_memory(
    model: Path, memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those that still wait in the pool's queue, behind four that are under way."""
    go_on, plain = threading.Event(), reading_module.read_exactly

    def slow(*arguments: Any) -> None:
        go_on.wait(10)
        plain(*arguments)

    monkeypatch.setattr(reading_module, "REQUEST_BYTES", 1000)
    monkeypatch.setattr(reading_module, "read_exactly", slow)
    with loader_of(model) as loader:
        assert loader.prefetch(1)
        reading = loader._prefetched[1]
        assert len(reading.requests) > 20
        threading.Timer(0.1, go_on.set).start()
        assert loader.free_prefetched()
        assert sum(request.cancelled() for request in reading.requests) >= len(reading.requests) - 4
        assert len(memories) > 1
        assert memories.freed == len(memories)


def test_memory_is_not_freed_before_compute_waits_for_pending_copies(model: Path, memories: Memories) -> None:
    """The allocator would hand it out at once, while a copy by the other stream may still be writing there."""
    seen: list[tuple[bool, bool]] = []

    class GpuCopier:
        """Stands in for the one of a GPU."""

        def __init__(self, reading: Reading) -> None:
            self.reading = reading

        def compute_waits(self) -> None:
            done = all(request.done() for request in self.reading.requests)
            seen.append((done, memories.freed > 0))

    with loader_of(model) as loader:
        loader.prefetch(1)
        loader._prefetched[1].wait()
        loader._reader._gpu_copier = GpuCopier(loader._prefetched[1])  # type: ignore[assignment]
        loader.free_prefetched()
        assert seen == [(True, False)]
        assert memories.freed == len(memories)


def test_a_block_whose_loading_failed_is_freed_before_the_next_attempt(
    model: Path, memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that were read, and not only those that were being converted when memory ran out."""
    plain, calls = Conversion.load, 0

    def convert(self: Conversion, tensors: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("2.00 GiB")
        plain(self, tensors)

    monkeypatch.setattr(Conversion, "load", convert)
    with loader_of(model) as loader:
        try:
            with loader.layer(0):
                pytest.fail("it was loaded")
        except MemoryError:
            pass
        assert len(memories) > 2
        assert memories.freed == len(memories)
        with loader.layer(0) as block:
            assert not any(parameter.is_meta for parameter in block.parameters())


@pytest.mark.parametrize(
    ("most", "expected"),
    [(2**31, [(-3, 2**30), (-1, 2**30)]), (2**25, [(-3, 2**25), (-1, 2**30)]), (0, [])],
)
def test_malloc_is_told_no_more_than_it_takes(
    most: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of glibc refuse a threshold above 32 MiB. The other one alone would be worse than none."""
    taken: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            if option == -3 and value > most:
                return 0
            taken.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "HF_DEACTIVATE_ASYNC_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    machine.limit_library_memory()
    assert taken == expected
