"""What `status` tells of a work folder, and what `clean` takes out of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streamprune.work.saved_states import DATA_NAME
from tests.faults import Case, Injected, damage, make_case
from tests.helpers import tree_bytes
from tests.interruptions import call, status


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("made"))


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    case = made.at(tmp_path / "out")
    case.interrupt(at=2)
    return case


def generations(case: Case) -> list[str]:
    return sorted(path.name for path in (case.work / "states").iterdir())


def test_where_there_is_no_run(made: Case, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path, made.output):
        for command in ("status", "clean", "resume"):
            told = call(command, folder)
            assert told.exit_code == 1
            assert str(folder) in told.stderr
            assert len(told.stderr.splitlines()) == 1
    assert tree_bytes(made.output) == made.expected


def test_a_file_that_is_no_result_is_not_called_one(tmp_path: Path) -> None:
    for notes in (b"what to try next", b""):
        (tmp_path / "notes.txt").write_bytes(notes)
        for command in ("status", "resume"):
            told = call(command, tmp_path / "notes.txt.work")
            assert (told.exit_code, "complete" in told.output, "it does not exist" in told.stderr) == (1, False, True)


def test_where_the_run_is_elsewhere(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The output is named instead of its work folder.
    for command in ("status", "clean", "resume"):
        told = call(command, case.output)
        assert (told.exit_code, told.stderr.splitlines()) == (1, [told.stderr.strip()])
        assert told.stderr.endswith(f"An unfinished run is in {case.work}.\n")
    # The current folder, without and with a run in it.
    monkeypatch.chdir(tmp_path)
    for command in ("status", "clean", "resume"):
        assert call(command, Path()).stderr.endswith("The work folder of an unfinished run is OUT.work.\n")
    monkeypatch.chdir(case.work)
    assert "layers: 2 of 4 done, 2 left" in call("status", Path()).output


def test_in_the_middle(case: Case) -> None:
    found = status(case)
    assert found == {
        "work_folder": str(case.work),
        "command": "run",
        "model": str(case.model),
        "output": str(case.output),
        "stop_if_kl": None,
        "complete": False,
        "running": None,
        "blocks": 4,
        "done": [0, 1],
        "left": [2, 3],
        "written": [0, 1],
        "states_saved_in_block": 2,
        "bytes": sum(map(len, tree_bytes(case.work).values())),
    }
    told = call("status", case.work).stdout
    assert "layers: 2 of 4 done, 2 left; " in told
    assert "Hidden states were last saved in layer 2/3." in told
    assert told.endswith(f"Resume with: streamprune resume {case.work}\n")


def test_while_a_run_works(case: Case) -> None:
    """From another process; and a look does not disturb the run."""
    lock = (
        "import signal, sys; from pathlib import Path; from streamprune.work.folder import WorkFolder\n"
        "WorkFolder(Path(sys.argv[1])).__enter__(); print('held', flush=True); signal.pause()"
    )
    holder = subprocess.Popen([sys.executable, "-c", lock, str(case.work)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    before = tree_bytes(case.work)
    assert status(case)["running"] == str(holder.pid)
    assert f"Process {holder.pid} is working on it." in call("status", case.work).stdout
    refused = call("clean", case.work, "--all")
    assert (refused.exit_code, f"pid {holder.pid}" in refused.stderr) == (1, True)
    assert tree_bytes(case.work) == before
    holder.kill()
    holder.communicate()
    assert status(case)["running"] is None, "a lock whose holder is gone holds nothing"


def test_clean_leaves_what_a_resume_needs(case: Case) -> None:
    assert generations(case) == ["1", "2"]
    told = call("clean", case.work)
    assert told.exit_code == 0
    removed, left = told.stdout.splitlines()
    assert "KiB removed from" in removed
    assert left.endswith(f"which --all discards. Resume it with: streamprune resume {case.work}")
    assert generations(case) == ["2"]
    case.resume()
    case.check()


def test_clean_keeps_the_generation_that_is_whole(case: Case) -> None:
    damage(case.work / "states" / "2" / DATA_NAME, "flip")
    assert call("clean", case.work).exit_code == 0
    assert generations(case) == ["1"]
    case.resume()
    case.check()


def test_clean_all_gives_it_up(case: Case) -> None:
    size = status(case)["bytes"]
    assert size > 0
    told = call("clean", case.work, "--all")
    assert (told.exit_code, "Resume" in told.stdout) == (0, False)
    assert not case.work.exists()
    assert call("status", case.work).exit_code == 1


def test_a_run_that_ended_before_its_work_folder_was_removed(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(point: str) -> None:
        if point == "output renamed":
            raise Injected

    monkeypatch.setattr("streamprune.output.writer.kill_point", reached)
    for command in (("status",), ("clean",), ("resume", "--quiet")):
        case = made.at(tmp_path / f"out-{command[0]}")
        with pytest.raises(Injected):
            case.run()
        assert status(case)["complete"]
        assert "The output is complete; `streamprune clean` removes" in call("status", case.work).stdout
        done = call(command[0], case.work, *command[1:])
        assert done.exit_code == 0, done.stderr
        if command[0] != "status":
            case.check()


def test_the_command_line_resumes(case: Case) -> None:
    done = call("resume", case.work, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(case.output)
    assert "resuming: 2 of 4 layers are done" in done.stderr
    case.check()
