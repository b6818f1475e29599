"""Where in a checkpoint the experts lie: all that has to be known of a model to prune it without building it.

Found once from the model's structure (`survey`), and kept with the scores as JSON, so that a later run that only writes
needs neither torch nor transformers. As JSON, tensors are told by patterns of their names:

    {"model.layers.{block}.mlp.gate.weight": [0, 1, 0],            experts along axis 0, 1 row each, 0 rows of no expert
     "model.layers.{block}.mlp.experts.{expert}.up_proj.weight": null,   one tensor for each expert
     "model.layers.{block}.input_layernorm.weight": null}          copied, with its block

What no pattern fits lies outside the blocks and is copied. Of such tensors, those named as if they were in a block
(rotary frequencies, which no model reads) are listed, so that nothing is copied because a pattern is missing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError
from streamprune.models.config_json import MOST_BLOCKS, ExpertSpec
from streamprune.models.tensor_slices import (
    EXPERT,
    Cut,
    ExpertRows,
    OutputTensor,
    may_be_next_token_prediction,
    output_tensors,
)

#: Stands for a block's number in a pattern.
BLOCK = "{block}"


@dataclass(frozen=True)
class Layout:
    """A model as pruning sees it: its routed experts, the blocks that have some, and how each tensor can be cut.

    `count_names` are the keys under which its config may state the number of experts, beside the usual ones. `dropped`
    are the tensors of multi-token prediction (MTP), which are left out.
    """

    spec: ExpertSpec
    layer_count: int
    expert_layers: tuple[int, ...]
    count_names: tuple[str, ...]
    dropped: tuple[str, ...]
    cuts: Mapping[str, Cut] = field(repr=False)

    def output(self, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int]) -> list[OutputTensor]:
        """Every tensor of the output where `counts` experts stay, by block."""
        return output_tensors(tensors, self.cuts, counts)

    def as_json(self) -> dict[str, Any] | None:
        """The layout as JSON, less the spec; None where patterns cannot tell it."""
        patterns: dict[str, list[int] | None] = {}
        for name, cut in self.cuts.items():
            if cut.block is None:
                continue
            pattern = _pattern(cut.family or name, cut.block)
            rows = [cut.rows.axis, cut.rows.stride, cut.rows.tail] if cut.rows else None
            if pattern is None or patterns.setdefault(pattern, rows) != rows:
                return None
        told = {
            "blocks": self.layer_count,
            "expert_layers": list(self.expert_layers),
            "count_names": list(self.count_names),
            "dropped": list(self.dropped),
            "outside": [name for name in _uncut(self.cuts) if name.startswith(_prefixes(patterns))],
            "patterns": patterns,
        }
        # Whoever reads it has nothing else to go by.
        return told if dict(_cuts(patterns, [*self.cuts, *self.dropped], set(self.dropped))) == self.cuts else None


def layout_from_json(
    told: Any, spec: ExpertSpec, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int] | None = None
) -> Layout:
    """The layout that `as_json` told, for the checkpoint with these tensors: the source's, or those of an output.

    `counts` are the experts by block of an output; None for the source, whose blocks all have those of the spec.
    Raises CheckpointError where it is none, or does not go with the tensors: it may come from a stranger.
    """
    try:
        blocks, expert_layers = told["blocks"], tuple(told["expert_layers"])
        dropped, patterns = tuple(told["dropped"]), dict(told["patterns"])
        texts = (*told["count_names"], *dropped, *patterns)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("names that are no text")
        if type(blocks) is not int or not 1 <= blocks <= MOST_BLOCKS:
            raise ValueError("blocks is no number of blocks")
        if not all(type(block) is int and 0 <= block < blocks for block in expert_layers) or not expert_layers:
            raise ValueError("blocks that the model does not have")
        if list(expert_layers) != sorted(set(expert_layers)):
            raise ValueError("blocks in no ascending order")
        kept_back = [name for name in dropped if not may_be_next_token_prediction(name, blocks)]
        if kept_back:
            raise ValueError(f"{kept_back[0]} is of no multi-token-prediction layer")
        cuts = dict(_cuts(patterns, tensors, set(dropped)))
        _check(cuts, tensors, counts or dict.fromkeys(expert_layers, spec.count), blocks, expert_layers)
        outside = set(told["outside"])
        doubtful = [name for name in _uncut(cuts) if name.startswith(_prefixes(patterns)) and name not in outside]
        if doubtful:
            raise ValueError(f"nothing tells where {doubtful[0]} belongs")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"What the scores tell of the checkpoint's tensors does not go with it ({error}). Score the model again."
        ) from None
    return Layout(spec, blocks, expert_layers, tuple(told["count_names"]), dropped, cuts)


def _check(
    cuts: Mapping[str, Cut],
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int],
    blocks: int,
    expert_layers: tuple[int, ...],
) -> None:
    families: dict[tuple[str, int], set[int | None]] = defaultdict(set)
    found = set()
    for name, cut in cuts.items():
        if cut.block is not None and cut.block >= blocks:
            raise ValueError(f"{name} is of block {cut.block}, of {blocks}")
        if cut.family is not None:
            families[cut.family, _count_in(cut, counts)].add(cut.expert)
        if cut.rows is not None:
            shape, rows, count = tensors[name].shape, cut.rows, _count_in(cut, counts)
            if not 0 <= rows.axis < len(shape) or shape[rows.axis] != rows.stride * count + rows.tail:
                raise ValueError(f"{name} has no {count} experts along axis {rows.axis}")
        if cut.family is not None or cut.rows is not None:
            found.add(cut.block)
    missing = any(numbers != set(range(count)) for (_, count), numbers in families.items())
    if missing or found != set(expert_layers):
        raise ValueError("experts are missing")


def _count_in(cut: Cut, counts: Mapping[int, int]) -> int:
    """Experts of the block in which a tensor is that holds some; 0 where none should be."""
    return counts.get(cut.block, 0) if cut.block is not None else 0


def _uncut(cuts: Mapping[str, Cut]) -> list[str]:
    return [name for name, cut in cuts.items() if cut.block is None]


def _prefixes(patterns: Iterable[str]) -> tuple[str, ...]:
    """What the names of the blocks' tensors begin with."""
    return tuple({pattern.partition(BLOCK)[0] for pattern in patterns})


