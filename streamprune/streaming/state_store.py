"""Where hidden states are stored: in the memory of the device that computes, in RAM, or in a file."""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from streamprune.checkpoint.safetensors_file import read_into
from streamprune.errors import ResourceError
from streamprune.hardware.device import CPU, is_gpu, page_locked, record_event
from streamprune.progress import Busy

#: Linux writes at most 2 GiB at a time; smaller portions keep an interrupt from waiting long.
_PORTION = 1 << 26
#: Micro-batches that wait to be written to a file, each in memory of its own.
_MOST_WAITING = 1


@dataclass(frozen=True)
class Written:
    """A tensor's place in the file: its first byte, its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, count: int) -> Written:
        """The place of `count` rows of the first dimension, from row `start`."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Written(self.offset + start * row, (count, *self.shape[1:]), self.dtype)


class StatesFile:
    """Tensors in a file in `folder` without a name, so that it is gone when it is closed, however the process ends.

    Read and written with system calls, not mapped: mapped pages would count as this process's resident memory. Raises
    ResourceError, with the system's reason, when it cannot be made, written or read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = 0
        #: Released stretches (first byte, bytes), by position; neighbours are joined.
        self._free: list[tuple[int, int]] = []
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed("be created", error) from None

    def close(self) -> None:
        self._file.close()

    def reserve(self, tensor: torch.Tensor) -> Written:
        """A place for a tensor: the first released stretch that is large enough, else the end of the file."""
        for number, (offset, size) in enumerate(self._free):
            if size >= tensor.nbytes:
                rest = [(offset + tensor.nbytes, size - tensor.nbytes)] if size > tensor.nbytes else []
                self._free[number : number + 1] = rest
                return Written(offset, tuple(tensor.shape), tensor.dtype)
        offset, self._end = self._end, self._end + tensor.nbytes
        return Written(offset, tuple(tensor.shape), tensor.dtype)

    def release(self, place: Written) -> None:
        """Give a place back for other tensors."""
        joined: list[tuple[int, int]] = []
        for offset, size in sorted([*self._free, (place.offset, place.nbytes)]):
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            elif size:
                joined.append((offset, size))
        self._free = joined

    def write(self, place: Written, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU tensor to its place."""
        view, done = _bytes_of(tensor), 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done : done + _PORTION], place.offset + done)
        except OSError as error:
            raise self._failed("be written", error) from None

    def read(self, place: Written) -> torch.Tensor:
        """The tensor at a place, in memory of its own."""
        tensor = torch.empty(place.shape, dtype=place.dtype)
        try:
            moved = read_into(self._file.fileno(), place.offset, [_bytes_of(tensor)] if place.nbytes else [])
            if moved < place.nbytes:
                raise OSError(f"it ends after {moved:,} of {place.nbytes:,} bytes")
        except OSError as error:
            raise self._failed("be read", error) from None
        return tensor

    def _failed(self, what: str, error: OSError) -> ResourceError:
        return ResourceError(
            f"The file for the hidden states in {self._folder} could not {what}: {error.strerror or error}. Make room "
            "on that disk or check it, choose another place with -o, or keep the states in memory with --states ram."
        )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@dataclass(frozen=True)
class Fetch:
    """A leaf on its way; calling waits for it. (A class of its own, to distinguish it from a stored leaf.)"""

    arrive: Callable[[], Any]

    def __call__(self) -> Any:
        return self.arrive()


class StateStore(Protocol):
    """Stores leaves, each as a tensor or a `Written`. Leaves that are no tensors are stored as they are."""

    def fetch(self, stored: Any, device: torch.device) -> Fetch:
        """Begin to bring a leaf to a device."""

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """What will stand for `new` (in the place of `old` if that suits), and the data still to be filled in."""

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        """Fill in the data of a micro-batch's leaves."""

    def rows(self, stored: Any, start: int, count: int) -> Any:
        """Some rows of a leaf, in the place where they lie."""

    def copy(self, stored: Any) -> Any:
        """The same leaf in a place of its own."""

    def drop(self, leaves: Sequence[Any]) -> None:
        """Free the places of leaves."""

    def synchronize(self) -> None:
        """Wait until all that was filled in has arrived. Raises what went wrong on the way."""

    def close(self) -> None:
        """Free everything."""


