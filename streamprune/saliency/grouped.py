"""Experts computed as transformers' grouped_mm implementation does, with what is recorded of every pair on the way.

The arithmetic of `transformers.integrations.moe.grouped_mm_experts_forward`, value by value, so that the result is the
same bit for bit; what follows the matrix products is done in parts of the tokens that stay in the caches. `hooks` has a
slower path that needs to know nothing of these steps; tests compare the two, and both with the model run at once.

Shapes: T tokens, K experts chosen per token, P = T·K pairs, R rows (the pairs, and what fills up), H hidden size, E
experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.moe import _grouped_linear

from streamprune.saliency.statistics import Pairs, measure, part_rows

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

    On a GPU nothing here waits for it, as long as `tile` is 1.
    """
    chosen = index_TK.shape[1]
    expert_P, order_P = torch.sort(index_TK.reshape(-1))
    # As the library counts: histc takes floats on the CPU and whole numbers on CUDA.
    countable_P = expert_P.float() if expert_P.device.type == "cpu" else expert_P.int()
    counts_E = torch.histc(countable_P, bins=experts, min=0, max=experts - 1)
    token_R, expert_R = order_P // chosen, expert_P
    row_P = torch.arange(order_P.numel(), device=order_P.device)
    if tile > 1:
        fill_E = -counts_E.long() % tile
        counts_E = counts_E + fill_E
        before = torch.nn.functional.pad(torch.cumsum(fill_E, dim=0), (1, 0))
        row_P = row_P + before[expert_P.clamp(max=experts)]
        filled = order_P.numel() + int(before[-1])
        token_R, expert_R = (
            torch.zeros(filled, dtype=torch.long).index_copy_(0, row_P, values) for values in (token_R, expert_R)
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
        # In the model's own dtypes, as the library does it: these are the values that go on.
        sum_TH = (output_TKH * gates.unsqueeze(-1)).sum(dim=1)
        done.append((sum_TH, *measure(output_TKH, gates, sum_TH)))
    return tuple(map(torch.cat, zip(*done, strict=True)))
