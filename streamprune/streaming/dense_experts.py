"""The one place for experts that do not take (hidden_states, top_k_index, top_k_weights).

Llama4TextExperts gets every token once per expert, already multiplied by its router score, with zero rows for the
experts that the token was not routed to. The model multiplies the experts' outputs by nothing, so the combine weight
is 1 and the score is the mean norm of what the expert adds. (Its own code runs every expert on every token.)
"""

from __future__ import annotations

import torch
from torch import nn

from streamprune.streaming.lengths import dots, norms, peaks
from streamprune.streaming.statistics import Pairs, cosines


def pairs(module: nn.Module, hidden_states: torch.Tensor, output: torch.Tensor) -> Pairs:
    """Every token paired with every expert, (T, E), from a dense experts module's input and output.

    `hidden_states` and `output` are (E·T, H), expert by expert. An expert that was not chosen gets the index E.
    """
    experts = int(module.num_experts)  # type: ignore[arg-type]
    hidden_TEH, output_TEH = (
        tensor.view(experts, -1, tensor.shape[-1]).transpose(0, 1) for tensor in (hidden_states, output)
    )
    routed_TE = hidden_TEH.any(dim=-1)
    everyone_TE = torch.arange(experts, device=output.device).expand(routed_TE.shape)
    index_TE = torch.where(routed_TE, everyone_TE, experts)
    norms_TE = torch.where(routed_TE, norms(output_TEH), 0.0)
    gates_TE = torch.ones_like(norms_TE)
    sum_TH = output_TEH.sum(dim=1)
    # The rows of a token are its hidden state times the scores, whose order their norms therefore keep.
    ranks_TE = norms(hidden_TEH)
    together_TE = cosines(dots(output_TEH, sum_TH), gates_TE, norms_TE, norms(sum_TH))
    return Pairs(index_TE, gates_TE, ranks_TE, norms_TE, peaks(output_TEH), together_TE)
