"""`score`, runs whose choice needs all layers, and `prune`: records that are damaged, or somebody else's."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamprune.errors import (
    InterruptedRunError,
    OutputError,
    ResumeError,
    SettingsError,
    StreampruneError,
    VerifyError,
)
from streamprune.files.durable import read_record, write_record
from streamprune.saliency.scores import FIELDS, pack, unpack, unpack_channels
from streamprune.saliency.scores_file import read_scores
from streamprune.selection import select as choose
from streamprune.streaming.forward import LayerForward
from tests.faults import damage
from tests.fuzz_targets import write_signed
from tests.helpers import tree_bytes
from tests.interruptions import KINDS, Command, call, status
from tests.tiny import make_model, tiny_config

#: Of every kind with four blocks, the records after which there is more to be lost: of blocks scored, or written.
MOMENTS = [("score", 3), ("global", 3), ("global", 7), ("protected", 6), ("prune", 3)]


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
            with pytest.raises(
                ResumeError, match=r"no record of their model and settings\. Start over with --resume never"
            ):
                command.run()
            command.run(resume="never")
        else:
            command.run()
        command.check()
        shutil.rmtree(command.output) if command.output.is_dir() else command.output.unlink()


def forge(command: Command, block: int, change: Any) -> None:
    """Put another record in the place of a block's, with a checksum that is right."""
    path = command.work / "layers" / f"{block:05d}.json"
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


@pytest.mark.parametrize("field", ["tokens", "gated_norms", "channels"])
def test_sums_saved_in_mid_block_that_no_tokens_give_are_not_believed(
    made: dict[str, Command], tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = made["score"].at(tmp_path / "out")
    usual, calls = LayerForward.run_layer, 0

    def run_layer(self: LayerForward, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LayerForward, "run_layer", run_layer)
        with pytest.raises(InterruptedRunError):
            command.run()
    index = max((command.work / "states").glob("*/index.json"), key=lambda path: int(path.parent.name))
    body = read_record(index)
    if field == "channels":
        energies = unpack_channels(body["facts"]["channels"], (1, 8, 32), "f8")
        body["facts"]["channels"] = pack(-energies)
    else:
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
        path = command.work / "layers" / f"{block}.json"
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
    with pytest.raises(OutputError, match="is a link, which streamprune did not make"):
        command.run()
    assert (mine / "thesis.txt").read_text() == "mine"
    command.run(resume="never")
    command.check()
    assert (mine / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.clear(),
        lambda body: body.update(layers=-1),
        lambda body: body.update(layers=10**12),
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
    assert "Give the model that was scored" in told.stderr
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
        with pytest.raises(SettingsError, match=rf"Layer 1: .* All layers are scored: .* --scores {tmp_path}/out\."):
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
        with pytest.raises(SettingsError, match="--propagate pruned needs every layer's experts selected"):
            made[kind].at(tmp_path / "out").run(propagate="pruned", **changes)


def test_every_kind_is_there() -> None:
    assert {kind for kind, _ in MOMENTS} == set(KINDS)
    assert issubclass(ResumeError, StreampruneError)
