"""The states of two models side by side, as one state: what keeps, moves, splits and saves states need not know of it.

The model that is looked at is called `PRUNED`, also where it is all there is; `ORIGINAL` is what it is compared with.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from streamprune.streaming.stream import BatchState

ORIGINAL, PRUNED = "original", "pruned"
_SUMS = "sums"
#: Between the name of a side and that of what it carries along.
_MARK = "/"
#: Tokens at a time whose copies in float32 are looked at: of all they might take more than the block itself does.
_PORTION = 1024


def side_of(state: BatchState, side: str) -> BatchState:
    """One side of a state of both, as that model's blocks take it."""
    carried = {
        name.removeprefix(side + _MARK): values
        for name, values in state.carried.items()
        if name.startswith(side + _MARK)
    }
    return BatchState((state.output or {}).get(side), carried)


def with_side(state: BatchState, side: str, new: BatchState) -> BatchState:
    """A state of both with one side replaced; all else is shared."""
    others = {name: values for name, values in state.carried.items() if not name.startswith(side + _MARK)}
    carried = {side + _MARK + name: values for name, values in new.carried.items()}
    return BatchState({**(state.output or {}), side: new.output}, others | carried)


def sums_of(state: BatchState) -> torch.Tensor | None:
    """What was summed up over the vocabulary so far, (B, L, K) float64; None before the first slice."""
    sums: torch.Tensor | None = (state.output or {}).get(_SUMS)
    return sums


def with_sums(state: BatchState, sums: torch.Tensor) -> BatchState:
    """A state of both with what was summed up over the vocabulary."""
    return BatchState({**(state.output or {}), _SUMS: sums}, state.carried)


def relative_errors(state: BatchState, tokens: int) -> torch.Tensor:
    """For each of a micro-batch's tokens ‖pruned − original‖ / ‖original‖ of its hidden states, (tokens,) float64.

    Several residual streams of a token are taken together. 0 where both are zero.
    """
    original, pruned = (_hidden(side_of(state, side)).reshape(tokens, -1) for side in (ORIGINAL, PRUNED))
    errors = []
    for start in range(0, tokens, _PORTION):
        before, after = (whole[start : start + _PORTION].float() for whole in (original, pruned))
        difference, length = (after - before).norm(dim=-1), before.norm(dim=-1)
        errors.append(torch.where(difference > 0, difference / length, 0.0).double())
    return torch.cat(errors)


def _hidden(state: BatchState) -> torch.Tensor:
    """The hidden states in what a block returned: the first tensor of numbers, as in every model."""
    for leaf in pytree.tree_leaves(state.output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    # (Of no model's block; but saved states may have been made by somebody else.)
    raise ValueError("a state without hidden states")
