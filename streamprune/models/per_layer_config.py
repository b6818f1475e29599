"""Models whose blocks keep different numbers of experts, met as input: what their config.json says, read as plain JSON.

`fit` tells their memory; they cannot be scored or pruned again. Torch is not needed, nor the code that loads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from streamprune.checkpoint.index import CONFIG_NAME
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.files.json_text import show
from streamprune.models.config_json import (
    COUNT_NAME,
    MOST_BLOCKS,
    MOST_EXPERTS,
    first_number,
    single_number,
    text_part,
)
from streamprune.models.per_layer_experts import OWN_TABLE, STANDARD_TABLE

#: Goes with transformers' own table, and means nothing without it.
_ACCESS = "allow_global_per_layer_attribute_access"


@dataclass(frozen=True)
class PerLayerExperts:
    """A config.json taken apart: `stock` describes the same model with `usual` experts in every block that has some,
    and `differing` says how many there are in the blocks that have another number."""

    stock: Mapping[str, Any]
    usual: int
    differing: Mapping[int, int]

    @property
    def range_text(self) -> str:
        """The least and the most experts of a block, in words."""
        counts = (self.usual, *self.differing.values())
        return f"{min(counts)} to {max(counts)}"


def read_per_layer_experts(config: Mapping[str, Any]) -> PerLayerExperts | None:
    """What a config says of blocks with different numbers of experts; None where it gives all the same number.

    Raises CheckpointError for numbers that no model has, and UnsupportedModelError where blocks differ in more.
    """
    path, text = text_part(config)
    for table in (OWN_TABLE, STANDARD_TABLE):
        entries = text.get(table)
        # transformers' own table may also be about something else, such as attention windows.
        if table == OWN_TABLE and entries is not None and not isinstance(entries, Mapping):
            raise _bad(f"{table} is {show(entries)}, no table of blocks")
        if not isinstance(entries, Mapping) or not any(_counts_in(entry) for entry in entries.values()):
            continue
        return _read_table(config, path, text, table, entries)
    return None


def refuse_per_layer_experts(config: Mapping[str, Any], model: str) -> None:
    """Raise UnsupportedModelError for a model whose config gives its blocks different numbers of experts."""
    uneven = read_per_layer_experts(config)
    if uneven is None:
        return
    raise UnsupportedModelError(
        f"The blocks of {model} keep different numbers of experts already ({uneven.range_text}). Such a model can be "
        "neither scored nor pruned again. Prune the model that it was made from once more, from the scores that a run "
        f"leaves in its output: `streamprune prune SOURCE --scores {model} -o OUT`, with --keep, --ratio or "
        "--budget-gib."
    )


def counts_of(uneven: PerLayerExperts, blocks: Collection[int]) -> dict[int, int]:
    """The number of experts of each of the `blocks` that have some.

    Raises CheckpointError for a config that gives some to another block.
    """
    strangers = sorted(uneven.differing.keys() - set(blocks))
    if strangers:
        raise CheckpointError(
            f"{CONFIG_NAME} gives block {strangers[0]} {uneven.differing[strangers[0]]} experts, but that block has "
            "none. Config and weights do not belong together; download both again."
        )
    return {block: uneven.differing.get(block, uneven.usual) for block in sorted(blocks)}


def _read_table(
    config: Mapping[str, Any], path: tuple[str, ...], text: Mapping[str, Any], table: str, entries: Mapping[str, Any]
) -> PerLayerExperts | None:
    depth = first_number((text,), ("num_hidden_layers", "n_layer", "n_layers")) or MOST_BLOCKS
    usual: set[int] = set()
    counts: dict[int, int] = {}
    for key, entry in entries.items():
        block = int(key) if key.isascii() and key.isdigit() and len(key) <= 9 else -1
        if not 0 <= block < depth or block in counts or not isinstance(entry, Mapping):
            raise _bad(f"{table} has an entry for {show(key)}, which is none of the {depth:,} blocks, or there twice")
        count = _count_of(entry, text, table, key)
        counts[block] = _number(count[0], f"{table}, block {block}")
        usual.add(_number(count[1], "the number of experts of the other blocks"))
    if len(usual) > 1:
        raise _bad(f"it states different numbers of experts for the other blocks ({sorted(usual)[:4]})")
    number = usual.pop()
    differing = {block: count for block, count in counts.items() if count != number}
    if not differing:
        return None
    return PerLayerExperts(_stock(config, path, table), number, differing)


def _count_of(entry: Mapping[str, Any], text: Mapping[str, Any], table: str, key: str) -> tuple[Any, Any]:
    """What an entry states as the block's number of experts, and what the config states for the others."""
    found = []
    for name, value in entry.items():
        general = text.get(name)
        if COUNT_NAME.match(name):
            found.append((value, general))
        elif isinstance(value, Mapping) and isinstance(general, Mapping) and _plain_counts(value):
            # Of a part of the config that holds the number (DBRX's ffn_config) the entry repeats the rest.
            found += [(value[each], general.get(each)) for each in _plain_counts(value)]
            value, general = _less_counts(value), _less_counts(general)
        if not COUNT_NAME.match(name) and value != general:
            raise UnsupportedModelError(
                f"{CONFIG_NAME}: {table} gives block {show(key)} a {show(name)} of its own, beside its number of "
                "experts. Only models whose blocks differ in the number of experts alone are understood."
            )
    numbers = {(single_number(own), single_number(general)) for own, general in found}
    if len(numbers) != 1:
        raise _bad(f"{table} states {len(numbers)} numbers of experts for block {show(key)}")
    return numbers.pop()


def _stock(config: Mapping[str, Any], path: tuple[str, ...], table: str) -> dict[str, Any]:
    """The config without the table, and without what goes with it."""

    def without(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        if path:
            return {**node, path[0]: without(node[path[0]], path[1:])}
        gone = {table, _ACCESS} if table == STANDARD_TABLE else {table}
        return {name: value for name, value in node.items() if name not in gone}

    stock = without(config, path)
    code = stock.get("auto_map")
    if isinstance(code, Mapping) and "AutoConfig" not in code:
        # The classes that build the blocks unevenly derive from the stock ones, which the rest describes.
        stock["auto_map"] = {auto: name for auto, name in code.items() if not auto.startswith("AutoModel")}
    return stock


def _counts_in(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    return any(_plain_counts(part) for part in (entry, *(each for each in entry.values() if isinstance(each, Mapping))))


def _plain_counts(part: Mapping[str, Any]) -> list[str]:
    return [name for name in part if COUNT_NAME.match(name)]


def _less_counts(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if not COUNT_NAME.match(name)}


def _number(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_EXPERTS:
        raise _bad(f"{where}: {show(value)} is no number of experts")
    return value


def _bad(what: str) -> CheckpointError:
    return CheckpointError(f"{CONFIG_NAME} cannot be understood: {what}. Download it again.")
