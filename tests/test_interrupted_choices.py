"""Scoring, runs whose choice needs all layers, and pruning: nothing done is lost, whatever comes between."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from streamprune.choice import choose
from streamprune.cli import main
from streamprune.errors import (
    InterruptedRunError,
    OutputError,
    ResourceError,
    ResumeError,
    SettingsError,
    StreampruneError,
    VerifyError,
)
from streamprune.output import finish, writer
from streamprune.scores.file import read_scores
from streamprune.scores.statistics import FIELDS, pack, unpack
from streamprune.streaming.stream import BlockStream
from streamprune.work.durable import read_record, write_record
from streamprune.work.folder import WorkFolder
from tests.faults import Injected, damage, trap
from tests.fuzz_targets import write_signed
from tests.helpers import tree_bytes
from tests.interruptions import KINDS, Command, breaking_at, ending_at, make_commands
from tests.tiny import make_model, tiny_config

#: Of every kind with four blocks, the records after which there is more to be lost: of blocks scored, or written.
MOMENTS = [("score", 3), ("global", 3), ("global", 7), ("protected", 6), ("prune", 3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    return make_commands(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """With two blocks, for what has to be done many times."""
    return make_commands(tmp_path_factory.mktemp("short"), blocks=2)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def status(command: Command) -> dict[str, Any]:
    told = call("status", command.work, "--json")
    assert told.exit_code == 0, told.stderr
    value = json.loads(told.stdout)
    assert isinstance(value, dict)
    return value


# Going on


@pytest.mark.parametrize(("kind", "record"), MOMENTS)
def test_it_goes_on_with_the_same_command_or_resume(
    made: dict[str, Command], tmp_path: Path, kind: str, record: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = made[kind].at(tmp_path / "out")
    command.interrupt(at=record)
    kept = Path(shutil.copytree(command.work, tmp_path / "kept"))
    scored, usual = [], BlockStream.run_block

    def run_block(self: BlockStream, index: int, *more: Any) -> Any:
        scored.append(index)
        return usual(self, index, *more)

    monkeypatch.setattr(BlockStream, "run_block", run_block)
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


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev or not os.access(shared, os.W_OK):
        pytest.skip("needs /dev/shm as another file system")
    folder = shared / f"streamprune-choices-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


# Telling


def test_status_tells_each_kind_apart(made: dict[str, Command], tmp_path: Path) -> None:
    for (kind, record), told, done, written in zip(
        MOMENTS,
        (
            "2 of 4 blocks are scored, 2 are left; ",
            "2 of 4 blocks are scored, 2 are left, and 0 of 4 are written; ",
            "4 of 4 blocks are scored, 0 are left, and 1 of 4 are written; ",
            "4 of 4 blocks are scored, 0 are left, and 0 of 4 are written; ",
            "1 of 4 blocks are written, 3 are left; ",
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
        assert text.endswith(f"Go on with: streamprune resume {command.work}\n")
        assert ("Hidden states were last saved in block 3." in text) == (done == 2)


@pytest.mark.parametrize("kind", ["score", "prune"])
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_an_end_between_the_name_and_the_removal(
    made: dict[str, Command], tmp_path: Path, kind: str, place: str
) -> None:
    work = tmp_path / ("out.work" if place == "beside" else "work")
    changes = {} if place == "beside" else {"work_dir": work}
    for what in ("resume", "clean"):
        command = made[kind].at(tmp_path / "out")
        with ending_at("output named"):
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
        f"Error: {command.work} holds what `streamprune prune` began, which computes nothing: leave out --device, "
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
    refused("global", "holds what `streamprune prune` began. Go on with it .streamprune resume .* --resume never")
    refused("score", "holds what `streamprune prune` began")
    with pytest.raises(ResumeError, match=f"Go on with: streamprune resume {tmp_path}/out.work"):
        made["global"].at(tmp_path / "out").resume()
    made["score"].at(tmp_path / "out").run(resume="never")
    made["score"].at(tmp_path / "out").check()
    (tmp_path / "out").unlink()
    made["score"].at(tmp_path / "out").interrupt(at=3)
    refused("prune", "holds an unfinished run. Go on with it")
    refused("global", "only-score: True then, False now")
    made["score"].at(tmp_path / "out").resume()
    made["score"].at(tmp_path / "out").check()


def test_another_choice_begins_anew_unless_resuming_is_required(made: dict[str, Command], tmp_path: Path) -> None:
    command = made["prune"].at(tmp_path / "out")
    command.interrupt(at=4)
    with pytest.raises(ResumeError, match="another choice of experts"):
        command.run(keep=4, resume="required")
    command.run(keep=4)
    assert command.found() != command.expected
    with pytest.raises(ResumeError, match="holds nothing that could be taken up"):
        made["prune"].at(tmp_path / "none").run(resume="required")
    assert not (tmp_path / "none.work").exists()


def test_a_pruning_whose_model_was_changed_takes_nothing_up(made: dict[str, Command], tmp_path: Path) -> None:
    model = Path(shutil.copytree(made["prune"].model, tmp_path / "model"))
    command = Command("prune", model, model, made["prune"].scores, tmp_path / "out", made["prune"].expected)
    command.interrupt(at=4)
    os.utime(min(model.glob("*.safetensors")))
    with pytest.raises(ResumeError, match="the model's files were others"):
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


# Stopping


STOPS = [
    ("score", WorkFolder, "write_block", 2),
    ("score", finish, "check_scores_file", 1),
    ("global", WorkFolder, "write_block", 3),
    ("global", WorkFolder, "write_block", 5),
    ("global", writer.OutputWriter, "_check_sizes", 1),
    ("prune", WorkFolder, "write_block", 1),
    ("prune", WorkFolder, "write_block", 3),
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
    (typed,) = re.findall(r"Go on with: streamprune (.*)\n", told.stderr)
    assert shlex.split(typed) == ["resume", str(command.work)]
    assert call(*shlex.split(typed), "--quiet").exit_code == 0
    command.check()


def test_a_signal_before_anything_is_done_leaves_nothing(
    short: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune import pruning

    def check_place(settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pruning, "check_place", check_place)
    assert call(*short["prune"].at(tmp_path / "out").words()).exit_code == 130
    assert list(tmp_path.iterdir()) == []


# Disks that fail


@pytest.mark.parametrize("kind", ["score", "global", "prune"])
def test_any_write_may_fail_once(short: dict[str, Command], tmp_path: Path, kind: str) -> None:
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
    for number in numbers:
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
    assert failed > 3


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
        with pytest.raises(OutputError, match="is no regular file, so that it is not replaced"):
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


# Records that are damaged, or somebody else's


@pytest.mark.parametrize("kind", ["global", "prune"])
def test_any_file_of_the_work_folder_may_be_damaged(short: dict[str, Command], tmp_path: Path, kind: str) -> None:
    command = short[kind].at(tmp_path / "out")
    command.interrupt(at={"global": 5, "prune": 3}[kind])
    kept = Path(shutil.copytree(command.work, tmp_path / "kept"))
    names = sorted(name for name in tree_bytes(kept) if name != "streamprune.lock")
    # Of several that are alike one is enough.
    for number, name in enumerate({re.sub(r"[0-9]+", "0", name): name for name in names}.values()):
        how = ("flip", "cut", "remove")[number % 3] if name != "pruning.json" else "remove"
        shutil.rmtree(command.work, ignore_errors=True)
        shutil.copytree(kept, command.work)
        damage(command.work / name, how)
        if name == "pruning.json":
            with pytest.raises(ResumeError, match=r"no record of what they are from\. Begin anew with --resume never"):
                command.run()
            command.run(resume="never")
        else:
            command.run()
        command.check()
        shutil.rmtree(command.output) if command.output.is_dir() else command.output.unlink()


def forge(command: Command, block: int, change: Any) -> None:
    """Put another record in the place of a block's, with a checksum that is right."""
    path = command.work / "blocks" / f"{block:05d}.json"
    body = read_record(path)
    change(body)
    write_record(path, body)


