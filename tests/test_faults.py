"""Faults of disks and files: every write that can fail fails once, every file in the work folder is damaged once."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamprune.cli import main
from streamprune.errors import OutputError, ResourceError, ResumeError
from streamprune.files.durable import sync_file, write_atomically
from tests.faults import Case, damage, make_case, trap
from tests.helpers import tree_bytes
from tests.thorough import mostly_thorough


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One with two blocks, for what has to be run a hundred times."""
    return make_case(tmp_path_factory.mktemp("short"), blocks=2)


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    return made.at(tmp_path / "out")


def test_a_file_is_flushed_before_it_has_its_name_and_the_name_after_it(tmp_path: Path) -> None:
    """What a power cut would show, and no kill does."""
    with trap(tmp_path) as counted:
        write_atomically(tmp_path / "file", b"new")
    folder = tmp_path.name
    assert counted.calls == [
        "open file.partial", "write file.partial", "fsync file.partial", "rename file.partial", f"fsync {folder}",
    ]  # fmt: skip
    with trap(tmp_path) as counted:
        sync_file(tmp_path / "file")
    assert counted.calls == ["fsync file"]


def nothing_half_done(case: Case) -> None:
    """Whatever lies under the output's name is the whole of it."""
    if case.output.exists():
        assert tree_bytes(case.output) == case.expected


def failure_of(case: Case) -> str | None:
    """What a run says when it fails; None if it does not."""
    try:
        case.run()
    except (ResourceError, OutputError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("part", mostly_thorough(range(4), (1,)))
def test_any_write_may_fail_once(short: Case, tmp_path: Path, part: int) -> None:
    with trap(tmp_path) as counted:
        short.at(tmp_path / "counted").run()
    calls = counted.calls or []
    assert len(calls) > 100
    # The last of each kind: of the states only that of one generation, of the shards only one.
    kinds = {re.sub(r"[0-9]+", "0", call): number for number, call in enumerate(calls, 1)}
    failed = 0
    for number in sorted(kinds.values())[part::4]:
        code = (errno.ENOSPC, errno.EIO)[number % 2]
        case = short.at(tmp_path / f"out-{number}" / "out")
        case.output.parent.mkdir()
        with trap(tmp_path, number, code) as one:
            problem = failure_of(case)
            assert len(one.calls or []) >= number, "the call was never made"
        nothing_half_done(case)
        if problem is not None:
            failed += 1
            told = "No space left" if code == errno.ENOSPC else "Input/output error"
            assert told in problem, calls[number - 1]
            assert str(tmp_path) in problem
        if not case.output.exists():
            case.run()
        assert tree_bytes(case.output) == case.expected, calls[number - 1]
        shutil.rmtree(case.output.parent)
    assert failed > 5


def test_any_write_may_fail_in_a_run_that_replaces_an_output(short: Case, tmp_path: Path, thoroughly: bool) -> None:
    case = short.at(tmp_path / "out")
    case.run(keep=3)
    old = tree_bytes(case.output)
    with trap(tmp_path) as counted:
        case.run(overwrite=True)
    assert tree_bytes(case.output) == case.expected
    calls = counted.calls or []
    for number in range(len(calls) - 11, len(calls) + 1, 1 if thoroughly else 3):
        shutil.rmtree(case.output)
        case.run(keep=3)
        with trap(tmp_path, number, errno.EIO):
            try:
                case.run(overwrite=True)
            except OutputError:
                moved = case.work / "replaced"
                assert tree_bytes(case.output if case.output.exists() else moved) in (old, case.expected)
        case.run(overwrite=True)
        assert tree_bytes(case.output) == case.expected, calls[number - 1]


HOW = ["cut", "flip", "empty", "remove"]


def files_of(folder: Path) -> list[str]:
    return [name for name in tree_bytes(folder) if name != "streamprune.lock"]


@pytest.mark.parametrize("how", mostly_thorough(HOW, ("flip", "remove")))
def test_any_file_of_the_work_folder_may_be_damaged(made: Case, tmp_path: Path, how: str, thoroughly: bool) -> None:
    first = made.at(tmp_path / "out")
    first.interrupt(at=3)
    keep = tmp_path / "kept"
    shutil.copytree(first.work, keep)
    names = files_of(keep)
    assert {name.partition("/")[0] for name in names} >= {"run.json", "tokens.json", "layers", "states", "model"}
    if not thoroughly:
        # Of several that are alike one is enough.
        names = list({re.sub(r"[0-9]+", "0", name): name for name in names}.values())
    for number, name in enumerate(names):
        for folder in (first.output, first.work):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(keep, first.work)
        damage(first.work / name, how)
        (first.run, first.resume)[number % 2]()
        first.check()


@pytest.mark.parametrize("how", mostly_thorough(HOW, ("cut",)))
def test_a_record_whose_copy_is_damaged_as_well_is_named(made: Case, tmp_path: Path, how: str) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=3)
    for name in ("tokens.json", "tokens.copy.json"):
        damage(case.work / name, how)
    with pytest.raises(ResumeError, match=r"tokens\.json is damaged"):
        case.resume()
    assert case.work.exists(), "a refusal takes nothing away"
    shutil.copytree(case.work, tmp_path / "kept")
    case.run()
    case.check()
    (tmp_path / "kept").rename(case.work)
    shutil.rmtree(case.output)
    for name in ("run.json", "run.copy.json"):
        damage(case.work / name, how)
    with pytest.raises(ResumeError, match=r"run\.json and its copy are missing or damaged"):
        case.run()
    with pytest.raises(ResumeError, match="has no run to resume"):
        case.resume()
    case.run(resume="never")
    case.check()


def test_the_command_line_tells_a_full_disk_in_one_message(short: Case, tmp_path: Path) -> None:
    case = short.at(tmp_path / "out")
    command = ["run", case.model, "-o", case.output, "--keep", 5, "--batch-tokens", 24, "--checkpoint-every", 0]
    with trap(tmp_path) as counted:
        case.at(tmp_path / "counted").run()
    (number, *_) = (at for at, call in enumerate(counted.calls or [], 1) if call == "write data.bin.partial")
    with trap(tmp_path, number):
        told = CliRunner().invoke(main, list(map(str, [*command, "--calibration", case.tokens, "--quiet"])))
    assert told.exit_code == 1
    assert isinstance(told.exception, SystemExit)
    assert told.stderr.startswith(f"Error: Saving the hidden states in {case.work}/states failed: the disk")
    assert "free. Free space. Then run the same command again: finished work is kept." in told.stderr
    assert len(told.stderr.splitlines()) == 1
    case.resume()
    case.check()


def test_everything_but_the_record_of_the_run_may_be_lost(case: Case) -> None:
    case.interrupt(at=3)
    for name in ("states", "layers", "model"):
        shutil.rmtree(case.work / name)
    case.resume()
    case.check()
