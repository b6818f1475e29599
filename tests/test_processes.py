"""What several processes agree on and send each other, and how they know of one another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streamprune.calibration.sequences import Calibration, MicroBatch
from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.distributed.joining import joined
from streamprune.distributed.processes import ALONE, Launched, Processes, launched
from streamprune.errors import ProcessesError
from streamprune.hardware.memory_plan import Limit, MemoryPlan, Needs, Room
from streamprune.planning.memory_needs import agree_on_batch_tokens
from streamprune.progress import Progress
from streamprune.streaming.batches import MicroBatches, Runtime, Stopped
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU
from tests.launching import ranks_told

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


class Threads(Processes):
    """Processes that are threads of this one: they tell each other of their values through memory."""

    def __init__(self, rank: int, count: int, table: list[Any], barrier: threading.Barrier, pipes: Any) -> None:
        self.rank, self.count, self.local_count, self.local_rank = rank, count, count, rank
        self._table, self._barrier, self._pipes = table, barrier, pipes

    def collect(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait(30)
        found = list(self._table)
        self._barrier.wait(30)
        return found

    def send(self, value: Any, process: int) -> None:
        self._pipes[self.rank, process].put(value, timeout=30)

    def receive(self, process: int) -> Any:
        return self._pipes[process, self.rank].get(timeout=30)


def in_threads(count: int, act: Callable[[Processes], Any]) -> list[Any]:
    """What `act` gives in each of so many processes."""
    table, barrier = [None] * count, threading.Barrier(count)
    # One thing is on its way at a time, as between processes.
    pipes: dict[tuple[int, int], Queue[Any]] = {(a, b): Queue(1) for a in range(count) for b in range(count)}
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(act, Threads(rank, count, table, barrier, pipes)) for rank in range(count)]
        return [task.result(60) for task in tasks]


def test_one_process_is_a_case_of_several() -> None:
    values = torch.ones(3, dtype=torch.float64)
    ALONE.add_up(values, [1])
    assert values.tolist() == [1.0, 1.0, 1.0]
    assert ALONE.broadcast("value") == "value"
    assert ALONE.collect(4) == [4]
    assert ALONE.mine(range(3)) == [0, 1, 2]
    assert [ALONE.asked(False), ALONE.asked(True)] == [False, True]
    assert list(ALONE.scatter(3, lambda number: 10 * number)) == [0, 10, 20]
    pieces = ALONE.in_order([(0, 2), (1, 1), (1, 1)])
    assert [(piece.process, piece.number, piece.size) for piece in pieces] == [(0, 0, 2), (0, 1, 1), (0, 2, 1)]
    assert list(ALONE.gather(pieces, lambda number: 10 * number)) == [0, 10, 20]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launched()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Launched()),
        ({"WORLD_SIZE": "", "RANK": "x"}, Launched()),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Launched(4, 3, 2, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3"}, Launched(4, 3, 4, 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, Launched(2, 1, 2, 1)),
    ],
)
def test_how_a_process_was_launched(
    environment: dict[str, str], expected: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


@pytest.mark.parametrize(("rank", "said"), [(None, "RANK is not set"), ("2", "RANK is 2")])
def test_a_process_that_cannot_know_which_it_is(rank: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ProcessesError, match=said), joined():
        pass
    told = CliRunner().invoke(main, ["devices"])
    assert told.exit_code == 1
    assert told.stderr.startswith("Error: The environment says that 2 processes were launched (WORLD_SIZE), but RANK ")
    assert told.stderr.count("\n") == 1


def test_only_the_first_process_does_what_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, exit_code, words in ((0, 1, 1), (1, 0, 0)):
        monkeypatch.setenv("RANK", str(rank))
        for command in (
            ["fit", "nowhere/at/all", "--budget-gib", "1"],
            ["verify", str(tmp_path), "--source", str(tmp_path)],
        ):
            told = CliRunner().invoke(main, command)
            assert (told.exit_code, told.stderr.count("Error: ")) == (exit_code, words), command
        given = ["run", "nowhere/at/all", "-o", str(tmp_path / "out"), "--keep", "1", "--dry-run"]
        assert CliRunner().invoke(main, given).exit_code == exit_code


def test_what_real_processes_send_each_other(tmp_path: Path) -> None:
    """The connections themselves, in three processes that know nothing else of a run."""
    script = """
import torch
from streamprune.distributed.joining import joined
with joined("cpu") as processes:
    assert (processes.rank, processes.count, processes.local_rank) == (rank, 3, rank)
    assert processes.broadcast(("first", rank)) == ("first", 0)
    assert processes.collect(rank * rank) == [0, 1, 4]
    # Sums that depend on their order: all have the same ones, and those are in the order of the ranks.
    values = torch.tensor([[1e16, 1.0, -1e16], [0.1, 0.7, 0.3]], dtype=torch.float64)[:, rank].clone()
    processes.add_up(values, maxima=[1])
    assert values.tolist() == [((1e16 + 1.0) - 1e16), 0.7], values
    sent = lambda place: ([torch.full((2, 3), place, dtype=torch.bfloat16)], {"keys": {7: (torch.arange(place), None)}})
    got = list(processes.scatter(7, lambda place: (rank == 0) and sent(place)))
    assert len(got) == len(processes.mine(range(7)))
    for place, (rows, carried) in zip(processes.mine(range(7)), got):
        assert torch.equal(rows[0], sent(place)[0][0]) and rows[0].dtype == torch.bfloat16
        assert torch.equal(carried["keys"][7][0], torch.arange(place)) and carried["keys"][7][1] is None
    pieces = processes.in_order((place, 1) for place in processes.mine(range(7)))
    brought = list(processes.gather(pieces, lambda number: got[number]))
    assert [int(rows[0][0, 0]) for rows, _ in brought] == ([] if rank else list(range(7)))
    assert not processes.asked(False)
    processes.collect(None)
    asked = processes.asked(rank == 2)
    processes.collect(None)
    import time
    time.sleep(0.3)
    assert processes.asked(False), asked
