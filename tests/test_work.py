"""The work folder: what is saved comes back, and what is damaged is not believed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from streamprune.errors import OutputError, ResumeError, UnsupportedModelError
from streamprune.files.durable import read_record, write_record
from streamprune.formats.base import KeptExperts
from streamprune.saliency.scores import FIELDS, LayerStatistics, pack, unpack_channels
from streamprune.work.folder import WorkFolder
from streamprune.work.layer_records import FinishedLayer, FinishedShard
from streamprune.work.records import RUN_FORMAT, RecordedRun, read_pruning, read_run, read_tokens, write_run
from streamprune.work.saved_states import DATA_NAME, INDEX_NAME, BatchState, open_states, save_states

RUN = {
    "format": RUN_FORMAT,
    "command": {"model": "model", "output": "out"},
    "settings": {},
    "source": "",
    "files": {},
    "calibration": {
        "fingerprint": "",
        "sequences": 2,
        "tokens": 3,
        "sources": [],
        "source_of": [],
        "notes": [],
        "recipe": {},
    },
    "anchor": None,
    "best": None,
    "versions": {},
    "layers": 4,
    "budget_bytes": None,
    "batch_tokens": 1024,
}


def some_states(count: int = 3) -> list[BatchState]:
    generator = torch.Generator().manual_seed(0)
    states = []
    for number in range(count):
        hidden = torch.randn(2, 5, 8, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        keys = {0: (hidden[:1].float(), hidden[1:].double()), 7: [torch.arange(number), None, "full", 1.5, True]}
        states.append(BatchState((hidden, None, {"flags": hidden > 0}), {"shared": keys}))
    return states


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_states_of_any_structure_come_back_to_the_bit(tmp_path: Path) -> None:
    states = some_states()
    save_states(tmp_path / "1", len(states), states.__getitem__, {"block": 4})
    saved = open_states(tmp_path / "1")
    assert saved is not None
    assert len(saved) == 3
    assert saved.facts == {"block": 4}
    for number, state in enumerate(states):
        assert_same(saved.load(number).output, state.output)
        assert_same(saved.load(number).carried, state.carried)


def test_what_cannot_be_made_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="object"):
        save_states(tmp_path / "1", 1, lambda _: BatchState(object()), {})


@pytest.mark.parametrize("name", [DATA_NAME, INDEX_NAME])
@pytest.mark.parametrize("how", ["flip", "cut", "grow", "remove"])
def test_damaged_states_are_not_believed(name: str, how: str, tmp_path: Path) -> None:
    states = some_states()
    save_states(tmp_path / "1", len(states), states.__getitem__, {})
    damage(tmp_path / "1" / name, how)
    assert open_states(tmp_path / "1") is None


def damage(path: Path, how: str, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data))
    if how == "flip":
        data[place] ^= 1 << random.Random(seed).randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "grow":
        data += b"x"
    path.unlink()
    if how != "remove":
        path.write_bytes(data)


def test_a_record_with_any_flipped_bit_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    body = {"block": 3, "scores": [0.1, 2.5e-300], "text": "größer"}
    write_record(path, body)
    assert read_record(path) == body
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            assert read_record(path) in (None, body), (place, bit)


def test_two_generations_are_kept_and_the_older_one_stands_in(tmp_path: Path) -> None:
    states = some_states()
    with WorkFolder(tmp_path / "work") as work:
        for block in range(4):
            work.states.save(len(states), states.__getitem__, {"block": block})
        assert [saved.facts["block"] for saved in work.states.intact()] == [3, 2]
        assert len(list((work.folder / "states").iterdir())) == 2
        damage(work.folder / "states" / "4" / DATA_NAME, "flip")
        assert [saved.facts["block"] for saved in work.states.intact()] == [2]
        damage(work.folder / "cursor.json", "flip")
        assert [saved.facts["block"] for saved in work.states.intact()] == [2], "without a cursor, what is whole counts"
        work.states.save(len(states), states.__getitem__, {"block": 9})
        assert next(saved.facts["block"] for saved in work.states.intact()) == 9


def test_a_crash_before_the_cursor_moves_leaves_the_old_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = some_states()
    with WorkFolder(tmp_path / "work") as work:
        work.states.save(len(states), states.__getitem__, {"block": 1})

        def crash(point: str) -> None:
            if point == "states saved":
                raise KeyboardInterrupt

        monkeypatch.setattr("streamprune.work.saved_states.kill_point", crash)
        with pytest.raises(KeyboardInterrupt):
            work.states.save(len(states), states.__getitem__, {"block": 2})
        monkeypatch.undo()
        assert [saved.facts["block"] for saved in work.states.intact()] == [1]
        work.states.save(len(states), states.__getitem__, {"block": 3})
        assert [saved.facts["block"] for saved in work.states.intact()] == [3, 1]


def test_blocks_and_shards(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as work:
        assert work.read_layer(3) is None
        (work.staging / "a.safetensors").write_bytes(b"12345")
        digest = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
        shard = FinishedShard("a.safetensors", 5, digest)
        layer = LayerStatistics(3, np.full((len(FIELDS), 2, 4), 1 / 3))
        work.write_layer(3, layer, KeptExperts((1, 2)), [shard])
        channels = np.full((2, 4, 3), 1 / 3, dtype=np.float32)
        work.write_layer(4, replace(layer, index=4, channels=channels), KeptExperts((1, 2)), [shard])
        recorded = work.read_layer(4)
        assert recorded is not None
        assert recorded.result is not None
        assert unpack_channels(recorded.result["channels"], (2, 4, 3), "f4").tobytes() == channels.tobytes()
        work.write_layer(None, None, KeptExperts(), [])
        record = work.read_layer(3)
        assert record == FinishedLayer({"block": 3, "statistics": pack(layer.values)}, (1, 2), [shard])
        assert work.read_layer(None) == FinishedLayer(None, (), [])
        assert work.is_intact(shard)
        (work.staging / "a.safetensors").write_bytes(b"12346")
        assert not work.is_intact(shard)
        work.forget_layer(3)
        assert work.read_layer(3) is None


def test_the_run_and_its_tokens(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as work:
        run = msgspec.convert(RUN, RecordedRun)
        assert read_run(work.folder) is None
        write_run(work.folder, run, [[1, 2], [3]])
        assert read_record(work.folder / "run.json") == RUN
        assert read_run(work.folder) == run
        damage(work.folder / "run.json", "flip")
        assert read_run(work.folder) == run, "the copy stands in"
        damage(work.folder / "run.copy.json", "flip")
        assert read_run(work.folder) is None
        assert read_tokens(work.folder) == [[1, 2], [3]]
        damage(work.folder / "tokens.json", "flip")
        assert read_tokens(work.folder) == [[1, 2], [3]], "the copy stands in"
        damage(work.folder / "tokens.copy.json", "flip")
        with pytest.raises(ResumeError, match="is damaged"):
            read_tokens(work.folder)
        work.start_afresh()
        assert read_run(work.folder) is None


def test_a_second_run_is_held_off_and_a_stale_lock_is_not(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work"), pytest.raises(OutputError, match=rf"pid {os.getpid()}\) is working in"):
        WorkFolder(tmp_path / "work").__enter__()
    holder = f"""
