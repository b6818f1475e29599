"""Whether and how a model can be loaded with different numbers of experts per layer, found by building it that way.

The model's name decides nothing: the module that an output would get is run on the meta device, and its layers are
compared with those of stock models that have the same number everywhere.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import textwrap
from collections.abc import Mapping
from functools import cache, reduce
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from streamprune.errors import StreampruneError
from streamprune.models.config_json import minimum_keep
from streamprune.models.open import config_from_dict
from streamprune.models.per_layer_experts import (
    OWN_TABLE,
    STANDARD_TABLE,
    LoadingClass,
    LoadingFacts,
    config_of_per_layer_experts,
    modeling_source,
)
from streamprune.models.skeleton import Skeleton, build_model, count_names, with_expert_count

#: The auto classes for models that generate text, and for their base models. Older transformers lack some.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")


def find_loading_facts(raw: Mapping[str, Any], config: PreTrainedConfig, skeleton: Skeleton) -> LoadingFacts:
    """What an output with different numbers of experts per layer needs; `problem` says why there can be none.

    `raw` is the source's config.json and `config` what `load_config` makes of it. Builds the model on the meta device a
    few times, which takes about as long as `build_skeleton`.
    """
    facts = _describe(config, skeleton)
    problems = [facts.problem]
    # Models that use per_layer_config for something else may expect the same entry for all layers of one type, or make
    # the table themselves if config.json has none (Gemma 4 does both).
    taken = config.get_text_config(decoder=True).is_heterogeneous
    tables = () if facts.problem else (OWN_TABLE,) if taken else (STANDARD_TABLE, OWN_TABLE)
    for table in tables:
        tried = msgspec.structs.replace(facts, table=table)
        try:
            problem = _try(raw, config, skeleton, tried)
        except StreampruneError as error:
            problem = textwrap.shorten(str(error), 500)
        except Exception as error:
            # Model code was not written for this, and may fail in any way.
            problem = f"its code fails to build it ({type(error).__name__}: {textwrap.shorten(str(error), 300)})."
        if not problem:
            return tried
        problems.append(problem)
    return msgspec.structs.replace(facts, problem=next(filter(None, problems)))


def _describe(config: PreTrainedConfig, skeleton: Skeleton) -> LoadingFacts:
    text = config.get_text_config(decoder=True)
    path = () if text is config else skeleton.spec.path[:1]
    inner = skeleton.spec.path[len(path) :]
    names = count_names(config, skeleton.spec)
    problem = ""
    if not type(skeleton.model).__module__.startswith("transformers."):
        problem = "its code is not transformers' own, but comes with the model."
    elif len(inner) > 1 or reduce(getattr, path, config) is not text:
        problem = "its config states the number of experts in a part of a part."
    elif getattr(text, "num_hidden_layers", None) != skeleton.layer_count:
        problem = f"its config names another number of layers than the {skeleton.layer_count} that it has."
    elif not {*names, *inner}.isdisjoint(text.per_layer_attributes or ()):
        problem = "its layers have different numbers of experts already."
    classes = () if problem else _classes(config, skeleton)
    if not problem and type(skeleton.model).__name__ not in [each.stock for each in classes]:
        problem = f"no Auto class of transformers leads to {type(skeleton.model).__name__}."
    return LoadingFacts(
        model_type=str(config.model_type),
        path=path,
        inner=inner[0] if inner else None,
        names=names,
        layer_count=skeleton.layer_count,
        classes=classes,
        table=STANDARD_TABLE,
        problem=problem,
    )


def _classes(config: PreTrainedConfig, skeleton: Skeleton) -> tuple[LoadingClass, ...]:
    found = []
    text = config.get_text_config(decoder=True)
    for auto in _AUTO_CLASSES:
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        stock = mapping.get(type(config), None)
        if stock is None:
            continue
        stock = stock[0] if isinstance(stock, (tuple, list)) else stock
        # If the class is made for the text config, transformers passes it only that part of the whole config.
        text_only = stock.config_class is type(text) and text is not config
        layers = _layers_path(stock, text if text_only else config, skeleton)
        if layers is not None:
            module = "transformers" if getattr(transformers, stock.__name__, None) is stock else stock.__module__
            whole = type(config).__name__ if text_only else None
            found.append(LoadingClass(auto, stock.__name__, module, layers, whole))
    return tuple(found)


def _layers_path(stock: type[PreTrainedModel], config: PreTrainedConfig, skeleton: Skeleton) -> str | None:
    """The path of the decoder's list of layers in another class of the same model; None if it has no such list."""
    if stock is type(skeleton.model):
        return skeleton.layers_path
    kinds = [type(layer) for layer in skeleton.layers]
    try:
        with torch.device("meta"):
            model = stock._from_config(config)
    except Exception:
        # For example, its image tower needs a library that is not installed. The class that is pruned can be built.
        return None
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and [type(layer) for layer in module] == kinds
    ]
    return paths[0] if len(paths) == 1 else None


