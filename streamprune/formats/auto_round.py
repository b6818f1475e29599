"""What AutoRound writes into config.json: in which layout of others weights are packed, and how each module's are.

AutoRound has no layout of its own: it uses those of GPTQ, AWQ and compressed-tensors. Read from AutoRound 0.16.1,
`inference/convert_model.py` and `inference/backend.py`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from streamprune.formats.quantization import Quantization

#: Values of `quant_method`.
METHODS = frozenset({"auto-round", "intel/auto-round"})

#: Layouts that `packing` tells apart: GPTQ with zero points less one, with plain ones, AWQ, compressed-tensors, FP8.
GPTQ, GPTQ_V2, AWQ, COMPRESSED, FP8 = "gptq", "gptq_v2", "awq", "llm_compressor", "fp8"
_LAYOUTS = {
    "auto": GPTQ, "auto_round:gptq": GPTQ, "auto_round:auto_gptq": GPTQ,
    "auto_round": GPTQ_V2, "auto_round:gptqmodel": GPTQ_V2,
    "auto_round:awq": AWQ, "auto_round:auto_awq": AWQ,
    "auto_round:llm_compressor": COMPRESSED,
    "auto_round:fp8": FP8, "auto_round:fp8_static": FP8,
}  # fmt: skip


def packing(quantization: Quantization) -> str | None:
    """The layout of AutoRound's weights; None if another program wrote them, or if it is not known here."""
    if quantization.method not in METHODS:
        return None
    values = quantization.values
    if str(values.get("data_type")).startswith("fp"):
        return FP8
    # Older versions stated only the program that was to run the weights: `auto_round:gptq:exllamav2`.
    stated = values.get("packing_format") or values.get("backend") or "auto"
    return _LAYOUTS.get("auto_round:gptq" if str(stated).startswith("auto_round:gptq:") else str(stated))


def unsupported(quantization: Quantization) -> str | None:
    """Why weights as config.json describes them cannot be read, as far as that says it."""
    if quantization.method not in METHODS:
        return None
    values = quantization.values
    if values.get("rotation_config") or values.get("spinquant_config"):
        return "its weights are rotated, which AutoRound undoes while it runs them (rotation_config)"
    if packing(quantization) is None:
        stated = values.get("packing_format") or values.get("backend")
        return f"AutoRound's packing_format {stated} is not known here, only {', '.join(sorted(_LAYOUTS))}"
    if "int" in str(values.get("data_type", "int")) and values.get("data_type", "int") != "int":
        return f"AutoRound's data_type {values['data_type']} is not known here"
    return None


def settings(path: str, quantization: Quantization) -> Mapping[str, Any] | None:
    """`bits`, `group_size`, `data_type` and `sym` of the module at `path`; None if it stays plain.

    `extra_config` has what differs for some, by their names or patterns that are found in them; modules outside
    `block_name_to_quantize` are plain unless they are named there.
    """
    values = quantization.values
    extra = values.get("extra_config")
    own = _own(path, extra) if isinstance(extra, Mapping) else None
    if own is None and not _in_blocks(path, values):
        return None
    merged = {key: values[key] for key in ("bits", "group_size", "data_type", "sym") if key in values} | dict(own or {})
    bits = merged.get("bits")
    return None if isinstance(bits, int) and bits > 8 else merged


def _own(path: str, extra: Mapping[str, Any]) -> Mapping[str, Any] | None:
    own = extra.get(path)
    if own is None:
        found = (name for name, pattern in _patterns(tuple(extra)) if extra[name] and pattern.search(path))
        own = extra.get(next(found, path))
    return own if isinstance(own, Mapping) else None


@lru_cache(maxsize=4)
def _patterns(names: tuple[str, ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Those names that are patterns. Most are names of modules, thousands of them."""
    patterns = []
    for name in names:
        # AutoRound leaves out what is no regular expression.
        with contextlib.suppress(re.error):
            if re.search(r"[*+?\\|^$(\[]", name):
                patterns.append((name, re.compile(name)))
    return tuple(patterns)


def _in_blocks(path: str, values: Mapping[str, Any]) -> bool:
    blocks = values.get("block_name_to_quantize") or values.get("to_quant_block_names")
    if isinstance(blocks, str):
        blocks = blocks.split(",")
    if not blocks or not isinstance(blocks, list):
        # All decoder layers, which are numbered.
        return re.search(r"\.\d+\.", path) is not None
    names = [name for each in blocks for name in (each if isinstance(each, list) else [each])]
    return any(path.startswith(str(name).strip()) for name in names)
