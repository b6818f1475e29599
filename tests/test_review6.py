"""Where threads, memory and cards meet: what is given up is free, what is awaited is in order, what fails is told."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from streamprune.checkpoint import reader as reading_module
from streamprune.checkpoint.index import open_checkpoint
from streamprune.checkpoint.reader import Reading, ShardReader
from streamprune.cli import main
from streamprune.errors import InterruptedRunError, NonFiniteError
from streamprune.hardware import memory as machine
from streamprune.models.config import load_config
from streamprune.models.open import OpenedModel
from streamprune.models.skeleton import build_skeleton, map_checkpoint
from streamprune.output import compare
from streamprune.progress import Busy
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.forward import LayerForward
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.stages import ForwardStage
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU, prune, streamed, token_ids
from tests.tiny import FAMILIES, make_model, tiny_config, write_token_ids

PLAIN_RUN_BLOCK = LayerForward.run_layer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tiny_config(FAMILIES[0]))


@contextmanager
def loader_of(model: Path) -> Iterator[LayerWeights]:
    checkpoint, skeleton = open_checkpoint(model), build_skeleton(load_config(model), torch.float32)
    opened = OpenedModel(checkpoint, skeleton, map_checkpoint(skeleton.model, checkpoint.tensors), torch.float32)
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

    def start(self: ShardReader, groups: Any) -> Reading:
        reading = plain(self, groups)
        for memory in reading._memory.values():
            found.add(memory)
        return reading

    monkeypatch.setattr(ShardReader, "start", start)
    return found


def test_requests_that_are_given_up_hold_no_memory(
    model: Path, memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those that still wait in the pool's queue, behind four that are under way."""
    go_on, plain = threading.Event(), reading_module._read_fully

    def slow(*arguments: Any) -> None:
        go_on.wait(10)
        plain(*arguments)

    monkeypatch.setattr(reading_module, "REQUEST_BYTES", 1000)
    monkeypatch.setattr(reading_module, "_read_fully", slow)
    with loader_of(model) as loader:
        assert loader.prefetch(1)
        reading = loader._prefetched[1]
        assert len(reading.requests) > 20
        threading.Timer(0.1, go_on.set).start()
        assert loader.free_prefetched()
        assert sum(request.cancelled() for request in reading.requests) >= len(reading.requests) - 4
        assert len(memories) > 1
        assert memories.freed == len(memories)


def test_memory_is_not_freed_before_the_card_waits_for_what_is_on_its_way(model: Path, memories: Memories) -> None:
    """The allocator would hand it out at once, while a copy by the other stream may still be writing there."""
    seen: list[tuple[bool, bool]] = []

    class Courier:
        """Stands in for the one of a card."""

        def __init__(self, reading: Reading) -> None:
            self.reading = reading

        def lead(self) -> None:
            done = all(request.done() for request in self.reading.requests)
            seen.append((done, memories.freed > 0))

    with loader_of(model) as loader:
        loader.prefetch(1)
        loader._prefetched[1].wait()
        loader._reader._courier = Courier(loader._prefetched[1])  # type: ignore[assignment]
        loader.free_prefetched()
        assert seen == [(True, False)]
        assert memories.freed == len(memories)


def test_a_block_whose_loading_failed_is_freed_before_the_next_attempt(
    model: Path, memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that were read, and not only those that were being converted when memory ran out."""
    plain, calls = LayerWeights._convert, 0

    def convert(self: LayerWeights, tensors: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("2.00 GiB")
        plain(self, tensors)

    monkeypatch.setattr(LayerWeights, "_convert", convert)
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


def test_states_that_nobody_looked_at_are_not_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card they are looked at when a block ends. A run stopped before would save what cannot be trusted."""
    plain_run, plain_check, within = MicroBatches.run, ForwardStage.check_finite, [False]

    def run(self: MicroBatches, *arguments: Any) -> None:
        within[0] = True
        try:
            plain_run(self, *arguments)
        finally:
            within[0] = False

    def check(self: ForwardStage) -> None:
        # As it is on a card.
        if not within[0]:
            plain_check(self)

    def run_layer(self: LayerForward, index: int, block: nn.Module, ids: torch.Tensor, state: BatchState) -> BatchState:
        result = PLAIN_RUN_BLOCK(self, index, block, ids, state)
        if index == 1:
            result.output[0, 0, 0] = poison
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(MicroBatches, "run", run)
    monkeypatch.setattr(ForwardStage, "check_finite", check)
    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=4, length=16)
    for poison, error in ((1.0, InterruptedRunError), (float("nan"), NonFiniteError)):
        out = tmp_path / f"out{poison}"
        with pytest.raises(error):
            prune(model, out, calibration=(str(ids),), batch_tokens=16)
        work = Path(f"{out}.work")
        assert bool(list((work / "states").iterdir())) is (error is InterruptedRunError)
        assert [path.name for path in sorted((work / "layers").glob("0*"))] == ["00000.json"]


class Event:
    """Stands in for a card's event: remembers where it was recorded."""

    recorded: list[Any]

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = "the current card's") -> None:
        Event.recorded.append(stream)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _: Event) -> float:
        return 500.0


def test_a_card_is_timed_by_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever card is the current one: an event without a stream would be recorded there, and cost memory there."""
    Event.recorded = []
    monkeypatch.setattr(torch, "Event", Event)
    stream = SimpleNamespace(device="cuda:1")
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: {torch.device("cuda:1"): stream}[device])
    busy = Busy()
    with busy.on_card("compute", torch.device("cuda:1")):
        pass
    assert Event.recorded == [stream] * 2
    busy.settle()
    assert busy._spent["compute"] == 0.5


def test_what_is_measured_on_a_card_is_added_up_block_by_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that were kept until the end of a run would be a hundred thousand."""
    most = [0]

    @contextmanager
    def on_card(self: Busy, resource: str, device: torch.device) -> Iterator[None]:
        yield
        self._events.append((resource, Event(), Event()))
        most[0] = max(most[0], len(self._events))

    monkeypatch.setattr(Busy, "on_card", on_card)
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=5, length=16)
    result = prune(model, tmp_path / "out", calibration=(str(ids),), batch_tokens=16)
    assert most == [5]
    assert result.summary["busy"]["compute"] > 0


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


def refuse(*_: Any) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def test_a_file_system_that_takes_no_hints_is_read_all_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = streamed(model, token_ids(), torch.float32)
    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    logits, _ = streamed(model, token_ids(), torch.float32)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(("owner", "name"), [(compare, "_read"), (os, "pread")])
def test_a_disk_that_fails_while_it_is_compared_is_told_in_one_message(
    owner: Any, name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(model, tmp_path / "out")
    monkeypatch.setattr(owner, name, refuse)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--source", str(model)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Invalid argument" in result.stderr
