"""How long each resource was at work, as it is counted and told; and the memory of libraries, which is bounded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streamprune import progress as busy
from streamprune.cli import main
from streamprune.hardware import memory as machine
from streamprune.hardware.memory import limit_library_memory, release_freed_memory
from streamprune.progress import RESOURCES, Busy, describe
from tests.faults import Case, make_case
from tests.helpers import CPU, prune
from tests.tiny import write_token_ids


class Clock:
    """Stands in for the module `time`: stands still unless it is told to go on."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(busy, "time", stopped)
    return stopped


def test_shares_are_of_the_time_since_the_beginning(clock: Clock) -> None:
    one = Busy()
    with one.at("read"):
        clock.now += 1
    with one.on_device("compute", CPU):
        clock.now += 2
    clock.now += 1
    assert one.utilisation() == {"read": 0.25, "compute": 0.5, "write": 0.0, "states": 0.0, "seconds": 4.0}
    assert describe(one.utilisation()) == (
        "busy: computing 50%, reading 25%, writing 0%, moving hidden states 0% of 4.0 s"
    )


def test_several_at_a_time_count_once_and_errors_count_too(clock: Clock) -> None:
    one = Busy()
    with one.at("read"):
        clock.now += 1
        with pytest.raises(OSError, match="while it is read"), one.at("read"), one.at("write"):  # noqa: PT012
            clock.now += 1
            raise OSError("while it is read")
        clock.now += 1
    clock.now += 1
    with one.at("read"):
        clock.now += 1
    assert one.utilisation() == {"read": 0.8, "compute": 0.0, "write": 0.2, "states": 0.0, "seconds": 5.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("made"), blocks=2)


@pytest.mark.parametrize("command", ["run", "score"])
def test_the_summary_and_the_user_are_told_the_shares(command: str, made: Case, tmp_path: Path) -> None:
    goal = ["--keep", 5, "--states", "disk"] if command == "run" else []
    words = [command, made.model, "-o", tmp_path / "out", *goal, "--calibration", made.tokens, "--json"]
    told = CliRunner().invoke(main, list(map(str, words)))
    assert told.exit_code == 0, told.stderr
    shares = json.loads(told.stdout)["busy"]
    assert shares.keys() == {*RESOURCES, "seconds"}
    assert 0 < shares["seconds"] < json.loads(told.stdout)["seconds"]
    at_work = {name for name in RESOURCES if shares[name] > 0}
    assert all(0 <= shares[name] <= 1 for name in RESOURCES)
    assert at_work == ({"read", "compute", "write", "states"} if command == "run" else {"read", "compute"})
    (line,) = (line for line in told.stderr.splitlines() if line.startswith("busy: "))
    assert line == describe(shares)
    assert re.fullmatch(
        r"busy: computing \d+%, reading \d+%, writing \d+%, moving hidden states \d+% of [\d.]+ s", line
    )


def test_a_library_without_glibcs_options_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As musl and macOS have it; what the user has set wins."""
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=lambda _: object()))
    monkeypatch.setattr(os, "environ", {"HF_DEACTIVATE_ASYNC_LOAD": "0"})
    limit_library_memory()
    release_freed_memory()
    assert os.environ == {"HF_DEACTIVATE_ASYNC_LOAD": "0", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
    limit_library_memory(tight=True)
    assert os.environ["LRU_CACHE_CAPACITY"] == "1"


@pytest.mark.parametrize(
    ("most", "expected"), [(2**31, {-3: 2**30, -1: 2**30}), (2**25, {-3: 2**25, -1: 2**30}), (0, {})]
)
def test_freed_memory_is_kept_as_far_as_the_library_lets_us(
    most: int, expected: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M_MMAP_THRESHOLD (-3) has a limit in older versions of glibc; without it M_TRIM_THRESHOLD (-1) is of no use."""
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > most:
            return 0
        options[option] = value
        return 1

    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=lambda _: SimpleNamespace(mallopt=mallopt)))
    monkeypatch.setattr(os, "environ", {})
    limit_library_memory()
    assert options == expected


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
    with busy.on_device("compute", torch.device("cuda:1")):
        pass
    assert Event.recorded == [stream] * 2
    busy.synchronize()
    assert busy._spent["compute"] == 0.5


def test_what_is_measured_on_a_card_is_added_up_block_by_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that were kept until the end of a run would be a hundred thousand."""
    most = [0]

    @contextmanager
    def on_device(self: Busy, resource: str, device: torch.device) -> Iterator[None]:
        yield
        self._events.append((resource, Event(), Event()))
        most[0] = max(most[0], len(self._events))

    monkeypatch.setattr(Busy, "on_device", on_device)
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=5, length=16)
    result = prune(model, tmp_path / "out", calibration=(str(ids),), batch_tokens=16)
    assert most == [5]
    assert result.summary["busy"]["compute"] > 0
