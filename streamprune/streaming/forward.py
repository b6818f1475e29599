"""The model's own forward, one layer at a time, and hidden states of two models (original and pruned) in one state.

To run layer i, the model's forward is called with stand-ins for its layers: those before i return the stored output of
layer i-1, and the one for layer i runs the real layer and leaves the forward. So masks, positions, per-layer inputs and
the head are the model's own, and only the layers' outputs are stored between layers.

In an evaluation a micro-batch has the states of both models ("sides"). The measured model is `PRUNED`, even if it is
the only one; it is compared with `ORIGINAL`. A search measures several at once, each a side with a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import masking_utils

from streamprune.errors import UnsupportedModelError
from streamprune.models.skeleton import Decoder
from streamprune.work.saved_states import BatchState


@contextmanager
def layers_replaced(decoder: Decoder, layers: nn.ModuleList) -> Iterator[None]:
    """Inside the context, the model has these modules in place of its decoder layers."""
    path, _, attribute = decoder.layers_path.rpartition(".")
    owner, own = decoder.model.get_submodule(path), decoder.layers
    setattr(owner, attribute, layers)
    try:
        yield
    finally:
        setattr(owner, attribute, own)


class LayerForward:
    """Runs one layer of a model on one micro-batch, within the model's own forward."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # Turn off outputs from inside the layers, which stand-ins do not have.
        for config in (decoder.model.config, decoder.model.config.get_text_config(decoder=True)):
            config.return_dict = True
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False
        self._cursor = _Cursor()
        self._stand_ins = nn.ModuleList(
            _StandIn(layer, index, self._cursor) for index, layer in enumerate(decoder.layers)
        )
        #: Layers of which it is known that the model gives them nothing of layers before the previous one.
        self._checked = {0, 1}
        #: Shapes and devices of position ids that are known not to be of packed sequences.
        self._unpacked: set[tuple[Any, ...]] = set()

    @torch.no_grad()
    def run_layer(self, index: int, layer: nn.Module, input_ids: torch.Tensor, state: BatchState) -> BatchState:
        """The state after layer `index`, from token ids (B, L) and the state after the layer before it.

        `layer` is the loaded module to run in that place. `state` itself is not changed. Raises UnsupportedModelError
        for a model whose forward cannot be entered layer by layer.
        """
        self._check_inputs(index, input_ids, state)
        try:
            self._run(index, layer, input_ids, state)
        except _Reached as reached:
            return reached.state
        raise UnsupportedModelError(f"{type(self._decoder.model).__name__}: its forward never reached layer {index}.")

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, state: BatchState) -> torch.Tensor:
        """The logits (B, L, V) from the state after a layer, by the final norm and the head, whose weights it needs."""
        self._check_inputs(len(self._stand_ins), input_ids, state)
        logits: torch.Tensor = self._run(len(self._stand_ins), None, input_ids, state).logits
        return logits

    def _check_inputs(self, index: int, input_ids: torch.Tensor, state: BatchState) -> None:
        """Raise UnsupportedModelError if layer `index` (or the head) gets more than what the layer before it returned.

        Only that is stored. Some models also gather the outputs of earlier layers between their layers. Tried once for
        each layer: with NaN as those outputs, its inputs have to stay the same.
        """
        if index in self._checked:
            return
        given: list[list[Any]] = []

        def probe(*args: Any, **kwargs: Any) -> None:
            given.append(pytree.tree_leaves((args, {name: kwargs[name] for name in sorted(kwargs)})))

        for earlier in (None, pytree.tree_map(_as_nan, state.output)):
            try:
                result = self._run(index, probe, input_ids, state, earlier)
                given.append([result.logits])
            except _Reached:
                pass
        if not all(map(_is_same, *given)):
            where = "its head" if index == len(self._stand_ins) else f"layer {index}"
            raise UnsupportedModelError(
                f"{type(self._decoder.model).__name__} cannot be streamed: {where} gets outputs of several earlier "
                "layers, of which only the last is kept. Please report this model."
            )
        self._checked.add(index)

    def _run(
        self,
        index: int,
        layer: Callable[..., Any] | None,
        input_ids: torch.Tensor,
        state: BatchState,
        earlier: Any = None,
    ) -> Any:
        """Run the model's forward with stand-ins for its layers, of which number `index` runs `layer` and leaves it.

        Those before the previous one return `earlier` instead of the state, unless that is None.
        """
        cursor = self._cursor
        cursor.index, cursor.layer, cursor.state, cursor.versions = index, layer, state, _versions(state)
        cursor.earlier = state.output if earlier is None else earlier
        usual = masking_utils.find_packed_sequence_indices

        def find_packed(position_ids: torch.Tensor) -> torch.Tensor | None:
            # Asked once for each shape: it waits for the device in every forward. Without attention mask and cache,
            # positions follow from the shape of the token ids alone.
            key = (*position_ids.shape, position_ids.device)
            if key in self._unpacked:
                return None
            found: torch.Tensor | None = usual(position_ids)
            if found is None:
                self._unpacked.add(key)
            return found

        masking_utils.find_packed_sequence_indices = find_packed
        try:
            with layers_replaced(self._decoder, self._stand_ins):
                return self._decoder.model(input_ids=input_ids, use_cache=False)
        finally:
            masking_utils.find_packed_sequence_indices = usual
            cursor.layer = cursor.state = cursor.earlier = None


