"""The one place for experts that do not take (hidden_states, top_k_index, top_k_weights).

Llama4TextExperts gets every token once per expert, already multiplied by its router score, with zero rows for the
experts that the token was not routed to. The model multiplies the experts' outputs by nothing, so the combine weight
is 1 and the score is the mean norm of what the expert adds. (Its own code runs every expert on every token.)
"""

from __future__ import annotations

import torch
from torch import nn

CLASSES = frozenset({"Llama4TextExperts"})


def routing(
    module: nn.Module, hidden_states: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen experts, combine weights and output norms, each (T, E), from a dense experts module's input and output.

    `hidden_states` and `output` are (E·T, H), expert by expert. An expert that was not chosen gets the index E.
    """
    experts = int(module.num_experts)  # type: ignore[arg-type]
    routed_TE = hidden_states.view(experts, -1, hidden_states.shape[-1]).any(dim=-1).T
    everyone_TE = torch.arange(experts, device=output.device).expand(routed_TE.shape)
    index_TE = torch.where(routed_TE, everyone_TE, experts)
    exact = torch.float64 if output.dtype == torch.float64 else torch.float32
    norms_TE = torch.linalg.vector_norm(output, dim=-1, dtype=exact).view(experts, -1).T
    return index_TE, torch.ones_like(norms_TE), torch.where(routed_TE, norms_TE, 0.0)
