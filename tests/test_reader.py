"""Reading exact byte ranges: the values of safetensors' own loading, few requests, several in flight, clear errors."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from streamprune.checkpoint import reader
from streamprune.checkpoint.index import INDEX_NAME, Checkpoint, open_checkpoint
from streamprune.checkpoint.reader import Reading, ShardReader
from streamprune.errors import CheckpointError
from streamprune.progress import Busy
from tests.faults import invalid_argument
from tests.helpers import CPU, streamed, token_ids
from tests.shards import DATA, shard

PLAIN_PREADV = os.preadv
#: Long enough for the busiest machine. Nothing waits so long unless something is wrong.
PATIENCE = 60.0

Files = dict[str, dict[str, torch.Tensor]]


def make_checkpoint(folder: Path, files: Files) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return open_checkpoint(folder)


def random_bytes(dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Every bit pattern there is, also NaNs of all kinds."""
    if dtype == torch.bool:
        return torch.rand(tuple(shape)) > 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def same_bytes(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Same dtype, shape and bits (NaNs are not equal to themselves)."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, wanted)]
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(*bits)


@pytest.fixture
def open_reader() -> Iterator[Callable[[Checkpoint], ShardReader]]:
    opened: list[ShardReader] = []

    def make(checkpoint: Checkpoint) -> ShardReader:
        opened.append(ShardReader(checkpoint, CPU, Busy()))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def read_all(shards: ShardReader, groups: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    reading = shards.start(groups)
    reading.wait()
    shards.sync_with_compute()
    return {name: tensor for group in groups for name, tensor in reading.take(group).items()}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is asked of the system: file, first byte, and the byte behind the last."""
    seen: list[tuple[str, int, int]] = []

    def preadv(file: int, buffers: list[memoryview], position: int) -> int:
        name = Path(f"/proc/self/fd/{file}").readlink().name
        seen.append((name, position, position + sum(map(len, buffers))))
        return PLAIN_PREADV(file, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


@pytest.mark.parametrize("name", sorted(reader.DTYPES))
def test_every_dtype_equals_safetensors_own_loading(name: str, tmp_path: Path, open_reader: Any) -> None:
    torch.manual_seed(0)
    dtype = reader.DTYPES[name]
    shapes = {"matrix": (7, 5), "scalar": (), "empty": (3, 0, 2), "nothing": (0,), "one": (1,), "cube": (3, 2, 11)}
    tensors = {key: random_bytes(dtype, shape) for key, shape in shapes.items()}
    checkpoint = make_checkpoint(tmp_path / "model", {"model.safetensors": tensors})
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {name}
    shards = open_reader(checkpoint)
    wanted = load_file(tmp_path / "model" / "model.safetensors")
    for groups in ({"all": list(tensors)}, {key: [key] for key in tensors}):
        found = read_all(shards, groups)
        assert found.keys() == wanted.keys()
        assert all(same_bytes(found[key], wanted[key]) for key in wanted)


def mixed_files(requests_size: int) -> Files:
    """Three files, dtypes of all sizes mixed, tensors from a byte to several requests."""
    torch.manual_seed(1)
    dtypes = [dtype for dtype in reader.DTYPES.values() if dtype != torch.bool]
    sizes = [1, 3, 17, requests_size // 8, requests_size, 5 * requests_size // 2]
    return {
        f"{file}.safetensors": {
            f"{file}.{number:02d}": random_bytes(dtypes[number % len(dtypes)], (sizes[number % 6],))
            for number in range(26)
        }
        for file in ("one", "two", "three")
    }


def test_interleaved_groups_of_several_files_are_read_once_and_nothing_else(
    tmp_path: Path, open_reader: Any, requests: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "REQUEST_BYTES", 1000)
    files = mixed_files(1000)
    checkpoint = make_checkpoint(tmp_path / "model", files)
    names = [name for name in checkpoint.tensors if not name.endswith("7")]
    groups = {str(rest): names[rest::3] for rest in range(3)}
    found = read_all(open_reader(checkpoint), groups)
    assert sorted(found) == sorted(names)
    whole = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert all(same_bytes(found[name], whole[name]) for name in names)
    assert max(end - begin for _, begin, end in requests) == 1000
    for file in files:
        asked = sorted((begin, end) for name, begin, end in requests if name == file)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(asked)), "read twice"
        wanted = {byte for name in names if name in files[file]
                  for byte in range(checkpoint.tensors[name].begin, checkpoint.tensors[name].end)}  # fmt: skip
        assert {byte for begin, end in asked for byte in range(begin, end)} == wanted


def test_neighbours_are_one_request(tmp_path: Path, open_reader: Any, requests: list[tuple[str, int, int]]) -> None:
    tensors = {f"t{number:04d}": torch.full((4,), float(number)) for number in range(1200)}
    checkpoint = make_checkpoint(tmp_path / "model", {"a.safetensors": tensors})
    shards = open_reader(checkpoint)
    names = list(checkpoint.tensors)
    # Whatever group they belong to, and in whatever order they are asked for.
    read_all(shards, {"even": names[90:2:-2], "odd": names[3:90:2]})
    first, last = checkpoint.tensors[names[3]], checkpoint.tensors[names[90]]
    assert requests == [("a.safetensors", first.begin, last.end)]
    requests.clear()
    read_all(shards, {"gap": [names[0], names[1], names[3]]})
    assert len(requests) == 2
    requests.clear()
    # More than a system call takes.
    found = read_all(shards, {"all": names})
    assert 3 <= len(requests) <= 4
    assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_tensors_with_places_are_read_there(tmp_path: Path, open_reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjacent in the file and not in memory, and in parts. Another group keeps its own order."""
    monkeypatch.setattr(reader, "REQUEST_BYTES", 100)
    tensors = {f"t{number}": torch.rand(3, 5) for number in range(8)}
    checkpoint = make_checkpoint(tmp_path / "model", {"a.safetensors": tensors})
    order = ["t4", "t0", "t7", "t2"]
    reading = open_reader(checkpoint).start(
        {"joined": sorted(order), "others": ["t1", "t3"]}, {name: 60 * place for place, name in enumerate(order)}
    )
    reading.wait()
    assert torch.equal(reading.take_joined("joined", (4, 3, 5)), torch.stack([tensors[name] for name in order]))
    assert all(torch.equal(found, tensors[name]) for name, found in reading.take("others").items())


def test_several_requests_are_in_flight(tmp_path: Path, open_reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four requests waits until there are four."""
    monkeypatch.setattr(reader, "REQUEST_BYTES", 4096)
    together = threading.Barrier(4, timeout=PATIENCE)

    def preadv(*arguments: Any) -> int:
        together.wait()
        return PLAIN_PREADV(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    tensor = torch.arange(4096, dtype=torch.float32)
    checkpoint = make_checkpoint(tmp_path / "model", {"a.safetensors": {"t": tensor}})
    assert torch.equal(read_all(open_reader(checkpoint), {"": ["t"]})["t"], tensor)


def test_the_system_may_give_less_than_it_was_asked_for(
    tmp_path: Path, open_reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(file: int, buffers: list[memoryview], position: int) -> int:
        return PLAIN_PREADV(file, [buffers[0][:7]], position)

    monkeypatch.setattr(os, "preadv", preadv)
    tensors = {f"t{number}": torch.rand(number) for number in range(1, 30)}
    checkpoint = make_checkpoint(tmp_path / "model", {"a.safetensors": tensors})
    found = read_all(open_reader(checkpoint), {"": list(tensors)})
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("how", ["cut", "moved", "unreadable"])
def test_a_file_that_fails_is_one_clear_error(
    how: str, tmp_path: Path, open_reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "REQUEST_BYTES", 1000)
    checkpoint = make_checkpoint(tmp_path / "model", {"a.safetensors": {"t": torch.rand(4000)}})
    path = tmp_path / "model" / "a.safetensors"
    if how == "cut":
        os.truncate(path, 5000)
        words = r"a\.safetensors ends at byte 5,000, but bytes .* restore it and run again"
    elif how == "moved":
        path.rename(tmp_path / "elsewhere")
        words = r"a\.safetensors can no longer be read: No such file or directory.* then run again"
    else:

        def preadv(*_: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", preadv)
        words = r"a\.safetensors can no longer be read: Input/output error.* or is the disk failing"
    shards = open_reader(checkpoint)
    reading = shards.start({"": ["t"]})
    with pytest.raises(CheckpointError, match=words):
        reading.wait()
    shards.discard(reading)


def test_dtypes_that_torch_cannot_compute_with_are_refused(tmp_path: Path, open_reader: Any) -> None:
    header = {"a": {"dtype": "F4", "shape": [29, 2], "data_offsets": [0, 29]}}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(shard(header, DATA))
    with pytest.raises(CheckpointError, match="a has dtype F4, which torch cannot compute with"):
        open_reader(open_checkpoint(folder)).start({"": ["a"]})


def test_what_is_given_up_is_freed_at_once(tmp_path: Path, open_reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty requests, of which four are under way: the others are never made, and the memory is free."""
    monkeypatch.setattr(reader, "REQUEST_BYTES", 1000)
    under_way, go_on = threading.Semaphore(0), threading.Event()
    calls = []

    def preadv(*arguments: Any) -> int:
        calls.append(arguments[2])
        under_way.release()
        assert go_on.wait(PATIENCE)
        return PLAIN_PREADV(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    checkpoint = make_checkpoint(tmp_path / "model", {"a.safetensors": {"t": torch.rand(5000)}})
    shards = open_reader(checkpoint)
    reading: Reading = shards.start({"": ["t"]})
    held: Any = StorageWeakRef(reading.memory[""].untyped_storage())  # type: ignore[no-untyped-call]
    for _ in range(4):
        assert under_way.acquire(timeout=PATIENCE)
    assert not held.expired()
    threading.Timer(0.05, go_on.set).start()
    shards.discard(reading)
    assert len(calls) == 4
    assert held.expired()
    with pytest.raises(KeyError):
        reading.take("")


def test_a_file_system_that_takes_no_hints_is_read_all_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = streamed(model, token_ids(), torch.float32)
    monkeypatch.setattr(os, "posix_fadvise", invalid_argument, raising=False)
    logits, _ = streamed(model, token_ids(), torch.float32)
    assert torch.equal(logits, expected)
