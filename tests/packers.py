"""Quantized forms of one weight, written from the formats' definitions: codes and scales, and what these mean.

Independent of the decoders in `streamprune.formats`: nothing here takes a packed tensor apart. A packer chooses codes
and scales; the plain values are codes times scales in float64, rounded to float32 once. O rows (out), I columns (in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

#: What each byte means: sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa (OCP 8-bit floating point, E4M3).
E4M3 = np.array(
    [
        (-1) ** (code >> 7)
        * ((code & 7) / 8 * 2**-6 if not code >> 3 & 15 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3 & 15) - 7))
        for code in range(256)
    ]
)
#: What each half byte means: sign, 2 bits of exponent, 1 of mantissa (OCP Microscaling Formats v1.0, E2M1).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
#: AutoAWQ's `gemm`: which of eight columns is in the lowest half byte of a word, which in the next, and so on.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored: `parts` by their names in the module; and `values` (O, I), float32, what it means."""

    parts: dict[str, torch.Tensor]
    values: torch.Tensor


def fp8(
    weight: torch.Tensor,
    block: tuple[int, int],
    scale_dtype: torch.dtype = torch.float32,
    scale_name: str = "weight_scale_inv",
    scale_shape: tuple[int, ...] | None = None,
) -> Packed:
    """E4M3 values and one scale for each block of (rows, columns); the last blocks may be smaller.

    As DeepSeek-V3 (arXiv:2412.19437, section 3.3.2): scale = largest magnitude / 448. A scale of one byte is a power of
    two (E8M0). A block of (O, I) is one scale for the tensor, of (1, I) one for each row.
    """
    given = weight.double().numpy()
    scales, stored = _scales(_largest(given, block) / 448, scale_dtype)
    spread = _spread(scales, block, given.shape)
    codes = torch.from_numpy(np.clip(given / spread, -448, 448)).float().to(torch.float8_e4m3fn)
    values = E4M3[codes.view(torch.uint8).numpy()] * spread
    shaped = stored if scale_shape is None else stored.reshape(scale_shape)
    return Packed({"weight": codes, scale_name: shaped}, _float32(values))


def fp4(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E2M1 codes, two a byte with the first in the low half, uint8 (O, I/2); exponents, uint8 (O, I/group); the values.

    MXFP4 (OCP Microscaling Formats v1.0): the exponent is that of the largest magnitude, less that of 6.
    """
    given = weight.double().numpy()
    exponents = np.floor(np.log2(_largest(given, (1, group)))) - 2
    spread = _spread(2.0**exponents, (1, group), given.shape)
    codes = np.abs(given[..., None] / spread[..., None] - E2M1).argmin(-1).astype(np.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    stored = (exponents + 127).astype(np.uint8)
    return torch.from_numpy(packed), torch.from_numpy(stored), _float32(E2M1[codes] * spread)


def gptq(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    g_idx: str = "plain",
    seed: int = 0,
) -> Packed:
    """AutoGPTQ's layout: codes packed along `in`, zero points along `out`; scales F16.

    Version 1 stores zero points less one, version 2 (GPTQModel's `gptq_v2`) as they are. GPTQModel makes one from the
    other by words, whose 0x11111111 it adds or subtracts: in version 1 a zero point of 0 borrows from the next one.
    A `group` of -1 is one for all columns. `g_idx` says which group each column is in: "plain" (in order), "shuffled"
    (as `desc_act` leaves it) or "none" (not stored, as by AutoRound).
    """
    columns = weight.shape[1]
    groups = np.arange(columns) // (columns if group < 0 else group)
    if g_idx == "shuffled":
        groups = np.random.default_rng(seed).permutation(groups)
    codes, zeros, scales = _integers(weight, groups, bits, symmetric)
    values = (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]
    one = _words(np.ones_like(zeros), bits) if version == 1 else 0
    parts = {
        "qweight": _words(codes.T, bits),
        "qzeros": (_words(zeros, bits) - one).T.contiguous(),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }
    if g_idx != "none":
        parts["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return Packed(parts, _float32(values))


def awq(weight: torch.Tensor, group: int = 32, symmetric: bool = False) -> Packed:
    """AutoAWQ's `gemm` layout, 4 bits: codes and zero points packed along `out`, columns in AWQ_ORDER; scales F16."""
    groups = np.arange(weight.shape[1]) // group
    codes, zeros, scales = _integers(weight, groups, 4, symmetric)
    values = (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]
    parts = {
        "qweight": _words(_reordered(codes), 4).T.contiguous(),
        "qzeros": _words(_reordered(zeros), 4).T.contiguous(),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }
    return Packed(parts, _float32(values))


def _integers(weight: torch.Tensor, groups: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes (O, I), zero points (O, G), and scales (O, G) in F16, of columns in these groups."""
    given, top = weight.double().numpy(), 2**bits - 1
    by_group = [given[:, groups == group] for group in range(groups.max() + 1)]
    low = np.stack([np.minimum(part.min(1), 0) for part in by_group], 1)
    high = np.stack([np.maximum(part.max(1), 0) for part in by_group], 1)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = np.maximum((high - low) / top, 1e-5).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if symmetric else np.rint(-low / scales).astype(np.int64)
    zeros = np.clip(zeros, 0, top)
    codes = np.clip(np.rint(given / scales.astype(np.float64)[:, groups]) + zeros[:, groups], 0, top)
    return codes.astype(np.int64), zeros, scales


def _words(values: Array, bits: int) -> torch.Tensor:
    """Packed along the first axis: the first value in the lowest bits of a 32-bit word, the next above it."""
    each = 32 // bits
    parts = values.astype(np.uint32).reshape(values.shape[0] // each, each, *values.shape[1:])
    shifts = (bits * np.arange(each, dtype=np.uint32)).reshape(1, each, *(1 for _ in values.shape[1:]))
    return torch.from_numpy(np.bitwise_or.reduce(parts << shifts, axis=1).view(np.int32).copy())


def _reordered(values: Array) -> Array:
    """Rows (O, ...) in the order in which AWQ packs them."""
    return values.reshape(-1, 8, *values.shape[1:])[:, AWQ_ORDER].reshape(values.shape)


def _scales(wanted: Array, dtype: torch.dtype) -> tuple[Array, torch.Tensor]:
    """Scales, float64, that the dtype can hold; and as they are stored."""
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = np.ceil(np.log2(wanted))
        stored = torch.from_numpy((exponents + 127).astype(np.uint8))
        return 2.0**exponents, stored.view(dtype)
    stored = torch.from_numpy(wanted).to(dtype)
    return stored.double().numpy(), stored


def _largest(values: Array, block: tuple[int, int]) -> Array:
    """The largest magnitude of each block."""
    rows, columns = (math.ceil(size / step) for size, step in zip(values.shape, block, strict=True))
    padded = np.zeros((rows * block[0], columns * block[1]))
    padded[: values.shape[0], : values.shape[1]] = np.abs(values)
    largest: Array = padded.reshape(rows, block[0], columns, block[1]).max((1, 3))
    return largest


def _spread(scales: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """The scale of each value."""
    return scales.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def _float32(values: Array) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
