"""Experts computed as transformers' grouped_mm implementation does, with what is recorded of every pair on the way.

The arithmetic of `transformers.integrations.moe.grouped_mm_experts_forward`, value by value, so that the result is the
same bit for bit. What follows the matrix products is done in parts of the tokens that stay in the caches: widened to
float32 at once, the outputs of a micro-batch would be copied to memory that is new each time, which takes a CPU longer
than the arithmetic (15 of 33 ms for 1,024 tokens of tools/bench's `mid` shape), and a GPU a GiB. `hooks` has a slower
path that needs to know nothing of these steps; tests compare the two, and both with the whole model.

Shapes: T tokens, K experts chosen per token, P = T·K pairs, R rows (the pairs, and what fills up), H hidden size, E
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.moe import _grouped_linear

from streamprune.saliency.statistics import Pairs, cosines

#: Values that are widened at a time, by kind of device.
_PART_VALUES = {"cpu": 1 << 19, "cuda": 1 << 24}


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """The 2-norms of vectors along the last axis, in float32 or wider."""
    return _by_parts(torch.linalg.vector_norm, vectors)


def peaks(vectors: torch.Tensor) -> torch.Tensor:
    """The largest absolute values along the last axis, in float32 or wider."""
    # The infinity norm is the same, and takes forty times as long on a CPU.
    return _by_parts(lambda part, dim: part.abs().amax(dim=dim), vectors)


def norms_and_peaks(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both at once, so that the vectors are read once."""

    def both(part: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.stack((torch.linalg.vector_norm(part, dim=dim), part.abs().amax(dim=dim)), dim=-1)

    found = _by_parts(both, vectors)
    return found[..., 0], found[..., 1]


def dots(vectors_TKH: torch.Tensor, with_TH: torch.Tensor) -> torch.Tensor:
    """The dot products (T, K) of a token's K vectors with one of its own, in float32 or wider."""
    exact = exact_dtype(vectors_TKH)
    size = part_rows(vectors_TKH, vectors_TKH.shape[1] * vectors_TKH.shape[2])
    parts = zip(torch.split(vectors_TKH, size), torch.split(with_TH, size), strict=True)
    # Products in half precision would overflow where an expert's output is large. (As a product of matrices it would
    # take thirty times as long on a CPU.)
    return torch.cat([(each.to(exact) * one.to(exact).unsqueeze(1)).sum(dim=-1) for each, one in parts])


def _by_parts(measure: Callable[..., torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    exact = exact_dtype(vectors)
    parts = torch.split(vectors, part_rows(vectors, vectors[0].numel() if len(vectors) else 1))
    return torch.cat([measure(part.to(exact), dim=-1) for part in parts])


def part_rows(tensor: torch.Tensor, row_values: int) -> int:
    """How many rows of so many values are worked on at a time, where the tensor lies."""
    return max(1, _PART_VALUES.get(tensor.device.type, _PART_VALUES["cuda"]) // max(1, row_values))


def exact_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What lengths are computed in: float32, or the tensor's own dtype if that is wider."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


#: On a CPU in half precision an expert's rows are filled up to a multiple of this share of the mean: oneDNN compiles a
#: kernel for every number of rows, at 0.2 ms and up to a MiB each, and routers come up with every number there is.
_FILL_SHARE = 8


def forward_with_pairs(
    module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> tuple[torch.Tensor, Pairs]:
    """The experts' combined output (T, H), and what is known of each pair, in float32 or wider."""
    rows = sort_by_expert(index_TK, module.num_experts, tile_of(hidden_TH, index_TK, module.num_experts))

    def linear(inputs: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias")[rows.expert_R] if module.has_bias else None
        output: torch.Tensor = _grouped_linear(
            inputs, getattr(module, name), rows.ends_E, bias=bias, is_transposed=module.is_transposed
        )
        return output

    inner = linear(hidden_TH.index_select(0, rows.token_R), "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output_RH = linear(inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        output_RH = module.post_expert_norm(output_RH)
    sum_TH, *measured = _combine(output_RH, rows.row_TK, gates_TK)
    return sum_TH.to(hidden_TH.dtype), Pairs(index_TK, gates_TK, gates_TK, *measured)


@dataclass(frozen=True)
class Rows:
    """Pairs in the order of their experts: each row's token and expert, where each expert's rows end, each pair's row.

    Rows that only fill up have some token and some expert, and belong to no pair.
    """

    token_R: torch.Tensor
    expert_R: torch.Tensor
    ends_E: torch.Tensor
    row_TK: torch.Tensor


def tile_of(hidden_TH: torch.Tensor, index_TK: torch.Tensor, experts: int) -> int:
    """The number to a multiple of which experts' rows are filled up; 1 where nothing would be gained.

    In half precision a row's product does not depend on how many rows there are, bit for bit; in float32, which other
    kernels compute that are not compiled for each size, it does.
    """
    if hidden_TH.device.type != "cpu" or hidden_TH.dtype not in (torch.bfloat16, torch.float16):
        return 1
    return max(1, index_TK.numel() // experts // _FILL_SHARE)


def sort_by_expert(index_TK: torch.Tensor, experts: int, tile: int = 1) -> Rows:
    """Sort pairs by expert, with a multiple of `tile` rows for each; pairs of experts beyond the last come at the end.

    On a card nothing here waits for it, as long as `tile` is 1.
    """
    chosen = index_TK.shape[1]
    expert_P, order_P = torch.sort(index_TK.reshape(-1))
    # As the library counts: histc takes floats on the CPU and whole numbers on CUDA.
    countable_P = expert_P.float() if expert_P.device.type == "cpu" else expert_P.int()
    counts_E = torch.histc(countable_P, bins=experts, min=0, max=experts - 1)
    token_R, expert_R = order_P // chosen, expert_P
    row_P = torch.arange(order_P.numel(), device=order_P.device)
    if tile > 1:
        spare_E = -counts_E.long() % tile
        counts_E = counts_E + spare_E
        before = torch.nn.functional.pad(torch.cumsum(spare_E, dim=0), (1, 0))
        row_P = row_P + before[expert_P.clamp(max=experts)]
        filled = order_P.numel() + int(before[-1])
        token_R, expert_R = (
            torch.zeros(filled, dtype=torch.long).index_copy_(0, row_P, x) for x in (token_R, expert_R)
        )
    row_TK = torch.empty_like(order_P).index_copy_(0, order_P, row_P).view(index_TK.shape)
    return Rows(token_R, expert_R, torch.cumsum(counts_E, dim=0, dtype=torch.int32), row_TK)


def _combine(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gated sum (T, H) of each token's experts; the norms, peaks and cosines of all pairs, (T, K)."""
    tokens, chosen = row_TK.shape
    size = part_rows(output_RH, chosen * output_RH.shape[1])
    done = []
    for begin in range(0, tokens, size):
        gates = gates_TK[begin : begin + size]
        rows_TK = row_TK[begin : begin + size]
        output_TKH = output_RH.index_select(0, rows_TK.reshape(-1)).view(*rows_TK.shape, -1)
        wide_TKH = output_TKH.to(exact_dtype(output_TKH))
        length, peak = norms_and_peaks(wide_TKH)
        # In the model's own dtypes, as the library does it: these are the values that go on.
        gated_TKH = output_TKH * gates.unsqueeze(-1)
        sum_TH = gated_TKH.sum(dim=1)
        together = cosines(dots(wide_TKH, sum_TH) * gates, gates, length, norms(sum_TH))
        done.append((sum_TH, length, peak, together))
    return tuple(map(torch.cat, zip(*done, strict=True)))
