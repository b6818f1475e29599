"""Signals to a real process: it saves, says how to go on, and exits 75; a second signal ends it at once."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.__main__ import main as program
from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError
from streamprune.pipeline.run import run
from tests.faults import Case, make_case
from tests.forked import Forked
from tests.helpers import tree_bytes
from tests.interruptions import call
from tests.thorough import mostly_thorough

#: A run that waits in a micro-batch of layer 1 until a signal is taken, and then, with a second word, for another one.
WAITING = """
import signal, sys, time
from pathlib import Path
from streamprune.cli import main
from streamprune.streaming.forward import LayerForward

reached, again = Path(sys.argv.pop(1)), sys.argv.pop(1)
usual = LayerForward.run_layer

def run_layer(self, index, *arguments):
    if index == 1 and not reached.exists():
        reached.touch()
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            time.sleep(0.005)
        if again:
            reached.with_name("again").touch()
            signal.pause()
    return usual(self, index, *arguments)

LayerForward.run_layer = run_layer
main()
"""


def start(case: Case, again: str = "") -> Forked:
    reached = case.output.with_name("reached")
    words = [
        reached, again, "run", case.model, "-o", case.output, "--keep", 5, "--batch-tokens", 24,
        "--checkpoint-every", 0, "--propagate", "pruned", "--calibration", case.tokens,
    ]  # fmt: skip
    process = Forked(WAITING, words, case.output.parent)
    wait_for(reached, process)
    return process


def wait_for(path: Path, process: Forked) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


class InterruptedImport:
    """Finds no module: Ctrl-C comes while `streamprune.cli` is looked for."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "streamprune.cli":
            raise KeyboardInterrupt


def test_a_signal_while_the_commands_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "streamprune.cli")
    monkeypatch.setattr(sys, "meta_path", [InterruptedImport, *sys.meta_path])
    with pytest.raises(SystemExit, match="130"):
        program()
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    # As many threads as the processes it is compared with have: sums are rounded otherwise with more.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_case(tmp_path_factory.mktemp("small"), propagate="pruned", checkpoint_every=1e6)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", mostly_thorough([signal.SIGINT, signal.SIGTERM], (signal.SIGINT,)))
def test_a_signal_saves_and_says_how_to_go_on(small: Case, tmp_path: Path, number: int) -> None:
    case = small.at(tmp_path / 'it\'s "größer"\nand more' / "out")
    case.output.parent.mkdir()
    process = start(case)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "Traceback" not in told
    assert "Error" not in told
    assert not case.output.exists()
    command = told.partition("Resume with: streamprune ")[2].rstrip()
    assert shlex.split(command) == ["resume", str(case.work)]
    # As a shell would take it.
    shell = ["/bin/sh", "-c", f"printf '%s\\0' {command}"]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    assert "hidden states saved in layer 1" in done.stderr
    case.check()


@pytest.mark.parametrize("number", mostly_thorough([signal.SIGINT, signal.SIGTERM], (signal.SIGTERM,)))
def test_a_second_signal_ends_it_at_once(small: Case, tmp_path: Path, number: int) -> None:
    case = small.at(tmp_path / "out")
    process = start(case, "again")
    process.send_signal(signal.SIGINT)
    wait_for(case.output.with_name("again"), process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert not case.output.exists()
    case.resume()
    case.check()


class Signals:
    """Sends this process a signal when a function is called for the n-th time."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
        self.calls, usual = 0, getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == nth:
                os.kill(os.getpid(), signal.SIGINT)
            return usual(*arguments, **named)

        patch.setattr(owner, name, call)


@pytest.mark.parametrize("nth", mostly_thorough(range(1, 33, 3), (1, 13, 28)))
def test_a_signal_in_any_micro_batch(small: Case, tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four sequences, four blocks and two passes each: within the scoring pass as within the pruned one."""
    from streamprune.streaming.forward import LayerForward

    case = small.at(tmp_path / "out")
    signals = Signals(monkeypatch, LayerForward, "run_layer", nth)
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError, match=f"streamprune resume {case.work}"):
        case.run()
    assert signals.calls == nth, "nothing is computed after the micro-batch"
    assert signal.getsignal(signal.SIGINT) is usual
    monkeypatch.undo()
    before = tree_bytes(case.work / "states")
    assert before
    signals = Signals(monkeypatch, LayerForward, "run_layer", 0)
    case.resume()
    assert signals.calls == 32 - nth, "nothing is computed twice"
    case.check()


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        ("streamprune.work.folder.WorkFolder", "write_layer", 5),
        ("streamprune.work.folder.WorkFolder", "is_intact", 1),
        ("streamprune.output.verify", "_read", 10),
        ("streamprune.output.writer.OutputWriter", "_write_small_files", 1),
        ("streamprune.output.writer.OutputWriter", "_check_sizes", 1),
    ],
)
def test_a_signal_outside_the_blocks(
    small: Case, tmp_path: Path, owner: str, name: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    case = small.at(tmp_path / "out")
    case.interrupt(at=3)
    module, _, kind = owner.rpartition(".")
    target = getattr(importlib.import_module(module), kind)
    Signals(monkeypatch, target, name, nth if name != "write_layer" else 1)
    with pytest.raises(InterruptedRunError, match="streamprune resume"):
        case.run()
    assert not case.output.exists()
    monkeypatch.undo()
    case.resume()
    case.check()


def test_a_signal_before_anything_is_done_leaves_nothing(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    case = small.at(tmp_path / "out")
    Signals(monkeypatch, __import__("streamprune.pipeline.run", fromlist=["run"]), "calibrate", 1)
    told = CliRunner().invoke(
        main, ["run", str(case.model), "-o", str(case.output), "--keep", "5", "--calibration", str(case.tokens)]
    )
    assert told.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_jumps_changes_nothing(small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 2e9 - 1e6 * next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: 10**18 - 10**15 * next(jumps))
    case = small.at(tmp_path / "out")
    case.interrupt(at=2, checkpoint_every=0.001)
    case.resume()
    case.check()


def test_outside_the_main_thread_signals_are_left_alone(small: Case, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    settings = {"calibration": (str(small.tokens),), **small.settings}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, RunSettings(model=str(small.model), output=tmp_path / "out", **settings), True).result()
    assert tree_bytes(tmp_path / "out") == small.expected