class _Reached(Exception):
    """Raised to leave the model's forward once the requested layer has run, with the state after it."""

    def __init__(self, state: BatchState) -> None:
        super().__init__()
        self.state = state


@dataclass
class _Cursor:
    """Shared by the stand-ins of a model: the layer to run, its input state, and what earlier layers return."""

    index: int = 0
    layer: Callable[..., Any] | None = None
    state: BatchState | None = None
    earlier: Any = None
    versions: Sequence[int] = ()


class _StandIn(nn.Module):
    """Takes a layer's place; attributes that the forward reads (layer types, flags) are those of the real layer."""

    def __init__(self, layer: nn.Module, index: int, cursor: _Cursor) -> None:
        super().__init__()
        # Bypass nn.Module's registration: the layer must not become a child of this module.
        object.__setattr__(self, "_layer", layer)
        self._index, self._cursor = index, cursor

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cursor, state = self._cursor, self._cursor.state
        assert state is not None
        if self._index < cursor.index:
            return state.output if self._index == cursor.index - 1 else cursor.earlier
        assert cursor.layer is not None
        if _versions(state) != cursor.versions:
            raise UnsupportedModelError(
                f"The model changes hidden states in place between its layers (before layer {self._index}), so that "
                "its forward cannot be entered layer by layer. Please report this model."
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
        raise _Reached(BatchState(output, carried))


def _as_nan(leaf: Any) -> Any:
    """NaN in place of a floating-point tensor."""
    return torch.full_like(leaf, torch.nan) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _is_same(one: Any, other: Any) -> bool:
    """Whether two inputs of a layer are the same, to the bit if they are tensors (NaN included)."""
    if one is other or not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return True
    as_bytes = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return one.shape == other.shape and torch.equal(*as_bytes)


def _versions(state: BatchState) -> list[int]:
    """Counters that change when the state's tensors are modified in place."""
    return [leaf._version for leaf in pytree.tree_leaves(state.output) if isinstance(leaf, torch.Tensor)]


ORIGINAL, PRUNED = "original", "pruned"
#: Separates the name of a side from the key of its carried values.
_MARK = "/"
#: Tokens at a time that are copied to float32: a copy of all of them may take more memory than the layer itself.
_PORTION = 1024


def of_side(what: str, side: str) -> str:
    """The name of something that each side but the original has of its own; in a run there is one side, `PRUNED`."""
    return what if side == PRUNED else f"{what} of {side}"


def side_of(state: BatchState, side: str) -> BatchState:
    """One side of a state with both, as input for that model's layers."""
    carried = {
        name.removeprefix(side + _MARK): values
        for name, values in state.carried.items()
        if name.startswith(side + _MARK)
    }
    return BatchState((state.output or {}).get(side), carried)


def with_side(state: BatchState, side: str, new: BatchState) -> BatchState:
    """A state with both sides, one of them replaced; the rest is shared."""
    others = {name: values for name, values in state.carried.items() if not name.startswith(side + _MARK)}
    carried = {side + _MARK + name: values for name, values in new.carried.items()}
    return BatchState({**(state.output or {}), side: new.output}, others | carried)


def without_side(state: BatchState, side: str) -> BatchState:
    """A state with several sides without one of them; the rest is shared."""
    carried = {name: values for name, values in state.carried.items() if not name.startswith(side + _MARK)}
    return BatchState({name: output for name, output in state.output.items() if name != side}, carried)


def relative_errors(state: BatchState, side: str, tokens: int) -> torch.Tensor:
    """For each of a micro-batch's tokens ‖side - original‖ / ‖original‖ of its hidden states, (tokens,) float64.

    Several residual streams of a token count as one vector. 0 if both are zero.
    """
    original, pruned = (hidden_states_of(side_of(state, each)).reshape(tokens, -1) for each in (ORIGINAL, side))
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
    counts = [
        (~torch.isfinite(tensor)).flatten(2 if tensor.dim() > 2 else 1).any(-1).sum()
        for tensor in pytree.tree_leaves(state.output)
        if isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        # On the CPU, a finite sum proves finite values; other sums (which may have overflowed) need the full check.
        and (tensor.device.type != "cpu" or not torch.isfinite(tensor.sum()))
    ]
    if len(counts) == 1:
        return counts[0]
    return torch.stack(counts).max() if counts else torch.zeros((), dtype=torch.int64)


def hidden_states_of(state: BatchState) -> torch.Tensor:
    """The hidden states in what a layer returned: the first floating-point tensor, as in every model."""
    for leaf in pytree.tree_leaves(state.output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    # (No model's layer returns that, but saved states may be from something else.)
    raise ValueError("a state without hidden states")
