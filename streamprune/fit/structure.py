"""Footprints of models built on the meta device, by transformers' own code, if names or config are ambiguous.

Caches are read from transformers' cache objects after forwards on shapes alone.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.fit.cache import CacheSizes, LayerCache, served_itemsize, stated_cache
from streamprune.fit.estimate import Footprint
from streamprune.fit.positions import max_positions
from streamprune.fit.published import published_facts
from streamprune.fit.weights import Weights, is_vision, weights_by_layout, weights_with
from streamprune.formats.pick import is_read
from streamprune.formats.quantization import Quantization
from streamprune.models.config_json import ExpertSpec, mtp_layers, stated_shape, states_experts
from streamprune.models.open import DescribedModel, declared_dtype, describe_model, dtype_of_tensors, load_config
from streamprune.models.per_layer_experts import read_per_layer_experts
from streamprune.models.skeleton import Skeleton, build_model, map_checkpoint
from streamprune.models.survey import survey

#: Tokens of the forwards: the first two show what grows and what is fixed; the last, that it grows evenly. (Where there
#: are sliding windows the last one is longer, to go beyond them.)
_SHORT, _MIDDLE, _LONG = 2, 4, 7


def trace_cache(model: PreTrainedModel, experts: Mapping[int, str], layers: nn.ModuleList) -> CacheSizes:
    """The caches that `model` (on the meta device) fills. `experts` are the paths of the experts modules by layer.

    Nothing is computed: the forwards run on shapes alone, without the experts, whose shapes depend on the router's
    choice. Raises UnsupportedModelError for a model whose forward needs real values, or whose cache grows unevenly.
    """
    modules = [layers[layer].get_submodule(path) for layer, path in experts.items()]
    try:
        with _without_experts(modules):
            short, middle = (_run_on_shapes(model, length) for length in (_SHORT, _MIDDLE))
            length = max([_LONG, *(each.window + 2 for each in middle if each.window is not None)])
            long = _run_on_shapes(model, length)
    except UnsupportedModelError:
        raise
    except Exception as error:
        # Model code that looks at values fails on meta tensors in many ways of its own.
        raise UnsupportedModelError(
            f"The size of {type(model).__name__}'s cache is unknown: its forward does not run on shapes "
            f"alone ({type(error).__name__}: {textwrap.shorten(str(error), 200)}). Please report this model."
        ) from error
    caches = (_layer_cache(model, *seen, length) for seen in zip(short, middle, long, strict=True))
    return CacheSizes(tuple(caches), model.dtype.itemsize)


@dataclass(frozen=True)
class _Cached:
    """What one layer has in its cache after a forward: tensors by name, for the last `window` tokens (None: all)."""

    tensors: Mapping[str, torch.Tensor]
    window: int | None


def _run_on_shapes(model: PreTrainedModel, length: int) -> list[_Cached]:
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
    # Some models (MiniMax) keep the states of their linear layers outside the list of layers.
    found = [_cached(part) for part in (*cache.layers, cache)]
    return found if found[-1].tensors else found[:-1]


def _cached(layer: Any) -> _Cached:
    """The tensors that a layer of a cache holds per sequence, directly or numbered in a list or dict."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in vars(layer).items():
        items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [value])
        # A single whole number (the window's width as a tensor) is a setting, not a state.
        tensors |= {f"{name}{key}": each for key, each in items if isinstance(each, torch.Tensor) and each.dim() > 1}
    # transformers keeps one token less than the window: the newest one's own keys come on top.
    window = getattr(layer, "sliding_window", None)
    return _Cached(tensors, window - 1 if isinstance(window, int) else None)


def _layer_cache(model: PreTrainedModel, first: _Cached, second: _Cached, third: _Cached, length: int) -> LayerCache:
    """The cache of one layer, from what it was after forwards over _SHORT, _MIDDLE and `length` tokens."""
    grows, state_bytes, index_bytes, window = 0, 0, 0, second.window
    for name, tensor in second.tensors.items():
        before, values = first.tensors[name].numel() if name in first.tensors else 0, tensor.numel()
        after = third.tensors[name].numel()
        step, rest = divmod(values - before, _MIDDLE - _SHORT)
        if window is not None and window < _MIDDLE:
            # So small a window was full already: everything in it belongs to its tokens.
            step, rest = divmod(values, window or 1)
            before = step * _SHORT
        fixed = before - step * _SHORT
        if step and after == fixed + step * length:
            # Some models (UnlimitedOCR) keep all of the prompt, and a window of what they generate.
            window = None
        if rest or fixed < 0 or after != fixed + step * (length if window is None else min(length, window)):
            raise UnsupportedModelError(
                f"{type(model).__name__}'s cache does not grow evenly with the context, so its size cannot be "
                f"estimated: {name} has {before}, {values} and {after} values after {_SHORT}, {_MIDDLE} "
                f"and {length} tokens."
            )
        # Tensors of the model's own dtype are keys and values, which may be cached in another; others may not.
        if tensor.dtype is model.dtype:
            grows += step
        else:
            index_bytes += step * tensor.dtype.itemsize
        state_bytes += fixed * tensor.dtype.itemsize
    return LayerCache(grows, window if grows or index_bytes else None, state_bytes, index_bytes)


