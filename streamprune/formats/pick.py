"""Which format each tensor of a checkpoint is stored in. Checkpoints in a format that is not supported are refused."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import Format, StoredTensor
from streamprune.formats.plain import PLAIN

#: The formats in the order in which they are tried; the plain format takes all remaining tensors.
FORMATS: tuple[Format, ...] = (PLAIN,)

_FLOATS = {"BF16", "F16", "F32", "F64"}
_QUANTIZATION_NAME = re.compile(
    r"(scales?|scale_inv|scale_2|zero_points?|qweight|qzeros|g_idx|packed|blocks|absmax|quant_map|quant_state[\w.]*)$"
)
_ADVICE = "Quantized weights cannot be streamed yet: prune the bfloat16 or float16 original and quantize the result."


def pick_formats(tensors: Mapping[str, TensorEntry]) -> dict[str, StoredTensor]:
    """How every tensor of a checkpoint is stored, by its name; decided module by module."""
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        modules[name.rpartition(".")[0]][name] = entry
    stored: dict[str, StoredTensor] = {}
    for module in modules.values():
        storage, parts = next(
            (storage, parts) for storage in FORMATS if (parts := storage.parts_of(module)) is not None
        )
        stored |= {name: StoredTensor(parameter, part, storage) for name, (parameter, part) in parts.items()}
    return {name: stored[name] for name in tensors}


def refuse_unread(entry: TensorEntry, stored: StoredTensor, feeds_floats: bool | None) -> None:
    """Raise UnsupportedModelError for a tensor of quantized weights that belongs to no format.

    `feeds_floats` says whether the tensor feeds a floating-point parameter; None if the model ignores it. A companion
    that nothing reads must be fatal: transformers would silently load wrong weights.
    """
    if stored.format is not PLAIN:
        return
    if feeds_floats is None and _QUANTIZATION_NAME.search(entry.name):
        raise UnsupportedModelError(
            f"The checkpoint is quantized: {entry.name} belongs to quantized weights. {_ADVICE}"
        )
    if feeds_floats and entry.dtype not in _FLOATS:
        raise UnsupportedModelError(f"The checkpoint is quantized: {entry.name} has the dtype {entry.dtype}. {_ADVICE}")


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The quantization method in a config.json, at its top level or in its text part; None for plain weights."""
    for part in (config, config.get("text_config")):
        stated = part if isinstance(part, Mapping) else {}
        quantization = stated.get("quantization_config") or stated.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
            return str(method)
    return None


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UnsupportedModelError for a checkpoint whose config says that its weights are quantized."""
    method = quantization_method(config)
    if method is not None:
        raise UnsupportedModelError(f"The model in {folder} is quantized ({method}). {_ADVICE}")
