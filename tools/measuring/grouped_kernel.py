"""A Triton kernel for the products of sorted rows with each their expert's matrix: to measure, not to prune with.

Another order of its sums than the library's changes the last bits of a model's values. Shapes: R rows in the order of
their experts, E experts, I inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Rows, outputs and inputs of a tile; warps and stages of a program. The usual ones of a large half-precision product.
ROWS, OUTPUTS, INPUTS = 128, 128, 64
WARPS, STAGES = 8, 3


@triton.jit  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    input_RI,
    weight_ENI,
    output_RN,
    ends_E,
    tiles_E,
    E: tl.constexpr,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E_ROUNDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A tile of rows of one expert, times a tile of its outputs. `tiles_E` counts the tiles of rows up to each expert.

    There are programs for as many tiles as there can be: those behind the last do nothing, so that the host need not
    know the counts.
    """
    tile = tl.program_id(0)
    numbers = tl.arange(0, E_ROUNDED)
    tiles = tl.load(tiles_E + numbers, mask=numbers < E, other=2**30)
    expert = tl.sum((tiles <= tile).to(tl.int32), axis=0)
    if expert < E:
        before = tl.sum(tl.where(numbers == expert - 1, tiles, 0), axis=0)
        begin = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_E + expert)
        rows = (begin + (tile - before) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        weights = weight_ENI + expert.to(tl.int64) * N * I
        for first in range(0, I, BLOCK_I):
            inputs = first + tl.arange(0, BLOCK_I)
            left = tl.load(
                input_RI + rows[:, None] * I + inputs[None, :],
                mask=(rows < end)[:, None] & (inputs < I)[None, :],
                other=0.0,
            )
            right = tl.load(
                weights + outputs[None, :] * I + inputs[:, None],
                mask=(outputs < N)[None, :] & (inputs < I)[:, None],
                other=0.0,
            )
            total = tl.dot(left, right, total)
        places = output_RN + rows[:, None] * N + outputs[None, :]
        tl.store(places, total.to(output_RN.dtype.element_ty), mask=(rows < end)[:, None] & (outputs < N)[None, :])


def grouped_product(
    input_RI: torch.Tensor, weight_ENI: torch.Tensor, ends_E: torch.Tensor, block: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """The rows of each expert, which end at `ends_E` (int32), times the transpose of its matrix: (R, N).

    Rows behind the last end are not set. `block` are the rows, outputs and inputs of a tile.
    """
    (experts, width, inputs), (rows, columns, depth) = weight_ENI.shape, block or (ROWS, OUTPUTS, INPUTS)
    output_RN = input_RI.new_empty((len(input_RI), width))
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    tiles_E = ((counts_E + rows - 1) // rows).cumsum(0, dtype=torch.int32)
    grid = (len(input_RI) // rows + experts, -(-width // columns))
    _products[grid](
        input_RI, weight_ENI, output_RN, ends_E, tiles_E, E=experts, N=width, I=inputs,
        E_ROUNDED=triton.next_power_of_2(experts), BLOCK_R=rows, BLOCK_N=columns, BLOCK_I=depth,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return output_RN
