"""Tiny models with different numbers of experts per layer, cut by hand: a checkpoint, and the same model in memory."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from streamprune.models.config_json import rewrite_config
from streamprune.models.open import load_config
from streamprune.models.per_layer_experts import (
    LoadingFacts,
    config_of_per_layer_experts,
    loading_facts_from_json,
    modeling_source,
)
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.models.skeleton import Skeleton, build_skeleton, with_expert_count
from tests.helpers import known_family, read_tensors
from tests.tiny import EXPERTS, Family, make_model, tiny_config

_FILE = "model.safetensors"


@dataclass(frozen=True)
class Uneven:
    """A source model, the output folder cut from it, and the experts that stayed, by block."""

    source: Path
    output: Path
    facts: LoadingFacts
    kept: Mapping[int, list[int]]
    skeleton: Skeleton

    @property
    def counts(self) -> dict[int, int]:
        return {block: len(experts) for block, experts in self.kept.items()}


def facts_of(family: str = "qwen3_moe") -> LoadingFacts:
    """The facts of a family's tiny model."""
    config = tiny_config(known_family(family))
    facts = find_loading_facts(json.loads(config.to_json_string()), config, build_skeleton(config, torch.float32))
    assert not facts.problem
    return facts


def make_uneven(family: Family, folder: Path, alias: str | None = None) -> Uneven:
    """A random tiny model in `folder/source`, and in `folder/uneven-NAME` the same with random experts left out.

    With `alias` the source's config states the number of experts under that name, as published ones may.
    """
    source = make_model(folder / "source", tiny_config(family))
    if alias is not None:
        path = source / "config.json"
        raw = json.loads(path.read_text())
        names = [name for name, value in raw.items() if value == EXPERTS and name.endswith("_experts")]
        assert len(names) == 1
        assert names != [alias]
        path.write_text(json.dumps({alias if name == names[0] else name: value for name, value in raw.items()}))
    output = folder / f"uneven-{family.id}"
    config = load_config(source)
    skeleton = build_skeleton(config, torch.float32)
    # Through JSON, as the facts will be stored.
    found = find_loading_facts(json.loads((source / "config.json").read_text()), config, skeleton)
    facts = loading_facts_from_json(json.loads(json.dumps(msgspec.to_builtins(found))))
    assert not facts.problem, facts.problem
    kept = choose(skeleton)
    output.mkdir()
    doubled = make_model(folder / "doubled", with_expert_count(config, skeleton.spec, 2 * EXPERTS))
    save_file(cut(read_tensors(source), read_tensors(doubled), kept), output / _FILE, metadata={"format": "pt"})
    write_code(source, output, facts, skeleton, {block: len(experts) for block, experts in kept.items()})
    return Uneven(source, output, facts, kept, skeleton)


def write_code(source: Path, output: Path, facts: LoadingFacts, skeleton: Skeleton, counts: dict[int, int]) -> None:
    """Config, generation config and module, as the writer will lay them into the output."""
    raw = json.loads((source / "config.json").read_text())
    rewritten = rewrite_config(raw, skeleton.spec, facts.names, max(counts.values()))
    (output / "config.json").write_text(json.dumps(config_of_per_layer_experts(rewritten, facts, counts), indent=2))
    (output / facts.file_name).write_text(modeling_source(facts))
    generation = source / "generation_config.json"
    if generation.is_file():
        (output / generation.name).write_bytes(generation.read_bytes())


def choose(skeleton: Skeleton, seed: int = 5) -> dict[int, list[int]]:
    """Random experts for every block, of different numbers, equally many from each of the router's groups."""
    chance = random.Random(seed)
    groups = skeleton.spec.groups
    size = EXPERTS // groups
    numbers = (3, 6, 4, 5) if groups == 1 else (2, 3, 3, 2)
    kept = {}
    for place, block in enumerate(sorted(skeleton.experts)):
        picks = [
            group * size + each
            for group in range(groups)
            for each in sorted(chance.sample(range(size), numbers[place % 4]))
        ]
        kept[block] = picks
    return kept


def cut(
    tensors: Mapping[str, torch.Tensor], doubled: Mapping[str, torch.Tensor], kept: Mapping[int, list[int]]
) -> dict[str, torch.Tensor]:
    """The published tensors of the experts that stay: by number where each has its own, else along the axis that is
    longer in a checkpoint with twice the experts."""
    result = {}
    for name, tensor in tensors.items():
        number = re.search(r"\.experts\.(\d+)\.", name)
        block = re.search(r"\.(\d+)\.", name)
        if number is not None and block is not None:
            experts = kept[int(block.group(1))]
            if int(number.group(1)) in experts:
                place = experts.index(int(number.group(1)))
                result[name.replace(number.group(0), f".experts.{place}.")] = tensor
            continue
        result[name] = _rows(name, tensor, doubled[name].shape, kept)
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _rows(name: str, tensor: torch.Tensor, other: torch.Size, kept: Mapping[int, list[int]]) -> torch.Tensor:
    for axis, (have, twice) in enumerate(zip(tensor.shape, other, strict=True)):
        if have != twice:
            block = re.search(r"\.(\d+)\.", name)
            assert block is not None, name
            width = (twice - have) // EXPERTS
            rows = [expert * width + row for expert in kept[int(block.group(1))] for row in range(width)]
            rows += range(width * EXPERTS, have)
            tensor = tensor.index_select(axis, torch.tensor(rows))
    return tensor


def stock_model(config: PreTrainedConfig) -> Any:
    """A model of transformers' own class, as `helpers.load_whole` would load it."""
    torch.manual_seed(0)
    try:
        return AutoModelForCausalLM.from_config(config).eval()
    except ValueError:
        return AutoModelForImageTextToText.from_config(config).eval()


def in_memory(made: Uneven, whole: nn.Module) -> Any:
    """The reference: stock models only. Each layer is taken from one that has the layer's number of experts throughout,
    and gets the parameters of the `whole` source model, cut to the experts that stay."""
    config, spec = load_config(made.source), made.skeleton.spec
    models = {count: stock_model(with_expert_count(config, spec, count)) for count in set(made.counts.values())}
    reference = models[max(models)]
    layers = reference.get_submodule(made.skeleton.layers_path)
    for block, count in made.counts.items():
        layers[block] = models[count].get_submodule(made.skeleton.layers_path)[block]
    doubled = stock_model(with_expert_count(config, spec, 2 * EXPERTS)).state_dict()
    reference.load_state_dict(
        {name: _rows(name, tensor, doubled[name].shape, made.kept) for name, tensor in whole.state_dict().items()}
    )
    return reference
