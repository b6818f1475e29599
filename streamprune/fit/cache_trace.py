"""The caches of any model, read off transformers' own cache objects after a forward on the meta device."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import nn
from transformers import PreTrainedModel

from streamprune.errors import UnsupportedModelError
from streamprune.fit.kv_cache import CacheSizes, LayerCache

#: Tokens of the forwards. The first two give what grows and what stays; the third shows that it grows evenly.
_LENGTHS = (2, 4, 7)


def trace_cache(model: PreTrainedModel, experts: Mapping[int, str], blocks: nn.ModuleList) -> CacheSizes:
    """The caches that `model` (on the meta device) fills. `experts` are the paths of the experts modules by block.

    Nothing is computed: the forwards run on shapes alone, with the experts, whose shapes depend on the router's choice,
    left out. Raises UnsupportedModelError for a model whose forward needs real values, or whose cache grows unevenly.
    """
    modules = [blocks[block].get_submodule(path) for block, path in experts.items()]
    try:
        with _without_experts(modules):
            runs = [_cached_values(model, length) for length in _LENGTHS]
    except UnsupportedModelError:
        raise
    except Exception as error:
        # Model code that looks at values fails on meta tensors in many ways of its own.
        raise UnsupportedModelError(
            f"The size of {type(model).__name__}'s cache cannot be worked out: its forward does not run on shapes "
            f"alone ({type(error).__name__}: {textwrap.shorten(str(error), 200)}). Please report this model."
        ) from error
    layers = tuple(_layer(model, *layer) for layer in zip(*runs, strict=True))
    return CacheSizes(layers, model.dtype.itemsize)


class _Seen:
    """One layer's cached tensors after a forward over `length` tokens: values and dtype, by name."""

    def __init__(self, layer: Any, length: int) -> None:
        self.length = length
        self.values = {name: (tensor.numel(), tensor.dtype) for name, tensor in _tensors(layer)}
        # transformers keeps one token less than the window: the newest one's own keys come on top.
        window = getattr(layer, "sliding_window", None)
        self.window = int(window) - 1 if isinstance(window, int) else None


def _layer(model: PreTrainedModel, first: _Seen, second: _Seen, third: _Seen) -> LayerCache:
    grows, state_bytes, index_bytes = 0, 0, 0
    for name, (values, dtype) in second.values.items():
        before = first.values[name][0] if name in first.values else 0
        step, rest = divmod(values - before, second.length - first.length)
        if second.window is not None and second.window < third.length:
            # So small a window was full already: all that is kept belongs to its tokens.
            step, rest = divmod(values, min(second.length, second.window) or 1)
            before = step * first.length
        fixed = before - step * first.length
        expected = fixed + step * _within(third.length, third.window)
        if rest or fixed < 0 or third.values[name][0] != expected:
            raise UnsupportedModelError(
                f"{type(model).__name__}'s cache does not grow evenly with the context, so its size cannot be "
                f"foretold: {name} has {before}, {values} and {third.values[name][0]} values after {_LENGTHS} tokens."
            )
        # What has the model's own dtype is keys and values, which may be cached in another; the rest stays as it is.
        if dtype is model.dtype:
            grows += step
        else:
            index_bytes += step * dtype.itemsize
        state_bytes += fixed * dtype.itemsize
    return LayerCache(grows, second.window if grows or index_bytes else None, state_bytes, index_bytes)


def _within(length: int, window: int | None) -> int:
    return length if window is None else min(length, window)


def _cached_values(model: PreTrainedModel, length: int) -> list[_Seen]:
    ids = torch.zeros((1, length), dtype=torch.int64, device="meta")
    # Attention that picks tokens asks how many there are; no size of a cache depends on the answer.
    with torch.no_grad(), torch.device("meta"), fx_config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        output = model(input_ids=ids, use_cache=True)
    # Models without any attention (Mamba) have another name for it.
    cache: Any = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    if not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no cache of keys and values: it does not generate text token by token."
        )
    # Some models (MiniMax) keep the states of their linear layers beside the list of layers.
    beside = _Seen(cache, length)
    return [*(_Seen(layer, length) for layer in cache.layers), *([beside] if beside.values else [])]


def _tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a layer of a cache holds per sequence, directly or numbered in a dict."""
    for name, value in vars(layer).items():
        items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [value])
        for key, item in items:
            # A single whole number (the window's width as a tensor) is a setting, not a state.
            if isinstance(item, torch.Tensor) and item.dim() > 1:
                yield f"{name}{key}", item


@contextmanager
def _without_experts(modules: list[nn.Module]) -> Iterator[None]:
    def pass_through(*args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(named["hidden_states"] if "hidden_states" in named else args[0])

    plain = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = pass_through
    try:
        yield
    finally:
        for module, forward in zip(modules, plain, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
