"""A model on the meta device: where its decoder layers and experts are, and which checkpoint tensor feeds what.

No table of models: the model is built twice with two expert counts, and the parameters whose shape differs are the
expert-indexed ones; transformers' own weight conversion says which checkpoint tensor feeds which parameter.
"""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from streamprune.checkpoint.index import CONFIG_NAME
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import ChannelRows, ExpertRows
from streamprune.formats.pick import pick_formats
from streamprune.models.config_json import (
    GROUP_NAMES,
    TOP_K_NAMES,
    TOPK_GROUP_NAMES,
    ExpertSpec,
    WidthSpec,
    expert_spec,
    stated_counts,
)
from streamprune.models.expert_layout import Target
from streamprune.models.joined import find_places

#: The signature that experts modules share in transformers; it is what makes them scorable.
EXPERTS_ARGUMENTS = {"hidden_states", "top_k_index", "top_k_weights"}
#: Experts modules without that signature that `saliency.hooks` can score all the same.
DENSE_EXPERTS = frozenset({"Llama4TextExperts"})
#: Experts modules with that signature whose own code does not honour it, and why.
UNSUPPORTED_EXPERTS = {
    "Inkling2Experts": "its layers take the hidden states of layers far before them, of which streaming keeps the last",
    "ZayaExperts": "its router gives expert 0 the tokens that skip all experts, so that scores would be of them too",
    "LongcatFlashExperts": "its code fails when a token goes to a single expert, which scoring needs",
}


@dataclass(frozen=True)
class Decoder:
    """A model on the meta device.

    `layers_path` is the dotted path of the list of decoder layers; `expert_rows` maps expert-indexed parameters to
    where in them the experts lie (empty for a model that is opened without regard to experts).
    """

    model: PreTrainedModel
    layers_path: str
    expert_rows: Mapping[str, ExpertRows]

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer_of(self, name: str) -> int | None:
        """The index of the layer that a parameter belongs to; None outside the layers."""
        match = re.match(re.escape(self.layers_path) + r"\.(\d+)\.", name)
        return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Skeleton(Decoder):
    """A Mixture-of-Experts model on the meta device, and where its experts are.

    `experts` maps a layer's index to the path, relative to the layer, of its experts module. `width` is what the config
    says of the experts' channels, and `channels` where they are in each parameter that has some, without the axis of
    the experts. `width` is None for experts that cannot be made narrower; `fixed_width` says why.
    """

    spec: ExpertSpec
    experts: Mapping[int, str]
    width: WidthSpec | None = None
    channels: Mapping[str, ChannelRows] = field(default_factory=dict)
    fixed_width: str = ""


def build_model(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model class that transformers gives for text generation, on the meta device, without any weight.

    A multimodal model for which transformers has no text-only class is built in full; its vision tower then never gets
    weights, since text alone does not reach it. Raises UnsupportedModelError, and CheckpointError where the
    model's own constructor fails on the config.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder; only decoders can be streamed.")
    problem: Exception | None = None
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                model = auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
            _avoid_unaligned_products(model)
            return model.eval()
        except ValueError as error:
            problem = problem or error
        except Exception as error:
            # The model's own constructor fails on values that its config class let pass.
            where = f"{config.name_or_path}/{CONFIG_NAME}" if config.name_or_path else f"this {CONFIG_NAME}"
            raise CheckpointError(
                f"A {config.model_type} model cannot be built from {where}: {type(error).__name__}: "
                f"{textwrap.shorten(str(error), 500)}"
            ) from error
    raise UnsupportedModelError(
        f"transformers cannot build a {config.model_type} model for text: {problem}"
    ) from problem


def _avoid_unaligned_products(model: PreTrainedModel) -> None:
    """Let experts run one after the other where torch's grouped product would refuse their matrices.

    Its rows must be a multiple of 16 bytes, which experts with an odd number of channels are not.
    """
    for module in model.modules():
        if dispatches_experts(module) and any(
            tensor.dim() == 3 and tensor.shape[2] * tensor.itemsize % 16 for tensor in module.parameters()
        ):
            module.config._experts_implementation = "eager"


def find_decoder(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> Decoder:
    """Build any decoder-only model on meta, with or without experts, and find its layers.

    Raises UnsupportedModelError if they are not one list of as many layers as the config says, and for models of
    UNSUPPORTED_EXPERTS.
    """
    model = build_model(config, dtype, trust_remote_code)
    reason = next((UNSUPPORTED_EXPERTS[name] for name in _class_names(model) if name in UNSUPPORTED_EXPERTS), None)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be streamed: {reason}.")
    decoder = model.get_decoder()
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), None)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"\.\d+\.", f".{name}.")
    ]
    if prefix is None or len(lists) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(lists)} lists of {count} layers were found in its decoder; exactly one can "
            "be streamed."
        )
    return Decoder(model, prefix + lists[0], {})


