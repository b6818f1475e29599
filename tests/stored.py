"""One quantized weight as it is published, with its config.json, and what the package makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streamprune.checkpoint.reader import DTYPES
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.formats.base import Format, decode_tensors
from streamprune.formats.pick import pick_formats
from streamprune.formats.plain import PLAIN
from tests.packers import Packed

#: Where the weight is in the checkpoint.
PATH = "model.layers.1.mlp.experts.3.up_proj"
#: Presets of compressed-tensors, with the name of their format and other settings for the weights.
PRESETS = {
    "channel": ("FP8_DYNAMIC", "float-quantized", {}),
    "tensor": ("FP8", "float-quantized", {}),
    "block": ("FP8_BLOCK", "float-quantized", {"block_structure": [16, 32]}),
    "int8": ("W8A8", "int-quantized", {}),
    "int4": ("W4A16", "pack-quantized", {"group_size": 32}),
    "int4-channel": ("W4A16", "pack-quantized", {"group_size": None, "strategy": "channel"}),
    "int8-packed": ("W8A16", "pack-quantized", {"group_size": 16}),
    "int3": ("W3A16", "pack-quantized", {"group_size": 32}),
    "asymmetric": ("W4A16_ASYM", "pack-quantized", {"group_size": 32}),
    "asymmetric-5": ("W4A16_ASYM", "pack-quantized", {"group_size": 32, "num_bits": 5}),
    "nvfp4": ("NVFP4", "nvfp4-pack-quantized", {}),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized", {}),
    "mxfp8": ("MXFP8A16", "mxfp8-quantized", {}),
}
#: What AutoRound states whatever the packing.
AUTO_ROUND = {"quant_method": "auto-round", "block_name_to_quantize": "model.layers", "sym": True}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Read:
    """The recognized format, the shapes of its parts by their names, and the decoded weight."""

    format: Format
    parts: Mapping[str, tuple[str, tuple[int, ...]]]
    values: torch.Tensor


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of different magnitudes, with zeros among them."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=made) * torch.rand(rows, 1, generator=made) * 3
    return (values * (torch.rand(rows, columns, generator=made) > 0.1)).to(dtype)


def preset(name: str, weight: torch.Tensor) -> tuple[Packed, dict[str, Any]]:
    """A weight in a preset of compressed-tensors, by that library, and its config.json. Skips the test without it."""
    from tests import compressed

    named, form, changes = PRESETS[name]
    scheme = compressed.scheme_of(named, **changes)
    return compressed.compressed(weight, form, scheme), {
        "quantization_config": compressed.section({"group_0": (form, scheme)}, ["lm_head"])
    }


def entries(parts: Mapping[str, torch.Tensor], path: str = PATH) -> dict[str, TensorEntry]:
    """The header's entries of tensors in the module at `path`."""
    file = "model.safetensors"
    return {
        (name := f"{path}.{leaf}"): TensorEntry(name, file, _NAMES[each.dtype], tuple(each.shape), 0, each.nbytes)
        for leaf, each in parts.items()
    }


def read(
    parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype = torch.float32, path: str = PATH
) -> Read:
    """Recognize and decode the tensors of one module; all of them belong to its weight."""
    given = entries(parts, path)
    stored = pick_formats(given, config)
    assert {each.parameter for each in stored.values()} == {f"{path}.weight"}
    storage = next(iter(stored.values())).format
    assert storage is not PLAIN
    decoded = decode_tensors({f"{path}.{leaf}": tensor for leaf, tensor in parts.items()}, stored, dtype)
    found = {each.part: (given[name].dtype, given[name].shape) for name, each in stored.items()}
    return Read(storage, found, decoded[f"{path}.weight"])
