"""Codes of a few bits to numbers: by table, out of 32-bit words; and scales and zero points of blocks.

For the decoders of quantized formats, which call these for every expert of every layer: no tensor here has more than
four bytes for each value. Works on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The numbers (rows, columns x n), float32, of the bytes `codes` (rows, columns) in a `table` (256, n).

    A row of the table has four or eight bytes in all.
    """
    import torch

    # A row is copied as one whole number: four to six times as fast as a look-up of rows, or as the cast of float8.
    numbers = table.view(torch.int64 if table[0].nbytes == 8 else torch.int32).flatten()
    found = numbers.index_select(0, codes.view(torch.uint8).flatten().int())
    return found.view(table.dtype).float().view(len(codes), -1)


def words_as_bytes(words: torch.Tensor) -> torch.Tensor:
    """The bytes (rows, columns x 4) of words (rows, columns), the lowest first."""
    import torch

    # Flattened first: a transposed column counts as contiguous, but cannot be viewed as bytes.
    return words.contiguous().flatten().view(torch.uint8).view(len(words), -1)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes (rows, columns), float32, of `words` int32 (rows, ...): the first code in the lowest bits of a row.

    Codes of 1 to 8 bits lie one after the other, those of 3, 5, 6 and 7 bits across the ends of words.
    """
    import torch

    codes = words_as_bytes(words)
    if bits == 8:
        return codes[:, :columns].float()
    if bits in (2, 4):
        return look_up(codes, _codes_of_bytes(bits, codes.device))[:, :columns]
    begin = torch.arange(columns, device=codes.device) * bits
    # No code reaches over more than two bytes.
    pairs = torch.nn.functional.pad(codes, (0, 1)).int()
    pairs = pairs[:, begin // 8] | pairs[:, begin // 8 + 1] << 8
    return (pairs >> begin % 8 & (1 << bits) - 1).float()


@lru_cache(maxsize=16)
def _codes_of_bytes(bits: int, device: torch.device) -> torch.Tensor:
    """The codes (256, 8 / bits) in each byte, the first in its lowest bits. Kept: made of a list, it takes longer than
    the look-up of a small matrix."""
    import torch

    # Half precision holds codes of two bits exactly, and four of them are eight bytes.
    dtype = torch.float16 if bits == 2 else torch.float32
    table = [[byte >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)] for byte in range(256)]
    return torch.tensor(table, dtype=dtype, device=device)


def multiply_blocks(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`values` (rows, columns), float32, multiplied in place with the scale of each block.

    The last blocks of rows and columns may be smaller: `scale` has ceil(rows / block[0]) x ceil(columns / block[1]).
    """
    import torch

    return _with_blocks(values, scale, block, torch.Tensor.mul_)


def subtract_blocks(values: torch.Tensor, zero: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`values`, float32, less the zero point of each block, in place; as `multiply_blocks`."""
    import torch

    return _with_blocks(values, zero, block, torch.Tensor.sub_)


def _with_blocks(
    values: torch.Tensor,
    each: torch.Tensor,
    block: tuple[int, int],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    rows, columns = values.shape
    if columns % block[1]:
        change(values, each.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns])
        return values
    full = rows // block[0]
    change(values[: full * block[0]].view(full, block[0], each.shape[1], block[1]), each[:full, None, :, None])
    if rows % block[0]:
        change(values[full * block[0] :].view(-1, each.shape[1], block[1]), each[full:, :, None])
    return values
