"""The footprint of a model whose names or config leave doubts, from its structure as transformers builds it on meta."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.fit.cache_trace import trace_cache
from streamprune.fit.estimate import Footprint
from streamprune.fit.footprint import max_positions
from streamprune.fit.kv_cache import CacheSizes
from streamprune.fit.weight_facts import weights_by_layout, weights_by_name, weights_with
from streamprune.fit.weights import WeightFact, Weights, category_of
from streamprune.output.survey import survey
from streamprune.output.uneven_input import UnevenConfig, counts_of
from streamprune.source.architecture import config_from_dict, declared_dtype, load_config
from streamprune.source.checkpoint import TensorEntry
from streamprune.source.config_facts import (
    ExpertSpec,
    stated_experts,
    stated_shape,
    states_experts,
    text_part,
)
from streamprune.source.decoder import build_model
from streamprune.source.skeleton import Skeleton, build_skeleton

#: dtypes by their names in a safetensors header.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def footprint_of_model(
    model: str,
    folder: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry] | None,
    trust_remote_code: bool,
    uneven: UnevenConfig | None = None,
) -> Footprint:
    """Build the model of `folder`'s config on the meta device and read off what names did not tell.

    `tensors` are the checkpoint's; None for a config alone, whose weights are then taken as the model would have them.
    `uneven` is what its config says of blocks with different numbers of experts, if it does.
    """
    config = load_config(folder, trust_remote_code)
    if uneven is not None:
        # Built with the same number everywhere: its caches are the same, and names and axes of its tensors too.
        raw, config = uneven.stock, config_from_dict(config, uneven.stock)
    if states_experts(config.to_dict()):
        skeleton = build_skeleton(config, declared_dtype(config) or torch.bfloat16, trust_remote_code)
        footprint = footprint_of_skeleton(model, raw, skeleton, tensors, trust_names=True, uneven=uneven)
        return footprint if tensors is not None else _as_published(footprint, config, raw)
    built = build_model(config, declared_dtype(config) or torch.bfloat16, trust_remote_code)
    weights = weights_by_name(tensors, raw, None) if tensors is not None else _weights_of(built, None)
    if weights is None:
        raise UnsupportedModelError(
            f"{model}: its tensors are named after experts, but its config states no number of them, so its weights "
            "cannot be told apart."
        )
    footprint = _footprint(model, config, weights, None, trace_cache(built, {}, nn.ModuleList()))
    return footprint if tensors is not None else _as_published(footprint, config, raw)


def _as_published(footprint: Footprint, config: PreTrainedConfig, raw: Mapping[str, Any]) -> Footprint:
    """What a config alone lets one expect of the checkpoint beyond the text model that was built from it."""
    notes = footprint.notes
    weights = footprint.weights
    if not any(fact.category == "vision" for fact in weights.facts):
        # Pruning keeps the other towers of a multimodal model, of which the text class knows nothing.
        weights = replace(weights, facts=(*weights.facts, *_vision_of(config)))
    quantization = raw.get("quantization_config") or text_part(raw)[1].get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        notes = (*notes, f"The published weights are quantized ({method}), but the sizes are of plain ones, as the "
                 "model has them without quantization: only a checkpoint's headers tell the others.")  # fmt: skip
    return replace(footprint, weights=weights, notes=notes)


def _vision_of(config: PreTrainedConfig) -> Iterator[WeightFact]:
    """The tensors of a multimodal model's other towers; none for a model of text."""
    if config.get_text_config(decoder=True) is config:
        return
    try:
        with torch.device("meta"):
            whole = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=declared_dtype(config))
    except Exception:
        # Not every multimodal config has such a class, and its constructor may refuse the config in any way.
        return
    for fact in _weights_of(whole, None).facts:
        if fact.category == "vision":
            yield fact


def footprint_of_skeleton(
    model: str,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    trust_names: bool = False,
    uneven: UnevenConfig | None = None,
) -> Footprint:
    """The footprint of a Mixture-of-Experts model that was built on the meta device.

    With `trust_names` the weights are told apart by name where that is certain: also in quantized checkpoints, whose
    tensors do not feed the plain model. `uneven` says how many experts the blocks have if not as many as the skeleton.
    """
    counts = counts_of(uneven, skeleton.experts) if uneven else None
    weights = None
    if tensors is not None and trust_names:
        weights = weights_by_name(tensors, raw, stated_experts(raw), uneven.differing if uneven else None)
    if weights is None and tensors:
        weights = weights_of_checkpoint(raw, skeleton, tensors, counts)
    elif weights is None:
        weights = _weights_of(skeleton.model, skeleton, counts)
    blocks = {fact.block for fact in weights.facts if fact.category == "experts"}
    if len(blocks) != len(skeleton.experts):
        raise CheckpointError(
            f"{model} has experts in {len(blocks)} blocks, but by its config there should be some in "
            f"{len(skeleton.experts)}. Config and weights do not belong together; download both again."
        )
    cache = trace_cache(skeleton.model, skeleton.experts, skeleton.blocks)
    return _footprint(model, skeleton.model.config, weights, skeleton.spec, cache)


def weights_of_checkpoint(
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int] | None = None,
) -> Weights:
    """The weights by what each tensor feeds in the model, with `counts` experts by block (None: as the skeleton)."""
    counts = counts or dict.fromkeys(skeleton.experts, skeleton.spec.count)
    return weights_by_layout(tensors, survey(raw, skeleton, tensors, counts=counts), counts)


def _footprint(
    model: str, config: PreTrainedConfig, weights: Weights, spec: ExpertSpec | None, cache: CacheSizes
) -> Footprint:
    known = config.to_dict()
    shape = stated_shape(known)
    if shape is None:
        raise UnsupportedModelError(
            f"{model}: its config names no hidden size, attention heads or vocabulary under a usual name, so its "
            "workspace cannot be worked out. Please report this model."
        )
    itemsize = (declared_dtype(config) or torch.bfloat16).itemsize
    spec = None if weights.counts else spec
    return Footprint(model, weights, spec, cache, shape, itemsize, max_positions(known))


def _weights_of(model: PreTrainedModel, skeleton: Skeleton | None, counts: Mapping[int, int] | None = None) -> Weights:
    """The weights as transformers would hold them, with `counts` experts by block; tied ones count once."""
    if skeleton is not None and counts is None:
        counts = dict.fromkeys(skeleton.experts, skeleton.spec.count)
    facts, seen = [], set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        block = skeleton.block_of(name) if skeleton else None
        rows = skeleton.expert_rows.get(name) if skeleton else None
        category = category_of(name, rows is not None, block)
        shape = list(tensor.shape)
        if rows is not None and block is not None and counts is not None:
            shape[rows.axis] = rows.stride * counts[block] + rows.tail
        size = math.prod(shape) * tensor.element_size()
        facts.append(WeightFact(name, DTYPE_NAMES[tensor.dtype], tuple(shape), size, category, block, rows=rows))
    return weights_with(facts, counts or {}, measured=False)