import os, signal
from pathlib import Path
from streamprune.work.folder import WorkFolder
WorkFolder(Path({str(tmp_path / "work")!r})).__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", holder], check=False)
    with WorkFolder(tmp_path / "work") as work:
        assert (work.folder / "streamprune.lock").read_text() == f"{os.getpid()}\n"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by streamprune"):
        WorkFolder(tmp_path / "work").__enter__()
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_half_written_files_go(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as work:
        left = work.staging / "model-00001-of-00002.safetensors.partial"
        left.write_bytes(b"half")
    with WorkFolder(tmp_path / "work"):
        assert not left.exists()


@pytest.mark.parametrize(
    ("name", "body", "maker"),
    [
        ("run.json", {**RUN, "format": 2}, "streamprune 0.1.0"),
        ("run.json", {**RUN, "format": 3}, "another version of streamprune, in format 3"),
        ("run.json", {**RUN, "format": RUN_FORMAT + 1}, f"another version of streamprune, in format {RUN_FORMAT + 1}"),
        ("run.json", {}, "another version of streamprune, in format None"),
        ("pruning.json", {"command": RUN["command"], "blocks": 4, "decided": {}}, "streamprune 0.1.0"),
    ],
    ids=["a run of 0.1.0", "other states", "a later version", "no format", "a pruning of 0.1.0"],
)
def test_work_of_another_version_is_refused_in_one_line(
    name: str, body: dict[str, Any], maker: str, tmp_path: Path
) -> None:
    write_record(tmp_path / name, body)
    with pytest.raises(ResumeError) as refused:
        read_run(tmp_path) if name == "run.json" else read_pruning(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / name} was made by {maker}. This version cannot resume it: remove {tmp_path}, or start over with "
        "--resume never."
    )
