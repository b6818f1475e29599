"""The model's own forward, one layer at a time, and hidden states of two models (original and pruned) in one state.

To run layer i the model's forward is entered anew: the layers before i are stand-ins that return the stored output of
layer i-1, the stand-in for layer i runs the real one and leaves the forward. So masks, positions, per-layer extras and
the head are the model's own, and nothing but the layers' outputs is kept between layers.

In an evaluation a micro-batch has the states of both models ("sides"). The model that is measured is `PRUNED`, also
where it is the only one; `ORIGINAL` is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import masking_utils

from streamprune.errors import UnsupportedModelError
from streamprune.models.skeleton import Decoder
from streamprune.work.saved_states import BatchState


class LayerForward:
    """Runs one layer of a model on one micro-batch, within the model's own forward."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # Options that make the forward return what comes from inside the layers, which stand-ins do not have.
        for config in (decoder.model.config, decoder.model.config.get_text_config(decoder=True)):
            config.return_dict = True
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False
        self._cursor = _Cursor()
        self._stand_ins = nn.ModuleList(
            _StandIn(layer, index, self._cursor) for index, layer in enumerate(decoder.layers)
        )
        self._unpacked: set[tuple[Any, ...]] = set()

    @torch.no_grad()
    def run_layer(self, index: int, layer: nn.Module, input_ids: torch.Tensor, state: BatchState) -> BatchState:
        """The state after layer `index`, from token ids (B, L) and the state after the layer before it.

        `layer` is the loaded module to run in that place. `state` itself is not changed. Raises UnsupportedModelError
        for a model whose forward cannot be entered layer by layer.
        """
        cursor = self._cursor
        cursor.index, cursor.layer, cursor.state, cursor.result = index, layer, state, None
        cursor.versions = _versions(state)
        try:
            with self._with_stand_ins():
                self._decoder.model(input_ids=input_ids, use_cache=False)
        except _Reached:
            assert cursor.result is not None
            return cursor.result
        finally:
            cursor.layer = cursor.state = cursor.result = None
        raise UnsupportedModelError(f"{type(self._decoder.model).__name__}: its forward never reached layer {index}.")

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, state: BatchState) -> torch.Tensor:
        """The logits (B, L, V) from the state after a layer, by the final norm and the head, whose weights it needs."""
        cursor = self._cursor
        cursor.index, cursor.state, cursor.versions = len(self._stand_ins), state, _versions(state)
        try:
            with self._with_stand_ins():
                output = self._decoder.model(input_ids=input_ids, use_cache=False)
        finally:
            cursor.state = None
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _with_stand_ins(self) -> Iterator[None]:
        path, _, attribute = self._decoder.layers_path.rpartition(".")
        owner, layers = self._decoder.model.get_submodule(path), self._decoder.layers
        find_packed = getattr(masking_utils, "find_packed_sequence_indices", None)
        setattr(owner, attribute, self._stand_ins)
        if find_packed is not None:
            masking_utils.find_packed_sequence_indices = self._remembering(find_packed)
        try:
            yield
        finally:
            setattr(owner, attribute, layers)
            if find_packed is not None:
                masking_utils.find_packed_sequence_indices = find_packed

    def _remembering(self, find_packed: Any) -> Any:
        """`find_packed_sequence_indices`, asked once for each shape: it waits for the device in every forward.

        Without attention mask and cache, positions follow from the shape of the token ids alone.
        """

        def find(position_ids: torch.Tensor) -> torch.Tensor | None:
            key = (*position_ids.shape, position_ids.device)
            if key in self._unpacked:
                return None
            found: torch.Tensor | None = find_packed(position_ids)
            if found is None:
                self._unpacked.add(key)
            return found

        return find


class _Reached(Exception):
    """Leaves the model's forward once the layer that was asked for has run."""


@dataclass
class _Cursor:
    """What the stand-ins of a model share: which layer is to run, on what state, and what came of it."""

    index: int = 0
    layer: nn.Module | None = None
    state: BatchState | None = None
    result: BatchState | None = None
    versions: list[int] = field(default_factory=list)


class _StandIn(nn.Module):
    """Takes a layer's place; whatever the forward reads from it (layer types, flags) comes from the real one."""

    def __init__(self, layer: nn.Module, index: int, cursor: _Cursor) -> None:
        super().__init__()
        # Past nn.Module's registration: the layer must not become our child, nor be found twice.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_cursor", cursor)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cursor: _Cursor = self.__dict__["_cursor"]
        index: int = self.__dict__["_index"]
        state = cursor.state
        assert state is not None
        if index < cursor.index:
            return state.output
        assert cursor.layer is not None
        if _versions(state) != cursor.versions:
            raise UnsupportedModelError(
                f"The model changes hidden states in place between its layers (before layer {index}), so that its "
                "forward cannot be entered layer by layer. Please report this model."
            )
        shared = {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        before = {}
        for name, mapping in shared.items():
            mapping.update(state.carried.get(name, {}))
            before[name] = dict(mapping)
        output = cursor.layer(*args, **kwargs)
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
#: Tokens at a time that are copied to float32: a copy of all of them may take more memory than the layer itself.
_PORTION = 1024


def side_of(state: BatchState, side: str) -> BatchState:
    """One side of a state of both, as that model's layers take it."""
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
    """For each of a micro-batch's tokens ‖pruned - original‖ / ‖original‖ of its hidden states, (tokens,) float64.

    Several residual streams of a token are taken together. 0 where both are zero.
    """
    original, pruned = (_hidden(side_of(state, side)).reshape(tokens, -1) for side in (ORIGINAL, PRUNED))
    errors = []
    for start in range(0, tokens, _PORTION):
        before, after = (states[start : start + _PORTION].float() for states in (original, pruned))
        difference, length = (after - before).norm(dim=-1), before.norm(dim=-1)
        errors.append(torch.where(difference > 0, difference / length, 0.0).double())
    return torch.cat(errors)


def non_finite_tokens(state: BatchState) -> torch.Tensor:
    """How many tokens of a micro-batch have NaN or infinity in their hidden states: one number, on their device.

    Does not wait for a GPU.
    """
    counts = [torch.zeros((), dtype=torch.int64)]
    for tensor in pytree.tree_leaves(state.output):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        # On the host, a finite sum means finite values; only a doubtful one is worth a second look (sums may overflow).
        if tensor.device.type != "cpu" or not torch.isfinite(tensor.sum()):
            counts.append((~torch.isfinite(tensor)).flatten(2 if tensor.dim() > 2 else 1).any(-1).sum())
    device = counts[-1].device
    return torch.stack([count.to(device) for count in counts]).max() if len(counts) > 2 else counts[-1]


def _hidden(state: BatchState) -> torch.Tensor:
    """The hidden states in what a layer returned: the first floating-point tensor, as in every model."""
    for leaf in pytree.tree_leaves(state.output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    # (No model's layer returns that; but saved states may have been made by somebody else.)
    raise ValueError("a state without hidden states")
