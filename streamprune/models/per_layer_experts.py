"""Different numbers of experts per layer: what a config.json says of them, and how it is written.

Plain JSON: neither torch nor transformers is needed, nor the code that loads such a model. A model that has them
already can be measured by `fit`; it cannot be scored or pruned again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from streamprune.checkpoint.index import CONFIG_NAME
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.files.json_text import show
from streamprune.models.config_json import (
    COUNT_NAME,
    MOST_EXPERTS,
    MOST_LAYERS,
    first_number,
    single_number,
    text_part,
)
from streamprune.models.per_layer_module import OLDEST_TRANSFORMERS, OWN_TABLE, STANDARD_TABLE, LoadingFacts

#: Goes with transformers' own table, and means nothing without it.
_ACCESS = "allow_global_per_layer_attribute_access"


@dataclass(frozen=True)
class PerLayerExperts:
    """A config.json taken apart: `stock` describes the same model with `usual` experts in every layer that has some,
    and `differing` says how many there are in the layers that have another number."""

    stock: Mapping[str, Any]
    usual: int
    differing: Mapping[int, int]

    @property
    def range_text(self) -> str:
        """The least and the most experts of a layer, in words."""
        counts = (self.usual, *self.differing.values())
        return f"{min(counts)} to {max(counts)}"


def read_per_layer_experts(config: Mapping[str, Any]) -> PerLayerExperts | None:
    """What a config says of layers with different numbers of experts; None where it gives all the same number.

    Raises CheckpointError for numbers that no model has, and UnsupportedModelError where layers differ in more.
    """
    path, text = text_part(config)
    for table in (OWN_TABLE, STANDARD_TABLE):
        entries = text.get(table)
        # transformers' own table may also be about something else, such as attention windows.
        if table == OWN_TABLE and entries is not None and not isinstance(entries, Mapping):
            raise _bad(f"{table} is {show(entries)}, no table of layers")
        if not isinstance(entries, Mapping) or not any(_counts_in(entry) for entry in entries.values()):
            continue
        return _read_table(config, path, text, table, entries)
    return None


def refuse_per_layer_experts(config: Mapping[str, Any], model: str) -> None:
    """Raise UnsupportedModelError for a model whose config gives its layers different numbers of experts."""
    per_layer = read_per_layer_experts(config)
    if per_layer is None:
        return
    raise UnsupportedModelError(
        f"The layers of {model} keep different numbers of experts already ({per_layer.range_text}). Such a model can "
        "be neither scored nor pruned again. Prune the model that it was made from once more, from the scores that a "
        f"run writes into its output: `streamprune prune SOURCE --scores {model} -o OUT`, with --keep, --ratio or "
        "--budget-gib."
    )


def counts_of(per_layer: PerLayerExperts, layers: Collection[int]) -> dict[int, int]:
    """The number of experts of each of the `layers` that have some.

    Raises CheckpointError for a config that gives some to another layer.
    """
    strangers = sorted(per_layer.differing.keys() - set(layers))
    if strangers:
        raise CheckpointError(
            f"{CONFIG_NAME} gives layer {strangers[0]} {per_layer.differing[strangers[0]]} experts, but that layer has "
            "none. Config and weights do not belong together; download both again."
        )
    return {layer: per_layer.differing.get(layer, per_layer.usual) for layer in sorted(layers)}


def _read_table(
    config: Mapping[str, Any], path: tuple[str, ...], text: Mapping[str, Any], table: str, entries: Mapping[str, Any]
) -> PerLayerExperts | None:
    depth = first_number((text,), ("num_hidden_layers", "n_layer", "n_layers")) or MOST_LAYERS
    usual: set[int] = set()
    counts: dict[int, int] = {}
    for key, entry in entries.items():
        layer = int(key) if key.isascii() and key.isdigit() and len(key) <= 9 else -1
        if not 0 <= layer < depth or layer in counts or not isinstance(entry, Mapping):
            raise _bad(f"{table} has an entry for {show(key)}, which is none of the {depth:,} layers, or there twice")
        count = _count_of(entry, text, table, key)
        counts[layer] = _number(count[0], f"{table}, layer {layer}")
        usual.add(_number(count[1], "the number of experts of the other layers"))
    if len(usual) > 1:
        raise _bad(f"it states different numbers of experts for the other layers ({sorted(usual)[:4]})")
    number = usual.pop()
    differing = {layer: count for layer, count in counts.items() if count != number}
    if not differing:
        return None
    return PerLayerExperts(_stock(config, path, table), number, differing)


def _count_of(entry: Mapping[str, Any], text: Mapping[str, Any], table: str, key: str) -> tuple[Any, Any]:
    """What an entry states as the layer's number of experts, and what the config states for the others."""
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
                f"{CONFIG_NAME}: {table} gives layer {show(key)} a {show(name)} of its own, besides its number of "
                "experts. Only models whose layers differ in the number of experts alone are understood."
            )
    numbers = {(single_number(own), single_number(general)) for own, general in found}
    if len(numbers) != 1:
        raise _bad(f"{table} states {len(numbers)} numbers of experts for layer {show(key)}")
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
        # The classes that give layers other numbers of experts derive from the stock ones, which the rest describes.
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


