"""Reads tensors from the shards in background threads: exact byte ranges, in file order, several requests at once.

On the CPU a request reads straight into the tensors. For a GPU it reads into a small page-locked buffer, which is
then copied to the GPU on a stream of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry, disable_read_ahead, read_exactly
from streamprune.errors import CheckpointError
from streamprune.files.page_cache import Stretch, drop_files_from_cache, uncached_ranges
from streamprune.hardware.device import is_gpu, page_locked, record_event
from streamprune.hardware.memory_plan import STAGING_BYTES
from streamprune.progress import Busy

#: Requests in flight: one alone leaves an NVMe disk idle half of the time.
_READERS = 4
#: Bytes of a request at most. Larger ones are no faster. The GPU's staging buffers have this size.
REQUEST_BYTES = 8 * 2**20
#: Linux takes up to 1,024 buffers in one system call.
_MOST_PLACES = 512
#: Alignment of each tensor in a group's memory, enough for any dtype.
_ALIGNMENT = 64

#: dtypes by their names in a safetensors header.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where `size` bytes of a request go: the group, and the offset in its memory."""

    group: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Request:
    """Adjacent bytes of one file, from byte `begin` on."""

    file: str
    begin: int
    places: tuple[_Place, ...]

    @property
    def size(self) -> int:
        return sum(place.size for place in self.places)


class Reading:
    """Groups of tensors that are being read. Call `wait`, then `take` or `take_joined` each group once.

    `places` are the offsets in their group's memory of tensors that lie without gaps in it; other groups are aligned.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[TensorEntry]], device: torch.device, places: Mapping[str, int]
    ) -> None:
        self.memory: dict[str, torch.Tensor] = {}
        #: The tensors of each group by name, and their offsets in the group's memory.
        self.layout: dict[str, dict[str, tuple[TensorEntry, int]]] = {}
        self.requests: list[Future[None]] = []
        #: What this reading added to the page cache, by file.
        self.cached: dict[Path, list[Stretch]] = {}
        for group, entries in groups.items():
            self.layout[group], end = {}, 0
            for entry in entries:
                if entry.dtype not in DTYPES:
                    raise CheckpointError(f"{entry.name} has dtype {entry.dtype}, which torch cannot compute with.")
                begin = places.get(entry.name)
                if begin is None:
                    self.layout[group][entry.name] = entry, end
                    end += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
                else:
                    self.layout[group][entry.name] = entry, begin
                    end = max(end, begin + entry.nbytes)
            self.memory[group] = torch.empty(end, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Wait for all bytes. Raises CheckpointError if some could not be read."""
        for request in self.requests:
            request.result()

    def take(self, group: str) -> dict[str, torch.Tensor]:
        """The tensors of a group by name, which share memory."""
        memory = self.memory.pop(group)
        return {
            name: memory[offset : offset + entry.nbytes].view(DTYPES[entry.dtype]).view(entry.shape)
            for name, (entry, offset) in self.layout[group].items()
        }

    def take_joined(self, group: str, shape: Sequence[int]) -> torch.Tensor:
        """All of a group as one tensor of this shape, if its tensors have places."""
        entry, _ = next(iter(self.layout[group].values()))
        return self.memory.pop(group).view(DTYPES[entry.dtype]).view(*shape)

    def cancel(self) -> None:
        """Cancel requests that have not begun, and wait for the others."""
        for request in self.requests:
            request.cancel()
        for request in self.requests:
            if not request.cancelled():
                request.exception()


