"""A block is read, another computes, a third is written: shown by handshakes, never by seconds.

What happens on two threads at a time is made to wait for one another, so that it would end in an error if one came
after the other.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streamprune.checkpoint.reader import ShardReader
from streamprune.cli import main
from streamprune.output.writer import OutputWriter
from streamprune.streaming.forward import LayerForward
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.states_file import StatesFile
from tests.faults import Case, make_case
from tests.handshakes import Points, Turn

PLAIN_PREADV = os.preadv
BLOCKS, BATCHES = 4, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Four blocks, four micro-batches; nothing is saved on the way, which would wait for what is under way."""
    return make_case(tmp_path_factory.mktemp("made"), checkpoint_every=1e6)


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    return made.at(tmp_path / "out")


def layer_of(name: str) -> int | None:
    number = re.search(r"layers\.(\d+)\.", name)
    return int(number.group(1)) if number else None


def test_a_block_is_read_another_computes_a_third_is_written(
    case: Case, points: Points, around: Callable[..., None]
) -> None:
    """The first micro-batch of each block waits for the next block to be read and the one before to be written.

    These again wait for it to begin.
    """

    def reads(shards: ShardReader, request: Any, *_: Any) -> None:
        begun = {entry.name for entry in shards._checkpoint.tensors.values()
                 if (entry.file, entry.begin) == (request.file, request.begin)}  # fmt: skip
        index = layer_of(begun.pop())
        points.reach("reading", index)
        if index:
            points.await_("computing", index - 1)

    def started(weights: LayerWeights, index: int) -> None:
        points.reach("read ahead", index)
        weights._prefetched[index].wait()
        points.reach("read", index)

    def ahead(weights: LayerWeights, index: int) -> None:
        # Waits on a thread of its own, since the one that computes must go on.
        threading.Thread(target=started, args=(weights, index)).start()

    def computes(stream: LayerForward, index: int, *_: Any) -> None:
        if ("computing", index) not in points.seen:
            points.reach("computing", index)
        if index + 1 < BLOCKS:
            points.await_("read", index + 1)
        if index:
            points.await_("written", index - 1)

    def writes(writer: OutputWriter, block: int | None, *_: Any) -> None:
        points.reach("writing", block)
        if block is not None and block + 1 < BLOCKS:
            points.await_("computing", block + 1)

    around(LayerWeights, "prefetch", lambda *_: None, ahead)
    around(ShardReader, "_read", reads)
    around(LayerForward, "run_layer", computes, lambda stream, index, *_: points.reach("computed", index))
    around(OutputWriter, "write_layer", writes, lambda writer, block, *_: points.reach("written", block))
    case.run()
    case.check()
    for block in range(BLOCKS - 1):
        assert points.in_order(("computing", block), ("read", block + 1), ("computed", block))
        assert points.in_order(("computing", block + 1), ("written", block), ("computed", block + 1))
    # Never more than one block ahead, and never more than one behind.
    for block in range(BLOCKS - 2):
        assert points.in_order(("computed", block), ("reading", block + 2))
        assert points.in_order(("written", block), ("writing", block + 1), ("computing", block + 2))


def test_what_is_ahead_is_bounded_even_where_reading_is_quick(
    case: Case, points: Points, around: Callable[..., None]
) -> None:
    """With nobody waiting: at any time at most the next block has been asked for."""
    held: list[set[int]] = []
    around(LayerWeights, "_start", lambda loader, index: points.reach("asked", index))
    around(LayerWeights, "prefetch", lambda *_: None, lambda weights, index: held.append(set(weights._prefetched)))
    around(LayerForward, "run_layer", lambda stream, index, *_: points.reach("computing", index))
    case.run()
    assert held == [{1}, {2}, {3}]
    assert [index for what, index in points.seen if what == "asked"] == [0, 1, 2, 3]
    for block in range(2):
        assert points.in_order(("computing", block), ("asked", block + 2))


def test_states_on_the_disk_come_and_go_while_another_micro_batch_computes(
    case: Case, points: Points, around: Callable[..., None]
) -> None:
    """Each micro-batch waits for the next one's states to be read and those of the last one to be written."""
    computed, came, went = Turn(0, BATCHES), Turn(1, BATCHES), Turn(0, BATCHES)

    def computes(*_: Any) -> None:
        block, number = computed.now()
        points.reach("computing", block, number)
        if block and number + 1 < BATCHES:
            points.await_("fetched", block, number + 1)
        if number:
            points.await_("stored", block, number - 1)

    def fetches(*_: Any) -> None:
        block, number = came.now()
        if number:
            points.await_("computing", block, number - 1)

    def stores(*_: Any) -> None:
        block, number = went.now()
        points.reach("storing", block, number)
        if number + 1 < BATCHES:
            points.await_("computing", block, number + 1)

    around(LayerForward, "run_layer", computes, lambda *_: points.reach("computed", *computed.next()))
    around(StatesFile, "read", fetches, lambda *_: points.reach("fetched", *came.next()))
    around(StatesFile, "write", stores, lambda *_: points.reach("stored", *went.next()))
    case.run(states="disk")
    case.check()
    assert [turn.now() for turn in (computed, came, went)] == [(BLOCKS, 0)] * 3
    for block in range(BLOCKS):
        # At most one is on its way out, and none is left at the end of a block.
        for number in range(BATCHES - 2):
            assert points.in_order(("stored", block, number), ("computing", block, number + 2))
        if block + 1 < BLOCKS:
            assert points.in_order(("stored", block, BATCHES - 1), ("computing", block + 1, 0))


@pytest.mark.parametrize("at", [1, 3])
def test_without_memory_for_reading_ahead_a_run_goes_on_to_the_same_bytes(
    at: int, made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, plain, usual = made.at(tmp_path / "out"), torch.empty, LayerWeights.prefetch
    tried: list[tuple[int, bool]] = []
    within: list[int] = []

    def empty(*arguments: Any, **named: Any) -> torch.Tensor:
        if within and within[0] >= at and named.get("dtype") is torch.uint8:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return plain(*arguments, **named)

    def prefetch(self: LayerWeights, index: int) -> bool:
        within.append(index)
        tried.append((index, usual(self, index)))
        within.clear()
        return tried[-1][1]

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(LayerWeights, "prefetch", prefetch)
    case.run()
    assert tried == [(index, index < at) for index in range(1, BLOCKS)], "it is not tried again"
    monkeypatch.undo()
    case.check()


def test_the_command_line_tells_a_disk_that_fails_while_reading_ahead(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, calls = made.at(tmp_path / "out"), []

    def preadv(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return PLAIN_PREADV(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    told = CliRunner().invoke(
        main, ["run", str(case.model), "-o", str(case.output), "--keep", "5", "--quiet", "--batch-tokens", "24",
               "--calibration", str(case.tokens)],
    )  # fmt: skip
    assert (told.exit_code, type(told.exception)) == (1, SystemExit)
    (line,) = told.stderr.splitlines()
    assert line.startswith("Error: ")
    assert ".safetensors cannot be read at byte " in line
    assert "Input/output error. Check the disk." in line
    monkeypatch.undo()
    case.run()
    case.check()
