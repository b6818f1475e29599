"""The text of the module that loads an output with different numbers of experts per layer.

Outputs whose layers keep different numbers of experts: their config.json, and the code that loads them.

transformers has a key for it, `per_layer_config`, but its model classes still give every layer the same number. So the
output gets a small module, named by `auto_map`, whose classes build the stock model and replace the layers that differ.
Plain JSON and text: neither torch nor transformers is needed. What must be known of the model is found by
`uneven_facts`, once, and kept with the scores.
"""

from __future__ import annotations

import keyword
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.files.json_text import show
from streamprune.models.config_json import MOST_BLOCKS, single_number

#: transformers' own entry of config.json for what differs by layer.
STANDARD_TABLE = "per_layer_config"
_PREFIX = "Uneven"

_MODULE = '''\
"""This model with a different number of experts in some of its layers.

config.json states the largest number, and in `{table}` the layers that have fewer. The classes of
transformers do not build from that yet: the ones below build the stock model, then replace those layers. Load with

    {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)

Needs nothing but transformers {oldest} or later. Training with output_router_logits=True fails, since the loss that
balances the experts' load expects as many of them in every layer. Written by streamprune.
"""

{imports}


def replace_layers(model, layers):
    """Build those layers anew that have fewer experts than config.json states for the rest."""
    config = model.config.get_text_config(decoder=True)
    if not hasattr(config, "is_heterogeneous"):
        raise ImportError("This model needs transformers {oldest} or later: pip install --upgrade transformers")
    for key{values} in config.to_dict().get("{table}", {{}}){items}:
        index, stock = int(key), layers[int(key)]
{own}        layers[index] = type(stock)(layer_config, index)
        # Settings changed later, such as the attention implementation, are made in the model's own config.
        for new, old in zip(layers[index].modules(), stock.modules()):
            if getattr(old, "config", None) is config:
                new.config = config
    model.post_init()
{classes}'''

_STANDARD = """\
        layer_config = config.per_layer_config[index]
"""

_APART = """\
        layer_config = copy.copy(config.per_layer_config[index])
        for name, value in values.items():
            setattr(layer_config, name, value)
"""

_INNER = """\
        layer_config.{inner} = type(config.{inner}).from_dict(values["{inner}"])
"""

_CLASS = """

class {name}({stock}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        replace_layers(self, self.{layers})

    @classmethod
    def is_custom_code(cls):
        # The tensors are named as for the stock class, so that its conversion of published names must be applied.
        return False
"""

_TEXT_PART = """

class {entry}({name}):
    # The text part of the model without its other parts. Once built it is an ordinary text model, also when saved.
    config_class = {whole}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config.get_text_config(decoder=True), *args, **kwargs)
        self.__class__ = {name}


{name}.register_for_auto_class("{auto}")
"""


@dataclass(frozen=True)
class LoadingClass:
    """A class that transformers takes for this model: the `auto` class it is found by, its name, the module that it is
    imported from, and the dotted path of the list of decoder layers in it.

    `whole` is None, or the name of the config class of a model of which this class takes the text part only.
    """

    auto: str
    stock: str
    module: str
    layers: str
    whole: str | None = None

    @property
    def name(self) -> str:
        """The name of the class that derives from it in the output's module."""
        return _PREFIX + self.stock

    @property
    def entry(self) -> str:
        """The name of the class that `auto_map` names: for a text part one that takes the whole model's config."""
        return f"{self.name}OfTextPart" if self.whole else self.name


def module_text(classes: Sequence[LoadingClass], table: str, inner: str | None, oldest: str) -> str:
    """The module's code.

    `table` is the entry of the config with the layers that differ, `inner` the part of the config that has the number
    of experts, if it is in one; `oldest` the first transformers that will do.
    """
    imports = defaultdict(set)
    definitions = {}
    for each in classes:
        imports[each.module].add(each.stock)
        definitions[each.name] = _CLASS.format(name=each.name, stock=each.stock, layers=each.layers)
        if each.whole:
            imports["transformers"].add(each.whole)
            definitions[each.entry] = _TEXT_PART.format(
                entry=each.entry, name=each.name, whole=each.whole, auto=each.auto
            )
    standard = table == STANDARD_TABLE
    needs_values = bool(inner) or not standard
    return _MODULE.format(
        auto=classes[0].auto,
        oldest=oldest,
        table=table,
        values=", values" if needs_values else "",
        items=".items()" if needs_values else "",
        own=(_STANDARD if standard else _APART) + (_INNER.format(inner=inner) if inner else ""),
        imports=("" if standard else "import copy\n\n")
        + "\n".join(f"from {name} import {', '.join(sorted(imports[name]))}" for name in sorted(imports)),
        classes="".join(definitions.values()),
    )