"""
    assert ranks_told(script, 3, tmp_path) == [(0, "", "")] * 3


def calibration(*lengths: int) -> Calibration:
    sequences = tuple(torch.full((length,), number, dtype=torch.int64) for number, length in enumerate(lengths))
    return Calibration(sequences, ("text",), (0,) * len(lengths), "")


def plan(batch_tokens: int) -> MemoryPlan:
    needs = Needs(
        layer=1, reading=1, loading=1, staging=1, non_layer=1, states=1, workspace=lambda tokens: tokens,
        sequences=9, longest=4, tokens=36, itemsize=4,
    )  # fmt: skip
    free = Limit(1 << 30, "1 GiB is free", "wait")
    return MemoryPlan("ram", batch_tokens, needs, Room(free, None, free), "cpu")


def micro_batches(
    processes: Processes, text: Calibration, tokens: int, folder: Path, stop: StopRequest
) -> MicroBatches:
    settings = RunSettings(model="m", output=folder / "out", only_score=True)
    progress = Progress(1, quiet=True)
    return MicroBatches(Runtime(settings, plan(tokens), CPU, progress, folder, stop, processes=processes), text)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_saved_and_restored_in_the_order_of_one(count: int, tmp_path: Path) -> None:
    """Nine sequences in four micro-batches and a rest, one process's cut into halves; then gone on with by two."""
    text = calibration(*[4] * 9)

    def first(processes: Processes) -> list[int]:
        batches = micro_batches(processes, text, 8, tmp_path, StopRequest())
        if processes.rank == min(1, count - 1):
            batches.batch_tokens = 4
        seen: list[int] = []

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            seen.extend(batch.ids[:, 0].tolist())
            return BatchState(batch.ids * 10, {"past": {0: (batch.ids + 1, "kind")}})

        batches.run(0, compute, lambda done, batch: None)
        if processes.is_first:
            with WorkFolder(tmp_path / "work") as work:
                batches.save(work, 0, {"layer": 1})
        else:
            batches.save(None, 0, {"layer": 1})
        return seen

    seen = in_threads(count, first)
    assert sorted(chain.from_iterable(seen)) == list(range(9)), "each sequence goes through the block once"
    with WorkFolder(tmp_path / "work") as work:
        (saved,) = work.states.intact()
    assert sum(saved.facts["sizes"]) == 9
    assert saved.facts["batch_tokens"] == 4
    assert saved.facts["done"] == 0
    order = [saved.load(number).output[:, 0].tolist() for number in range(len(saved))]
    assert list(chain.from_iterable(order)) == [10 * number for number in range(9)]

    def second(processes: Processes) -> dict[int, Any]:
        batches = micro_batches(processes, text, 8, tmp_path, StopRequest())
        batches.restore(saved)
        found = {}

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            assert torch.equal(state.output, batch.ids * 10)
            assert torch.equal(state.carried["past"][0][0], batch.ids + 1)
            found.update({int(ids[0]): processes.rank for ids in batch.ids})
            return state

        batches.run(1, compute, lambda done, batch: None)
        return found

    found = in_threads(2, second)
    assert sorted([*found[0], *found[1]]) == list(range(9))


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_all_stop_behind_the_same_micro_batch(asked: int, tmp_path: Path) -> None:
    text = calibration(*[4] * 30)

    def act(processes: Processes) -> int:
        stop = StopRequest()
        batches = micro_batches(processes, text, 4, tmp_path, stop)
        done = 0

        def commit(number: int, batch: MicroBatch) -> None:
            nonlocal done
            done = number
            if processes.rank == asked and number == 2 + processes.rank:
                stop.signal = 15

        with pytest.raises(Stopped):
            batches.run(0, lambda number, batch, state: BatchState(batch.ids), commit)
        assert batches.own(sum(processes.collect(done))) == done, "what is done is the beginning of all"
        return done

    # In `Threads` nobody hears of a request before all meet: the others come to their ends, which only the last process
    # lies behind.
    assert in_threads(3, act) == [10, 10, 9 if asked == 2 else 10]


@pytest.mark.parametrize(
    ("lengths", "tokens", "count", "expected"),
    [
        ([4] * 9, (8, 8), 2, 8),
        ([4] * 9, (8, 100), 2, 8),
        ([4] * 9, (100, 100), 2, 32),
        ([4] * 9, (100, 100, 100, 100), 4, 8),
        ([4] * 2, (100, 100, 100), 3, 4),
        ([4, 4, 4, 6, 6], (100, 100, 100), 3, 8),
    ],
)
def test_micro_batches_suit_all(lengths: list[int], tokens: tuple[int, ...], count: int, expected: int) -> None:
    text = calibration(*lengths)
    plans = in_threads(count, lambda processes: agree_on_batch_tokens(processes, text, plan(tokens[processes.rank])))
    assert [each.batch_tokens for each in plans] == [expected] * count
    assert len(text.micro_batches(expected)) >= min(count, len(lengths))


def test_a_share_of_the_states() -> None:
    needs = plan(8).needs
    assert needs.states_here(8) == needs.states
    shared = replace(needs, states=3600, tokens=36, longest=4, processes=2)
    # 9, 5 and 1 micro-batches, of which one process has 5, 3 and all.
    assert [shared.states_here(tokens) for tokens in (4, 8, 36)] == [2000, 2160, 3600]
