"""The model's own forward, one block at a time.

For block i the forward is entered anew: the blocks before i are stand-ins that return the stored output of block i-1,
the stand-in for block i runs the real one and leaves the forward. So masks, positions, per-layer extras and the head
are the model's own, and nothing but the blocks' outputs is kept between blocks.

The states of two models side by side, as one state: what keeps, moves, splits and saves states need not know of it.

The model that is looked at is called `PRUNED`, also where it is all there is; `ORIGINAL` is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from streamprune.errors import UnsupportedModelError
from streamprune.models.decoder import Decoder
from streamprune.work.saved_states import BatchState


class LayerForward:
    """Runs one block of a model on one micro-batch within the model's own forward."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # What a config may ask the forward for besides: it is about the blocks' insides, which stand-ins do not have.
        for config in (decoder.model.config, decoder.model.config.get_text_config(decoder=True)):
            config.return_dict = True
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False
        self._cursor = _Cursor()
        self._stand_ins = nn.ModuleList(
            _StandIn(block, index, self._cursor) for index, block in enumerate(decoder.blocks)
        )

    @torch.no_grad()
    def run_layer(self, index: int, block: nn.Module, input_ids: torch.Tensor, state: BatchState) -> BatchState:
        """The state after block `index`, from token ids (B, L) and the state after the block before it.

        `block` is the loaded module to run in that place. `state` itself is not changed.
        """
        cursor = self._cursor
        cursor.index, cursor.block, cursor.state, cursor.result = index, block, state, None
        cursor.versions = _versions(state)
        try:
            with self._in_place():
                self._decoder.model(input_ids=input_ids, use_cache=False)
        except _Reached:
            assert cursor.result is not None
            return cursor.result
        finally:
            cursor.block = cursor.state = cursor.result = None
        raise UnsupportedModelError(f"{type(self._decoder.model).__name__}: its forward never reached block {index}.")

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, state: BatchState) -> torch.Tensor:
        """The logits (B, L, V) from the state after the last block; needs the head's weights."""
        cursor = self._cursor
        cursor.index, cursor.state, cursor.versions = len(self._stand_ins), state, _versions(state)
        try:
            with self._in_place():
                output = self._decoder.model(input_ids=input_ids, use_cache=False)
        finally:
            cursor.state = None
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        path, _, attribute = self._decoder.layers_path.rpartition(".")
        owner, blocks = self._decoder.model.get_submodule(path), self._decoder.blocks
        setattr(owner, attribute, self._stand_ins)
        try:
            yield
        finally:
            setattr(owner, attribute, blocks)


class _Reached(Exception):
    """Leaves the model's forward once the block that was asked for has run."""


@dataclass
class _Cursor:
    index: int = 0
    block: nn.Module | None = None
    state: BatchState | None = None
    result: BatchState | None = None
    versions: list[int] = field(default_factory=list)


class _StandIn(nn.Module):
    """Takes a block's place; whatever the forward reads from it (layer types, flags) comes from the real one."""

    def __init__(self, block: nn.Module, index: int, cursor: _Cursor) -> None:
        super().__init__()
        # Past nn.Module's registration: the block must not become our child, nor be found twice.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_cursor", cursor)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cursor: _Cursor = self.__dict__["_cursor"]
        index: int = self.__dict__["_index"]
        state = cursor.state
        assert state is not None
        if index < cursor.index:
            return state.output
        assert cursor.block is not None
        if _versions(state) != cursor.versions:
            raise UnsupportedModelError(
                f"The model changes hidden states in place between its blocks (before block {index}), so that its "
                "forward cannot be entered block by block. Please report this model."
            )
        shared = {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        before = {}
        for name, mapping in shared.items():
            mapping.update(state.carried.get(name, {}))
            before[name] = dict(mapping)
        output = cursor.block(*args, **kwargs)
        carried = {name: dict(values) for name, values in state.carried.items()}
        for name, mapping in shared.items():
            for key, value in mapping.items():
                if key not in before[name] or before[name][key] is not value:
                    carried.setdefault(name, {})[key] = value
        cursor.result = BatchState(output, carried)
        raise _Reached


def _versions(state: BatchState) -> list[int]:
    """Counters that change when somebody writes into the state's tensors."""
    return [leaf._version for leaf in pytree.tree_leaves(state.output) if isinstance(leaf, torch.Tensor)]


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