def restate(field: str, value: float) -> Any:
    def change(body: dict[str, Any]) -> None:
        values = unpack(body["result"]["statistics"], 1, 8)
        values[list(FIELDS).index(field), 0, 3] = value
        body["result"]["statistics"] = pack(values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(kept=[0, 1, 2, 3, 4]),
        lambda body: body.update(kept=[0] * 5),
        lambda body: body.update(kept=[2**62]),
        lambda body: body["shards"][0].update(file="../../evil"),
        lambda body: body["shards"][0].update(nbytes=0),
        lambda body: body["shards"].clear(),
        lambda body: body["shards"].append(body["shards"][0]),
        lambda body: body.update(result=None),
        restate("tokens", 1e6),
        restate("top_choices", 90.0),
        restate("cosines", 1e5),
        restate("peaks", 1e200),
    ],
)
def test_records_that_nothing_here_wrote_change_nothing(short: dict[str, Command], tmp_path: Path, change: Any) -> None:
    for kind in ("global", "prune"):
        command = short[kind].at(tmp_path / kind)
        command.interrupt(at={"global": 5, "prune": 3}[kind])
        forge(command, 0, change)
        assert call("status", command.work).exit_code == 0
        command.resume()
        command.check()


@pytest.mark.parametrize("field", ["tokens", "gated_norms"])
def test_sums_saved_in_mid_block_that_no_tokens_give_are_not_believed(
    made: dict[str, Command], tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = made["score"].at(tmp_path / "out")
    usual, calls = BlockStream.run_block, 0

    def run_block(self: BlockStream, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockStream, "run_block", run_block)
        with pytest.raises(InterruptedRunError):
            command.run()
    index = max((command.work / "states").glob("*/index.json"), key=lambda path: int(path.parent.name))
    body = read_record(index)
    values = unpack(body["facts"]["statistics"], 1, 8)
    values[list(FIELDS).index(field)] = 1e150 if field == "gated_norms" else 1e6
    body["facts"]["statistics"] = pack(values)
    write_record(index, body)
    command.resume()
    command.check()


@pytest.mark.parametrize("kind", ["global", "prune"])
def test_shards_of_another_choice_are_found_out_and_written_again(
    made: dict[str, Command], tmp_path: Path, kind: str
) -> None:
    """With records that vouch for them: only the comparison with the source can tell. No block is scored again."""
    command = made[kind].at(tmp_path / "out")
    command.interrupt(at={"global": 8, "prune": 4}[kind])
    shard = min((command.work / "model").glob("*.safetensors"))
    other = max((command.work / "model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4:] = other.read_bytes()[-4:]
    shard.write_bytes(data)
    import hashlib

    for block in ("outside", "00000", "00001"):
        path = command.work / "blocks" / f"{block}.json"
        body = read_record(path)
        for each in body["shards"]:
            if each["file"] == shard.name:
                each["sha256"] = hashlib.sha256(data).hexdigest()
        write_record(path, body)
    with pytest.raises(VerifyError, match=f"{shard.name}.* differs from the source"):
        command.resume(verify=True)
    assert status(command)["written"] == []
    assert len(status(command)["done"]) == (4 if kind == "global" else 0)
    command.resume(verify=True)
    command.check()


def test_what_lies_among_the_shards_does_not_get_into_the_output(made: dict[str, Command], tmp_path: Path) -> None:
    for kind in ("global", "prune"):
        command = made[kind].at(tmp_path / kind)
        command.interrupt(at=3)
        staging = command.work / "model"
        (staging / "modeling_evil.py").write_text("print('evil')")
        (staging / "model-00009-of-00009.safetensors").write_bytes(b"of another choice")
        (staging / "scores").mkdir()
        (staging / "scores" / "more").write_text("more")
        (staging / "link").symlink_to(tmp_path)
        command.resume()
        command.check()
    assert tmp_path.is_dir()


def test_a_staging_folder_that_leads_elsewhere_is_refused(made: dict[str, Command], tmp_path: Path) -> None:
    command = made["prune"].at(tmp_path / "out")
    command.interrupt(at=3)
    mine = tmp_path / "mine"
    (command.work / "model").rename(mine)
    (mine / "thesis.txt").write_text("mine")
    (command.work / "model").symlink_to(mine)
    with pytest.raises(OutputError, match="is a link, which nothing here makes"):
        command.run()
    assert (mine / "thesis.txt").read_text() == "mine"
    command.run(resume="never")
    command.check()
    assert (mine / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.clear(),
        lambda body: body.update(blocks=-1),
        lambda body: body.update(blocks=10**12),
        lambda body: body.update(command=7),
        lambda body: body.update(decided=None),
        lambda body: body["command"].update(model="a\0b"),
        lambda body: body["command"].update(keep="5"),
        lambda body: body["command"].update(keep=10**400),
        lambda body: body["command"].update(scores=[1]),
        lambda body: body["command"].update(scores=None),
        lambda body: body["command"].update(more=1),
        lambda body: body["command"].pop("model"),
        lambda body: body["command"].update(ratio=float("nan"), keep=None),
        lambda body: body["command"].update(output="x" * 5000),
        lambda body: body["command"].update(trust_remote_code=True),
        lambda body: body["decided"].update(kept={"0": "all"}),
        lambda body: body["decided"].update(source="another"),
    ],
)
def test_a_pruning_record_of_a_stranger_ends_in_one_message(
    short: dict[str, Command], tmp_path: Path, change: Any
) -> None:
    command = short["prune"].at(tmp_path / "out")
    command.interrupt(at=3)
    body = read_record(command.work / "pruning.json")
    change(body)
    write_signed(command.work / "pruning.json", body)
    for words in (["resume", command.work, "--quiet"], ["status", command.work], ["clean", command.work]):
        told = call(*words)
        assert told.exit_code in (0, 1, 2), told.output
        if told.exit_code:
            assert told.stderr.startswith("Error: ")
            assert len(told.stderr.splitlines()) == 1
            assert len(told.stderr) < 1500
            assert words[0] != "status" or str(command.work) in told.stderr
    assert not command.output.exists(), "none of these is what the scores choose"
    command.run(resume="never")
    command.check()


def test_a_pruning_record_of_another_model(made: dict[str, Command], tmp_path: Path) -> None:
    """It names a model whose scores these are not, and an output of its own; the work folder is elsewhere."""
    other = make_model(tmp_path / "other", tiny_config(next(iter_families())), seed=9)
    command = made["prune"].at(tmp_path / "out")
    command.interrupt(at=4)
    body = read_record(command.work / "pruning.json")
    body["command"]["model"] = str(other)
    write_signed(command.work / "pruning.json", body)
    told = call("resume", command.work)
    assert told.exit_code == 1
    assert "Give the very model that was scored" in told.stderr
    command.run()
    command.check()


def iter_families() -> Iterator[Any]:
    from tests.helpers import known_family

    yield known_family("qwen3_moe")


# A choice that cannot be made


def test_scores_are_left_where_no_choice_can_be_made(
    made: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = made["protected"].at(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(choose, "super_experts", lambda layers, weights: {1: (0, 1, 2)})
        with pytest.raises(SettingsError, match=rf"Layer 1: .* All blocks are scored; .* --scores {tmp_path}/out\."):
            command.run(keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out.scores.safetensors"]
    left, scored = read_scores(tmp_path / "out.scores.safetensors"), read_scores(command.scores)
    for one, other in zip(left.layers, scored.layers, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
    made["prune"].at(tmp_path / "out").run(scores=tmp_path / "out.scores.safetensors")
    assert made["prune"].at(tmp_path / "out").found() == made["prune"].expected


def test_pruned_states_need_a_choice_that_is_made_on_the_way(made: dict[str, Command], tmp_path: Path) -> None:
    (tmp_path / "schedule.json").write_text("[3, 8, 2, 5]")
    for kind, changes in (("global", {}), ("protected", {"schedule": str(tmp_path / "schedule.json"), "keep": None})):
        with pytest.raises(SettingsError, match="--propagate pruned needs every block's experts chosen"):
            made[kind].at(tmp_path / "out").run(propagate="pruned", **changes)


def test_every_kind_is_there() -> None:
    assert {kind for kind, _ in MOMENTS} == set(KINDS)
    assert issubclass(ResumeError, StreampruneError)
