"""Different numbers of experts per layer: what a config.json says of them, and what loads such an output.

transformers has a config key for such models, `per_layer_config`, but its model classes still give every layer the same
number. So an output gets a module, named by `auto_map`, whose classes build the stock model and replace the layers that
differ. What is needed of the model for that (`LoadingFacts`) is found once by `per_layer_loading`, and kept with the
scores. Nothing here needs torch or transformers. A model that has different numbers already can be measured by
`fit`; it cannot be scored or pruned again.
"""

from __future__ import annotations

import keyword
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from streamprune.checkpoint.index import CONFIG_NAME
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.files.json_text import show
from streamprune.models.config_json import COUNT_NAME, MOST_EXPERTS, MOST_LAYERS, first_number, single_number, text_part

#: transformers' own entry of config.json for what differs by layer.
STANDARD_TABLE: Final = "per_layer_config"
#: The entry of the same form for models whose own code fails on expert counts in transformers' entry.
OWN_TABLE: Final = "per_layer_experts"
#: The key that belongs to transformers' own table. A config with the table but without this key raises when a stock
#: class reads the number of experts, even with hasattr().
_ACCESS = "allow_global_per_layer_attribute_access"
#: The first transformers whose configs know `per_layer_config`.
_OLDEST_TRANSFORMERS = "5.14"
#: The template of the output's module.
_TEMPLATE = Path(__file__).with_name("modeling_per_layer.py.j2")


def _matching(pattern: str) -> msgspec.Meta:
    return msgspec.Meta(pattern=rf"^{pattern}\Z", max_length=200)


# Names go into code that somebody will run: only plain names, and only classes of transformers itself.
_IDENTIFIER = rf"(?!(?:{'|'.join(keyword.kwlist)})\b)[A-Za-z_][A-Za-z0-9_]*"
_Name = Annotated[str, _matching(_IDENTIFIER)]
_Path = Annotated[str, _matching(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*")]
_Module = Annotated[str, _matching(rf"transformers(\.{_IDENTIFIER})*")]
_Auto = Annotated[str, _matching("AutoModel(For[A-Za-z0-9]+)?")]


class LoadingClass(msgspec.Struct, frozen=True):
    """A class that transformers loads this model with: `stock` is its name, `auto` the auto class that leads to it,
    `module` where it is imported from, and `layers` the dotted path of its list of decoder layers.

    `whole` is the name of the whole model's config class if this class takes the text config only, else None.
    """

    auto: _Auto
    stock: _Name
    module: _Module
    layers: _Path
    whole: _Name | None

    @property
    def name(self) -> str:
        """The name of the class that derives from it in the output's module."""
        return f"Uneven{self.stock}"

    @property
    def entry(self) -> str:
        """The name of the class that `auto_map` names. For a text-only class it is a subclass that takes the whole
        model's config."""
        return f"{self.name}OfTextPart" if self.whole else self.name


class LoadingFacts(msgspec.Struct, frozen=True):
    """What is needed to write an output of a model that has different numbers of experts per layer.

    `path` leads from config.json to the decoder's config. `inner` is the sub-config of it that states the number of
    experts (DBRX's `ffn_config`), or None if the decoder's config states it directly. `names` are the keys that state
    it there, the config class's own first. `table` is the key of the per-layer entries: transformers' own where the
    model's code allows it. `problem` says why no such output can be loaded; it is empty if one can.
    """

    model_type: Annotated[str, _matching("[A-Za-z0-9_.-]+")]
    path: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=8)]
    inner: _Name | None
    names: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=64)]
    layer_count: Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)] = msgspec.field(name="blocks")
    classes: Annotated[tuple[LoadingClass, ...], msgspec.Meta(max_length=16)]
    table: Literal["per_layer_config", "per_layer_experts"]
    problem: Annotated[str, msgspec.Meta(max_length=2000)]

    @property
    def file_name(self) -> str:
        """The name of the output's module."""
        return f"modeling_{re.sub(r'[^a-zA-Z0-9_]', '_', self.model_type)}_uneven.py"


def loading_facts_from_json(value: Any) -> LoadingFacts:
    """The facts from their JSON in the scores.

    Raises CheckpointError for anything else: they may come from a stranger, and become code.
    """
    try:
        facts = msgspec.convert(value, LoadingFacts)
        if not facts.problem.isprintable():
            raise ValueError("problem has control characters")
        if not facts.problem and not (facts.classes and facts.names):
            raise ValueError("no class or no key is named")
    except ValueError as error:
        raise CheckpointError(
            f"What the scores say about loading the model cannot be used ({str(error)[:300]}). Score the model again."
        ) from None
    return facts


