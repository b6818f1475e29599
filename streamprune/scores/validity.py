"""What scores have to be, whoever made them. Each check raises ScoresError, or gives back what it has checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from streamprune.errors import ScoresError
from streamprune.scores.statistics import COUNTS, FIELDS, SIGNED, LayerStatistics
from streamprune.source.config_facts import MOST_BLOCKS, MOST_EXPERTS, ExpertSpec
from streamprune.source.shard import show

MOST_SOURCES = 1000
LONGEST_SOURCE_NAME = 1000
#: Up to here float64 has every whole number.
MOST_TOKENS = 2**53
#: Far beyond what float32 can reach, squared and summed, and low enough that products of two stay finite.
MOST_VALUE = 1e120
#: Rounding may carry a sum of cosines above the number of its terms, the more so the narrower the dtype.
_SLACK = 1e-2
_SPEC_FIELDS = ("path", "attribute", "count", "top_k", "groups", "topk_groups")
_AGAIN = "Score the model again."


def check_sources(names: Sequence[Any], tokens: Sequence[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of sources: texts that can be printed, no two the same; each source has at least one token."""
    if not 1 <= len(names) == len(tokens) <= MOST_SOURCES:
        raise ScoresError(f"{len(names)} sources with {len(tokens)} token counts are no calibration. {_AGAIN}")
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.strip()) <= LONGEST_SOURCE_NAME:
            raise ScoresError(f"a source cannot be named {show(name)}. {_AGAIN}")
    if len(set(names)) < len(names):
        raise ScoresError(f"two sources have the same name: {show(sorted(names))}. {_AGAIN}")
    for name, count in zip(names, tokens, strict=True):
        if not _whole(count, 1, MOST_TOKENS):
            raise ScoresError(f"source {name} has {show(count)} tokens. {_AGAIN}")
    return tuple(names), tuple(tokens)


def check_spec(spec: ExpertSpec | Mapping[str, Any]) -> ExpertSpec:
    """How many experts there are, and how the router picks among them."""
    facts = {name: getattr(spec, name) for name in _SPEC_FIELDS} if isinstance(spec, ExpertSpec) else spec
    if facts.keys() != set(_SPEC_FIELDS):
        raise ScoresError(f"its experts are described by {show(sorted(facts))}. {_AGAIN}")
    path, attribute = facts["path"], facts["attribute"]
    count, top_k, groups, topk_groups = (facts[name] for name in _SPEC_FIELDS[2:])
    right = (
        isinstance(path, (list, tuple)) and all(isinstance(part, str) for part in path) and isinstance(attribute, str)
        and _whole(count, 1, MOST_EXPERTS) and _whole(top_k, 1, count)
        and _whole(groups, 1, count) and count % groups == 0 and _whole(topk_groups, 1, groups)
    )  # fmt: skip
    if not right:
        raise ScoresError(f"no router picks experts like this: {show(dict(facts))}. {_AGAIN}")
    return ExpertSpec(tuple(path), attribute, count, top_k, groups, topk_groups)


def check_blocks(blocks: Sequence[Any]) -> tuple[int, ...]:
    """Numbers of blocks, ascending; at least one."""
    if not blocks or not all(_whole(block, 0, MOST_BLOCKS) for block in blocks):
        raise ScoresError(f"these are no numbers of layers: {show(list(blocks))}. {_AGAIN}")
    if any(left >= right for left, right in pairwise(blocks)):
        raise ScoresError(f"its layers are not in ascending order: {show(list(blocks))}. {_AGAIN}")
    return tuple(blocks)


def check_layer(layer: LayerStatistics, source_tokens: Sequence[int], experts: int) -> None:
    """The statistics of one layer: of the right shape, finite, and such as sums over these tokens can be."""
    shape = (len(FIELDS), len(source_tokens), experts)
    if layer.values.shape != shape:
        raise ScoresError(f"layer {layer.block} has statistics {layer.values.shape} instead of {shape}. {_AGAIN}")
    fields = dict(zip(FIELDS, layer.values, strict=True))
    tokens = fields["tokens"]
    limits = np.asarray(source_tokens, dtype=np.float64)[:, None]
    for name, values in fields.items():
        wrong = ~(np.abs(values) <= MOST_VALUE)
        if name not in SIGNED:
            wrong |= values < 0
        if name in COUNTS:
            wrong |= (values != np.floor(values)) | (values > (limits if name == "tokens" else tokens))
        if name == "cosines":
            wrong |= np.abs(values) > tokens * (1 + _SLACK) + _SLACK
        wrong |= (tokens == 0) & (values != 0)
        if wrong.any():
            source, expert = (int(index) for index in np.argwhere(wrong)[0])
            raise ScoresError(
                f"layer {layer.block}, expert {expert}, source {source}: {name} is {values[source, expert]:g} with "
                f"{tokens[source, expert]:g} tokens of {limits[source, 0]:g}, which cannot be. {_AGAIN}"
            )


def _whole(number: Any, least: int, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and least <= number <= most
