"""Where a run works: other disks, folders in the way, long and odd names, and two runs at the same place."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamprune.checkpoint import safetensors_file
from streamprune.cli import main
from streamprune.errors import CheckpointError, OutputError, SettingsError
from streamprune.pipeline.run import resume
from streamprune.pipeline.status import clean_up
from streamprune.work.folder import WorkFolder
from tests.faults import Case, Injected, make_case
from tests.helpers import tree_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("made"), blocks=2)


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    return made.at(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_work_folder_on_another_disk(case: Case, elsewhere: Path, overwrite: bool) -> None:
    if overwrite:
        case.run(keep=3)
    case.run(work_dir=elsewhere / "work", overwrite=overwrite)
    case.check()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_mounts_of_one_device(case: Case, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the same device number, and still no rename leads from one to the other."""
    usual = Path.rename
    mount = tmp_path / "mount"

    def rename(path: Path, target: Path) -> Path:
        if path.is_relative_to(mount) != Path(target).is_relative_to(mount):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return usual(path, target)

    if overwrite:
        case.run(keep=3)
    monkeypatch.setattr(Path, "rename", rename)
    case.run(work_dir=mount / "work", overwrite=overwrite)
    case.check()
    assert not (mount / "work").exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_end_in_the_middle_of_replacing(
    case: Case, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume` is not taken in by the old output, and the old one is never lost before the new one has its name."""
    case.run(keep=3)
    old = tree_bytes(case.output)

    def reached(point: str) -> None:
        if point == {"before": "old output moved aside", "after": "output renamed"}[when]:
            raise Injected

    monkeypatch.setattr("streamprune.output.writer.kill_point", reached)
    with pytest.raises(Injected):
        case.run(overwrite=True, work_dir=tmp_path / "work")
    monkeypatch.undo()
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-kept"))
    assert CliRunner().invoke(main, ["clean", "--all", str(tmp_path / "work")]).exit_code == 0
    assert tree_bytes(case.output) == (old if when == "before" else case.expected)
    shutil.rmtree(tmp_path)
    tmp_path.with_name(tmp_path.name + "-kept").rename(tmp_path)
    resume(tmp_path / "work", quiet=True)
    assert tree_bytes(case.output) == case.expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


def test_resume_is_not_taken_in_by_an_old_output(case: Case) -> None:
    case.run(keep=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.work.records.kill_point", raise_injected)
        patch.setattr(WorkFolder, "remove", lambda self: None)  # as after a kill
        with pytest.raises(Injected):
            case.run(overwrite=True)
    case.resume()
    case.check()


def raise_injected(point: str) -> None:
    raise Injected


def test_a_second_run_is_refused_and_names_the_first(case: Case, tmp_path: Path) -> None:
    hold = f"""
import signal
from pathlib import Path
from streamprune.work.folder import WorkFolder
WorkFolder(Path({str(case.work)!r})).__enter__()
print("held", flush=True)
signal.pause()
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for settings in ({}, {"work_dir": tmp_path / "work"}, {"resume": "never"}):
        with pytest.raises(OutputError, match=rf"Another run \(pid {holder.pid}\) is working in {case.work}"):
            case.run(**settings)
    assert not (tmp_path / "work").exists()
    with pytest.raises(OutputError, match=f"pid {holder.pid}"):
        clean_up(case.work, everything=True)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    case.run()
    case.check()


@pytest.mark.parametrize("name", ["a b", "it's", 'say "hi"', "größer 模型", "two\nlines", "-o", "$HOME;ls", "x" * 255])
def test_odd_names(made: Case, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = made.at(Path(name))
    case.run()
    assert tree_bytes(tmp_path / name) == case.expected
    found = {path.name for path in tmp_path.iterdir()}
    assert len(found) == 2
    assert all(len(os.fsencode(each)) <= 255 for each in found)
    assert any(each.endswith(".streamprune.log") for each in found)


def test_a_name_of_255_bytes_can_be_resumed(made: Case, tmp_path: Path) -> None:
    from streamprune.config import RunSettings
    from streamprune.pipeline.run import run

    name = "ü" * 127 + "x"
    case = made.at(tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.output.writer.OutputWriter.finish", lambda *_: raise_injected(""))
        with pytest.raises(Injected):
            case.run()
    (work,) = tmp_path.iterdir()
    assert work.name.endswith(".work")
    assert len(os.fsencode(work.name)) in (254, 255)
    resume(work, quiet=True)
    assert tree_bytes(case.output) == case.expected
    # Another name that begins in the same way has a folder of its own.
    one, other = (
        RunSettings(model="m", output=tmp_path / ("y" * 254 + end), keep=1).output_work_folder for end in "ab"
    )
    assert one != other
    with pytest.raises(SettingsError, match="longer than the 255 bytes"):
        run(RunSettings(model="m", output=tmp_path / ("y" * 256), keep=1))


def in_the_way(path: Path) -> Path:
    path.write_text("mine")
    return path


def test_places_where_nothing_can_be_made(case: Case, tmp_path: Path) -> None:
    file = in_the_way(tmp_path / "file")
    for settings, message in (
        ({"work_dir": file}, "cannot be written"),
        ({"work_dir": file / "work"}, "cannot be written|failed"),
        ({"work_dir": case.output}, "must not be, or contain, one another"),
        ({"work_dir": case.output / "work"}, "must not be, or contain, one another"),
    ):
        with pytest.raises(OutputError, match=message):
            case.run(**settings)
    with pytest.raises(OutputError, match=r"cannot be written|failed"):
        case.at(file / "out").run()
    in_the_way(case.work)
    with pytest.raises(OutputError, match=r"out\.work"):
        case.run()
    assert file.read_text() == case.work.read_text() == "mine"


def test_a_work_folder_that_is_a_link_to_another_disk_is_refused(case: Case, elsewhere: Path) -> None:
    case.work.symlink_to(elsewhere)
    with pytest.raises(OutputError, match=r"is on another disk than .* with --work-dir"):
        case.run()


def test_a_source_shard_that_breaks_in_mid_run(made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    case = Case(model, made.tokens, tmp_path / "out", made.settings, made.expected)
    shard = sorted(model.glob("*.safetensors"))[-1]
    whole, facts = shard.read_bytes(), shard.stat()

    def cut(point: str) -> None:
        if point == "block recorded":
            shard.write_bytes(whole[: len(whole) // 2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.work.folder.kill_point", cut)
        with pytest.raises(CheckpointError, match=shard.name):
            case.run()
    assert not case.output.exists()
    shard.write_bytes(whole)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    calls = 0

    def read_into(file: int, position: int, into: list[memoryview]) -> int:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(file, position, into)

    # Of the copying alone: the reader of whole layers has its own name for it.
    usual = safetensors_file.read_into
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "read_into", read_into)
        with pytest.raises(CheckpointError, match=r"cannot be read at byte .*error"):
            case.run()
    assert not case.output.exists()
    case.run()
    case.check()


def test_an_unreadable_tokenizer_file_is_told_as_the_models(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    usual = Path.open

    def open_(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == made.model / "tokenizer_config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return usual(path, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot"):
            case.run()
    case.resume()
    case.check()
