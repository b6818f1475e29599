"""Which bytes of the source go where in the output. Pure: no weight is read, nothing is written, torch is not needed.

The output holds the source's own tensors, in the source's names and layout. A tensor that belongs to one expert is
kept or left out and renumbered; a tensor that holds all experts along one axis is sliced; everything else is copied.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamprune.source.checkpoint import DTYPE_BITS, TensorEntry
from streamprune.source.roles import ExpertRows

#: Stands for an expert's number in the name that the tensors of all experts share.
EXPERT = "{expert}"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output. `block` is None for what lies outside the decoder's blocks.

    Exactly one of these describes it: `rows` (slice `sources[0]`), several `sources` (one per source expert; this
    output tensor is that of the `slot`-th kept expert), or neither (copy `sources[0]`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    block: int | None
    sources: tuple[TensorEntry, ...] = field(repr=False)
    slot: int | None = None
    rows: ExpertRows | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def ranges(self, kept: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The source file and the byte ranges in it that make up this tensor when the experts `kept` stay, in order."""
        if self.slot is not None:
            entry = self.sources[kept[self.slot]]
            return entry.file, [(entry.begin, entry.end)]
        entry = self.sources[0]
        if self.rows is None:
            return entry.file, [(entry.begin, entry.end)]
        axis_size = entry.shape[self.rows.axis]
        outer = math.prod(entry.shape[: self.rows.axis])
        row_bytes = entry.nbytes // (outer * axis_size)
        wanted = [(expert * self.rows.stride, (expert + 1) * self.rows.stride) for expert in kept]
        wanted.append((axis_size - self.rows.tail, axis_size))
        ranges: list[tuple[int, int]] = []
        for index in range(outer):
            start = entry.begin + index * axis_size * row_bytes
            for first, last in wanted:
                begin, end = start + first * row_bytes, start + last * row_bytes
                if ranges and ranges[-1][1] == begin:
                    ranges[-1] = (ranges[-1][0], end)
                elif end > begin:
                    ranges.append((begin, end))
        return entry.file, ranges


@dataclass(frozen=True)
class Cut:
    """What becomes of a checkpoint tensor when experts go. `block` is None for what lies outside the decoder's blocks.

    A tensor of one expert has that `expert`'s number, and as `family` its name with EXPERT in the number's place. One
    that holds all experts has `rows`. Any other is copied.
    """

    block: int | None
    family: str | None = None
    expert: int | None = None
    rows: ExpertRows | None = None


def output_tensors(
    tensors: Mapping[str, TensorEntry], cuts: Mapping[str, Cut], counts: Mapping[int, int]
) -> list[OutputTensor]:
    """Every tensor of the output, in the source's order, for `counts` experts that stay, by block."""
    families: dict[str, dict[int, TensorEntry]] = defaultdict(dict)
    for name, cut in cuts.items():
        if cut.family is not None and cut.expert is not None:
            families[cut.family][cut.expert] = tensors[name]
    ordered = {family: tuple(members[number] for number in sorted(members)) for family, members in families.items()}
    result = []
    for name, cut in cuts.items():
        entry = tensors[name]
        keep = counts.get(cut.block, 0) if cut.block is not None else 0
        if cut.family is not None:
            assert cut.expert is not None
            if cut.expert < keep:
                sources = ordered[cut.family]
                result.append(OutputTensor(name, entry.dtype, entry.shape, cut.block, sources, slot=cut.expert))
        elif cut.rows is not None:
            size = cut.rows.stride * keep + cut.rows.tail
            shape = (*entry.shape[: cut.rows.axis], size, *entry.shape[cut.rows.axis + 1 :])
            result.append(OutputTensor(name, entry.dtype, shape, cut.block, (entry,), rows=cut.rows))
        else:
            result.append(OutputTensor(name, entry.dtype, entry.shape, cut.block, (entry,)))
    return result
