"""The hidden states of all micro-batches, stored between layers and updated in place: in memory, or in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from streamprune.hardware.device import CPU
from streamprune.progress import Busy
from streamprune.streaming.state_store import (
    Fetch,
    FileStateStore,
    StatesFile,
    StateStore,
    Written,
    memory_state_store,
    same_place,
)
from streamprune.work.saved_states import BatchState

#: What a micro-batch's parts go by: () for the output, (argument, key) for what is carried along.
_Parts = dict[tuple[Any, ...], Any]


class HiddenStates:
    """One `BatchState` per micro-batch. Holds tokens × hidden size × bytes per value, and no more.

    They lie in the memory of `home` (by default the host's), or with `folder` in a nameless file in that folder, which
    is gone when this is closed. The values are the same to the bit wherever they lie. Between the store and the
    `computing` device states move while another micro-batch computes: `prefetch` brings one, `store` sends one away,
    and `synchronize` waits for all that were sent.
    """

    def __init__(
        self, batches: int, home: torch.device = CPU, folder: Path | None = None, *,
        computing: torch.device = CPU, busy: Busy | None = None,
    ) -> None:  # fmt: skip
        self._states = [BatchState() for _ in range(batches)]
        self._computing, self._busy = computing, busy or Busy()
        self._store: StateStore = (
            memory_state_store(home, computing, self._busy)
            if folder is None
            else FileStateStore(StatesFile(folder), self._busy)
        )
        #: The state that is on its way: as it was stored when it was asked for, where to, and what waits for it.
        self._coming: tuple[BatchState, torch.device, BatchState] | None = None

    def close(self) -> None:
        """Free what the states take, also on the disk."""
        self.drop_prefetch()
        self._states.clear()
        self._store.close()

    def synchronize(self) -> None:
        """Wait until all that was stored has arrived. Raises what went wrong on the way."""
        self._store.synchronize()

    def resize(self, batches: int) -> None:
        """Forget all states, and make room for those of so many micro-batches."""
        self._store.drop([leaf for state in self._states for part in _parts(state).values() for leaf in _leaves(part)])
        self._states = [BatchState() for _ in range(batches)]

    def prefetch(self, batch: int, device: torch.device) -> None:
        """Begin to fetch the state of a micro-batch that `load` will ask for next."""
        stored = self._states[batch]
        self._coming = stored, device, _map_state(lambda leaf: self._store.fetch(leaf, device), stored)

    def drop_prefetch(self) -> None:
        """Free the state that was prefetched."""
        self._coming = None

    def load(self, batch: int, device: torch.device) -> BatchState:
        """The state of a micro-batch on `device` (a view of the stored one where it lies there)."""
        stored = self._states[batch]
        if self._coming is None or self._coming[0] is not stored or self._coming[1] != device:
            self.prefetch(batch, device)
        assert self._coming is not None
        fetches, self._coming = self._coming[2], None
        return _map_state(lambda fetch: fetch() if isinstance(fetch, Fetch) else fetch, fetches)

    def store(self, batch: int, state: BatchState) -> None:
        """Replace a micro-batch's state, writing into the place of the old one where the sizes agree.

        Whatever may run out of memory comes first: if it does, the old state is still there as it was.
        """
        old, new = _parts(self._states[batch]), _parts(state)
        jobs: list[tuple[Any, torch.Tensor]] = []
        gone: list[Any] = []
        made: list[Any] = []

        def prepare(old_leaf: Any, new_leaf: Any) -> Any:
            stored, data = self._store.prepare(old_leaf, new_leaf) if _is_tensor(new_leaf) else (new_leaf, None)
            if not same_place(stored, old_leaf):
                gone.append(old_leaf)
                made.append(stored)
            if data is not None:
                jobs.append((stored, data))
            return stored

        try:
            ready = {key: _match(prepare, old.get(key), value, gone) for key, value in new.items()}
        except BaseException:
            self._store.drop(made)
            raise
        if jobs:
            self._store.fill(jobs)
        gone += [leaf for key in old.keys() - new.keys() for leaf in pytree.tree_leaves(old[key])]
        self._store.drop(gone)
        self._states[batch] = _state_of(ready)

    def move(self, home: torch.device) -> None:
        """Move all states into the memory of another device."""
        self.drop_prefetch()
        self.synchronize()
        store = memory_state_store(home, self._computing, self._busy)
        for number, state in enumerate(self._states):
            self._states[number] = _map_state(lambda leaf: store.take_over(self._store.fetch(leaf, home)()), state)
        self._store.close()
        self._store = store

    def split(self, batch: int, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Make several micro-batches of one of token ids of `shape` (B, L): of `sizes` sequences, summing to B.

        The micro-batches after it move up. The parts share the storage of the original.
        """
        self.drop_prefetch()
        start, pieces = 0, []
        for size in sizes:
            first, count = start, size

            def piece(leaf: Any, first: int = first, count: int = count) -> Any:
                rows = _rows_per_sequence(leaf, shape)
                if rows is None:
                    # What all sequences share: a copy each, since each will write its own into it.
                    return leaf if first == 0 else self._store.copy(leaf)
                return self._store.rows(leaf, first * rows, count * rows)

            pieces.append(_map_state(piece, self._states[batch]))
            start += size
        self._states[batch : batch + 1] = pieces


def _rows_per_sequence(leaf: Any, shape: Sequence[int]) -> int | None:
    """How many rows of a leaf belong to each of the B sequences of L tokens; None if it is not made of sequences.

    The batch comes first in every model's states: (B, …), or flattened with the dimensions behind it (B·L, …). A first
    dimension of L is that of something which all sequences share, even where L is a multiple of B.
    """
    sequences, length = shape
    rows = leaf.shape[0] if isinstance(leaf, (torch.Tensor, Written)) and len(leaf.shape) else 0
    if rows == sequences:
        return 1
    if rows == 0 or rows == length or rows % sequences:
        return None
    return int(rows // sequences)


def _leaves(part: Any) -> list[Any]:
    return list(pytree.tree_leaves(part))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _parts(state: BatchState) -> _Parts:
    carried = {(name, key): value for name, values in state.carried.items() for key, value in values.items()}
    return {(): state.output, **carried}


def _state_of(parts: _Parts) -> BatchState:
    state = BatchState(parts[()])
    for key, value in parts.items():
        if key:
            state.carried.setdefault(key[0], {})[key[1]] = value
    return state


def _map_state(function: Callable[[Any], Any], state: BatchState) -> BatchState:
    return _state_of({key: pytree.tree_map(function, value) for key, value in _parts(state).items()})


def _match(function: Callable[[Any, Any], Any], old: Any, new: Any, gone: list[Any]) -> Any:
    """`new` with function(old leaf, new leaf) in place of every leaf; old leaves are None where there is none.

    Where the structures differ, the old leaves have no successor and are added to `gone`.
    """
    old_leaves, old_structure = pytree.tree_flatten(old)
    new_leaves, new_structure = pytree.tree_flatten(new)
    if old_structure != new_structure:
        gone += old_leaves
        old_leaves = [None] * len(new_leaves)
    return pytree.tree_unflatten(list(map(function, old_leaves, new_leaves)), new_structure)
