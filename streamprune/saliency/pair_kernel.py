"""A Triton kernel that combines the experts' outputs and measures every pair, reading the outputs once.

The steps of `combine.by_torch` one by one read and write them about twenty times. torch's builds for GPUs bring Triton;
import this module only where it is there.

Shapes: T tokens, K experts chosen per token, R rows of the experts' outputs, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Values of a token's experts that a program holds at a time: an eighth of the 65,536 registers of a multiprocessor of
#: an NVIDIA GPU, so that several programs run beside each other.
_VALUES = 8192
#: Columns at a time at most, and at least.
_MOST_COLUMNS, _FEWEST_COLUMNS = 1024, 128


@triton.jit  # type: ignore[untyped-decorator]
def _combine_tokens(  # type: ignore[no-untyped-def]
    output_RH,
    row_TK,
    gates_TK,
    sum_TH,
    norms_TK,
    peaks_TK,
    dots_TK,
    sum_norms_T,
    H: tl.constexpr,
    K: tl.constexpr,
    K_ROUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token. `K_ROUNDED` is the power of two from K on. Sums are in float32."""
    # 64 bits: a row's offset may exceed 2^31.
    token = tl.program_id(0).to(tl.int64)
    choices = tl.arange(0, K_ROUNDED)
    chosen = choices < K
    rows = tl.load(row_TK + token * K + choices, mask=chosen, other=0)
    squares = tl.zeros((K_ROUNDED,), tl.float32)
    peaks = tl.zeros((K_ROUNDED,), tl.float32)
    dots = tl.zeros((K_ROUNDED,), tl.float32)
    sum_squares = tl.zeros((1,), tl.float32)
    for begin in range(0, H, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        inside = columns < H
        # torch's sums over so few values are four on a GPU, of each fourth value, which are then added up.
        sum0 = tl.zeros((COLUMNS,), tl.float32)
        sum1 = tl.zeros((COLUMNS,), tl.float32)
        sum2 = tl.zeros((COLUMNS,), tl.float32)
        sum3 = tl.zeros((COLUMNS,), tl.float32)
        for choice in tl.static_range(K):
            row = tl.load(row_TK + token * K + choice)
            gate = tl.load(gates_TK + token * K + choice).to(tl.float32)
            values = tl.load(output_RH + row * H + columns, mask=inside, other=0.0).to(tl.float32)
            gated = (values * gate).to(sum_TH.dtype.element_ty).to(tl.float32)
            if choice % 4 == 0:
                sum0 += gated
            elif choice % 4 == 1:
                sum1 += gated
            elif choice % 4 == 2:
                sum2 += gated
            else:
                sum3 += gated
        total = (((sum0 + sum1) + sum2) + sum3).to(sum_TH.dtype.element_ty)
        tl.store(sum_TH + token * H + columns, total, mask=inside)
        # The same values again, now all experts' at once. They come from the caches.
        places = output_RH + rows[:, None] * H + columns[None, :]
        outputs = tl.load(places, mask=chosen[:, None] & inside[None, :], other=0.0).to(tl.float32)
        totals = total.to(tl.float32)
        squares += tl.sum(outputs * outputs, axis=1)
        peaks = tl.maximum(peaks, tl.max(tl.abs(outputs), axis=1))
        dots += tl.sum(outputs * totals[None, :], axis=1)
        sum_squares += tl.sum(totals * totals, axis=0)
    pairs = token * K + choices
    tl.store(norms_TK + pairs, tl.sqrt_rn(squares), mask=chosen)
    tl.store(peaks_TK + pairs, peaks, mask=chosen)
    tl.store(dots_TK + pairs, dots, mask=chosen)
    tl.store(sum_norms_T + token + tl.arange(0, 1), tl.sqrt_rn(sum_squares))


def combine_tokens(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is needed of each token's chosen experts, whose outputs are rows of `output_RH` (contiguous).

    Dtypes are at most 32 bits wide; rows are int64. Returns the gated sums (T, H) in the dtype of output times gate,
    and in float32 the norms and peaks of the outputs, the dot products of outputs and sums (all (T, K)), and the norms
    of the sums (T,). Products and sums are rounded as torch rounds them on an NVIDIA GPU.
    """
    (tokens, chosen), hidden = row_TK.shape, output_RH.shape[1]
    dtype = torch.promote_types(output_RH.dtype, gates_TK.dtype)
    sum_TH = output_RH.new_empty((tokens, hidden), dtype=dtype)
    norms_TK, peaks_TK, dots_TK = (output_RH.new_empty((tokens, chosen), dtype=torch.float32) for _ in range(3))
    sum_norms_T = output_RH.new_empty(tokens, dtype=torch.float32)
    if tokens:
        # Triton starts it on the current GPU and its stream, whichever the tensors are on.
        with torch.accelerator.device_index(output_RH.device.index):
            _combine_tokens[(tokens,)](
                output_RH, row_TK.contiguous(), gates_TK.contiguous(),
                sum_TH, norms_TK, peaks_TK, dots_TK, sum_norms_T,
                **sizes_for(hidden, chosen),
                # A product and a sum in one instruction would leave out the rounding between them.
                enable_fp_fusion=False,
            )  # fmt: skip
    return sum_TH, norms_TK, peaks_TK, dots_TK, sum_norms_T


def sizes_for(hidden: int, chosen: int) -> dict[str, Any]:
    """The kernel's sizes for H and K."""
    rounded = triton.next_power_of_2(chosen)
    columns = min(_MOST_COLUMNS, max(_FEWEST_COLUMNS, _VALUES // rounded), triton.next_power_of_2(hidden))
    return {"H": hidden, "K": chosen, "K_ROUNDED": rounded, "COLUMNS": columns}
