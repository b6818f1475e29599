"""The bytes of a stored tensor that belong to the experts, or to the channels of an expert, that stay. No torch.

The same for all formats: experts and channels are rows along an axis of an array of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.formats.base import ChannelRows, ExpertRows


@dataclass(frozen=True, eq=False)
class Bytes:
    """Bytes `begin` to `end` (exclusive) of a file; with `take`, only some of them.

    They are then an array (A, count, size) of bytes, of which the rows `take`, ascending, of the middle axis are meant.
    """

    begin: int
    end: int
    count: int = 0
    size: int = 0
    take: NDArray[np.int64] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """How many bytes are meant."""
        total = self.end - self.begin
        return total if self.take is None else total // self.count * len(self.take)


def slice_experts(entry: TensorEntry, rows: ExpertRows, kept: Sequence[int]) -> list[Bytes]:
    """The bytes of the file that make up a stored tensor with the experts `kept` only, in their order."""
    length = entry.shape[rows.axis]
    outer = math.prod(entry.shape[: rows.axis])
    row_bytes = entry.nbytes // (outer * length)
    wanted = [(expert * rows.stride, (expert + 1) * rows.stride) for expert in kept]
    wanted.append((length - rows.tail, length))
    ranges: list[tuple[int, int]] = []
    for index in range(outer):
        start = entry.begin + index * length * row_bytes
        for first, last in wanted:
            begin, end = start + first * row_bytes, start + last * row_bytes
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            elif end > begin:
                ranges.append((begin, end))
    return [Bytes(begin, end) for begin, end in ranges]


def slice_channels(begin: int, end: int, shape: tuple[int, ...], rows: ChannelRows, kept: NDArray[np.int64]) -> Bytes:
    """The bytes of one expert's stored tensor that belong to its channels `kept`, ascending.

    The tensor has this shape, and lies between the bytes `begin` and `end` of the file.
    """
    outer = math.prod(shape[: rows.axis]) * rows.repeats
    width = shape[rows.axis] // rows.repeats // rows.step
    return Bytes(begin, end, width, (end - begin) // (outer * width), kept)
