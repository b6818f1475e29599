"""The model's structure on the meta device, and which checkpoint tensor feeds which part of it.

No table of models: the model is built twice with two expert counts, and the parameters whose shape differs are the
expert-indexed ones; transformers' own weight conversion says which checkpoint tensor feeds which parameter.

The layout of a checkpoint, found by bringing its tensors together with the model's structure.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.models.config import count_names, expert_candidates, with_expert_count
from streamprune.models.config_json import ExpertSpec, mtp_layers
from streamprune.models.decoder import Decoder, build_model
from streamprune.models.expert_layout import Layout
from streamprune.models.tensor_slices import ExpertRows, SourceRole, find_cuts, next_token_prediction

#: The signature that experts modules share in transformers; it is what makes them scorable.
EXPERTS_ARGUMENTS = {"hidden_states", "top_k_index", "top_k_weights"}
#: Experts modules without it, which `saliency.hooks` knows how to score.
DENSE_EXPERTS = frozenset({"Llama4TextExperts"})
#: Experts modules with that signature whose own code does not honour it, and why.
UNSUPPORTED_EXPERTS = {
    "LongcatFlashExperts": "its code fails when a token goes to a single expert, which scoring needs"
}


@dataclass(frozen=True)
class Target:
    """The parameter or buffer that a checkpoint tensor feeds, and the conversion pattern that matched, if any.

    `also` names the further parameters that one tensor feeds when the conversion splits it.
    """

    name: str
    pattern: str | None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skeleton(Decoder):
    """A Mixture-of-Experts model on the meta device and what was found out about it.

    `experts` maps a block's index to the path, relative to the block, of its experts module.
    """

    spec: ExpertSpec
    experts: Mapping[int, str]


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
    """Build the model on meta and find its blocks and expert-indexed parameters.

    Raises UnsupportedModelError when there is no MoE block, or its experts have a form that cannot be scored.
    """
    model = build_model(config, dtype, trust_remote_code)
    for spec in expert_candidates(config):
        # Twice as many: still divisible into the router's groups, and never below its top-k.
        other = build_model(with_expert_count(config, spec, 2 * spec.count), dtype, trust_remote_code)
        axes = _expert_rows(model, other, spec)
        if axes:
            layers_path = _find_blocks(model, axes)
            return Skeleton(model, layers_path, axes, spec, _find_experts(model, layers_path, axes))
    raise UnsupportedModelError(
        f"{config.model_type} has no Mixture-of-Experts block: no parameter depends on a number of experts in its "
        "config. There is nothing to prune."
    )


def _expert_rows(model: nn.Module, other: nn.Module, spec: ExpertSpec) -> dict[str, ExpertRows]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    others = {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()}
    if shapes.keys() != others.keys():
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps every expert in a module of its own instead of 3-D parameters, as models "
            "with custom code do. It cannot be scored here."
        )
    axes = {}
    for name, shape in shapes.items():
        differing = [axis for axis, size in enumerate(shape) if size != others[name][axis]]
        if not differing:
            continue
        axis = differing[0]
        stride, rest = divmod(others[name][axis] - shape[axis], spec.count)
        tail = shape[axis] - stride * spec.count
        if len(differing) > 1 or rest or stride < 1 or tail < 0:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name} {list(shape)} does not hold its {spec.count} experts one after the "
                f"other (with {2 * spec.count} experts it is {list(others[name])}), so none can be cut out."
            )
        axes[name] = ExpertRows(axis, stride, tail)
    return axes


def _find_blocks(model: nn.Module, names: Iterable[str]) -> str:
    """The path of the one ModuleList in whose elements all expert-indexed parameters lie."""
    paths: dict[str, str] = {}
    for name in names:
        head = re.match(r"(.*?)\.\d+\.", name)
        if head is None or not isinstance(model.get_submodule(head.group(1)), nn.ModuleList):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name} depends on the number of experts, outside blocks."
            )
        paths.setdefault(head.group(1), name)
    if len(paths) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has experts in several lists of blocks ({', '.join(sorted(paths))}); "
            "only one decoder can be streamed."
        )
    return next(iter(paths))


def _find_experts(model: nn.Module, layers_path: str, axes: Mapping[str, ExpertRows]) -> dict[int, str]:
    experts: dict[int, set[str]] = defaultdict(set)
    for name in axes:
        head = re.match(re.escape(layers_path) + r"\.(\d+)\.", name)
        assert head is not None  # _find_blocks has seen it
        block = int(head.group(1))
        experts[block] |= set()
        path = name.rpartition(".")[0]
        while len(path) > len(head.group(0)) - 1:
            module = model.get_submodule(path)
            reason = UNSUPPORTED_EXPERTS.get(type(module).__name__)
            if reason is not None:
                raise UnsupportedModelError(f"{type(model).__name__} cannot be scored: {reason}.")
            if _is_experts_module(module):
                experts[block].add(path.removeprefix(head.group(0)))
                break
            path = path.rpartition(".")[0]
    for block, found in experts.items():
        if len(found) != 1:
            kind = type(model.get_submodule(f"{layers_path}.{block}")).__name__
            raise UnsupportedModelError(
                f"{type(model).__name__}: block {block} ({kind}) has {len(found)} modules that take tokens, chosen "
                "experts and their weights; exactly one can be scored. Its experts work in another way than routing "
                "tokens to feed-forward networks."
            )
    return {block: found.pop() for block, found in sorted(experts.items())}


def _is_experts_module(module: nn.Module) -> bool:
    takes_routing = set(inspect.signature(type(module).forward).parameters) >= EXPERTS_ARGUMENTS
    return takes_routing or dispatches_experts(module) or type(module).__name__ in DENSE_EXPERTS


def dispatches_experts(module: nn.Module) -> bool:
    """Whether a module runs through transformers' experts interface, so that a registered forward can take over."""
    # use_experts_implementation() sets this attribute on every module that it wraps.
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def map_checkpoint(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Target | None]:
    """For each checkpoint tensor the parameter or buffer that transformers feeds with it; None where it ignores it."""
    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    meta: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    targets: dict[str, Target | None] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            # The loader falls back the same way for names that should not have been renamed.
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in meta:
            targets[name] = None
            continue
        outputs = by_pattern[pattern].target_patterns if pattern is not None else [""]
        also = tuple(target.replace(outputs[0], output) for output in outputs[1:])
        targets[name] = Target(target, pattern, also)
    return targets


