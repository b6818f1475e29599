"""Experts computed as transformers' grouped_mm implementation does, with what is recorded of every pair on the way.

Step for step the arithmetic of `transformers.integrations.moe.grouped_mm_experts_forward`, so that the result is the
same bit for bit, at the cost of three passes over the outputs. `saliency` keeps a slower path that needs to know
nothing of these steps; tests hold the two against each other, and both against the whole model.

Shapes: T tokens, K experts chosen per token, P = T·K pairs, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import _grouped_linear

from streamprune.streaming.lengths import dots, norms, norms_and_peaks
from streamprune.streaming.statistics import Pairs, cosines


def forward_with_pairs(
    module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> tuple[torch.Tensor, Pairs]:
    """The experts' combined output (T, H), and what is known of each pair, in float32 or wider."""
    tokens, chosen = index_TK.shape
    expert_P, order_P = torch.sort(index_TK.reshape(-1))
    # As the library counts: histc takes floats on the CPU and whole numbers on CUDA.
    countable_P = expert_P.float() if expert_P.device.type == "cpu" else expert_P.int()
    counts_E = torch.histc(countable_P, bins=module.num_experts, min=0, max=module.num_experts - 1)
    ends_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)

    def linear(inputs: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias")[expert_P] if module.has_bias else None
        output: torch.Tensor = _grouped_linear(
            inputs, getattr(module, name), ends_E, bias=bias, is_transposed=module.is_transposed
        )
        return output

    inner = linear(hidden_TH[order_P // chosen], "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output_PH = linear(inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        output_PH = module.post_expert_norm(output_PH)

    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    norms_TK, peaks_TK = (found[place_P].view(tokens, chosen) for found in norms_and_peaks(output_PH))
    gated_TKH = (output_PH * gates_TK.reshape(-1)[order_P].unsqueeze(-1))[place_P].view(tokens, chosen, -1)
    sum_TH = gated_TKH.sum(dim=1)
    cosines_TK = cosines(dots(gated_TKH, sum_TH), gates_TK, norms_TK, norms(sum_TH))
    return sum_TH.to(hidden_TH.dtype), Pairs(index_TK, gates_TK, gates_TK, norms_TK, peaks_TK, cosines_TK)
