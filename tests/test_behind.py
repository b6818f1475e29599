"""What goes on behind the scoring: in order, one piece at a time; what fails or is stopped leaves nothing half done."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import InterruptedRunError, OutputError, ResourceError
from streamprune.output.background import BackgroundWriter
from streamprune.output.writer import OutputWriter
from streamprune.streaming.forward import LayerForward
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.work.folder import WorkFolder
from tests.faults import Case, make_case, trap
from tests.forked import Forked
from tests.handshakes import PATIENCE, Points

BLOCKS, BATCHES = 4, 4
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Four blocks, four micro-batches; nothing is saved on the way, which would wait for what is under way."""
    return make_case(tmp_path_factory.mktemp("made"), checkpoint_every=1e6)


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    return made.at(tmp_path / "out")


def test_work_behind_is_done_in_order_one_piece_at_a_time(points: Points) -> None:
    def piece(number: int) -> Callable[[], None]:
        def work() -> None:
            points.reach("begins", number)
            points.await_("handed", number)
            points.reach("ends", number)

        return work

    with BackgroundWriter() as writer:
        for number in range(5):
            writer.submit(piece(number))
            # It goes on meanwhile; the next one is not begun before its end.
            points.reach("handed", number)
    assert [point for point in points.seen if point[0] != "handed"] == [
        (what, number) for number in range(5) for what in ("begins", "ends")
    ]


def test_an_error_behind_is_raised_by_the_next_call_and_once() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("behind")

    with BackgroundWriter() as writer:
        writer.submit(fail)
        with pytest.raises(OSError, match="behind"):
            writer.submit(lambda: done.append(1))
        writer.wait()
        assert done == [], "what comes after a failure is not begun"
        writer.submit(lambda: done.append(2))
        writer.wait()
        writer.submit(fail)
        with pytest.raises(OSError, match="behind"):
            writer.wait()
    assert done == [2]


def test_leaving_waits_and_raises_unless_the_block_has_an_error_of_its_own() -> None:
    ended: list[bool] = []
    go_on = threading.Event()

    def fail() -> None:
        assert go_on.wait(PATIENCE)
        ended.append(True)
        raise OSError("behind")

    with pytest.raises(OSError, match="behind"), BackgroundWriter() as writer:  # noqa: PT012 (leaving raises)
        writer.submit(fail)
        go_on.set()
    go_on.clear()
    with pytest.raises(KeyError, match="its own"), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(fail)
        threading.Timer(0.05, go_on.set).start()
        raise KeyError("its own")
    assert ended == [True, True], "no piece is left under way"


@pytest.mark.parametrize(("block", "code"), [(0, errno.ENOSPC), (BLOCKS - 1, errno.EIO)])
def test_a_write_that_fails_behind_ends_the_run_in_one_error(
    block: int, code: int, case: Case, around: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with trap(case.output.parent) as counted:
        case.at(case.output.with_name("counted")).run()
    calls = [(at, call) for at, call in enumerate(counted.calls or [], 1) if call.startswith("write model-")]
    # The first shard is what lies outside the blocks.
    files = list(dict.fromkeys(call for _, call in calls))
    number = next(at for at, call in calls if call == files[1 + block])
    threads: list[str] = []
    around(OutputWriter, "write_layer", lambda *_: threads.append(threading.current_thread().name))
    with trap(case.output.parent, number, code), pytest.raises((OutputError, ResourceError)) as caught:
        case.run()
    assert caught.type is (ResourceError if code == errno.ENOSPC else OutputError)
    assert os.strerror(code) in str(caught.value)
    assert threads[-1].startswith("write")
    assert not case.output.exists()
    monkeypatch.undo()
    done = {int(path.stem) for path in (case.work / "layers").glob("0*.json")} if case.work.exists() else set()
    assert done == set(range(block))
    case.run()
    case.check()


def test_a_stop_while_a_block_is_written_waits_for_it(
    case: Case, points: Points, around: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM comes while block 2 computes and block 1 is under way to the disk."""

    def computes(stream: LayerForward, index: int, *_: Any) -> None:
        if index == 2:
            points.await_("writing", 1)
            os.kill(os.getpid(), signal.SIGTERM)
            points.reach("asked to stop")

    def writes(writer: OutputWriter, block: int | None, *_: Any) -> None:
        points.reach("writing", block)
        if block == 1:
            points.await_("asked to stop")

    around(LayerForward, "run_layer", computes)
    around(OutputWriter, "write_layer", writes)
    with pytest.raises(InterruptedRunError, match=f"2 of {BLOCKS} layers are done"):
        case.run()
    monkeypatch.undo()
    assert sorted(path.name for path in (case.work / "layers").glob("0*.json")) == ["00000.json", "00001.json"]
    computed: list[int] = []
    around(LayerForward, "run_layer", lambda stream, index, *_: computed.append(index))
    case.resume()
    assert computed == [2] * (BATCHES - 1) + [3] * BATCHES, "nothing is computed twice"
    monkeypatch.undo()
    case.check()


def slow_to_write(points: Points, around: Callable[..., None]) -> None:
    """Let every block be recorded only when somebody waits for it, in a run that saves the states at every block.

    Such a run waits twice for each block: for the one before as it hands it over, and before it saves.
    """
    around(BackgroundWriter, "wait", lambda behind: points.reach("waiting"))

    def record(work: WorkFolder, block: int | None, *_: Any) -> None:
        if block is not None:
            points.await_count(2 * block + 2)

    around(WorkFolder, "write_layer", record)


def recorded(work: WorkFolder) -> set[int]:
    return {block for block in range(BLOCKS) if work.read_layer(block) is not None}


def test_states_are_never_saved_ahead_of_a_block_without_record(
    case: Case, points: Points, around: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[tuple[int, set[int]]] = []
    slow_to_write(points, around)
    around(LayerLoop, "save", lambda loop, work: at.append((loop.point.layer, recorded(work))))
    case.run(checkpoint_every=0.0)
    assert at == [(block, set(range(block))) for block in range(1, BLOCKS)]
    monkeypatch.undo()
    case.check()


KILLED = """
import json, os, signal, sys
from tests.handshakes import Points, wrapping
from tests.test_behind import slow_to_write
from tests.faults import Case
from streamprune.streaming.layer_loop import LayerLoop
from pathlib import Path
import pytest

saves = []

def kill(*_):
    saves.append(1)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

around = wrapping(pytest.MonkeyPatch())
slow_to_write(Points(), around)
around(LayerLoop, "save", lambda *_: None, kill)
model, tokens, output, settings = sys.argv[1:]
Case(Path(model), Path(tokens), Path(output), {**json.loads(settings), "checkpoint_every": 0.0}, {}).run()
"""


def test_killed_right_after_a_save_a_run_ends_with_the_same_bytes(
    case: Case, around: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, which nothing tidies up: two blocks are recorded, and their states are taken up."""
    words = [case.model, case.tokens, case.output, json.dumps(case.settings)]
    killed = Forked(KILLED, words, ROOT)
    _, told = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, told
    assert sorted(path.name for path in (case.work / "layers").glob("0*.json")) == ["00000.json", "00001.json"]
    computed: list[int] = []
    around(LayerForward, "run_layer", lambda stream, index, *_: computed.append(index))
    case.run()
    assert computed == [2] * BATCHES + [3] * BATCHES
    monkeypatch.undo()
    case.check()
