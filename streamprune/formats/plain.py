"""The plain format: every parameter is one tensor of floats (or integers), as transformers saves it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import ByteRange, Bytes, ChannelRows, ExpertRows, Format

if TYPE_CHECKING:
    import torch


class PlainFormat(Format):
    """One tensor per parameter, its values as they are computed with."""

    name = "plain"

    def parts_of(self, module: Mapping[str, TensorEntry]) -> Mapping[str, tuple[str, str]]:
        return {name: (name, "") for name in module}

    def expert_rows(self, entry: TensorEntry, part: str, of: ExpertRows, experts: int) -> ExpertRows:
        """Conversions may transpose or join tensors, but none moves experts apart: the axis is the parameter's own if
        it has the right size, else the only one of that size."""
        size = of.size(experts)
        axes = [axis for axis, length in enumerate(entry.shape) if length == size]
        if of.axis in axes:
            axes = [of.axis]
        if len(axes) != 1:
            raise UnsupportedModelError(
                f"{entry.name} {list(entry.shape)} has no single axis of {size} rows for its {experts} experts."
            )
        if entry.nbytes % (math.prod(entry.shape[: axes[0]]) * size):
            raise UnsupportedModelError(f"{entry.name} packs several experts' values into one byte ({entry.dtype}).")
        return ExpertRows(axes[0], of.stride, of.tail)

    def channel_rows(self, shape: tuple[int, ...], part: str, of: ChannelRows, width: int) -> ChannelRows | None:
        """As in the parameter, or only one of the projections that it joins."""
        length = shape[of.axis] if of.axis < len(shape) else 0
        if length == of.repeats * width * of.step:
            return of
        return ChannelRows(of.axis) if length == width and of.step == 1 else None

    def slice_experts(self, entry: TensorEntry, rows: ExpertRows, kept: Sequence[int]) -> list[ByteRange]:
        length = entry.shape[rows.axis]
        outer = math.prod(entry.shape[: rows.axis])
        row_bytes = entry.nbytes // (outer * length)
        wanted = [(expert * rows.stride, (expert + 1) * rows.stride) for expert in kept]
        wanted.append((length - rows.tail, length))
        ranges: list[ByteRange] = []
        for index in range(outer):
            start = entry.begin + index * length * row_bytes
            for first, last in wanted:
                begin, end = start + first * row_bytes, start + last * row_bytes
                if ranges and ranges[-1][1] == begin:
                    ranges[-1] = (ranges[-1][0], end)
                elif end > begin:
                    ranges.append((begin, end))
        return ranges

    def slice_channels(
        self, expert: ByteRange, shape: tuple[int, ...], rows: ChannelRows, kept: NDArray[np.int64]
    ) -> Bytes:
        begin, end = expert
        outer = math.prod(shape[: rows.axis]) * rows.repeats
        width = shape[rows.axis] // rows.repeats // rows.step
        return Bytes(begin, end, width, (end - begin) // (outer * width), kept)

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[""]

    def encode(self, parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {parameter: tensor}

    def pruned_config(self, config: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> Mapping[str, Any]:
        return config


PLAIN = PlainFormat()
