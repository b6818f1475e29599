"""The plain format: every parameter is one tensor of floats (or integers), as transformers saves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import ChannelRows, ExpertRows, Format

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlainFormat(Format):
    """One tensor per parameter, its values as they are computed with."""

    name = "plain"

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

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it is: transformers knows which parameters have another dtype than the model."""
        return parts[""]

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {"": ("BF16", shape)}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[""]


PLAIN = PlainFormat()