class MemoryStateStore:
    """The memory of a device."""

    def __init__(self, home: torch.device) -> None:
        self._home = home

    def fetch(self, stored: Any, device: torch.device) -> Fetch:
        return Fetch(lambda: stored.to(device) if isinstance(stored, torch.Tensor) else stored)

    def take_over(self, leaf: Any) -> Any:
        """A leaf from elsewhere, in this memory."""
        return leaf.to(self._home) if isinstance(leaf, torch.Tensor) else leaf

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        if isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype:
            if old is new:
                return old, None
            # A strided copy between devices would need memory at a moment when none may be asked for any more.
            return old, new if old.device == new.device else new.contiguous()
        return self._place(new)

    def _place(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # A copy of its own: the layer's output may be a view of something larger that must not stay in memory.
        return new.to(self._home, copy=True).contiguous(), None

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        for stored, data in jobs:
            stored.copy_(data)

    def rows(self, stored: Any, start: int, count: int) -> Any:
        return stored.narrow(0, start, count)

    def copy(self, stored: Any) -> Any:
        return stored.clone() if isinstance(stored, torch.Tensor) else stored

    def drop(self, leaves: Sequence[Any]) -> None:
        """Nothing to do: the memory goes with the last reference."""

    def synchronize(self) -> None:
        """Nothing to do: copies are in the device's own order."""

    def close(self) -> None:
        """Nothing to do."""


class OffloadedStateStore(MemoryStateStore):
    """Page-locked RAM for a GPU's states. Two streams of its own carry states in and out while the GPU computes."""

    def __init__(self, gpu: torch.device, busy: Busy) -> None:
        super().__init__(CPU)
        self._gpu, self._busy = gpu, busy
        self._inward, self._outward = torch.Stream(gpu), torch.Stream(gpu)

    def fetch(self, stored: Any, device: torch.device) -> Fetch:
        if not isinstance(stored, torch.Tensor) or not is_gpu(device):
            # (Whoever wants to look at it here has called `synchronize`.)
            return super().fetch(stored, device)
        with self._inward, self._busy.on_device("states", device):
            moved = stored.to(device, non_blocking=True)
        there = record_event(self._inward)

        def arrive() -> torch.Tensor:
            stream = torch.accelerator.current_stream(device)
            stream.wait_event(there)
            # Its memory is the inward stream's, which must not use it again before this one has done with it.
            moved.record_stream(stream)
            return moved

        return Fetch(arrive)

    def take_over(self, leaf: Any) -> Any:
        return page_locked(leaf.shape, leaf.dtype).copy_(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _place(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return page_locked(new.shape, new.dtype), new.contiguous()

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        self._outward.wait_stream(torch.accelerator.current_stream(self._gpu))
        with self._outward, self._busy.on_device("states", self._gpu):
            for stored, data in jobs:
                stored.copy_(data, non_blocking=True)
                if is_gpu(data.device):
                    data.record_stream(self._outward)

    def copy(self, stored: Any) -> Any:
        self.synchronize()
        return self.take_over(stored)

    def synchronize(self) -> None:
        self._outward.synchronize()


class FileStateStore:
    """A file, read and written by a thread of its own, in the order in which that was asked for."""

    def __init__(self, file: StatesFile, busy: Busy) -> None:
        self._file, self._busy = file, busy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._waiting: deque[Future[Any]] = deque()

    def fetch(self, stored: Any, device: torch.device) -> Fetch:
        if not isinstance(stored, Written):
            return Fetch(lambda: stored)
        coming = self._begin(self._file.read, stored)
        return Fetch(lambda: coming.result().to(device))

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        data = new.to(CPU).contiguous()
        if isinstance(old, Written) and old.nbytes == data.nbytes:
            return Written(old.offset, tuple(data.shape), data.dtype), data
        return self._file.reserve(data), data

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        def write() -> None:
            for stored, data in jobs:
                self._file.write(stored, data)

        self._waiting.append(self._begin(write))
        while len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft().result()

    def rows(self, stored: Any, start: int, count: int) -> Any:
        return stored.rows(start, count)

    def copy(self, stored: Any) -> Any:
        if not isinstance(stored, Written):
            return stored
        data = self._begin(self._file.read, stored).result()
        place = self._file.reserve(data)
        self.fill([(place, data)])
        return place

    def drop(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Written):
                self._file.release(leaf)

    def synchronize(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def _begin(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        def timed() -> Any:
            with self._busy.at("states"):
                return work(*arguments)

        return self._thread.submit(timed)


def memory_state_store(home: torch.device, computing: torch.device, busy: Busy) -> MemoryStateStore:
    """The store for states in the memory of `home` while `computing` computes."""
    if not is_gpu(home) and is_gpu(computing):
        return OffloadedStateStore(computing, busy)
    return MemoryStateStore(home)


def same_place(a: Any, b: Any) -> bool:
    """Whether two leaves are stored in the same place."""
    if isinstance(a, Written) and isinstance(b, Written):
        return a.offset == b.offset and a.nbytes == b.nbytes
    return a is b
