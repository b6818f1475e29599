"""What a config.json says of quantized weights, and the module whose tensors are recognized. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry

if TYPE_CHECKING:
    # (It needs numpy, which config.json alone does not.)
    from streamprune.formats.base import Format

#: Keys under which a config.json describes quantized weights, at its top level or in its text part.
SECTIONS = ("quantization_config", "compression_config")
_PARTS = ((), ("text_config",))


@dataclass(frozen=True)
class Quantization:
    """The quantization section of a config.json.

    `method` is its `quant_method`: empty for plain weights, `unknown` where the section names none. `values` is the
    section, and `path` where it stands. `expert_dtype` is stated in the section or, by DeepSeek-V4, beside it.
    """

    method: str = ""
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: tuple[str, ...] = ()
    expert_dtype: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quantization:
        """The section of a config.json, at its top level or in its text part."""
        for path, section in sections_of(config):
            part = _part(config, path[:-1])
            values = section if isinstance(section, Mapping) else {}
            experts = str(values.get("expert_dtype") or part.get("expert_dtype") or "")
            return cls(str(values.get("quant_method") or "unknown"), values, path, experts)
        return cls()

    def leaves_plain(self, path: str) -> bool:
        """Whether the module at `path` is among those that the section calls not converted.

        Without a list only the output layer is, as in transformers.
        """
        names = self.values.get("modules_to_not_convert")
        if names is None:
            names = self.values.get("ignored_layers")
        if not isinstance(names, (list, tuple)):
            names = ("lm_head",)
        return any_name_matches(path, names)


def sections_of(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every quantization section of a config.json: its path and its contents."""
    for path in _PARTS:
        part = _part(config, path)
        yield from (((*path, key), part[key]) for key in SECTIONS if part.get(key))


def _part(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """The part of a config at `path`; empty if there is none."""
    for name in path:
        found = config.get(name)
        config = found if isinstance(found, Mapping) else {}
    return config


def with_sections(config: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A config.json with every quantization section changed, wherever it stands; left out where `change` gives None."""
    result = dict(config)
    for path, section in sections_of(config):
        part = result
        for name in path[:-1]:
            part[name] = part = dict(part[name])
        part[path[-1]] = change(section)
        if part[path[-1]] is None:
            del part[path[-1]]
    return result


def has_empty_section(key: str, value: Any) -> bool:
    """Whether an entry of a config.json is a quantization section that says nothing: transformers refuses it."""
    return key in SECTIONS and value is not None and not value


def checkpoint_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The notes of a checkpoint, and one on a quantization section without contents, for people."""
    parts = (_part(checkpoint.config, path) for path in _PARTS)
    empty = [key for part in parts for key, value in part.items() if has_empty_section(key, value)]
    text = f"config.json has an empty {empty[0]}, with which transformers refuses it: taken as plain" if empty else ""
    return (*checkpoint.notes, *([f"{text}; a pruned copy leaves it out."] if empty else []))


def without_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its quantization sections: that of plain weights."""
    return with_sections(config, lambda section: None)


@dataclass(frozen=True)
class Module:
    """The tensors that lie directly in one module of a checkpoint, by their names in it (`weight`, `weight_scale`)."""

    path: str
    tensors: Mapping[str, TensorEntry]

    def of(self, name: str) -> str:
        """The full name of something in the module."""
        return f"{self.path}.{name}" if self.path else name


@dataclass(frozen=True)
class Recognized:
    """Tensors of one module that are stored in a format: for each the plain name in the module, and the part's name.

    `{"weight": ("weight", ""), "weight_scale_inv": ("weight", "scale")}`
    """

    format: Format
    parts: Mapping[str, tuple[str, str]]


def any_name_matches(path: str, names: Iterable[Any]) -> bool:
    """Whether one of `names` stands for the module at `path`, as transformers reads lists of modules not to convert.

    A name stands for all modules that it is the beginning of, up to a dot, read as a regular expression; or that end
    with it (transformers 5.23, `quantizers_utils.should_convert_module`).
    """
    patterns = _patterns(tuple(name for name in names if isinstance(name, str)))
    return any(path.endswith(name) or pattern.match(path) for name, pattern in patterns)


@lru_cache(maxsize=8)
def _patterns(names: tuple[str, ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((name, _beginning(name)) for name in names)


def _beginning(name: str) -> re.Pattern[str]:
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    try:
        return re.compile(f"(?:{name}){boundary}")
    except re.error:
        return re.compile(re.escape(name) + boundary)
