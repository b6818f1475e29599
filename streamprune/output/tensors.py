"""The tensors of the output: which there are, and where the bytes of each come from. Needs no torch.

The output holds the source's own tensors, in the source's names and layout. A tensor that belongs to one expert is
kept or left out and renumbered; a tensor that holds all experts along one axis is sliced; everything else is copied.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamprune.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import ByteRange, ExpertRows, Format
from streamprune.formats.pick import pick_formats
from streamprune.formats.plain import PLAIN
from streamprune.models.expert_layout import Layout


@dataclass(frozen=True)
class SourceSlice:
    """A written tensor that is bytes of the source, unchanged: `ranges` of a file, in order.

    `experts` are the source's experts in it, in order; empty for a tensor of no expert.
    """

    file: str
    ranges: tuple[ByteRange, ...]
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Computed:
    """A written tensor that a stage of the run has computed, and the SHA-256 of its bytes, in hex."""

    stage: str
    sha256: str


#: Where the bytes of a written tensor come from: all that is said of them, and every proof, follows from it.
Origin = SourceSlice | Computed


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output. `layer` is None for what lies outside the decoder's layers.

    Exactly one of these describes it: `rows` (slice `sources[0]`), several `sources` (one per source expert; this
    output tensor is that of the `slot`-th kept expert), or neither (copy `sources[0]`). If a `stage` is named, that
    stage computes the tensor, and passes its bytes to the writer.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[TensorEntry, ...] = field(repr=False)
    slot: int | None = None
    rows: ExpertRows | None = None
    format: Format = PLAIN
    stage: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def slice_of(self, kept: Sequence[int]) -> SourceSlice:
        """The bytes of the source that make up this tensor when the experts `kept` of its layer stay, in order.

        Raises UnsupportedModelError for a format in which no bytes of the source do.
        """
        if self.slot is not None:
            expert = kept[self.slot]
            entry = self.sources[expert]
            return SourceSlice(entry.file, ((entry.begin, entry.end),), (expert,))
        entry = self.sources[0]
        if self.rows is None:
            return SourceSlice(entry.file, ((entry.begin, entry.end),))
        ranges = self.format.slice_experts(entry, self.rows, kept)
        if ranges is None:
            raise UnsupportedModelError(
                f"{self.name} cannot be sliced as it is stored ({self.format.name}); it has to be encoded anew."
            )
        return SourceSlice(entry.file, tuple(ranges), tuple(kept))


def output_tensors(layout: Layout, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int]) -> list[OutputTensor]:
    """Every tensor of the output, in the source's order, where `counts` experts stay, by layer."""
    stored = pick_formats(tensors)
    families: dict[str, dict[int, TensorEntry]] = defaultdict(dict)
    for name, cut in layout.cuts.items():
        if cut.family is not None and cut.expert is not None:
            families[cut.family][cut.expert] = tensors[name]
    ordered = {family: tuple(members[number] for number in sorted(members)) for family, members in families.items()}
    result = []
    for name, cut in layout.cuts.items():
        entry, storage = tensors[name], stored[name].format
        keep = counts.get(cut.layer, 0) if cut.layer is not None else 0
        if cut.family is not None:
            assert cut.expert is not None
            if cut.expert < keep:
                sources = ordered[cut.family]
                result.append(
                    OutputTensor(name, entry.dtype, entry.shape, cut.layer, sources, slot=cut.expert, format=storage)
                )
        elif cut.rows is not None:
            shape = (*entry.shape[: cut.rows.axis], cut.rows.size(keep), *entry.shape[cut.rows.axis + 1 :])
            result.append(OutputTensor(name, entry.dtype, shape, cut.layer, (entry,), rows=cut.rows, format=storage))
        else:
            result.append(OutputTensor(name, entry.dtype, entry.shape, cut.layer, (entry,), format=storage))
    return result
