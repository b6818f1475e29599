"""Whole numbers of 2 to 8 bits with scales and, if asymmetric, zero points, as compressed-tensors stores them.

The plain weight is (code - zero point) x scale. Layouts: compressed-tensors 0.20, `compressors/naive_quantized` and
`compressors/pack_quantized`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamprune.errors import CheckpointError
from streamprune.formats.base import Format
from streamprune.formats.codes import multiply_blocks, subtract_blocks, unpack

if TYPE_CHECKING:
    import torch

#: The shape of a matrix (rows, columns) for which no blocks are stated: one scale for each row, or one for all.
Block = tuple[int, int] | None


@dataclass(frozen=True)
class Int8(Format):
    """A matrix (out, in) of int8 beside scales, and zero points in int8, for each `block`; None: each row, or all."""

    block: Block = None
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"INT8 (blocks of {self.block[0]} x {self.block[1]})" if self.block else "INT8"

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        zero = parts["zero"].float() if "zero" in parts else None
        return scaled(parts[""].float(), zero, parts["scale"].float(), self.block).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, rows, columns = shape
        each = (*outer, *scales_shape(self.block, rows, columns))
        stored = {"": ("I8", shape), "scale": ("BF16", each)}
        return stored if self.symmetric else {**stored, "zero": ("I8", each)}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[""]


@dataclass(frozen=True)
class PackedIntegers(Format):
    """A matrix (out, in): codes of `bits` along `in` in 32-bit words, with an offset of half their range.

    A scale for every `group` columns of a row; None: for each row, or one for all. Zero points are codes too, along
    `out`. `shape` is that of the matrix: rows are filled up to words. The scales' dtype, which only tensors show, is
    the model's.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    scale_dtype: str = field(default="BF16", compare=False)

    @property
    def name(self) -> str:
        return f"INT{self.bits}" + (f" (groups of {self.group})" if self.group else "")

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        rows, columns = self.plain_shape(shapes)
        stated = parts["shape"].tolist()
        if stated != [rows, columns]:
            raise CheckpointError(
                f"weight_shape ({self.name}) states {stated}, but {list(shapes['packed'])} words and "
                f"{list(shapes['scale'])} scales make {[rows, columns]}. Download the checkpoint again."
            )
        half = float(1 << (self.bits - 1))
        zero = unpack(parts["zero"].t(), self.bits, rows).t() if "zero" in parts else None
        values = unpack(parts["packed"], self.bits, columns)
        if zero is None:
            # The offset of the codes; that of zero points cancels it.
            values.sub_(half)
        block = (1, self.group) if self.group else None
        return scaled(values, zero, parts["scale"].float(), block).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, rows, columns = shape
        groups = columns // self.group if self.group else 1
        stored = {
            "packed": ("I32", (*outer, rows, math.ceil(columns * self.bits / 32))),
            "scale": (self.scale_dtype, (*outer, rows, groups)),
            "shape": ("I64", (*outer, 2)),
        }
        zero = (*outer, math.ceil(rows * self.bits / 32), groups)
        return stored if self.symmetric else {**stored, "zero": ("I32", zero)}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        rows, words = shapes["packed"]
        return rows, shapes["scale"][1] * self.group if self.group else words * 32 // self.bits


def scaled(values: torch.Tensor, zero: torch.Tensor | None, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """(values - zero) x scale, in place: `values` (rows, columns), float32, the others one for each block."""
    if block is not None:
        if zero is not None:
            subtract_blocks(values, zero, block)
        return multiply_blocks(values, scale, block)
    each = (-1, 1) if scale.numel() > 1 else ()
    if zero is not None:
        values.sub_(zero.reshape(each))
    return values.mul_(scale.reshape(each))


def scales_shape(block: Block, rows: int, columns: int) -> tuple[int, int]:
    """How many scales a matrix has along rows and columns, the last blocks possibly smaller; with none, one a row."""
    return (math.ceil(rows / block[0]), math.ceil(columns / block[1])) if block else (rows, 1)