def _try(raw: Mapping[str, Any], config: PreTrainedConfig, skeleton: Skeleton, facts: LoadingFacts) -> str:
    """Build every class with different numbers of experts, and say what is wrong with it; empty if nothing is."""
    spec = skeleton.spec
    expert_layers, least = sorted(skeleton.experts), minimum_keep(spec)
    if least >= spec.count or len(expert_layers) == 1:
        return ""  # there is no way to keep different numbers
    # Types of layers often alternate. The Thue-Morse sequence has no period, so layers of every type get both numbers.
    counts = {layer: (least, spec.count)[place.bit_count() % 2] for place, layer in enumerate(expert_layers)}
    changed = config_of_per_layer_experts(raw, facts, counts)
    module = _imported(facts)
    smaller = build_model(with_expert_count(config, spec, least), skeleton.model.dtype)
    expected = [
        smaller.get_submodule(f"{skeleton.layers_path}.{index}") if counts.get(index) == least else layer
        for index, layer in enumerate(skeleton.layers)
    ]
    for each in facts.classes:
        described = config_from_dict(config, changed)
        if config_from_dict(config, json.loads(described.to_json_string())).to_dict() != described.to_dict():
            return "its config does not stay the same when it is saved and loaded again."
        with torch.device("meta"):
            model = getattr(module, each.entry)._from_config(described, dtype=skeleton.model.dtype)
        problem = _compare(model.eval(), each, expected, facts.names)
        if problem:
            return problem
    return ""


def _imported(facts: LoadingFacts) -> ModuleType:
    """The module that an output would get, imported from a file as its users will."""
    with tempfile.TemporaryDirectory(prefix="streamprune-") as folder:
        path = Path(folder) / facts.file_name
        path.write_text(modeling_source(facts), encoding="utf-8")
        module = ModuleType(path.stem)
        SourceFileLoader(path.stem, str(path)).exec_module(module)
    return module


def _compare(model: PreTrainedModel, kind: LoadingClass, expected: list[nn.Module], names: tuple[str, ...]) -> str:
    """What is wrong with the layers of a model that the output's module has built."""
    layers = model.get_submodule(kind.layers)
    assert isinstance(layers, nn.ModuleList)
    for index, (layer, wanted) in enumerate(zip(layers, expected, strict=True)):
        difference = _difference(layer, wanted)
        if difference:
            return f"layer {index} of its {kind.stock} cannot be built from its own config alone ({difference})."
    looked_up = re.compile(rf"self\.config\.({'|'.join(names)})\b")
    kinds: set[Any] = {type(module) for layer in layers for module in layer.modules()}
    for module in kinds:
        if looked_up.search(_source(module)):
            return f"its {module.__name__} looks up one number of experts for all layers while it computes."
    if get_checkpoint_conversion_mapping(kind.stock) is not None:
        return f"transformers knows the names of its tensors by its class, {kind.stock}, not by its model_type."
    return ""


def _difference(layer: nn.Module, wanted: nn.Module) -> str:
    """The first difference between two layers, other than the values of their weights; empty if there is none."""
    mine, theirs = dict(layer.named_modules()), dict(wanted.named_modules())
    for path in [*theirs, *mine]:
        one, other = mine.get(path), theirs.get(path)
        if one is None or other is None or type(one) is not type(other):
            return f"{path or 'layer'} is another module"
        for name in sorted(vars(one).keys() | vars(other).keys()):
            values = [vars(module).get(name) for module in (one, other)]
            if all(isinstance(value, (int, float, str, type(None))) for value in values) and values[0] != values[1]:
                return f"{name} of {path or 'the layer'} is {values[0]!r} instead of {values[1]!r}"
    shapes = [
        {(name, tensor.shape, tensor.dtype) for name, tensor in (*part.named_parameters(), *part.named_buffers())}
        for part in (layer, wanted)
    ]
    differing = sorted(name for name, *_ in shapes[0] ^ shapes[1])
    return f"{differing[0]} has another shape" if differing else ""


@cache
def _source(kind: type) -> str:
    # Cached, since it takes 20 ms: Python parses the complete file of transformers.
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
