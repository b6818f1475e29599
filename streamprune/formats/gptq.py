"""GPTQ's layout: codes along `in` in 32-bit words, zero points along `out`, and scales for groups of inputs.

As AutoGPTQ and GPTQModel write it (`nn_modules/qlinear/torch.py`, `utils/model.py`), and AutoRound for these. Version 1
of the layout stores zero points less one, version 2 as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats import auto_round
from streamprune.formats.base import Format
from streamprune.formats.codes import multiply_blocks, subtract_blocks, unpack
from streamprune.formats.quantization import Module, Quantization, Recognized

if TYPE_CHECKING:
    import torch

#: Values of `quant_method`.
METHODS = frozenset({"gptq"})

_BITS = (2, 4, 8)
_FLOATS = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class Gptq(Format):
    """`qweight` I32 (in x bits / 32, out), `qzeros` I32 (groups, out x bits / 32), `scales` (groups, out) of (out, in).

    `group` inputs have a scale in common, those that `g_idx` (in) puts into a group, or one after the other; None: all.
    `less_one` says whether zero points are stored less one (version 1). Those of symmetric codes are half their range.
    """

    bits: int
    group: int | None
    less_one: bool = True
    symmetric: bool = False
    indexed: bool = True

    @property
    def name(self) -> str:
        return f"GPTQ INT{self.bits}" + (f" (groups of {self.group})" if self.group else "")

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        words, scale, zeros = parts["qweight"], parts["scales"].float().t(), parts["qzeros"]
        if self.less_one:
            # By words, as GPTQModel makes version 1 of version 2: a zero point of 0 has borrowed from the next.
            zeros = zeros + sum(1 << shift for shift in range(0, 32, self.bits))
        zero = unpack(zeros, self.bits, len(scale)).t()
        if self.symmetric and bool((zero != 1 << (self.bits - 1)).any()):
            raise CheckpointError(
                f"Zero points ({self.name}) go from {int(zero.min())} to {int(zero.max())}, but config.json calls "
                f"them symmetric, which is {1 << (self.bits - 1)}: its checkpoint_format (gptq or gptq_v2) or its sym "
                "is wrong."
            )
        values = unpack(words.t(), self.bits, len(words) * 32 // self.bits)
        index = _shuffled(parts["g_idx"], self.group, scale.shape[1]) if self.group and "g_idx" in parts else None
        if index is None:
            block = (1, self.group or values.shape[1])
            return multiply_blocks(subtract_blocks(values, zero, block), scale, block).to(dtype)
        each = index.expand(values.shape)
        return values.sub_(zero.contiguous().gather(1, each)).mul_(scale.contiguous().gather(1, each)).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, rows, columns = shape
        groups = math.ceil(columns / self.group) if self.group else 1
        stored = {
            "qweight": ("I32", (*outer, columns * self.bits // 32, rows)),
            "qzeros": ("I32", (*outer, groups, rows * self.bits // 32)),
            "scales": ("F16", (*outer, groups, rows)),
        }
        return {**stored, "g_idx": ("I32", (*outer, columns))} if self.indexed else stored

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        words, rows = shapes["qweight"]
        return rows, words * 32 // self.bits


def _shuffled(index: torch.Tensor, group: int, groups: int) -> torch.Tensor | None:
    """The group of each input by `g_idx`; None if they are in order."""
    import torch

    if torch.equal(index, torch.arange(len(index), dtype=index.dtype, device=index.device) // group):
        return None
    if not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise CheckpointError(
            f"g_idx goes from {int(index.min())} to {int(index.max())}, but there are {groups} groups. Download the "
            "checkpoint again."
        )
    return index.long()


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    """A `qweight` with scales for each of its columns. Raises UnsupportedModelError if it does not fit config.json."""
    version = _version(stated)
    if version is None or "qweight" not in module.tensors:
        return None
    bits, inputs, groups = _sizes(module)
    own = _settings(module.path, stated) or {}
    group = group_size(module, own, bits, inputs, groups)
    indexed = "g_idx" in module.tensors
    values = stated.values
    if not indexed and groups > 1 and values.get("desc_act") and not values.get("static_groups"):
        raise UnsupportedModelError(
            f"{module.path} has no g_idx, which says in which of {groups} groups each input is, but config.json says "
            "that they are not in order (desc_act). Repacked for one program? Use the original."
        )
    parts = {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"} | ({"g_idx": "g_idx"} if indexed else {})
    storage = Gptq(bits, group, version == 1, own.get("sym") is True, indexed)
    return Recognized(storage, {leaf: ("weight", part) for leaf, part in parts.items()})


def stated(path: str, quantization: Quantization) -> Format | None:
    """How a config.json says that the Linear weight of the module at `path` is stored; None: not in this format."""
    version = _version(quantization)
    own = _settings(path, quantization) if version is not None else None
    if own is None:
        return None
    bits, group = own.get("bits"), own.get("group_size")
    size = group if type(group) is int and group > 0 else None
    # AutoRound stores no g_idx.
    indexed = quantization.method in METHODS
    return Gptq(bits if type(bits) is int else 4, size, version == 1, own.get("sym") is True, indexed)


def unsupported(quantization: Quantization) -> str | None:
    """Why weights as config.json describes them cannot be read, as far as that says it."""
    if quantization.method not in METHODS:
        return None
    values = quantization.values
    layout = "marlin" if values.get("is_marlin_format") else _layout(values)
    if layout not in ("gptq", "gptq_v2"):
        return f"its weights are repacked for one program (checkpoint_format {layout})"
    return None


def _layout(values: Mapping[str, Any]) -> str:
    return str(values.get("checkpoint_format") or values.get("format") or "gptq").lower()


def group_size(module: Module, own: Mapping[str, Any], bits: int, inputs: int, groups: int) -> int | None:
    """Inputs in a group; None if all are in one. `own` is what config.json says of the module.

    Raises UnsupportedModelError if that is not what the shapes say: `bits`, `inputs`, `groups`.
    """
    size = own.get("group_size", -1 if groups == 1 else math.ceil(inputs / groups))
    wanted = math.ceil(inputs / size) if type(size) is int and size > 0 else 1 if size == -1 else 0
    if own.get("bits", bits) != bits or wanted != groups:
        raise UnsupportedModelError(
            f"{module.path} has {inputs} inputs with codes of {bits} bits in {groups} group(s), but config.json says "
            f"{own.get('bits', bits)} bits and group_size {size}. Compare config.json with the original's."
        )
    return None if size == -1 else size


def _version(quantization: Quantization) -> int | None:
    """1 if zero points are stored less one, 2 if as they are; None if this is not GPTQ's layout."""
    layout = auto_round.packing(quantization)
    if quantization.method in METHODS:
        layout = _layout(quantization.values)
    return {"gptq": 1, "gptq_v2": 2}.get(layout or "")


