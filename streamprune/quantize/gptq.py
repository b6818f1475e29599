"""GPTQ (arXiv:2210.17323): rounding weights column by column, each column mending what the ones before it did.

For a layer's inputs X with the Hessian H = XᵀX it makes the error tr(E H Eᵀ) of a weight W small, with E = W - Q and Q
what its codes mean. Columns are taken in falling order of diag(H), so that the inputs that matter most are rounded
first, and nothing but the order changes: groups stay those of the original columns, with the scales of their largest
magnitudes, and no index of groups is stored.

The recursion is GPTQ's in the form of QuIP (arXiv:2307.13304, theorem 6, where both are shown to be equal): with
H = M D Mᵀ, M unit upper triangular and D diagonal,

    q_k = nearest(w_k + Σ_{i<k} e_i M_ik),    e_k = w_k - q_k

where q_k in e_k is what programs decode the code to (`Scheme.as_run`). It needs one Cholesky factor of H, where the
paper inverts H and factors the inverse. As there, columns are taken in blocks: what earlier blocks did to a block is
one matrix product. `tools/gptq_oracle` compares the codes with llm-compressor's.

Experts do not depend on each other, to the bit: what is batched over them are single operations on values, and factors
and products are made one expert at a time. So a chunk of any size gives the same bytes, on the same kind of device with
the same number of threads.

Shapes: K experts, weights of R rows (out) and C columns (in); within, columns are the first axis: (K, C, R).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from streamprune.quantize.schemes import Scheme

#: Times the mean of diag(H), added to the diagonal, as in the paper's code. Inputs that were never seen have no more.
DAMPING = 0.01
#: Columns of a block, as in the paper.
BLOCK = 128


@dataclass(frozen=True)
class Rounding:
    """Weights after rounding: `codes` (K, R, C) and `scales` (K, r, c) as `Scheme.pack` takes them, of one expert each.

    `values` (K, R, C), float32, is what they mean. `failed` are the experts whose Hessian has no factor (all zeros, or
    not finite): they were rounded to nearest.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor
    failed: tuple[int, ...]


def gptq(weights: torch.Tensor, hessians: torch.Tensor, scheme: Scheme) -> Rounding:
    """Round weights (K, R, C) of K experts by the Hessians (K, C, C) of their inputs, both float32 on one device.

    A Hessian is XᵀX of an expert's inputs X (tokens, C), or any multiple of it; it is left as it is. Weights with the
    same inputs (gate and up projections) can be joined along R; with `fp8`, if the rows of each are whole blocks.
    The column of an input that was always 0 is rounded to nearest: other text may need it. (llm-compressor makes it 0.)

    Memory: `memory_bytes`. Raises NonFiniteError for weights that cannot be rounded.
    """
    weights = weights.float()
    scales = scheme.scales(weights)
    codes, failed = _codes(weights, hessians, scales, scheme)
    return Rounding(codes, scales, scheme.rounded(codes, scales), failed)


def memory_bytes(experts: int, rows: int, columns: int) -> int:
    """The most bytes that `gptq` takes beside float32 weights and Hessians of these sizes, its result included.

    While it rounds: the factors, one of them being made; the columns in float32, their codes, their scales by groups of
    at least 32; a block of columns, its scales and changes; and copies of one expert's columns. When it is done: codes,
    and what they mean, made from a copy (with ragged blocks, two).
    """
    values, width = experts * rows * columns, min(BLOCK, columns)
    factors = 4 * (experts + 4) * columns**2
    block = 4 * experts * rows * (3 * width + 4) + 4 * rows * (columns + width)
    rounding = factors + block + values * 5 + values // 2
    return max(rounding, 13 * values)


def _codes(
    weights: torch.Tensor, hessians: torch.Tensor, scales: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The codes (K, R, C), and the experts without a factor."""
    import torch

    count, rows, columns = weights.shape
    order = hessians.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    factors, failed = _factors(hessians, order)
    high, wide = scheme.block(weights.shape)
    # The scale of every row and group (K, c, R), and the group of each column in its place.
    row_scales = scales.float().repeat_interleave(high, 1)[:, :rows].transpose(1, 2).contiguous()
    groups = order // wide
    # Columns that are done hold their errors.
    work = _taken(weights.transpose(1, 2), order)
    codes = torch.empty_like(work, dtype=scheme.code_dtype)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block = work[:, begin:end].clone()
        for expert in range(count if begin else 0):
            # Copies, since the address of a matrix may decide how it is multiplied.
            factor, errors = factors[expert, :begin, begin:end].t().clone(), work[expert, :begin].clone()
            block[expert] += factor @ errors
        own, each_scale = factors[:, begin:end, begin:end], _taken(row_scales, groups[:, begin:end])
        codes[:, begin:end] = _round_block(block, work[:, begin:end], own, each_scale, scheme)
    # (float8 cannot be gathered.)
    back = _taken(codes.view(torch.int8), order.argsort(dim=1)).view(scheme.code_dtype)
    return back.transpose(1, 2).contiguous(), failed


def _round_block(
    block: torch.Tensor, columns: torch.Tensor, factors: torch.Tensor, scales: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """The codes (K, n, R), float32, of a block of columns.

    `block` are the columns after what earlier blocks did to them, and turns into the codes; `columns` are those of the
    weights, and turn into their errors. `factors` (K, n, n) are the block's own of M, `scales` (K, n, R) of its values.
    """
    for each in range(block.shape[1]):
        code = scheme.nearest(block[:, each], scales[:, each])
        error = columns[:, each].sub_(scheme.as_run(code, scales[:, each]))
        # Two operations: fused into one, as addcmul may be or not, they would round differently.
        block[:, each + 1 :] += factors[:, each, each + 1 :, None] * error[:, None]
        block[:, each] = code
    return block


def _factors(hessians: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """M (K, C, C) of each Hessian with its columns in `order` (K, C), zeros on and below its diagonal where there is no
    factor; and the experts without one."""
    import torch

    factors = torch.empty_like(hessians)
    sound = []
    for expert, hessian in enumerate(hessians):
        # From the last column to the first: the factor is lower triangular then, and upper triangular turned round.
        turned = order[expert].flip(0)
        damped = hessian.index_select(0, turned).index_select(1, turned)
        diagonal = damped.diagonal()
        diagonal += DAMPING * diagonal.mean()
        lower, info = torch.linalg.cholesky_ex(damped)
        torch.div(lower.flip(0, 1), lower.diagonal().flip(0), out=factors[expert])
        sound.append((info == 0) & torch.isfinite(factors[expert]).all())
    failed = (~torch.stack(sound)).nonzero().flatten()
    factors[failed] = 0
    return factors, tuple(failed.tolist())


def _taken(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns (K, n, R) of each expert that `order` (K, n) names."""
    return columns.gather(1, order[:, :, None].expand(-1, -1, columns.shape[2]))