@contextmanager
def _without_experts(modules: list[nn.Module]) -> Iterator[None]:
    def pass_through(*args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(named["hidden_states"] if "hidden_states" in named else args[0])

    for module in modules:
        module.forward = pass_through
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def footprint_of_model(
    model: str,
    folder: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry] | None,
    weights: Weights | None,
    trust_remote_code: bool,
) -> tuple[Footprint, DescribedModel | None]:
    """Build the model of `folder`'s config.json (`raw`) on the meta device, and read its footprint from it.

    The model itself is None if it has no experts.

    `tensors` are the checkpoint's; None for a config alone, whose weights are then those of the built model. `weights`
    are those that the tensors' names show for certain.
    """
    config, described = load_config(folder, trust_remote_code), None
    if read_per_layer_experts(raw) is not None or states_experts(config.to_dict()):
        # Built with the same number everywhere: its caches are the same, and names and axes of its tensors too.
        described = describe_model(folder, raw, trust_remote_code)
        raw, config = described.raw, described.config
        footprint = footprint_of_skeleton(model, raw, described.skeleton, tensors, weights, described.counts)
    else:
        built = build_model(config, declared_dtype(config) or torch.bfloat16, trust_remote_code)
        weights = _weights_of(built, raw) if tensors is None else weights
        if weights is None:
            raise UnsupportedModelError(
                f"{model}: its tensors are named after experts, but its config states no number of them, so its "
                "weights cannot be told apart."
            )
        footprint = _footprint(model, config, raw, weights, None, trace_cache(built, {}, nn.ModuleList()))
    return footprint if tensors is not None else _as_published(footprint, config, raw), described


def _as_published(footprint: Footprint, config: PreTrainedConfig, raw: Mapping[str, Any]) -> Footprint:
    """The footprint of a config alone, plus what its checkpoint will have in addition to the text model that was built:
    pruning keeps the other towers of a multimodal model, which the text class does not have."""
    notes, facts = footprint.notes, footprint.weights.facts
    if config.get_text_config(decoder=True) is not config and not any(fact.category == "vision" for fact in facts):
        try:
            with torch.device("meta"):
                built = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=declared_dtype(config))
        except Exception:
            # Not every multimodal config has such a class, and its constructor may refuse the config in any way.
            pass
        else:
            facts += tuple(published_facts(built, raw, wanted=is_vision))
    method = Quantization.of(raw).method
    if not is_read(raw):
        notes = (*notes, f"The published weights are quantized ({method}), but the sizes are of plain ones, as the "
                 "model has them without quantization: only a checkpoint's headers tell the others.")  # fmt: skip
    if predicting := mtp_layers(raw):
        layers = "1 layer" if predicting == 1 else f"{predicting} layers"
        notes = (*notes, f"Not counted: {layers} for multi-token prediction, which config.json names and "
                 "transformers does not load.")  # fmt: skip
    return replace(footprint, weights=replace(footprint.weights, facts=facts), notes=notes)


def footprint_of_skeleton(
    model: str,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    weights: Weights | None = None,
    counts: Mapping[int, int] | None = None,
) -> Footprint:
    """The footprint of a Mixture-of-Experts model that was built on the meta device.

    `weights` are the checkpoint's if they are known, as in quantized checkpoints, whose tensors the plain model does
    not load. `counts` are the experts by layer, where they are not those of the skeleton.
    """
    if weights is None and tensors:
        weights = weights_of_checkpoint(raw, skeleton, tensors, counts)
    elif weights is None:
        weights = _weights_of(skeleton.model, raw, skeleton, counts)
    layers = {fact.layer for fact in weights.facts if fact.category == "experts"}
    if len(layers) != len(skeleton.experts):
        raise CheckpointError(
            f"{model} has experts in {len(layers)} layers, but by its config there should be some in "
            f"{len(skeleton.experts)}. Config and weights do not belong together; download both again."
        )
    stated = stated_cache(raw, tensors) if tensors else None
    if stated is not None:
        # Plain attention: its projections say the same as a trace, which takes half a second.
        cache = stated
    else:
        # The model may be built to compute in another dtype than it is served in.
        itemsize = served_itemsize(raw) or dtype_of_tensors(tensors or {}).itemsize
        cache = replace(trace_cache(skeleton.model, skeleton.experts, skeleton.layers), itemsize=itemsize)
    footprint = _footprint(model, skeleton.model.config, raw, weights, skeleton.spec, cache)
    known = skeleton.width is not None and any(fact.channel_axis is not None for fact in weights.facts)
    return replace(footprint, width=skeleton.width.width if known and skeleton.width is not None else None)


def weights_of_checkpoint(
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int] | None = None,
) -> Weights:
    """The weights by what each tensor feeds in the model, with `counts` experts by layer (None: as the skeleton)."""
    counts = counts or dict.fromkeys(skeleton.experts, skeleton.spec.count)
    targets = map_checkpoint(skeleton, tensors, raw)
    stored = {name: target.stored for name, target in targets.items()}
    return weights_by_layout(tensors, survey(raw, skeleton, tensors, targets, counts), counts, stored)


def _footprint(
    model: str,
    config: PreTrainedConfig,
    raw: Mapping[str, Any],
    weights: Weights,
    spec: ExpertSpec | None,
    cache: CacheSizes,
) -> Footprint:
    known = config.to_dict()
    shape = stated_shape(known)
    if shape is None:
        raise UnsupportedModelError(
            f"{model}: its config names no hidden size, attention heads or vocabulary under a usual name, so its "
            "workspace cannot be worked out. Please report this model."
        )
    return Footprint(
        model, weights, None if weights.counts else spec, cache, shape, cache.itemsize, max_positions(known),
        quantization=Quantization.of(raw).method,
    )  # fmt: skip


def _weights_of(
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    skeleton: Skeleton | None = None,
    counts: Mapping[int, int] | None = None,
) -> Weights:
    """The weights of a checkpoint with the config.json `raw`, with `counts` experts by layer; tied ones count once."""
    if skeleton is not None and counts is None:
        counts = dict.fromkeys(skeleton.experts, skeleton.spec.count)
    return weights_with(published_facts(model, raw, skeleton, counts), counts or {}, measured=False)
