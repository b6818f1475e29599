"""The small Python module that loads an output with different numbers of experts per layer, and what it is made from.

transformers has a config key for such models, `per_layer_config`, but its model classes still give every layer the same
number. So the output gets a module, named by `auto_map`, whose classes build the stock model and replace the layers
that differ. What must be known of the model for that (`LoadingFacts`) is found by `per_layer_loading`, once, and kept
with the scores. Neither torch nor transformers is needed.
"""

from __future__ import annotations

import keyword
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.models.config_json import MOST_LAYERS

#: transformers' own entry of config.json for what differs by layer.
STANDARD_TABLE: Final = "per_layer_config"
#: The entry of the same form for models whose own code fails on expert counts in transformers' entry.
OWN_TABLE: Final = "per_layer_experts"
#: The first transformers whose configs know `per_layer_config`.
OLDEST_TRANSFORMERS = "5.14"
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


def _matching(pattern: str) -> msgspec.Meta:
    return msgspec.Meta(pattern=rf"^{pattern}\Z", max_length=200)


# Names go into code that somebody will run: only plain names, and only classes of transformers itself.
_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"
_Name = Annotated[str, _matching(_IDENTIFIER)]
_Path = Annotated[str, _matching(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*")]
_Module = Annotated[str, _matching(rf"transformers(\.{_IDENTIFIER})*")]
_Auto = Annotated[str, _matching("AutoModel(For[A-Za-z0-9]+)?")]


class LoadingClass(msgspec.Struct, frozen=True):
    """A class that transformers takes for this model: the `auto` class it is found by, its name, the module that it is
    imported from, and the dotted path of the list of decoder layers in it.

    `whole` is None, or the name of the config class of a model of which this class takes the text part only.
    """

    auto: _Auto
    stock: _Name
    module: _Module
    layers: _Path
    whole: _Name | None

    @property
    def name(self) -> str:
        """The name of the class that derives from it in the output's module."""
        return _PREFIX + self.stock

    @property
    def entry(self) -> str:
        """The name of the class that `auto_map` names: for a text part one that takes the whole model's config."""
        return f"{self.name}OfTextPart" if self.whole else self.name


class LoadingFacts(msgspec.Struct, frozen=True):
    """What has to be known of a model to write an output of it that has different numbers of experts per layer.

    `path` leads from config.json to the part that describes the decoder, `inner` further to a part of that which states
    the number of experts (DBRX's `ffn_config`), or is None; `names` are the keys that state it there, the config
    class's own first. `table` is the entry for what differs by layer: transformers' own where the model's code allows
    it. `problem` is why no such output can be loaded, in a sentence; empty where it can.
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

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON; `loading_facts_from_json` reads them."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def loading_facts_from_json(value: Any) -> LoadingFacts:
    """The facts that `LoadingFacts.as_json` wrote.

    Raises CheckpointError for anything else: they may come from a stranger, and become code.
    """
    try:
        facts = msgspec.convert(value, LoadingFacts)
        words = [*facts.path, *facts.names, facts.inner or ""]
        for each in facts.classes:
            words += [each.auto, each.stock, each.whole or "", *each.module.split("."), *each.layers.split(".")]
        reserved = next(filter(keyword.iskeyword, words), None)
        if reserved is not None:
            raise ValueError(f"{reserved!r} is a keyword of Python, not a name")
        if not facts.problem.isprintable():
            raise ValueError("problem has control characters")
        if not facts.problem and not (facts.classes and facts.names):
            raise ValueError("no class or no key is named")
    except ValueError as error:
        raise CheckpointError(
            f"What the scores say of how the model is loaded cannot be used ({str(error)[:300]}). Score the model "
            "again."
        ) from None
    return facts


def modeling_source(facts: LoadingFacts) -> str:
    """The Python code of the output's module, to be saved as `facts.file_name`. Raises UnsupportedModelError."""
    if facts.problem:
        raise UnsupportedModelError(
            f"No code can load {facts.model_type} with different numbers of experts per layer: {facts.problem}"
        )
    return _module_text(facts.classes, facts.table, facts.inner, OLDEST_TRANSFORMERS)


def _module_text(classes: Sequence[LoadingClass], table: str, inner: str | None, oldest: str) -> str:
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
