"""Scoring, runs whose choice needs all layers, and pruning: nothing done is lost, whatever comes between."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import OutputError, ResumeError
from streamprune.streaming.forward import LayerForward
from tests.faults import Injected
from tests.helpers import tree_bytes
from tests.interruptions import Command, breaking_at, call, ending_at, status

#: Of every kind with four blocks, the records after which there is more to be lost: of blocks scored, or written.
MOMENTS = [("score", 3), ("global", 3), ("global", 7), ("protected", 6), ("prune", 3)]


# Going on


@pytest.mark.parametrize(("kind", "record"), MOMENTS)
def test_it_goes_on_with_the_same_command_or_resume(
    made: dict[str, Command], tmp_path: Path, kind: str, record: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = made[kind].at(tmp_path / "out")
    command.interrupt(at=record)
    kept = Path(shutil.copytree(command.work, tmp_path / "kept"))
    scored, usual = [], LayerForward.run_layer

    def run_layer(self: LayerForward, index: int, *more: Any) -> Any:
        scored.append(index)
        return usual(self, index, *more)

    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    for words in (command.words(), ["resume", command.work, "--quiet"]):
        assert not command.output.exists()
        shutil.rmtree(command.work, ignore_errors=True)
        shutil.copytree(kept, command.work)
        scored.clear()
        done = call(*words)
        assert (done.exit_code, done.stderr) == (0, "")
        command.check()
        # Four sequences go through the block that was not recorded, and those behind it.
        blocks = [] if kind == "prune" or record > 4 else [2, 3]
        assert scored == [block for block in blocks for _ in range(4)]
        shutil.rmtree(command.output) if command.output.is_dir() else command.output.unlink()


@pytest.mark.parametrize("first", [0, 3])
def test_from_layer_where_blocks_were_written(made: dict[str, Command], tmp_path: Path, first: int) -> None:
    command = made["global"].at(tmp_path / "out")
    command.interrupt(at=8)
    assert status(command)["written"] == [0, 1]
    command.resume(from_layer=first)
    command.check()


def test_several_ends_on_the_way(made: dict[str, Command], tmp_path: Path) -> None:
    command = made["global"].at(tmp_path / "out")
    for record in (2, 1, 3, 2, 3):
        command.interrupt(at=record)
    command.run(resume="required")
    command.check()


def test_the_work_folder_alone_suffices(made: dict[str, Command], tmp_path: Path, monkeypatch: Any) -> None:
    """Relative paths in the first command, another folder, and the work folder moved."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    Path("schedule.json").write_text("[3, 8, 2, 5]")
    (tmp_path / "same").mkdir()
    for kind in ("protected", "prune"):
        goal = {"schedule": "schedule.json", "keep": None}
        whole, command = made[kind].at(tmp_path / "same" / kind), made[kind].at(Path(f"results/{kind}"))
        whole.run(**goal)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / "there")
            command.interrupt(at=3, **goal)
        shutil.move(command.work, tmp_path / "moved")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            command.resume(Path("moved"))
        assert command.found() == whole.found()
        assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("kind", ["score", "prune"])
def test_a_work_folder_on_another_disk(made: dict[str, Command], tmp_path: Path, elsewhere: Path, kind: str) -> None:
    command = made[kind].at(tmp_path / "out")
    command.interrupt(at=3, work_dir=elsewhere / "work")
    assert list(tmp_path.iterdir()) == []
    command.resume(elsewhere / "work")
    command.check()
    assert list(elsewhere.iterdir()) == []


# Telling


def test_status_tells_each_kind_apart(made: dict[str, Command], tmp_path: Path) -> None:
    for (kind, record), told, done, written in zip(
        MOMENTS,
        (
            "layers: 2 of 4 scored, 2 left; ",
            "layers: 2 of 4 scored, 0 of 4 written; ",
            "layers: 4 of 4 scored, 1 of 4 written; ",
            "layers: 4 of 4 scored, 0 of 4 written; ",
            "layers: 1 of 4 written, 3 left; ",
        ),
        (2, 2, 4, 4, 1),
        (0, 0, 1, 0, 1),
        strict=True,
    ):
        command = made[kind].at(tmp_path / f"{kind}-{record}" / "out")
        command.interrupt(at=record)
        found = status(command)
        assert found["command"] == ("run" if kind in ("global", "protected") else kind)
        assert (found["model"], found["output"]) == (str(command.model), str(command.output))
        assert (found["done"], found["written"]) == (list(range(done)), list(range(written)))
        text = call("status", command.work).stdout
        assert told in text
        assert text.endswith(f"Resume with: streamprune resume {command.work}\n")
        assert ("Hidden states were last saved in layer 2/3." in text) == (done == 2)


