"""8-bit floating point: values in F8_E4M3 or F8_E5M2 beside a scale for each block, row or tensor.

DeepSeek-V3's block format (arXiv:2412.19437, section 3.3.2), as Qwen, MiniMax and others publish it; one scale per row
or per tensor, as vLLM and compressed-tensors write it; blocks of 1 x 32 with powers of two for scales (MXFP8, OCP
Microscaling Formats v1.0). The plain weight is value x scale in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats import auto_round
from streamprune.formats.base import Format
from streamprune.formats.codes import look_up, multiply_blocks
from streamprune.formats.quantization import Module, Quantization, Recognized

if TYPE_CHECKING:
    import torch

#: Values of `quant_method`.
METHODS = frozenset({"fp8", "mxfp8"})
#: The blocks of MXFP8.
MX_BLOCK = (1, 32)

_VALUES = {"F8_E4M3", "F8_E5M2"}
#: U8 is F8_E8M0 written by programs that lack that dtype.
_POWERS = {"F8_E8M0", "U8"}
_SCALES = {"F32", "BF16", "F16", *_POWERS}


@dataclass(frozen=True)
class Fp8(Format):
    """Values beside one scale for each block of `block` (rows, columns) values; None: for each row, or one for all.

    Tensors show the rest, but without them config.json may: the scales' dtype, and whether all values have `one`.
    """

    joins_experts = True

    block: tuple[int, int] | None = None
    scale_dtype: str = field(default="F32", compare=False)
    one: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        return f"FP8 (blocks of {self.block[0]} x {self.block[1]})" if self.block else "FP8"

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        values, scale = parts[""], scale_values(parts["scale"])
        if values.dim() == 3:
            result = values.new_empty(values.shape, dtype=dtype)
            for expert, each in enumerate(values):
                result[expert] = self._decoded(each, scale[expert] if len(scale.shape) and scale.numel() > 1 else scale)
            return result
        return self._decoded(values, scale).to(dtype)

    def _decoded(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """One matrix (out, in) in float32."""
        import torch

        table = torch.arange(256, dtype=torch.uint8, device=values.device).view(values.dtype).float()
        result = look_up(values, table[:, None])
        if self.block is not None:
            return multiply_blocks(result, scale, self.block)
        return result.mul_(scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, rows, columns = shape
        blocks: tuple[int, ...] = (1,) if self.one else (rows, 1)
        if self.block is not None:
            blocks = (math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1]))
        # MXFP8's scales are powers of two.
        dtype = "U8" if self.block == MX_BLOCK else self.scale_dtype
        return {"": ("F8_E4M3", shape), "scale": (dtype, (*outer, *blocks))}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[""]


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents of two with a bias of 127 (E8M0, OCP Microscaling Formats v1.0)."""
    import torch

    if scale.dtype in (torch.float8_e8m0fnu, torch.uint8):
        return torch.exp2(scale.view(torch.uint8).float() - 127)
    return scale.float()


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    """FP8 values with their scales; `weight_block_size` of the config is the blocks' size."""
    parts: dict[str, tuple[str, str]] = {}
    formats: set[Fp8] = set()
    for leaf, entry in module.tensors.items():
        scale = _companion(module, leaf, ("_scale_inv", "_scale"), ("scale", "qscale_weight"))
        if entry.dtype not in _VALUES or scale is None:
            continue
        formats.add(_format_of(entry, module.tensors[scale], stated))
        parts |= {leaf: (leaf, ""), scale: (leaf, "scale")}
        activation = _companion(module, leaf, ("_activation_scale",), ("activation_scale", "input_scale", "qscale_act"))
        if activation is not None:
            parts[activation] = (leaf, "activation_scale")
    if len(formats) > 1:
        raise UnsupportedModelError(f"{module.path} has FP8 tensors with different kinds of scales.")
    return Recognized(formats.pop(), parts) if formats else None


def stated(path: str, quantization: Quantization) -> Format | None:
    """How a config.json says that the Linear weight of the module at `path` is stored; None: not in this format."""
    if auto_round.packing(quantization) == auto_round.FP8:
        return Fp8(block_size(quantization.values)) if auto_round.settings(path, quantization) else None
    if quantization.method not in METHODS or quantization.leaves_plain(path):
        return None
    # DeepSeek-V4, whose experts are in FP4, has E8M0 scales everywhere; a `scale_fmt` does not tell the dtype.
    dtype = "F8_E8M0" if quantization.expert_dtype == "fp4" else "F32"
    return Fp8(_stated_block(quantization), dtype, quantization.values.get("activation_scheme") == "static")


def _stated_block(quantization: Quantization) -> tuple[int, int] | None:
    """The blocks' size by config.json, which for MXFP8 need not state it."""
    return block_size(quantization.values) or (MX_BLOCK if quantization.method == "mxfp8" else None)


def _companion(module: Module, leaf: str, suffixes: tuple[str, ...], of_weight: tuple[str, ...]) -> str | None:
    """The name, in the module, of a companion of the tensor `leaf`: with one of the suffixes, or of the `weight`."""
    names = [leaf + suffix for suffix in suffixes] + list(of_weight if leaf == "weight" else ())
    return next((name for name in names if name in module.tensors), None)


def _format_of(values: TensorEntry, scale: TensorEntry, stated: Quantization) -> Fp8:
    """Which values share a scale, by the shapes of both. Raises UnsupportedModelError if they do not go together."""
    block = _stated_block(stated)
    if scale.dtype in _SCALES and len(values.shape) in (2, 3):
        # Of a tensor that holds all experts, `outer` is their number; else it is empty.
        *outer, rows, columns = values.shape
        if math.prod(scale.shape) == 1 or scale.shape in ((*outer,), (*outer, 1, 1)):
            return Fp8()
        if block is not None:
            blocks = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
            if scale.shape == (*outer, *blocks):
                return Fp8(block)
        if scale.shape in ((*outer, rows), (*outer, rows, 1)):
            return Fp8()
    wanted = f"{list(block)} (weight_block_size)" if block else "a weight_block_size, which config.json does not state"
    raise UnsupportedModelError(
        f"{scale.name} ({scale.dtype} {list(scale.shape)}) does not fit {values.name} {list(values.shape)}: neither "
        f"one scale, nor one for each row, nor one for each block of {wanted}. Download config.json and "
        "shards again."
    )


def block_size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """The `weight_block_size` (rows, columns) of a quantization section; None if it states none.

    AutoRound states it as `group_size`.
    """
    block = values.get("weight_block_size") or values.get("group_size")
    if isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    return None