def _sizes(module: Module) -> tuple[int, int, int]:
    """Bits, inputs and groups, by the tensors' shapes. Raises UnsupportedModelError if these do not fit together."""
    tensors = module.tensors
    words, zeros, scales = (tensors.get(name) for name in ("qweight", "qzeros", "scales"))
    seen = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in tensors.items())
    if words is None or zeros is None or scales is None or {words.dtype, zeros.dtype} != {"I32"}:
        raise UnsupportedModelError(f"{module.path} ({seen}) lacks GPTQ's qweight, qzeros (both I32) or scales.")
    fits = all(len(each.shape) == 2 for each in (words, zeros, scales)) and scales.dtype in _FLOATS
    groups, outputs = scales.shape if fits else (0, 0)
    fits = fits and 0 not in scales.shape and words.shape[1] == outputs and zeros.shape[0] == groups
    bits = zeros.shape[1] * 32 // outputs if fits else 0
    if fits and bits in (3, 5, 6, 7):
        raise UnsupportedModelError(
            f"{module.path} has codes of {bits} bits, which AutoGPTQ packs in one way and GPTQModel in another. "
            f"GPTQ is supported with {', '.join(map(str, _BITS))} bits."
        )
    fits = fits and bits in _BITS and zeros.shape[1] * 32 == outputs * bits
    inputs = words.shape[0] * 32 // bits if fits else 0
    index = tensors.get("g_idx")
    fits = fits and (index is None or (index.dtype in ("I32", "I64") and index.shape == (inputs,)))
    if not fits:
        raise UnsupportedModelError(
            f"{module.path} ({seen}) does not fit GPTQ's layout: qweight [in x bits / 32, out], qzeros [groups, out x "
            "bits / 32], scales [groups, out], g_idx [in]. Compare config.json with the original's."
        )
    return bits, inputs, groups


def _settings(path: str, quantization: Quantization) -> Mapping[str, Any] | None:
    """`bits`, `group_size` and `sym` of the module at `path`; None if it stays plain.

    `dynamic` has what differs for some, by patterns that match the beginning of names; those after `-:` are plain.
    Which Linear modules of a layer are left out besides, GPTQModel knows by the model's class.
    """
    if quantization.method not in METHODS:
        return auto_round.settings(path, quantization)
    values = quantization.values
    dynamic = values.get("dynamic")
    for pattern, own in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if _matches(pattern.removeprefix("-:").removeprefix("+:"), path):
            return None if pattern.startswith("-:") else {**_general(values), **(own if isinstance(own, dict) else {})}
    if re.search(r"\.\d+\.", path) is None:
        return _general(values) if values.get("lm_head") and path.endswith("lm_head") else None
    only = values.get("modules_in_block_to_quantize")
    if isinstance(only, list) and only:
        names = [name for each in only for name in (each if isinstance(each, list) else [each])]
        if not any(path.endswith(f".{name}") for name in names):
            return None
    return _general(values)


def _general(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in ("bits", "group_size", "sym") if values.get(key) is not None}


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise UnsupportedModelError(
            f"The pattern {pattern!r} under dynamic in config.json is no regular expression."
        ) from error