class ShardReader:
    """Reads groups of tensors of a checkpoint into the memory of `device`. Close it to end its threads.

    Peak memory: the groups, and for a GPU `STAGING_BYTES` of page-locked memory (buffers that are read into, and as
    many that are being copied).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, busy: Busy) -> None:
        self._checkpoint, self._device, self._busy = checkpoint, device, busy
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._lock = threading.Lock()
        self._gpu_copier = _GpuCopier(device) if is_gpu(device) else None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, groups: Mapping[str, Sequence[str]], places: Mapping[str, int] | None = None) -> Reading:
        """Start reading groups of tensors. Raises the device's error if it has not enough memory for them.

        `places` are the offsets in their group's memory of tensors that are taken as one, see `Reading`.
        """
        tensors = self._checkpoint.tensors
        entries = {group: [tensors[name] for name in names] for group, names in groups.items()}
        return self.start_entries(entries, places)

    def start_entries(
        self, groups: Mapping[str, Sequence[TensorEntry]], places: Mapping[str, int] | None = None
    ) -> Reading:
        """Like `start`, for entries that may be parts of the checkpoint's tensors."""
        reading = Reading(groups, self._device, places or {})
        if self._gpu_copier is not None:
            self._gpu_copier.wait_for_compute()
        for request in _requests(reading.layout):
            # `_read` looks up the memory when it runs: a cancelled request in the pool's queue must not hold it.
            reading.requests.append(self._pool.submit(self._read, request, reading))
        return reading

    def discard(self, reading: Reading) -> None:
        """Stop a reading, free its memory, and remove what it added to the page cache."""
        reading.cancel()
        # Copies to the GPU may be pending: later work on the GPU must not reuse that memory before they are done.
        self.sync_with_compute()
        reading.memory.clear()
        drop_files_from_cache(reading.cached)

    def sync_with_compute(self) -> None:
        """Let the GPU's compute stream wait for the copies of everything read so far."""
        if self._gpu_copier is not None:
            self._gpu_copier.compute_waits()

    def _read(self, request: _Request, reading: Reading) -> None:
        path = self._checkpoint.folder / request.file
        into = [reading.memory[place.group][place.offset : place.offset + place.size] for place in request.places]
        try:
            with self._busy.at("read"), path.open("rb", buffering=0) as stream:
                disable_read_ahead(stream)
                file = stream.fileno()
                fresh = uncached_ranges(file, request.begin, request.size)
                if self._gpu_copier is None:
                    read_exactly(file, request.begin, [_bytes_of(tensor) for tensor in into], path)
                else:
                    with self._gpu_copier.buffer() as buffer:
                        staged = buffer[: request.size]
                        read_exactly(file, request.begin, [_bytes_of(staged)], path)
                        self._gpu_copier.copy(staged, into)
        except OSError as error:
            raise CheckpointError(
                f"{path} can no longer be read: {error.strerror or error}. Was it moved or changed during the run, or "
                "is the disk failing? Check it, then run again."
            ) from None
        with self._lock:
            reading.cached.setdefault(path, []).extend(fresh)


class _GpuCopier:
    """Copies page-locked buffers to a GPU on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.Stream(device)
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.Event | None]] = queue.SimpleQueue()
        for _ in range(STAGING_BYTES // REQUEST_BYTES):
            self._free.put((page_locked((REQUEST_BYTES,), torch.uint8), None))

    def wait_for_compute(self) -> None:
        """Let later copies wait for the compute work queued so far, which may still use that memory."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))

    def compute_waits(self) -> None:
        """Let later compute work wait for all pending copies."""
        torch.accelerator.current_stream(self._device).wait_stream(self._stream)

    @contextmanager
    def buffer(self) -> Iterator[torch.Tensor]:
        """A free buffer, once its previous copy is done."""
        buffer, copied = self._free.get()
        if copied is not None:
            copied.synchronize()
        try:
            yield buffer
        finally:
            self._free.put((buffer, record_event(self._stream)))

    def copy(self, staged: torch.Tensor, into: Sequence[torch.Tensor]) -> None:
        """Copy the bytes of `staged` into the tensors, one after the other."""
        position = 0
        with self._stream:
            for place in into:
                place.copy_(staged[position : position + len(place)], non_blocking=True)
                position += len(place)


def _requests(layout: Mapping[str, Mapping[str, tuple[TensorEntry, int]]]) -> Iterator[_Request]:
    """Requests for all tensors, in file order: adjacent ones are joined, large ones divided."""
    wanted = sorted(
        ((entry, _Place(group, offset, entry.nbytes)) for group, places in layout.items()
         for entry, offset in places.values() if entry.nbytes),
        key=lambda item: (item[0].file, item[0].begin),
    )  # fmt: skip
    file, begin, end, places = "", 0, 0, list[_Place]()
    for entry, place in wanted:
        done = 0
        while done < place.size:
            full = end - begin >= REQUEST_BYTES or len(places) >= _MOST_PLACES
            if places and (full or (entry.file, entry.begin + done) != (file, end)):
                yield _Request(file, begin, tuple(places))
                places = []
            if not places:
                file = entry.file
                begin = end = entry.begin + done
            size = min(place.size - done, REQUEST_BYTES - (end - begin))
            places.append(_Place(place.group, place.offset + done, size))
            done, end = done + size, end + size
    if places:
        yield _Request(file, begin, tuple(places))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU."""
    array: Any = tensor.numpy()
    return memoryview(array)
