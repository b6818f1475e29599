"""AWQ's layout `gemm`: codes of four bits along `out` in 32-bit words, eight of them in an order of their own.

As AutoAWQ writes it (`awq/modules/linear/gemm.py`), and GPTQModel and AutoRound in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats import auto_round
from streamprune.formats.base import Format
from streamprune.formats.codes import multiply_blocks, subtract_blocks, words_as_bytes
from streamprune.formats.gptq import group_size
from streamprune.formats.quantization import Module, Quantization, Recognized

if TYPE_CHECKING:
    import torch

#: Values of `quant_method`.
METHODS = frozenset({"awq"})

#: Which of eight outputs is in the lowest four bits of a word, in the next, and so on.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class Awq(Format):
    """`qweight` I32 (in, out / 8), `qzeros` I32 (groups, out / 8), `scales` (groups, out) of a matrix (out, in).

    A scale for every `group` inputs; None: for all.
    """

    group: int | None

    @property
    def name(self) -> str:
        return "AWQ INT4" + (f" (groups of {self.group})" if self.group else "")

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        values, zero = _transposed(parts["qweight"]), _transposed(parts["qzeros"])
        block = (1, self.group or values.shape[1])
        return multiply_blocks(subtract_blocks(values, zero, block), parts["scales"].float().t(), block).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, rows, columns = shape
        groups = math.ceil(columns / self.group) if self.group else 1
        return {
            "qweight": ("I32", (*outer, columns, rows // 8)),
            "qzeros": ("I32", (*outer, groups, rows // 8)),
            "scales": ("F16", (*outer, groups, rows)),
        }

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        columns, words = shapes["qweight"]
        return words * 8, columns


def _transposed(words: torch.Tensor) -> torch.Tensor:
    """The codes (out, in), float32, of words (in, out / 8)."""
    import torch

    columns, eighths = words.shape
    pairs = words_as_bytes(words.t()).view(eighths, columns, 4)
    result = torch.empty((eighths, 8, columns), dtype=torch.float32, device=words.device)
    for number in range(4):
        result[:, _ORDER[2 * number]] = (pairs[..., number] & 15).float()
        result[:, _ORDER[2 * number + 1]] = (pairs[..., number] >> 4).float()
    return result.view(8 * eighths, columns)


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    """A `qweight` with eight scales for each of its columns. Raises UnsupportedModelError if it is none of `gemm`."""
    if not _is_awq(stated) or "qweight" not in module.tensors:
        return None
    tensors = module.tensors
    words, zeros, scales = (tensors.get(name) for name in ("qweight", "qzeros", "scales"))
    if words is None or zeros is None or scales is None or not _is_gemm(words, zeros, scales):
        seen = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in tensors.items())
        raise UnsupportedModelError(
            f"{module.path} ({seen}) does not fit AWQ's layout gemm for four bits: qweight [in, out / 8], qzeros "
            "[groups, out / 8], scales [groups, out]. Compare config.json with the original's."
        )
    own = _settings(module.path, stated) or {}
    group = group_size(module, own, 4, words.shape[0], scales.shape[0])
    parts = {name: ("weight", name) for name in ("qweight", "qzeros", "scales")}
    return Recognized(Awq(group), parts)


def _is_gemm(words: TensorEntry, zeros: TensorEntry, scales: TensorEntry) -> bool:
    if {words.dtype, zeros.dtype} != {"I32"} or scales.dtype not in _FLOATS:
        return False
    if any(len(each.shape) != 2 or 0 in each.shape for each in (words, zeros, scales)):
        return False
    groups, outputs = scales.shape
    return zeros.shape == (groups, words.shape[1]) and words.shape[1] * 8 == outputs


def stated(path: str, quantization: Quantization) -> Format | None:
    """How a config.json says that the Linear weight of the module at `path` is stored; None: not in this format."""
    own = _settings(path, quantization) if _is_awq(quantization) else None
    if own is None:
        return None
    size = own.get("group_size")
    return Awq(size if type(size) is int and size > 0 else None)


def unsupported(quantization: Quantization) -> str | None:
    """Why weights as config.json describes them cannot be read, as far as that says it."""
    if quantization.method not in METHODS:
        return None
    values = quantization.values
    layout = str(values.get("version") or values.get("format") or values.get("checkpoint_format") or "gemm").lower()
    if layout != "gemm" or values.get("backend") == "llm-awq":
        return f"of AWQ's layouts only gemm is read, not {layout if layout != 'gemm' else 'llm-awq'}"
    return None


def _is_awq(quantization: Quantization) -> bool:
    if quantization.method in METHODS:
        return unsupported(quantization) is None
    return auto_round.packing(quantization) == auto_round.AWQ


def _settings(path: str, quantization: Quantization) -> Mapping[str, Any] | None:
    """`bits` and `group_size` of the module at `path`; None if it stays plain."""
    if quantization.method not in METHODS:
        return auto_round.settings(path, quantization)
    # The output layer is plain whether or not it is listed.
    if path.endswith("lm_head") or quantization.leaves_plain(path):
        return None
    values = quantization.values
    # Older files state these under AutoAWQ's own names.
    found = {
        "bits": values.get("bits", values.get("w_bit")),
        "group_size": values.get("group_size", values.get("q_group_size")),
    }
    return {key: value for key, value in found.items() if value is not None}
