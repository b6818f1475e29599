"""The hidden states of all micro-batches, stored between layers and updated in place.

They are in the computing device's memory, in RAM, or in a file: `HiddenStates` manages micro-batches, a `StateStore`
the single tensors of their states. The store returns a handle for each tensor (a tensor, or its range in the file),
which replaces it in a `BatchState` of the same structure; other values are stored directly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from streamprune.hardware.device import CPU, is_gpu, page_locked, record_event
from streamprune.progress import Busy
from streamprune.streaming.states_file import StatesFile, Written
from streamprune.work.saved_states import BatchState

#: Micro-batches that may wait to be written to a file, each in separate memory.
_MOST_WAITING = 1


class _Prefetched(NamedTuple):
    """A state as it was stored, the device to which it is fetched, and functions that wait for its tensors."""

    stored: BatchState
    device: torch.device
    fetches: Any


class HiddenStates:
    """One `BatchState` per micro-batch. Takes tokens × hidden size × bytes per value, and no more.

    They are in the memory of `home` (by default the host's), or with `folder` in an unnamed temporary file there, which
    is deleted when this is closed. The values are bit-identical in every location. States move between the store and
    the `computing` device while another micro-batch computes: `prefetch` fetches one, `store` sends one, and
    `synchronize` waits for all that were sent.
    """

    def __init__(
        self, batches: int, home: torch.device = CPU, folder: Path | None = None, *,
        computing: torch.device = CPU, busy: Busy | None = None,
    ) -> None:  # fmt: skip
        self._states = [BatchState() for _ in range(batches)]
        self._computing, self._busy = computing, busy or Busy()
        self._store = (
            self._store_in(home) if folder is None else FileStateStore(StatesFile(folder), self._busy, computing)
        )
        self._prefetched: _Prefetched | None = None

    def close(self) -> None:
        """Free the memory and disk space of the states."""
        self.drop_prefetch()
        self._states.clear()
        self._store.close()

    def synchronize(self) -> None:
        """Wait until everything that was stored has arrived. Raises errors of the transfers."""
        self._store.synchronize()

    def resize(self, batches: int) -> None:
        """Forget all states, and allocate empty entries for `batches` micro-batches."""
        self._store.drop(pytree.tree_leaves(self._states))
        self._states = [BatchState() for _ in range(batches)]

    def prefetch(self, batch: int, device: torch.device) -> None:
        """Start fetching the state of the micro-batch that will be loaded next."""
        stored = self._states[batch]
        fetches = pytree.tree_map(lambda leaf: self._store.fetch(leaf, device), stored)
        self._prefetched = _Prefetched(stored, device, fetches)

    def drop_prefetch(self) -> None:
        """Free the state that was prefetched."""
        self._prefetched = None

    def load(self, batch: int, device: torch.device) -> BatchState:
        """The state of a micro-batch on `device`. Tensors already on `device` are the stored ones, not copies."""
        stored = self._states[batch]
        prefetched = self._prefetched
        if prefetched is None or prefetched.stored is not stored or prefetched.device != device:
            self.prefetch(batch, device)
        assert self._prefetched is not None
        fetches, self._prefetched = self._prefetched.fetches, None
        state: BatchState = pytree.tree_map(lambda wait: wait(), fetches)
        return state

    def store(self, batch: int, state: BatchState) -> None:
        """Replace a micro-batch's state, reusing the storage of the old one if the sizes match.

        Memory is allocated first: if that fails, the old state is unchanged.
        """
        old = dict(pytree.tree_flatten_with_path(self._states[batch])[0])
        new, structure = pytree.tree_flatten_with_path(state)
        stored: list[Any] = []
        jobs: list[tuple[Any, torch.Tensor]] = []
        try:
            for path, leaf in new:
                is_tensor = isinstance(leaf, torch.Tensor)
                place, data = self._store.prepare(old.get(path), leaf) if is_tensor else (leaf, None)
                stored.append(place)
                if data is not None:
                    jobs.append((place, data))
        except BaseException:
            self._store.drop(stored, but=old.values())
            raise
        if jobs:
            self._store.fill(jobs)
        self._store.drop(old.values(), but=stored)
        self._states[batch] = pytree.tree_unflatten(stored, structure)

    def change(self, change: Callable[[BatchState], BatchState]) -> None:
        """Leave something out of all states: `change` returns a state with some of the tensors, as they are stored."""
        self.drop_prefetch()
        self.synchronize()
        for number, state in enumerate(self._states):
            self._states[number] = change(state)
            self._store.drop(pytree.tree_leaves(state), but=pytree.tree_leaves(self._states[number]))

    def move(self, home: torch.device) -> None:
        """Move all states into the memory of another device."""
        self.drop_prefetch()
        self.synchronize()
        store = self._store_in(home)
        for number, state in enumerate(self._states):
            self._states[number] = pytree.tree_map(lambda leaf: store.put(self._store.fetch(leaf, home)()), state)
        self._store.close()
        self._store = store

    def split(self, batch: int, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Split a micro-batch with token ids of `shape` (B, L) into several of `sizes` sequences, summing to B.

        The indices of later micro-batches grow. The parts share the storage of the original.
        """
        self.drop_prefetch()
        self.synchronize()

        def piece(leaf: Any, first: int, count: int) -> Any:
            rows = _rows_per_sequence(leaf, shape)
            if rows is not None:
                return leaf.narrow(0, first * rows, count * rows)
            # A tensor that all sequences share is copied for each part, since each will modify its own.
            return self._store.put(self._store.fetch(leaf, self._store.home)()) if first else leaf

        self._states[batch : batch + 1] = [
            pytree.tree_map(partial(piece, first=end - size, count=size), self._states[batch])
            for end, size in zip(accumulate(sizes), sizes, strict=True)
        ]

    def _store_in(self, home: torch.device) -> StateStore:
        if not is_gpu(home) and is_gpu(self._computing):
            return OffloadedStateStore(self._computing, self._busy)
        return StateStore(home)


def first_of(state: BatchState, shape: Sequence[int]) -> BatchState:
    """The state of the first sequence of a micro-batch with token ids of `shape` (B, L), as views."""

    def piece(leaf: Any) -> Any:
        rows = _rows_per_sequence(leaf, shape)
        return leaf[:rows] if rows is not None else leaf

    return pytree.tree_map(piece, state)  # type: ignore[no-any-return]


def _rows_per_sequence(leaf: Any, shape: Sequence[int]) -> int | None:
    """How many rows of a leaf belong to each of the B sequences of L tokens; None if it has no rows per sequence.

    The batch is the first dimension of every model's states: (B, …), or flattened with the next one (B·L, …). A leaf
    with a first dimension of L is shared by all sequences, even if L is a multiple of B.
    """
    sequences, length = shape
    rows = leaf.shape[0] if isinstance(leaf, (torch.Tensor, Written)) and len(leaf.shape) else 0
    if rows == sequences:
        return 1
    if rows == 0 or rows == length or rows % sequences:
        return None
    return int(rows // sequences)


class StateStore:
    """Stores the tensors of states in the memory of a device, `home`. Other stores derive from it."""

    def __init__(self, home: torch.device) -> None:
        self.home = home

    def fetch(self, stored: Any, device: torch.device) -> Callable[[], Any]:
        """Start moving a leaf to a device; the returned function waits for it."""
        return lambda: stored.to(device) if isinstance(stored, torch.Tensor) else stored

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """The handle for `new` (that of `old` if its storage fits), and the data still to be filled in."""
        if isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype:
            if old is new:
                return old, None
            # A strided copy between devices would allocate memory later, when allocation must not fail any more.
            return old, new if old.device == new.device else new.contiguous()
        return self._place(new)

    def _place(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # A copy, since the layer's output may be a view of a larger tensor that must not stay in memory.
        return new.to(self.home, copy=True).contiguous(), None

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        """Fill in the data of a micro-batch's leaves."""
        for stored, data in jobs:
            stored.copy_(data)

    def put(self, leaf: Any) -> Any:
        """The handle for a fetched leaf, in storage of its own."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        stored, data = self.prepare(None, leaf)
        if data is not None:
            self.fill([(stored, data)])
        return stored

    def drop(self, leaves: Iterable[Any], but: Iterable[Any] = ()) -> None:
        """Free the storage of leaves, except what `but` still uses. In memory the last reference frees it."""

    def synchronize(self) -> None:
        """Wait until all data that was filled in has arrived. Raises errors of the transfers."""

    def close(self) -> None:
        """Free everything."""


class GpuTransfers:
    """Copies between page-locked RAM and a GPU, on two streams of their own, while the GPU computes."""

    def __init__(self, gpu: torch.device) -> None:
        self._gpu = gpu
        self._inward, self._outward = torch.Stream(gpu), torch.Stream(gpu)

    def to_gpu(self, stored: torch.Tensor, busy: Busy | None = None) -> Callable[[], torch.Tensor]:
        """Start copying a tensor; the returned function lets the stream that computes wait for it. Of any thread."""
        with self._inward, busy.on_device("states", self._gpu) if busy is not None else nullcontext():
            moved = stored.to(self._gpu, non_blocking=True)
        there = record_event(self._inward)

        def arrive() -> torch.Tensor:
            stream = torch.accelerator.current_stream(self._gpu)
            stream.wait_event(there)
            # Its memory belongs to the inward stream, which must not reuse it before this stream has finished with it.
            moved.record_stream(stream)
            return moved

        return arrive

    def from_gpu(self, jobs: Sequence[tuple[torch.Tensor, torch.Tensor]], busy: Busy | None = None) -> torch.Event:
        """Start copying tensors, once they are computed, into others in page-locked RAM; the event of their arrival."""
        self._outward.wait_stream(torch.accelerator.current_stream(self._gpu))
        with self._outward, busy.on_device("states", self._gpu) if busy is not None else nullcontext():
            for stored, data in jobs:
                stored.copy_(data, non_blocking=True)
                if is_gpu(data.device):
                    data.record_stream(self._outward)
        return record_event(self._outward)

    def synchronize(self) -> None:
        """Wait for all copies from the GPU."""
        self._outward.synchronize()


class OffloadedStateStore(StateStore):
    """Page-locked RAM for a GPU's states."""

    def __init__(self, gpu: torch.device, busy: Busy) -> None:
        super().__init__(CPU)
        self._transfers, self._busy = GpuTransfers(gpu), busy

    def fetch(self, stored: Any, device: torch.device) -> Callable[[], Any]:
        if not isinstance(stored, torch.Tensor) or not is_gpu(device):
            # (A caller that reads it on the host must call `synchronize` first: it may still be on its way there.)
            return super().fetch(stored, device)
        return self._transfers.to_gpu(stored, self._busy)

    def _place(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return page_locked(new.shape, new.dtype), new.contiguous()

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        self._transfers.from_gpu(jobs, self._busy)

    def synchronize(self) -> None:
        self._transfers.synchronize()


class FileStateStore(StateStore):
    """A file, read and written by a separate thread, in the order of the calls.

    States of a GPU, `computing`, pass through page-locked RAM, so that neither the host nor the GPU waits for copies.
    """

    def __init__(self, file: StatesFile, busy: Busy, computing: torch.device = CPU) -> None:
        super().__init__(CPU)
        self._file, self._busy = file, busy
        self._transfers = GpuTransfers(computing) if is_gpu(computing) else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._waiting: deque[Future[Any]] = deque()

    def fetch(self, stored: Any, device: torch.device) -> Callable[[], Any]:
        if not isinstance(stored, Written):
            return super().fetch(stored, device)
        transfers = self._transfers
        if transfers is None or not is_gpu(device):
            coming = self._begin(self._file.read, stored)
            return lambda: coming.result().to(device)

        def read() -> Callable[[], torch.Tensor]:
            return transfers.to_gpu(self._file.read(stored, page_locked(stored.shape, stored.dtype)))

        arriving = self._begin(read)
        return lambda: arriving.result()()

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        # (What is still on a GPU is copied when the file is filled.)
        data = new if is_gpu(new.device) and self._transfers is not None else new.to(CPU)
        data = data.contiguous()
        if isinstance(old, Written) and old.nbytes == data.nbytes:
            return Written(old.offset, tuple(data.shape), data.dtype), data
        return self._file.reserve(data), data

    def fill(self, jobs: Sequence[tuple[Any, torch.Tensor]]) -> None:
        arrived, jobs = self._staged(jobs)

        def write() -> None:
            if arrived is not None:
                arrived.synchronize()
            for stored, data in jobs:
                self._file.write(stored, data)

        self._waiting.append(self._begin(write))
        while len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft().result()

    def _staged(
        self, jobs: Sequence[tuple[Any, torch.Tensor]]
    ) -> tuple[torch.Event | None, Sequence[tuple[Any, torch.Tensor]]]:
        """The same jobs with data in RAM, on its way there until the event is reached (None: it is there)."""
        if self._transfers is None or not any(is_gpu(data.device) for _, data in jobs):
            return None, jobs
        staged = [(stored, page_locked(data.shape, data.dtype)) for stored, data in jobs]
        copies = [(place, data) for (_, place), (_, data) in zip(staged, jobs, strict=True)]
        return self._transfers.from_gpu(copies), staged

    def drop(self, leaves: Iterable[Any], but: Iterable[Any] = ()) -> None:
        used = {(leaf.offset, leaf.nbytes) for leaf in but if isinstance(leaf, Written)}
        for leaf in leaves:
            if isinstance(leaf, Written) and (leaf.offset, leaf.nbytes) not in used:
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