def has_per_layer_experts(counts: Mapping[int, int]) -> bool:
    """Whether the layers keep different numbers of experts."""
    return len(set(counts.values())) > 1


def check_per_layer_experts(facts: LoadingFacts, counts: Mapping[int, int]) -> None:
    """Raise UnsupportedModelError if the output could not be loaded; nothing to check where all counts are equal."""
    if has_per_layer_experts(counts) and facts.problem:
        raise UnsupportedModelError(
            f"Layers with different numbers of experts ({min(counts.values())} to {max(counts.values())}) cannot be "
            f"loaded for {facts.model_type}: {facts.problem} Give all layers the same number (--schedule uniform)."
        )


def config_of_per_layer_experts(
    config: Mapping[str, Any], facts: LoadingFacts, counts: Mapping[int, int]
) -> dict[str, Any]:
    """`config.json` for `counts` experts, by the index of every layer that has some.

    `config` already states the largest of the counts. Where all are equal nothing changes; else the layers that have
    fewer are listed in `per_layer_config`, and `auto_map` names the module's classes.
    Raises like `check_per_layer_experts`, and SettingsError for counts or a config that do not go with the model.
    """
    check_per_layer_experts(facts, counts)
    if not has_per_layer_experts(counts):
        return dict(config)
    beyond = [layer for layer in counts if not 0 <= layer < facts.layer_count]
    if beyond or min(counts.values()) < 1:
        raise SettingsError(
            f"Numbers of experts are given for layer {beyond[0]}, but the model has {facts.layer_count} layers."
            if beyond
            else f"{min(counts.values())} experts cannot be kept in a layer: at least 1 must stay."
        )
    return _with_classes(_at(config, facts.path, lambda part: _with_layers(part, facts, counts)), facts)


def engines_note(differing: bool) -> str:
    """Which engines can read the output, for the user and the model card."""
    if not differing:
        return "All layers keep the same number of experts: every engine that reads the source reads the result."
    return (
        f"The layers keep different numbers of experts. transformers {OLDEST_TRANSFORMERS} or later loads the result "
        "with trust_remote_code=True, through the small module beside the weights. vLLM and llama.cpp read one number "
        "for all layers today and cannot load it; for them, prune with --schedule uniform."
    )


def _with_layers(part: Mapping[str, Any], facts: LoadingFacts, counts: Mapping[int, int]) -> dict[str, Any]:
    """The decoder's part of the config with an entry for every layer that has fewer experts than the widest."""
    widest = max(counts.values())
    holder = part if facts.inner is None else _part(part, facts.inner)
    stating = [name for name in facts.names if name in holder] or [facts.names[0]]
    wrong = next((name for name in stating if name in holder and single_number(holder[name]) != widest), None)
    if wrong is not None:
        raise SettingsError(
            f"config.json states {wrong} = {show(holder[wrong])}, but its widest layer keeps {widest} experts."
        )
    if part.get(facts.table):
        raise UnsupportedModelError(
            f"The source's config.json has a {facts.table} of its own, which would be lost. Give all layers the same "
            "number (--schedule uniform)."
        )
    layers = {}
    for layer, count in sorted(counts.items()):
        if count == widest:
            continue
        own = {name: [count] * len(old) if isinstance(old := holder.get(name), list) else count for name in stating}
        layers[layer] = own if facts.inner is None else {facts.inner: {**holder, **own}}
    digits = len(str(max(layers)))
    table = {str(layer).zfill(digits): values for layer, values in layers.items()}
    # Else the config raises even when the stock classes ask it whether it has a number of experts.
    access = {"allow_global_per_layer_attribute_access": True} if facts.table == STANDARD_TABLE else {}
    return {**part, facts.table: table, **access}


def _with_classes(config: Mapping[str, Any], facts: LoadingFacts) -> dict[str, Any]:
    module = facts.file_name.removesuffix(".py")
    stated = config.get("auto_map")
    # The source's own model code would not know of per-layer counts; its tokenizer's and processor's still serve.
    kept = {
        auto: name
        for auto, name in (stated.items() if isinstance(stated, Mapping) else ())
        if not auto.startswith(("AutoModel", "AutoConfig"))
    }
    names = {each.stock: each.name for each in facts.classes}
    stated = config.get("architectures")
    # Other engines choose by this name, and one they do not know is refused by them at once.
    listed = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    architectures = [names[name] for name in listed if name in names]
    return {
        **config,
        "architectures": architectures or [facts.classes[0].name],
        "auto_map": kept | {each.auto: f"{module}.{each.entry}" for each in facts.classes},
    }


def _at(
    node: Mapping[str, Any], path: tuple[str, ...], change: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, Any]:
    if not path:
        return dict(change(node))
    return {**node, path[0]: _at(_part(node, path[0]), path[1:], change)}


def _part(node: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = node.get(name)
    if not isinstance(part, Mapping):
        raise UnsupportedModelError(
            f"config.json has no part {name}, which should state the number of experts: it is not the config of the "
            "model that was scored."
        )
    return part
