"""The text of the module that loads an output with different numbers of experts per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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
