"""MXFP4 as gpt-oss stores experts: a layer's experts in one tensor, transposed, as blocks of 32 values and scales.

Values and scales: OCP Microscaling Formats v1.0, section 5.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import Format
from streamprune.formats.fp4 import GROUP, decode_e2m1
from streamprune.formats.quantization import Module, Quantization, Recognized

if TYPE_CHECKING:
    import torch

#: Values of `quant_method`.
METHODS = frozenset({"mxfp4"})


@dataclass(frozen=True)
class Mxfp4(Format):
    """`blocks` U8 (experts, out, in / 32, 16), `scales` U8 (experts, out, in / 32) of (experts, in, out)."""

    name = "MXFP4"
    joins_experts = True

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        blocks, scales = parts["blocks"], parts["scales"]
        experts, rows, groups, _ = blocks.shape
        result = blocks.new_empty((experts, groups * GROUP, rows), dtype=dtype)
        for expert in range(experts):
            result[expert] = decode_e2m1(blocks[expert].flatten(1), scales[expert]).t()
        return result

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, columns = shape
        groups = (*outer, columns // GROUP)
        return {"blocks": ("U8", (*groups, GROUP // 2)), "scales": ("U8", groups)}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        experts, rows, groups = shapes["scales"]
        return (experts, groups * GROUP, rows)


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    """`..._blocks` with their `..._scales`; biases and routers stay plain."""
    parts: dict[str, tuple[str, str]] = {}
    for leaf, blocks in module.tensors.items():
        plain = leaf.removesuffix("_blocks")
        scales = module.tensors.get(f"{plain}_scales")
        if plain == leaf or scales is None or {blocks.dtype, scales.dtype} != {"U8"}:
            continue
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, GROUP // 2):
            raise UnsupportedModelError(
                f"{scales.name} {list(scales.shape)} does not fit {blocks.name} {list(blocks.shape)}: MXFP4 has one "
                f"scale for {GROUP // 2} bytes. Download config.json and shards again."
            )
        parts |= {leaf: (plain, "blocks"), f"{plain}_scales": (plain, "scales")}
    return Recognized(Mxfp4(), parts) if parts else None


def stated(path: str, quantization: Quantization) -> Format | None:
    """How a config.json says that the weights of the module at `path` are stored; None: not in this format.

    Only modules `experts`, which hold those of all experts of a layer, are.
    """
    if quantization.method not in METHODS or path.rpartition(".")[2] != "experts" or quantization.leaves_plain(path):
        return None
    return Mxfp4()