@pytest.mark.parametrize("kind", ["score", "prune"])
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_an_end_between_the_name_and_the_removal(
    made: dict[str, Command], tmp_path: Path, kind: str, place: str
) -> None:
    work = tmp_path / ("out.work" if place == "beside" else "work")
    changes = {} if place == "beside" else {"work_dir": work}
    for what in ("resume", "clean"):
        command = made[kind].at(tmp_path / "out")
        with ending_at("output renamed"):
            command.run(**changes)
        assert command.found() == command.expected
        text = call("status", work).stdout
        assert "The output is complete; `streamprune clean` removes this folder." in text
        done = call(what, work, *(["--json"] if what == "resume" else []))
        assert done.exit_code == 0, done.stderr
        if what == "resume":
            assert json.loads(done.stdout) == {"output": str(command.output), "complete": True}
        command.check()
        assert not work.exists()
        if place == "beside":
            assert status(command) == {"work_folder": str(work), "output": str(command.output), "complete": True}
            text = call("status", work).stdout
            assert text.startswith(f"Nothing is left to do: {work} is gone, and {command.output} is complete.")
            assert ("inspect" in text) == (kind == "score")
        shutil.rmtree(command.output) if command.output.is_dir() else command.output.unlink()


@pytest.mark.parametrize(("kind", "record"), [("score", 3), ("prune", 3)])
def test_clean_leaves_what_is_needed_and_with_all_gives_it_up(
    made: dict[str, Command], tmp_path: Path, kind: str, record: int
) -> None:
    command = made[kind].at(tmp_path / "out")
    command.interrupt(at=record)
    assert call("clean", command.work).exit_code == 0
    command.resume()
    command.check()
    command = made[kind].at(tmp_path / "other")
    with ending_at({"score": "scores written", "prune": "all written"}[kind]):
        command.run(work_dir=tmp_path / "work")
    assert call("clean", "--all", tmp_path / "work").exit_code == 0
    assert not list(tmp_path.glob("*work")), "also the folder that lay beside the output"
    assert not command.output.exists()


def test_options_that_make_no_sense_for_a_pruning_are_refused(made: dict[str, Command], tmp_path: Path) -> None:
    command = made["prune"].at(tmp_path / "out")
    command.interrupt(at=3)
    refused = call("resume", command.work, "--from-layer", 1, "--device", "cpu")
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"Error: {command.work} has an unfinished `streamprune prune`, which computes nothing. Leave out --device, "
        "--from-layer.\n"
    )
    assert call("resume", command.work, "--verify", "--quiet").exit_code == 0
    command.check()


# Each other's work folders


def test_one_kind_does_not_take_another_ones_work(made: dict[str, Command], tmp_path: Path) -> None:
    def refused(kind: str, words: str) -> None:
        before = tree_bytes(tmp_path / "out.work")
        told = call(*made[kind].at(tmp_path / "out").words())
        assert told.exit_code == 1
        assert re.search(words, told.stderr), told.stderr
        before["streamprune.lock"] = f"{os.getpid()}\n".encode()
        assert tree_bytes(tmp_path / "out.work") == before, "nothing is touched"

    made["prune"].at(tmp_path / "out").interrupt(at=4)
    refused("global", "has an unfinished `streamprune prune`. Resume it .streamprune resume .* --resume never")
    refused("score", "has an unfinished `streamprune prune`")
    with pytest.raises(ResumeError, match=f"Resume with: streamprune resume {tmp_path}/out.work"):
        made["global"].at(tmp_path / "out").resume()
    made["score"].at(tmp_path / "out").run(resume="never")
    made["score"].at(tmp_path / "out").check()
    (tmp_path / "out").unlink()
    made["score"].at(tmp_path / "out").interrupt(at=3)
    refused("prune", "has an unfinished run. Resume it")
    refused("global", "only-score: True then, False now")
    made["score"].at(tmp_path / "out").resume()
    made["score"].at(tmp_path / "out").check()


def test_another_choice_begins_anew_unless_resuming_is_required(made: dict[str, Command], tmp_path: Path) -> None:
    command = made["prune"].at(tmp_path / "out")
    command.interrupt(at=4)
    with pytest.raises(ResumeError, match="another selection of experts"):
        command.run(keep=4, resume="required")
    command.run(keep=4)
    assert command.found() != command.expected
    with pytest.raises(ResumeError, match="has nothing to resume"):
        made["prune"].at(tmp_path / "none").run(resume="required")
    assert not (tmp_path / "none.work").exists()


def test_a_pruning_whose_model_was_changed_takes_nothing_up(made: dict[str, Command], tmp_path: Path) -> None:
    model = Path(shutil.copytree(made["prune"].model, tmp_path / "model"))
    command = Command("prune", model, model, made["prune"].scores, tmp_path / "out", made["prune"].expected)
    command.interrupt(at=4)
    os.utime(min(model.glob("*.safetensors")))
    with pytest.raises(ResumeError, match="other files of the model"):
        command.resume()
    with breaking_at(3), pytest.raises(Injected):
        command.run()
    assert status(command)["written"] == [0], "what was copied before is not believed"
    command.run()
    command.check()


@pytest.mark.parametrize("kind", ["score", "prune"])
def test_a_second_command_is_refused_and_names_the_first(made: dict[str, Command], tmp_path: Path, kind: str) -> None:
    command = made[kind].at(tmp_path / "out")
    hold = (
        "import signal, sys; from pathlib import Path; from streamprune.work.folder import WorkFolder\n"
        "WorkFolder(Path(sys.argv[1])).__enter__(); print('held', flush=True); signal.pause()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(command.work)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for changes in ({}, {"work_dir": tmp_path / "work"}, {"resume": "never"}):
        with pytest.raises(OutputError, match=rf"Another run \(pid {holder.pid}\) is working in {command.work}"):
            command.run(**changes)
    holder.kill()
    holder.communicate()
    command.run()
    command.check()