def source_role(target: Target | None, skeleton: Skeleton) -> SourceRole:
    """What a checkpoint tensor is fed into, as surgery needs to know it."""
    if target is None:
        return SourceRole(None, None)
    rows: ExpertRows | None = skeleton.expert_rows.get(target.name)
    shape = tuple(skeleton.model.get_parameter_or_buffer(target.name).shape) if rows else ()
    return SourceRole(skeleton.layer_of(target.name), target.name, target.pattern, shape, rows)


def survey(
    config: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry],
    targets: Mapping[str, Target | None] | None = None,
    counts: Mapping[int, int] | None = None,
) -> Layout:
    """Find out about the tensors of a checkpoint with this raw config; `targets` if they have been mapped already.

    `counts` are the experts by block; None where each has as many as the skeleton.

    Raises CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced.
    """
    targets = map_checkpoint(skeleton.model, tensors) if targets is None else targets
    roles = {name: source_role(target, skeleton) for name, target in targets.items()}
    dropped = tuple(next_token_prediction(roles, skeleton.layer_count, mtp_layers(config)))
    cuts = find_cuts(tensors, roles, dropped, counts or dict.fromkeys(skeleton.experts, skeleton.spec.count))
    names = count_names(skeleton.model.config, skeleton.spec)
    return Layout(skeleton.spec, skeleton.layer_count, tuple(skeleton.experts), names, dropped, cuts)
