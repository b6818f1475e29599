"""The hidden states of all micro-batches, kept between blocks and updated in place: in memory, or in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from streamprune.streaming.states_file import StatesFile, Written
from streamprune.streaming.stream import BatchState

_HOST = torch.device("cpu")
#: What a micro-batch's parts go by: () for the output, (argument, key) for what is carried along.
_Parts = dict[tuple[Any, ...], Any]


class HiddenStates:
    """One `BatchState` per micro-batch. Holds tokens × hidden size × bytes per value, and no more.

    They lie in the memory of `device` (by default the host's), or with `folder` in a nameless file in that folder,
    which is gone when this is closed. The values are the same to the bit wherever they lie.
    """

    def __init__(self, batches: int, device: torch.device = _HOST, folder: Path | None = None) -> None:
        self._states = [BatchState() for _ in range(batches)]
        self._shelf: _Shelf = _Memory(device) if folder is None else _File(StatesFile(folder))

    def close(self) -> None:
        """Free what the states take, also on the disk."""
        self._states.clear()
        self._shelf.close()

    def resize(self, batches: int) -> None:
        """Forget all states, and make room for those of so many micro-batches."""
        self._shelf.drop([leaf for state in self._states for part in _parts(state).values() for leaf in _leaves(part)])
        self._states = [BatchState() for _ in range(batches)]

    def load(self, batch: int, device: torch.device) -> BatchState:
        """The state of a micro-batch on `device` (a view of the stored one where it lies there)."""
        return _map_state(lambda leaf: self._shelf.get(leaf, device), self._states[batch])

    def store(self, batch: int, state: BatchState) -> None:
        """Replace a micro-batch's state, writing into the place of the old one where the sizes agree.

        Whatever may run out of memory comes first: if it does, the old state is still there as it was.
        """
        old, new = _parts(self._states[batch]), _parts(state)
        jobs: list[tuple[Any, torch.Tensor]] = []
        gone: list[Any] = []
        made: list[Any] = []

        def prepare(old_leaf: Any, new_leaf: Any) -> Any:
            kept, data = self._shelf.prepare(old_leaf, new_leaf) if _is_tensor(new_leaf) else (new_leaf, None)
            if not _same_place(kept, old_leaf):
                gone.append(old_leaf)
                made.append(kept)
            if data is not None:
                jobs.append((kept, data))
            return kept

        try:
            ready = {key: _match(prepare, old.get(key), value, gone) for key, value in new.items()}
        except BaseException:
            self._shelf.drop(made)
            raise
        for kept, data in jobs:
            self._shelf.fill(kept, data)
        gone += [leaf for key in old.keys() - new.keys() for leaf in pytree.tree_leaves(old[key])]
        self._shelf.drop(gone)
        self._states[batch] = _whole(ready)

    def move(self, device: torch.device) -> None:
        """Move all states into the memory of another device."""
        shelf = _Memory(device)
        for number, state in enumerate(self._states):
            self._states[number] = _map_state(lambda leaf: self._shelf.get(leaf, device), state)
        self._shelf.close()
        self._shelf = shelf

    def split(self, batch: int, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Make several micro-batches of one of token ids of `shape` (B, L): of `sizes` sequences, summing to B.

        Those behind it move up. The parts lie where the whole did.
        """
        start, pieces = 0, []
        for size in sizes:
            first, count = start, size

            def piece(leaf: Any, first: int = first, count: int = count) -> Any:
                rows = _rows_per_sequence(leaf, shape)
                if rows is None:
                    # What all sequences share: a copy each, since each will write its own into it.
                    return leaf if first == 0 else self._shelf.copy(leaf)
                return self._shelf.rows(leaf, first * rows, count * rows)

            pieces.append(_map_state(piece, self._states[batch]))
            start += size
        self._states[batch : batch + 1] = pieces


class _Shelf(Protocol):
    """Where leaves are kept: as a tensor or a `Written`. Leaves that are no tensors are kept as they are."""

    def get(self, kept: Any, device: torch.device) -> Any: ...

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """What will stand for `new` (in the place of `old` if that suits), and the data still to be filled in."""

    def fill(self, kept: Any, data: torch.Tensor) -> None: ...

    def rows(self, kept: Any, start: int, count: int) -> Any: ...

    def copy(self, kept: Any) -> Any: ...

    def drop(self, leaves: Sequence[Any]) -> None: ...

    def close(self) -> None: ...


class _Memory:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def get(self, kept: Any, device: torch.device) -> Any:
        return kept.to(device) if _is_tensor(kept) else kept

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        if _is_tensor(old) and old.shape == new.shape and old.dtype == new.dtype:
            if old is new:
                return old, None
            # A strided copy between devices would need memory at a moment when none may be asked for any more.
            return old, new if old.device == new.device else new.contiguous()
        # A copy of its own: the block's output may be a view of something larger that must not stay in memory.
        return new.to(self._device, copy=True).contiguous(), None

    def fill(self, kept: Any, data: torch.Tensor) -> None:
        kept.copy_(data)

    def rows(self, kept: Any, start: int, count: int) -> Any:
        return kept.narrow(0, start, count)

    def copy(self, kept: Any) -> Any:
        return kept.clone() if _is_tensor(kept) else kept

    def drop(self, leaves: Sequence[Any]) -> None:
        """Nothing to do: the memory goes with the last reference."""

    def close(self) -> None:
        """Nothing to do."""


class _File:
    def __init__(self, file: StatesFile) -> None:
        self._file = file

    def get(self, kept: Any, device: torch.device) -> Any:
        return self._file.read(kept).to(device) if isinstance(kept, Written) else kept

    def prepare(self, old: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        data = new.to(_HOST).contiguous()
        if isinstance(old, Written) and old.nbytes == data.nbytes:
            return Written(old.offset, tuple(data.shape), data.dtype), data
        return self._file.reserve(data), data

    def fill(self, kept: Any, data: torch.Tensor) -> None:
        self._file.write(kept, data)

    def rows(self, kept: Any, start: int, count: int) -> Any:
        return kept.rows(start, count)

    def copy(self, kept: Any) -> Any:
        if not isinstance(kept, Written):
            return kept
        data = self._file.read(kept)
        place = self._file.reserve(data)
        self._file.write(place, data)
        return place

    def drop(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Written):
                self._file.release(leaf)

    def close(self) -> None:
        self._file.close()


def non_finite_tokens(state: BatchState) -> int:
    """How many tokens of a micro-batch have a NaN or infinity in their hidden states."""
    count = 0
    for tensor in pytree.tree_leaves(state.output):
        # A finite sum means finite values; only a doubtful one is worth a second look (sums may overflow).
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            count = max(count, int((~torch.isfinite(tensor)).flatten(2 if tensor.dim() > 2 else 1).any(-1).sum()))
    return count


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


def _same_place(a: Any, b: Any) -> bool:
    if isinstance(a, Written) and isinstance(b, Written):
        return a.offset == b.offset and a.nbytes == b.nbytes
    return a is b


def _parts(state: BatchState) -> _Parts:
    carried = {(name, key): value for name, values in state.carried.items() for key, value in values.items()}
    return {(): state.output, **carried}


def _whole(parts: _Parts) -> BatchState:
    state = BatchState(parts[()])
    for key, value in parts.items():
        if key:
            state.carried.setdefault(key[0], {})[key[1]] = value
    return state


def _map_state(function: Callable[[Any], Any], state: BatchState) -> BatchState:
    return _whole({key: pytree.tree_map(function, value) for key, value in _parts(state).items()})


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
