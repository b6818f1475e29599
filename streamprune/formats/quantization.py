"""What a config.json says of quantized weights, and the module whose tensors are recognized. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.formats.base import Format

#: Keys under which a config.json describes quantized weights, at its top level or in its text part.
SECTIONS = ("quantization_config", "compression_config")
_PARTS = ((), ("text_config",))


@dataclass(frozen=True)
class Quantization:
    """The quantization section of a config.json.

    `method` is its `quant_method`: empty for plain weights, `unknown` where the section names none. `values` is the
    section, and `path` where it stands.
    """

    method: str = ""
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quantization:
        """The section of a config.json, at its top level or in its text part."""
        for path in _PARTS:
            part: Any = config
            for name in path:
                part = part.get(name)
            if not isinstance(part, Mapping):
                continue
            for key in SECTIONS:
                section = part.get(key)
                if section:
                    values = section if isinstance(section, Mapping) else {}
                    return cls(str(values.get("quant_method") or "unknown"), values, (*path, key))
        return cls()

    def without(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json without this section: that of plain weights."""
        result = dict(config)
        if self.path:
            part = result
            for name in self.path[:-1]:
                part[name] = part = dict(part[name])
            del part[self.path[-1]]
        return result


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
