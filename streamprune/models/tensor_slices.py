"""What the tensors of a checkpoint are to the model, as pruning needs to know it. Needs no torch.

Which bytes of the source go where in the output. Pure: no weight is read, nothing is written, torch is not needed.

The output holds the source's own tensors, in the source's names and layout. A tensor that belongs to one expert is
kept or left out and renumbered; a tensor that holds all experts along one axis is sliced; everything else is copied.

How each tensor of a checkpoint can be cut when experts go, found from what it feeds in the model. Pure; no torch.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from streamprune.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class ExpertRows:
    """The experts in a checkpoint tensor: `stride` rows of `axis` per expert, `tail` rows of no expert at the end."""

    axis: int
    stride: int
    tail: int


@dataclass(frozen=True)
class SourceRole:
    """What a checkpoint tensor is fed into. `parameter` is None where the model ignores the tensor.

    `parameter_rows` is the expert axis of the parameter it feeds (not necessarily of the tensor itself); `pattern` is
    the conversion that leads there.
    """

    block: int | None
    parameter: str | None
    pattern: str | None = None
    parameter_shape: tuple[int, ...] = ()
    parameter_rows: ExpertRows | None = None


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


_MTP_SEGMENT = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
MTP_ONLY = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def next_token_prediction(roles: Mapping[str, SourceRole], layer_count: int, mtp_layers: int) -> list[str]:
    """Of the tensors that the model ignores, those of its multi-token-prediction (MTP) layers.

    Checkpoints keep them under a name of their own, or as further decoder blocks behind the last one: as many as the
    config says (`mtp_layers`), or such as hold tensors that only MTP layers have. Raises CheckpointError for a further
    block that is neither: it is one of the model's own, and the config is wrong.
    """
    lists = {
        match.group(1) for name, role in roles.items() if role.block is not None and (match := _NUMBERED.match(name))
    }
    found = []
    further: dict[int, list[str]] = defaultdict(list)
    for name, role in roles.items():
        if role.parameter is not None:
            continue
        match = _NUMBERED.match(name)
        if match is not None and match.group(1) in lists and int(match.group(2)) >= layer_count:
            further[int(match.group(2))].append(name)
        elif _MTP_SEGMENT.search(name):
            found.append(name)
    for number, names in further.items():
        if number >= layer_count + mtp_layers and not any(MTP_ONLY.search(name) for name in names):
            raise CheckpointError(
                f"The checkpoint has {names[0]}, but config.json describes only {layer_count} blocks and {mtp_layers} "
                "multi-token-prediction layers. Config and shards do not belong together; download both again."
            )
        found.extend(names)
    return [name for name in roles if name in set(found)]


def may_be_next_token_prediction(name: str, layer_count: int) -> bool:
    """Whether a tensor of this name, which the model ignores, may be found by `next_token_prediction`."""
    match = _NUMBERED.match(name)
    return bool(_MTP_SEGMENT.search(name)) or (match is not None and int(match.group(2)) >= layer_count)


def find_cuts(
    tensors: Mapping[str, TensorEntry],
    roles: Mapping[str, SourceRole],
    dropped: Iterable[str],
    counts: Mapping[int, int],
) -> dict[str, Cut]:
    """How every tensor but the `dropped` ones can be cut, in the source's order, in a model of `counts` experts, by
    block.

    Raises CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced.
    """
    left_out = set(dropped)
    groups: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name, role in roles.items():
        if role.parameter is not None and role.parameter_rows is not None:
            groups[role.parameter, role.pattern].append(name)
    numbered: dict[str, tuple[str, int]] = {}
    for (parameter, _), names in groups.items():
        if len(names) > 1:
            family, ordered = _by_expert(parameter, names, _experts_in(roles[names[0]], counts))
            if len({(tensors[name].dtype, tensors[name].shape) for name in ordered}) > 1:
                raise UnsupportedModelError(f"The experts of {parameter} differ in shape or dtype in the checkpoint.")
            numbered.update({name: (family, expert) for expert, name in enumerate(ordered)})
    result = {}
    for name, entry in tensors.items():
        role = roles[name]
        if name in left_out:
            continue
        if name in numbered:
            result[name] = Cut(role.block, *numbered[name])
        elif role.parameter_rows is not None:
            result[name] = Cut(role.block, rows=_rows_of(entry, role, role.parameter_rows, _experts_in(role, counts)))
        else:
            result[name] = Cut(role.block)
    return result


def _experts_in(role: SourceRole, counts: Mapping[int, int]) -> int:
    # Whatever depends on the number of experts lies in a block.
    assert role.block is not None
    return counts[role.block]


def _by_expert(parameter: str, names: Sequence[str], count: int) -> tuple[str, list[str]]:
    """The names of one tensor per expert by the expert's number, the one segment in which they differ.

    Before them, the name that they share, with EXPERT in the number's place.
    """
    split = [name.split(".") for name in names]
    differing = [place for place in range(len(split[0])) if len({parts[place] for parts in split}) > 1]
    if len({len(parts) for parts in split}) == 1 and len(differing) == 1:
        numbers = {parts[differing[0]]: name for parts, name in zip(split, names, strict=True)}
        if set(numbers) == {str(expert) for expert in range(count)}:
            family = ".".join((*split[0][: differing[0]], EXPERT, *split[0][differing[0] + 1 :]))
            return family, [numbers[str(expert)] for expert in range(count)]
        missing = [expert for expert in range(count) if str(expert) not in numbers]
        if not missing and all(number.isdigit() for number in numbers):
            raise CheckpointError(
                f"The checkpoint has {len(names)} experts of {parameter}, but config.json describes {count}. Config "
                "and shards do not belong together; download both again."
            )
        if missing and all(number.isdigit() for number in numbers):
            raise CheckpointError(
                f"The checkpoint has only {len(names)} of the {count} experts of {parameter}; the first missing one is "
                f"expert {missing[0]}. Complete the download."
            )
    raise UnsupportedModelError(f"Cannot tell which expert is which among {names[0]}, {names[1]}, … for {parameter}.")


def _rows_of(entry: TensorEntry, role: SourceRole, rows: ExpertRows, count: int) -> ExpertRows:
    """The expert axis of a checkpoint tensor that holds all experts of a parameter at once.

    Conversions may transpose or join tensors, but none moves experts apart, so the axis is the parameter's own when it
    has the parameter's size there, else the only one of that size.
    """
    size = rows.stride * count + rows.tail
    fitting = [axis for axis, length in enumerate(entry.shape) if length == size]
    if rows.axis < len(entry.shape) and entry.shape[rows.axis] == size:
        axis = rows.axis
    elif len(fitting) == 1:
        axis = fitting[0]
    else:
        raise UnsupportedModelError(
            f"{entry.name} {list(entry.shape)} feeds {role.parameter} {list(role.parameter_shape)}, but has no single "
            f"axis of {size} rows for its {count} experts."
        )
    outer = math.prod(entry.shape[:axis])
    if entry.nbytes % (outer * size):
        raise UnsupportedModelError(f"{entry.name} packs several experts' values into one byte ({entry.dtype}).")
    return ExpertRows(axis, rows.stride, rows.tail)