def _pattern(name: str, block: int) -> str | None:
    segments = name.split(".")
    if str(block) not in segments:
        return None
    segments[segments.index(str(block))] = BLOCK
    return ".".join(segments)


def _cuts(patterns: Mapping[str, list[int] | None], names: Any, dropped: set[str]) -> list[tuple[str, Cut]]:
    """The cut of every name, by the one pattern that fits it."""
    matchers: dict[str, list[tuple[re.Pattern[str], bool, ExpertRows | None]]] = defaultdict(list)
    for pattern, numbers in patterns.items():
        if pattern.split(".").count(BLOCK) != 1 or pattern.split(".").count(EXPERT) > 1:
            raise ValueError("a pattern without one block")
        segments = [
            {BLOCK: r"(?P<block>\d+)", EXPERT: r"(?P<expert>\d+)"}.get(segment) or re.escape(segment)
            for segment in pattern.split(".")
        ]
        rows = ExpertRows(*map(_count, numbers)) if numbers is not None else None
        key = pattern.replace(BLOCK, "0").replace(EXPERT, "0")
        matchers[_shape(key)].append((re.compile(r"\.".join(segments)), EXPERT in pattern, rows))
    result = []
    for name in names:
        if name in dropped:
            continue
        cut = Cut(None)
        for matcher, numbered, rows in matchers.get(_shape(name), ()):
            match = matcher.fullmatch(name)
            if match is None:
                continue
            family = expert = None
            if numbered:
                expert = int(match["expert"])
                family = f"{name[: match.start('expert')]}{EXPERT}{name[match.end('expert') :]}"
            cut = Cut(int(match["block"]), family, expert, rows)
        result.append((name, cut))
    return result


def _shape(name: str) -> str:
    """A name with every number in it taken for the same, so that few patterns have to be tried for each name."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("rows that are no numbers")
    return value