def _class_names(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
    """Build the model on meta and find its layers and expert-indexed parameters.

    Raises UnsupportedModelError when no layer has experts, or its experts have a form that cannot be scored.
    """
    decoder = find_decoder(config, dtype, trust_remote_code)
    for spec in expert_candidates(config):
        # Twice as many: still divisible into the router's groups, and never below its top-k.
        other = build_model(with_expert_count(config, spec, 2 * spec.count), dtype, trust_remote_code)
        rows = _expert_rows(decoder.model, other, spec)
        if rows:
            return Skeleton(decoder.model, decoder.layers_path, rows, spec, _find_experts(decoder, rows))
    raise UnsupportedModelError(
        f"{config.model_type} has no Mixture-of-Experts layer: no parameter depends on a number of experts in its "
        "config. There is nothing to prune."
    )


def expert_candidates(config: PreTrainedConfig) -> Iterator[ExpertSpec]:
    """Every place of the (text) config that may state the number of routed experts, likeliest first."""
    text = config.get_text_config(decoder=True)
    base = [name for name, part in _sub_configs(config) if part is text][:1]
    if text is not config and not base:
        raise UnsupportedModelError(
            f"{config.model_type}: its text config lies deeper than one level; please report this model."
        )
    for part, *path in ((text, *base), *((sub, *base, name) for name, sub in _sub_configs(text))):
        values = _values(part)
        for name, count in stated_counts(values).items():
            spec = expert_spec(tuple(path), name, count, (values, _values(text)))
            if spec is None:
                raise UnsupportedModelError(
                    f"{config.model_type}: the config names {count} experts ({name}), but not how many the router "
                    f"picks per token (looked for {', '.join(TOP_K_NAMES)})."
                )
            yield spec


def _sub_configs(config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    return [(name, value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's values by the names of its attributes, and its router settings by every usual name it accepts."""
    aliases = dict(getattr(config, "attribute_map", {}) or {})
    own = [name for name in (*vars(config), *aliases.values()) if not name.startswith("_")]
    values = {}
    for name in dict.fromkeys((*own, *TOP_K_NAMES, *GROUP_NAMES, *TOPK_GROUP_NAMES)):
        # transformers' heterogeneous configs raise if a value that differs by layer is read for the whole model.
        with suppress(RuntimeError):
            values[name] = getattr(config, name, None)
    return values


def with_expert_count(config: PreTrainedConfig, spec: ExpertSpec, count: int) -> PreTrainedConfig:
    """A copy of `config` that states `count` experts."""
    changed = copy.deepcopy(config)
    part = changed
    for name in spec.path:
        part = getattr(part, name)
    old = getattr(part, spec.attribute)
    setattr(part, spec.attribute, [count] * len(old) if isinstance(old, list) else count)
    return changed


def count_names(config: PreTrainedConfig, spec: ExpertSpec) -> tuple[str, ...]:
    """The keys under which a `config.json` may state the number of experts: the attribute itself and its aliases."""
    part: Any = config
    for name in spec.path:
        # The config of a model that was built from its text config alone has no such part.
        part = getattr(part, name, part)
    aliases = (key for key, value in (getattr(part, "attribute_map", {}) or {}).items() if value == spec.attribute)
    return (spec.attribute, *sorted(aliases))


def _expert_rows(model: nn.Module, other: nn.Module, spec: ExpertSpec) -> dict[str, ExpertRows]:
    """Where the experts are in each parameter whose shape differs in `other`, which has twice as many experts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    others = {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()}
    if shapes.keys() != others.keys():
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps every expert in a module of its own instead of 3-D parameters, as models "
            "with custom code do. It cannot be scored here."
        )
    found = {}
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
        found[name] = ExpertRows(axis, stride, tail)
    return found


def _find_experts(decoder: Decoder, rows: Mapping[str, ExpertRows]) -> dict[int, str]:
    """The path, relative to its layer, of the one experts module of each layer that has expert-indexed parameters."""
    model = type(decoder.model).__name__
    experts: dict[int, set[str]] = defaultdict(set)
    for name in rows:
        layer = decoder.layer_of(name)
        if layer is None:
            raise UnsupportedModelError(
                f"{model}: {name} depends on the number of experts, but lies outside the decoder layers."
            )
        inside, found = decoder.layers[layer], experts[layer]
        path = name.removeprefix(f"{decoder.layers_path}.{layer}.")
        while path := path.rpartition(".")[0]:
            module = inside.get_submodule(path)
            takes_routing = set(inspect.signature(type(module).forward).parameters) >= EXPERTS_ARGUMENTS
            if takes_routing or dispatches_experts(module) or type(module).__name__ in DENSE_EXPERTS:
                found.add(path)
                break
    for layer, found in experts.items():
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{model}: layer {layer} ({type(decoder.layers[layer]).__name__}) has {len(found)} modules that take "
                "tokens, chosen experts and their weights; exactly one can be scored. Its experts work in another way "
                "than routing tokens to feed-forward networks."
            )
    return {layer: found.pop() for layer, found in sorted(experts.items())}


def dispatches_experts(module: nn.Module) -> bool:
    """Whether a module runs through transformers' experts interface, so that a registered forward can take over."""
    # use_experts_implementation() sets this attribute on every module that it wraps.
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def map_checkpoint(
    decoder: Decoder,
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    named: Callable[[str], str] = str,
) -> dict[str, Target]:
    """For each tensor of a checkpoint with this config.json the parameter or buffer that transformers feeds with it.

    The values and the scales of a stored parameter feed what a plain tensor with the parameter's name would feed.
    `named` gives another name for it: then what a tensor of that name would feed.
    """
    model = decoder.model
    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    meta: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def feeds(tensor: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(tensor, renamings, converters, prefix, meta)
        if target not in meta and tensor in meta:
            # The loader falls back the same way for names that should not have been renamed.
            target, pattern = rename_source_key(tensor, [], [], prefix, meta)
        return target, pattern

    targets = {}
    for name, stored in pick_formats(tensors, config).items():
        target, pattern = feeds(named(stored.parameter))
        if target not in meta:
            targets[name] = Target(stored)
            continue
        outputs = by_pattern[pattern].target_patterns if pattern is not None else [""]
        also = tuple(target.replace(outputs[0], output) for output in outputs[1:])
        layer, rows = decoder.layer_of(target), decoder.expert_rows.get(target)
        converter = by_pattern[pattern] if pattern is not None else None
        channels = _channels_before(decoder, target, converter, tensors[name].shape)
        targets[name] = Target(stored, target, pattern, also, layer, rows, channels)
    for parameter, places in find_places(targets, tensors, meta, by_pattern).items():
        # The joined parameter is given to the loader under its own name, which must not be that of anything else.
        if feeds(parameter) == (parameter, None):
            targets |= {name: replace(targets[name], place=place) for name, place in places.items()}
    return targets


def _channels_before(
    decoder: Decoder, parameter: str, converter: WeightConverter | None, shape: tuple[int, ...]
) -> ChannelRows | None:
    """Where a parameter's channels are before the conversion that feeds it, without the axis of the experts.

    None for a parameter without channels, and if the conversion may move them in another way than by joining
    projections, by transposing, and by taking apart gate and up rows that alternate. `shape` is that of the
    checkpoint's tensor.
    """
    rows = decoder.channels.get(parameter) if isinstance(decoder, Skeleton) else None
    if rows is None or converter is None:
        return rows
    for step in converter.operations:
        if isinstance(step, Transpose):
            if {step.dim0, step.dim1} != {len(shape) - 2, len(shape) - 1}:
                return None
            # With check_dims, tensors that have the parameter's shape already stay as they are.
            as_it_is = shape == tuple(decoder.model.get_parameter(parameter).shape)
            if not (getattr(step, "check_dims", False) and as_it_is):
                rows = replace(rows, axis=1 - rows.axis)
        elif isinstance(step, Interleave):
            if step.inverse or step.dim != rows.axis + 1 or (rows.repeats, rows.step) != (2, 1):
                return None
            rows = replace(rows, repeats=1, step=2)
        elif not isinstance(step, (Concatenate, MergeModulelist)):
            return None
    return rows
