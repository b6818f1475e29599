"""4-bit floating point (E2M1) as DeepSeek-V4 stores experts: two values a byte, one scale for every 32.

E2M1 and the scales, powers of two, are those of MXFP4 (OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import Format
from streamprune.formats.codes import look_up, multiply_blocks
from streamprune.formats.fp8 import scale_values
from streamprune.formats.quantization import Module, Quantization, Recognized

if TYPE_CHECKING:
    import torch

#: The values of E2M1 by their code of four bits.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Values that share a scale.
GROUP = 32
#: Those of NVFP4.
NV_GROUP = 16


@dataclass(frozen=True)
class Fp4(Format):
    """A matrix (out, in): two values a byte along `in`, the first in the low bits; a scale for every 32 of them."""

    name = "FP4 (groups of 32)"

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return decode_e2m1(parts["packed"], parts["scale"]).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, columns = shape
        return {"packed": ("I8", (*outer, columns // 2)), "scale": ("F8_E8M0", (*outer, columns // GROUP))}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        *outer, bytes_of_two = shapes["packed"]
        return (*outer, 2 * bytes_of_two)


@dataclass(frozen=True)
class Nvfp4(Format):
    """A matrix (out, in) as `Fp4`, with a scale in F8_E4M3 for every 16 values, divided by one for all of them.

    As compressed-tensors writes it: the scale of the whole tensor is the reciprocal of what NVIDIA's ModelOpt stores.
    """

    name = "NVFP4"

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scale = parts["scale"].float() / parts["global_scale"]
        return decode_e2m1(parts["packed"], scale, NV_GROUP).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        *outer, columns = shape
        return {
            "packed": ("U8", (*outer, columns // 2)),
            "scale": ("F8_E4M3", (*outer, columns // NV_GROUP)),
            "global_scale": ("F32", (*outer[:-1], 1)),
        }

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        *outer, bytes_of_two = shapes["packed"]
        return (*outer, 2 * bytes_of_two)


def decode_e2m1(packed: torch.Tensor, scale: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """The matrix (rows, columns) in float32 of packed codes (rows, columns / 2) and scales (rows, columns / group)."""
    return multiply_blocks(look_up(packed, _pairs(packed.device)), scale_values(scale), (1, group))


@lru_cache(maxsize=16)
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values (256, 2) of each byte."""
    import torch

    return torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], device=device)


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    """A `weight` of bytes beside a `scale` of powers of two; its bytes are two values each."""
    weight, scale = module.tensors.get("weight"), module.tensors.get("scale")
    if weight is None or scale is None or weight.dtype not in ("I8", "U8") or scale.dtype not in ("F8_E8M0", "U8"):
        return None
    if len(weight.shape) != 2 or scale.shape != (weight.shape[0], weight.shape[1] * 2 // GROUP) or weight.shape[1] % 16:
        raise UnsupportedModelError(
            f"{scale.name} {list(scale.shape)} does not fit {weight.name} {list(weight.shape)}: {Fp4.name} has one "
            f"scale for {GROUP // 2} bytes. Download config.json and shards again."
        )
    return Recognized(Fp4(), {"weight": ("weight", "packed"), "scale": ("weight", "scale")})


def stated(path: str, quantization: Quantization) -> Format | None:
    """How a config.json says that the Linear weight of the module at `path` is stored; None: not in this format."""
    if quantization.method != "fp8" or quantization.expert_dtype != "fp4" or quantization.leaves_plain(path):
        return None
    return Fp4() if "experts" in path.split(".") else None