def modeling_source(facts: LoadingFacts) -> str:
    """The Python code of the output's module, to be saved as `facts.file_name`. Raises UnsupportedModelError."""
    # Imported here: most commands write no such module.
    from jinja2 import Environment, StrictUndefined

    if facts.problem:
        raise UnsupportedModelError(
            f"No code can load {facts.model_type} with different numbers of experts per layer: {facts.problem}"
        )
    # One class may be found by several auto classes.
    classes = list({each.stock: each for each in facts.classes}.values())
    imports = defaultdict(set)
    for each in facts.classes:
        imports[each.module].add(each.stock)
        if each.whole:
            imports["transformers"].add(each.whole)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts, standard=facts.table == STANDARD_TABLE, classes=classes, imports=imports,
        oldest=_OLDEST_TRANSFORMERS,
    )  # fmt: skip


@dataclass(frozen=True)
class PerLayerExperts:
    """A config.json in two parts: `stock` is the config of the same model with `usual` experts in every MoE layer, and
    `differing` maps the layers that have another number to that number."""

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

    Raises CheckpointError for numbers that no model has, and UnsupportedModelError if layers also differ otherwise.
    """
    _, text = text_part(config)
    for table in (OWN_TABLE, STANDARD_TABLE):
        entries = text.get(table)
        # transformers' own table may also be about something else, such as attention windows.
        if table == OWN_TABLE and entries is not None and not isinstance(entries, Mapping):
            raise _bad(f"{table} is {show(entries)}, no table of layers")
        if isinstance(entries, Mapping) and any(
            _numbers_and_rest(entry)[0] for entry in entries.values() if isinstance(entry, Mapping)
        ):
            return _read_table(config, table, entries)
    return None


def refuse_per_layer_experts(config: Mapping[str, Any], model: str) -> None:
    """Raise UnsupportedModelError for a model whose config gives its layers different numbers of experts."""
    per_layer = read_per_layer_experts(config)
    if per_layer is not None:
        raise UnsupportedModelError(
            f"The layers of {model} keep different numbers of experts already ({per_layer.range_text}). Such a model "
            "can be neither scored nor pruned again. Prune the model that it was made from once more, from the scores "
            f"that a run writes into its output: `streamprune prune SOURCE --scores {model} -o OUT`, with --keep, "
            "--ratio or --budget-gib."
        )


def counts_of(per_layer: PerLayerExperts, layers: Collection[int]) -> dict[int, int]:
    """The number of experts of each of `layers`, which are the MoE layers.

    Raises CheckpointError for a config that gives experts to another layer.
    """
    for layer, count in sorted(per_layer.differing.items()):
        if layer not in layers:
            raise CheckpointError(
                f"{CONFIG_NAME} gives layer {layer} {count} experts, but that layer has none. Config and weights do "
                "not belong together; download both again."
            )
    return {layer: per_layer.differing.get(layer, per_layer.usual) for layer in sorted(layers)}


def _read_table(config: Mapping[str, Any], table: str, entries: Mapping[str, Any]) -> PerLayerExperts | None:
    path, text = text_part(config)
    depth = first_number((text,), ("num_hidden_layers", "n_layer", "n_layers")) or MOST_LAYERS
    general, general_rest = _numbers_and_rest(text)
    usual: set[int] = set()
    counts: dict[int, int] = {}
    for key, entry in entries.items():
        layer = int(key) if key.isascii() and key.isdigit() and len(key) <= 9 else -1
        if not 0 <= layer < depth or layer in counts or not isinstance(entry, Mapping):
            raise _bad(f"{table} has an entry for {show(key)}, which is none of the {depth:,} layers, or there twice")
        own, rest = _numbers_and_rest(entry)
        strange = next((name for name in rest if rest[name] != general_rest.get(name)), None)
        if strange is not None:
            raise UnsupportedModelError(
                f"{CONFIG_NAME}: {table} gives layer {show(key)} a {show(strange)} of its own, in addition to its "
                "number of experts. Only models whose layers differ in the number of experts alone are understood."
            )
        # The number of experts in this layer, and in the layers without an entry.
        numbers = {(number, general.get(place)) for place, number in own.items()}
        if len(numbers) != 1:
            raise _bad(f"{table} states {len(numbers)} numbers of experts for layer {show(key)}")
        number, other = numbers.pop()
        counts[layer] = _checked(number, f"{table}, layer {layer}")
        usual.add(_checked(other, "the number of experts of the other layers"))
    if len(usual) > 1:
        raise _bad(f"it states different numbers of experts for the other layers ({sorted(usual)[:4]})")
    number = usual.pop()
    differing = {layer: count for layer, count in counts.items() if count != number}
    return PerLayerExperts(_stock(config, path, table), number, differing) if differing else None


def _numbers_and_rest(part: Mapping[str, Any]) -> tuple[dict[tuple[str, ...], int | None], dict[str, Any]]:
    """The numbers of experts in a part of a config, by their path in it, and the part without them.

    They may also be in a sub-config (DBRX's `ffn_config`), which an entry for a layer then repeats in full.
    """
    numbers: dict[tuple[str, ...], int | None] = {}
    rest: dict[str, Any] = {}
    for name, value in part.items():
        if COUNT_NAME.match(name):
            numbers[(name,)] = single_number(value)
        elif isinstance(value, Mapping):
            counts = {each: single_number(value[each]) for each in value if COUNT_NAME.match(each)}
            numbers |= {(name, each): count for each, count in counts.items()}
            rest[name] = {each: value[each] for each in value if each not in counts}
        else:
            rest[name] = value
    return numbers, rest


def _stock(config: Mapping[str, Any], path: tuple[str, ...], table: str) -> dict[str, Any]:
    """The stock config: without the table, its `_ACCESS` key, and the `auto_map` entries of the output's module."""
    removed = {table, _ACCESS} if table == STANDARD_TABLE else {table}
    stock = _changed(config, path, lambda part: {name: part[name] for name in part if name not in removed})
    code = stock.get("auto_map")
    if isinstance(code, Mapping) and "AutoConfig" not in code:
        # Without AutoConfig, the AutoModel entries name classes of an output's module. The stock config must not name
        # them: it is for the stock classes, from which they derive.
        stock["auto_map"] = {auto: name for auto, name in code.items() if not auto.startswith("AutoModel")}
    return stock


def _checked(value: int | None, where: str) -> int:
    if value is None or not 1 <= value <= MOST_EXPERTS:
        raise _bad(f"{where}: {show(value)} is not a number of experts")
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


def engines_note(differing: bool) -> str:
    """Which engines can read the output, for the user and the model card."""
    if not differing:
        return "All layers keep the same number of experts: every engine that reads the source reads the result."
    return (
        f"The layers keep different numbers of experts. transformers {_OLDEST_TRANSFORMERS} or later loads the result "
        "with trust_remote_code=True, through the small module next to the weights. vLLM and llama.cpp read one number "
        "for all layers today and cannot load it; for them, prune with --schedule uniform."
    )


def config_of_per_layer_experts(
    config: Mapping[str, Any], facts: LoadingFacts, counts: Mapping[int, int]
) -> dict[str, Any]:
    """`config.json` for an output with `counts` experts, by the index of each MoE layer.

    `config` already states the largest of the counts. If all are equal, nothing changes; else the layers that have
    fewer are listed under the key `facts.table`, and `auto_map` names the module's classes.
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
    changed = _changed(config, facts.path, lambda part: _with_layers(part, facts, counts))
    code, stated = config.get("auto_map"), config.get("architectures")
    # The source's own code for the model does not know per-layer counts; that for tokenizer and processor is kept.
    kept = {
        auto: name
        for auto, name in (code.items() if isinstance(code, Mapping) else ())
        if not auto.startswith(("AutoModel", "AutoConfig"))
    }
    # Other engines choose their implementation by the names in `architectures`, and refuse unknown ones at once.
    names = {each.stock: each.name for each in facts.classes}
    listed = stated if isinstance(stated, list) else []
    architectures = [names[name] for name in listed if isinstance(name, str) and name in names]
    module = facts.file_name.removesuffix(".py")
    return {
        **changed,
        "architectures": architectures or [facts.classes[0].name],
        "auto_map": kept | {each.auto: f"{module}.{each.entry}" for each in facts.classes},
    }


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
        if count < widest:
            own = {name: [count] * len(old) if isinstance(old := holder.get(name), list) else count for name in stating}
            layers[layer] = own if facts.inner is None else {facts.inner: {**holder, **own}}
    digits = len(str(max(layers)))
    table = {str(layer).zfill(digits): values for layer, values in layers.items()}
    return {**part, facts.table: table, **({_ACCESS: True} if facts.table == STANDARD_TABLE else {})}


def _changed(
    node: Mapping[str, Any], path: tuple[str, ...], change: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, Any]:
    """A copy of a config whose part at `path` is changed."""
    if not path:
        return dict(change(node))
    return {**node, path[0]: _changed(_part(node, path[0]), path[1:], change)}


def _part(node: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = node.get(name)
    if not isinstance(part, Mapping):
        raise UnsupportedModelError(
            f"config.json has no part {name}, which should state the number of experts: it is not the config of the "
            "model that was scored."
        )
    return part
