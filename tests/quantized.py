"""Quantized checkpoints as they are published, made from tiny plain ones, and plain checkpoints that mean the same."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers import known_family, read_tensors
from tests.schemes import SCHEMES
from tests.tiny import EXPERTS, make_model, tiny_config


@dataclass(frozen=True)
class Quantized:
    """The checkpoint as published, and the plain one of the same model with exactly the weights that it means."""

    source: Path
    reference: Path
    #: The stored tensors of every quantized parameter, by its plain name.
    parts: Mapping[str, list[str]]


def make_quantized(
    folder: Path, scheme: str, family: str = "qwen3_moe", sizes: Mapping[str, Any] | None = None, **options: Any
) -> Quantized:
    """A tiny model of a family, quantized; the options are those of `quantize`.

    It has two layers with experts, and those families with a dense layer first have that too.
    """
    kind = known_family(family)
    layers = {"num_hidden_layers": 3 if family in ("deepseek_v3", "glm4_moe") else 2}
    config = tiny_config(replace(kind, sizes={**kind.sizes, **layers, **(sizes or {})}))
    return quantize(make_model(folder / "plain", config, **SCHEMES[scheme].save), folder, scheme, **options)


def quantize(
    plain: Path,
    folder: Path,
    scheme: str,
    leave: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    place: tuple[str, ...] = ("quantization_config",),
) -> Quantized:
    """Write `folder/source` and `folder/reference` from a plain checkpoint; the modules in `leave` stay plain.

    `dtype` is that of the model: of what stays plain, and of the reference. `place` says where config.json has the
    section.
    """
    how = SCHEMES[scheme]
    stored: dict[str, torch.Tensor] = {}
    reference: dict[str, torch.Tensor] = {}
    parts: dict[str, list[str]] = {}
    untouched = []
    for name, tensor in read_tensors(plain).items():
        # These are float32 in models of any dtype.
        given = tensor if name.endswith("correction_bias") else tensor.to(dtype)
        module = name.removesuffix(".weight")
        packed = None if module in leave else how.pack(name, given)
        if packed is None:
            stored[name] = reference[name] = given
            untouched += [module] if name.endswith(".weight") else []
            continue
        path = name.rpartition(".")[0]
        named = {f"{path}.{leaf}": part for leaf, part in packed.parts.items()}
        stored |= named
        parts[name] = list(named)
        reference[name] = packed.values.to(dtype)
    config = json.loads((plain / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    section = how.section(untouched)
    write_checkpoint(folder / "reference", reference, config)
    write_checkpoint(folder / "source", stored, _with_section({**config, **how.outer}, section, place))
    if how.beside is not None:
        (folder / "source" / how.beside).write_text(json.dumps(section, indent=2))
    for name in ("source", "reference"):
        (folder / name / "generation_config.json").write_bytes((plain / "generation_config.json").read_bytes())
    return Quantized(folder / "source", folder / "reference", parts)


def _with_section(config: dict[str, Any], section: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = place
    return {**config, first: _with_section(config[first], section, tuple(rest)) if rest else section}


def cut_experts(
    tensors: Mapping[str, torch.Tensor], kept: Mapping[int, list[int]], experts: int = EXPERTS
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with only the experts that stay, by names and shapes alone."""
    result = {}
    for name, tensor in tensors.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        stay = kept.get(int(layer.group(1))) if layer else None
        number = re.search(r"\.experts\.(\d+)\.", name)
        if stay is None:
            result[name] = tensor
        elif number is None:
            joined = re.search(r"\.experts\.|\.(gate|router)\.|correction_bias$", name) and tensor.shape[:1] == (
                experts,
            )
            result[name] = tensor[stay] if joined else tensor
        elif int(number.group(1)) in stay:
            result[name.replace(number.group(0), f".experts.{stay.index(int(number.group(1)))}.")] = tensor
    return result


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """A checkpoint in shards of some 100 kB: in the order of names, so that companions may be in the next."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name in sorted(tensors):
        if sum(each.nbytes for each in shards[-1].values()) > 100_000:
            shards.append({})
        shards[-1][name] = tensors[name].contiguous()
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
