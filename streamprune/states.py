"""The hidden states of all micro-batches, kept in memory between blocks and updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from streamprune.stream import BatchState

_HOST = torch.device("cpu")


class HiddenStates:
    """One `BatchState` per micro-batch, in host memory. Holds tokens × hidden size × bytes per value, and no more."""

    def __init__(self, batches: int) -> None:
        self._states = [BatchState() for _ in range(batches)]

    def load(self, batch: int, device: torch.device) -> BatchState:
        """The state of a micro-batch on `device` (a view of the stored one where that is the CPU)."""
        return self._states[batch].to(device)

    def store(self, batch: int, state: BatchState) -> None:
        """Replace a micro-batch's state, writing into the memory of the old one where the shapes agree."""
        old = self._states[batch]
        self._states[batch] = BatchState(_put(old.output, state.output), _put(old.carried, state.carried))


def non_finite_tokens(state: BatchState) -> int:
    """How many tokens of a micro-batch have a NaN or infinity in their hidden states."""
    count = 0
    for tensor in pytree.tree_leaves(state.output):
        # A finite sum means finite values; only a doubtful one is worth a second look (sums may overflow).
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            count = max(count, int((~torch.isfinite(tensor)).flatten(2 if tensor.dim() > 2 else 1).any(-1).sum()))
    return count


def _put(old: Any, new: Any) -> Any:
    old_leaves, old_structure = pytree.tree_flatten(old)
    new_leaves, new_structure = pytree.tree_flatten(new)
    if old_structure != new_structure:
        old_leaves = [None] * len(new_leaves)
    return pytree.tree_unflatten(list(map(_put_leaf, old_leaves, new_leaves)), new_structure)


def _put_leaf(old: Any, new: Any) -> Any:
    if not isinstance(new, torch.Tensor):
        return new
    if isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype:
        return old if old is new else old.copy_(new)
    # A copy of its own: the block's output may be a view of something larger that must not stay in memory.
    return new.to(_HOST, copy=True).contiguous()


def hidden_state_bytes(sequences: Sequence[torch.Tensor], hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of the hidden states of all sequences, for a model whose blocks return (B, L, H)."""
    return sum(len(sequence) for sequence in sequences) * hidden_size * dtype.itemsize