#: The first transformers whose configs know `per_layer_config`.
OLDEST_TRANSFORMERS = "5.14"
#: Where the layers are told for models whose own code cannot bear expert counts in transformers' entry.
OWN_TABLE = "per_layer_experts"
_MODULE_uneven = re.compile(r"transformers(\.\w+)*")
_AUTO = re.compile(r"AutoModel(For\w+)?")
#: Names go into code that somebody will run; no real one is longer.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class LoadingFacts:
    """What has to be known of a model to write an output of it that has different numbers of experts per layer.

    `path` leads from config.json to the part that describes the decoder, `inner` further to a part of that which states
    the number of experts (DBRX's `ffn_config`), or is None; `names` are the keys that state it there, the config
    class's own first. `table` is the entry that tells what differs by layer: transformers' own `per_layer_config` where
    the model's code lets it. `problem` is why no such output can be loaded, in a sentence; empty where it can.
    """

    model_type: str
    path: tuple[str, ...]
    inner: str | None
    names: tuple[str, ...]
    blocks: int
    classes: tuple[LoadingClass, ...]
    table: str = STANDARD_TABLE
    problem: str = ""

    @property
    def file_name(self) -> str:
        """The name of the output's module."""
        return f"modeling_{re.sub(r'[^a-zA-Z0-9_]', '_', self.model_type)}_uneven.py"

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON; `loading_facts_from_json` reads them."""
        return asdict(self)


def loading_facts_from_json(told: Any) -> LoadingFacts:
    """The facts that `LoadingFacts.as_json` told.

    Raises CheckpointError for anything else. They may come from a stranger and become code, so that every name must be
    a plain name, and only classes of transformers itself are let through.
    """
    try:
        classes = tuple(_loading_class(each) for each in _listed(told["classes"], 16))
        path = tuple(_name(each) for each in _listed(told["path"], 8))
        names = tuple(_name(each) for each in _listed(told["names"], 64))
        inner = None if told["inner"] is None else _name(told["inner"])
        model_type, problem, blocks = told["model_type"], told["problem"], told["blocks"]
        if not isinstance(model_type, str) or not re.fullmatch(r"[\w.-]{1,200}", model_type, re.ASCII):
            raise ValueError("model_type is no name")
        if not isinstance(problem, str) or len(problem) > 2000 or not problem.isprintable():
            raise ValueError("problem is no sentence")
        if type(blocks) is not int or not 1 <= blocks <= MOST_BLOCKS:
            raise ValueError("blocks is no number of blocks")
        if told["table"] not in (STANDARD_TABLE, OWN_TABLE):
            raise ValueError("table is none of the known ones")
        if not problem and not (classes and names):
            raise ValueError("no class or no key is named")
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"What the scores tell of how the model is loaded cannot be used ({why[:300]}). Score the model again."
        ) from None
    return LoadingFacts(model_type, path, inner, names, blocks, classes, told["table"], problem)


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
    """`config.json` for `counts` experts, by the index of every block that has some.

    `config` already states the largest of the counts. Where all are equal nothing changes; else the layers that have
    fewer are told in `per_layer_config`, and `auto_map` names the module's classes.
    Raises like `check_per_layer_experts`, and SettingsError for counts or a config that do not go with the model.
    """
    check_per_layer_experts(facts, counts)
    if not has_per_layer_experts(counts):
        return dict(config)
    beyond = [block for block in counts if not 0 <= block < facts.blocks]
    if beyond or min(counts.values()) < 1:
        raise SettingsError(
            f"Numbers of experts are given for block {beyond[0]}, but the model has {facts.blocks} blocks."
            if beyond
            else f"{min(counts.values())} experts cannot be kept in a block: at least 1 must stay."
        )
    return _with_classes(_at(config, facts.path, lambda part: _with_layers(part, facts, counts)), facts)


def modeling_source(facts: LoadingFacts) -> str:
    """The Python code of the output's module, to be saved as `facts.file_name`. Raises UnsupportedModelError."""
    if facts.problem:
        raise UnsupportedModelError(f"No code can load {facts.model_type} unevenly: {facts.problem}")
    return module_text(facts.classes, facts.table, facts.inner, OLDEST_TRANSFORMERS)


def engines_note(uneven: bool) -> str:
    """Which engines can read the output, for the user and the model card."""
    if not uneven:
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
    for block, count in sorted(counts.items()):
        if count == widest:
            continue
        own = {name: [count] * len(old) if isinstance(old := holder.get(name), list) else count for name in stating}
        layers[block] = own if facts.inner is None else {facts.inner: {**holder, **own}}
    digits = len(str(max(layers)))
    table = {str(block).zfill(digits): values for block, values in layers.items()}
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


def _at(node: Mapping[str, Any], path: tuple[str, ...], change: Any) -> dict[str, Any]:
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


def _listed(value: Any, most: int) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) > most:
        raise ValueError(f"not a list of at most {most}")
    return list(value)


def _name(value: Any, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME or not value.isascii():
        raise ValueError("a name is no text, or too long")
    parts = value.split(".") if pattern is _MODULE_uneven else [value]
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise ValueError(f"{value!r} is no plain name")
    if pattern is not None and not pattern.fullmatch(value):
        raise ValueError(f"{value!r} is none of transformers' names")
    return value


def _loading_class(told: Any) -> LoadingClass:
    layers = told["layers"]
    if not isinstance(layers, str) or len(layers) > _LONGEST_NAME:
        raise ValueError("layers is no path")
    for part in layers.split("."):
        _name(part)
    whole = None if told["whole"] is None else _name(told["whole"])
    auto, stock, module = _name(told["auto"], _AUTO), _name(told["stock"]), _name(told["module"], _MODULE_uneven)
    return LoadingClass(auto, stock, module, layers, whole)
