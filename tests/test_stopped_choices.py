"""`score`, runs whose choice needs all layers, and `prune`: signals, full disks, and what was there before."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import OutputError, ResourceError
from streamprune.output import writer
from streamprune.pipeline import finish
from streamprune.work.folder import WorkFolder
from tests.faults import trap
from tests.interruptions import Command, call, ending_at

# Stopping


STOPS = [
    ("score", WorkFolder, "write_layer", 2),
    ("score", finish, "check_scores_file", 1),
    ("global", WorkFolder, "write_layer", 3),
    ("global", WorkFolder, "write_layer", 5),
    ("global", writer.OutputWriter, "_check_sizes", 1),
    ("prune", WorkFolder, "write_layer", 1),
    ("prune", WorkFolder, "write_layer", 3),
    ("prune", writer.OutputWriter, "verify", 1),
]


@pytest.mark.parametrize(("kind", "owner", "name", "nth"), STOPS)
def test_a_signal_is_answered_with_the_command_to_go_on(
    short: dict[str, Command], tmp_path: Path, kind: str, owner: Any, name: str, nth: int
) -> None:
    command = short[kind].at(tmp_path / "it's here" / "out")
    command.output.parent.mkdir()
    usual, calls = getattr(owner, name), 0

    def signalled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[nth % 2])
        return usual(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, signalled)
        told = call(*command.words("--verify") if kind == "prune" else command.words())
    assert calls >= nth
    assert told.exit_code == 75, told.output
    assert not command.output.exists()
    (typed,) = re.findall(r"Resume with: streamprune (.*)\n", told.stderr)
    assert shlex.split(typed) == ["resume", str(command.work)]
    assert call(*shlex.split(typed), "--quiet").exit_code == 0
    command.check()


def test_a_signal_before_anything_is_done_leaves_nothing(
    short: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.pipeline import prune as pruning

    def check_place(settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pruning, "check_place", check_place)
    assert call(*short["prune"].at(tmp_path / "out").words()).exit_code == 130
    assert list(tmp_path.iterdir()) == []


# Disks that fail


@pytest.mark.parametrize("kind", ["score", "global", "prune"])
def test_any_write_may_fail_once(short: dict[str, Command], tmp_path: Path, kind: str, thoroughly: bool) -> None:
    with trap(tmp_path) as counted:
        short[kind].at(tmp_path / "counted").run()
    calls = counted.calls or []
    kinds = {re.sub(r"[0-9]+", "0", call): number for number, call in enumerate(calls, 1)}
    numbers = sorted(kinds.values())
    if kind != "prune":
        # What they share with every run is seen to in test_faults: here what comes after the scoring, in part.
        scored = max(number for number, call in enumerate(calls, 1) if call == "rename cursor.json.partial")
        numbers = [number for number in numbers if number > scored][:: 3 if kind == "global" else 2]
    failed = 0
    for number in numbers if thoroughly else numbers[::3]:
        code = (errno.ENOSPC, errno.EIO)[number % 2]
        command = short[kind].at(tmp_path / f"out-{number}" / "out")
        command.output.parent.mkdir()
        with trap(tmp_path, number, code) as one:
            try:
                command.run()
                problem = None
            except (ResourceError, OutputError) as error:
                problem = str(error)
            assert len(one.calls or []) >= number, "the call was never made"
        assert command.found() in ({}, command.expected)
        if problem is not None:
            failed += 1
            assert ("No space left" if code == errno.ENOSPC else "Input/output error") in problem, calls[number - 1]
            assert str(tmp_path) in problem
        if not command.output.exists():
            command.run()
        assert command.found() == command.expected, calls[number - 1]
        shutil.rmtree(command.output.parent)
    assert failed > (3 if thoroughly else 0)


def test_older_scores_stay_until_the_new_ones_are_whole(
    short: dict[str, Command], made: dict[str, Command], tmp_path: Path
) -> None:
    command, older = short["score"].at(tmp_path / "out"), made["score"].expected["scores"]
    command.output.write_bytes(older)
    with pytest.raises(OutputError, match=r"out exists\. Choose another name with -o, or add --overwrite"):
        command.run()
    with trap(tmp_path) as counted:
        command.run(overwrite=True)
    calls = counted.calls or []
    (named,) = (number for number, call in enumerate(calls, 1) if call == "rename scores.safetensors")
    for number in range(named - 4, named + 1):
        command.output.write_bytes(older)
        with trap(tmp_path, number, errno.EIO), pytest.raises(OutputError):
            command.run(overwrite=True)
        assert command.output.read_bytes() == older
        command.resume()
        command.check()


def test_what_is_no_regular_file_is_not_replaced_by_scores(short: dict[str, Command], tmp_path: Path) -> None:
    command = short["score"].at(tmp_path / "pipe")
    os.mkfifo(command.output)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match="is not a regular file, so it is not replaced"):
            command.at(tmp_path / name).run(overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_model_that_was_moved_aside_is_not_lost_to_scores_of_its_name(
    short: dict[str, Command], tmp_path: Path
) -> None:
    """A run that was to replace it was killed; then somebody gives its name to scores."""
    model = short["global"].at(tmp_path / "out")
    model.run(keep=4)
    old = model.found()
    with ending_at("old output moved aside"):
        model.run(overwrite=True)
    with pytest.raises(OutputError, match="out is a folder"):
        short["score"].at(tmp_path / "out").run(resume="never", overwrite=True)
    assert model.found() == old
