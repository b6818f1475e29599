"""Scoring: what every expert contributes to its layer's output, summed while the model's own forward runs.

REAP (Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv:2510.13999):
the saliency of expert j is the mean, over the tokens routed to j, of g_j(x) · ‖f_j(x)‖₂. Where the experts work in a
latent space (Nemotron-H), f_j is their output there, before the projection back.

Shapes: T tokens, K experts chosen per token, E experts, H hidden size, P = T·K pairs of a token and a chosen expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from streamprune.errors import UnsupportedModelError
from streamprune.source.skeleton import dispatches_experts
from streamprune.streaming import dense_experts, grouped_experts

#: The name under which transformers' experts interface knows our forward.
IMPLEMENTATION = "streamprune"


class ExpertStatistics:
    """Sums per expert of one layer, on the layer's device.

    `counts` (E,) int64: tokens routed to each expert. `gated_norms` (E,) float64: Σ g·‖f‖₂ over those tokens.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.counts = torch.zeros(count, dtype=torch.int64, device=device)
        self.gated_norms = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, index_TK: torch.Tensor, gates_TK: torch.Tensor, norms_TK: torch.Tensor) -> None:
        """Add T tokens: chosen experts (int), combine weights and output norms (float), each (T, K).

        An index of E or more stands for no expert (zero-computation experts, padding) and is not counted.
        """
        experts = self.counts.numel()
        # One row per token, at most one value per cell: the sums are taken in a fixed order, so that they are the same
        # in every run, which scatter_add on a GPU would not grant.
        shape = (index_TK.shape[0], experts + 1)
        column_TK = index_TK.clamp(max=experts)
        values = torch.zeros(shape, dtype=torch.float64, device=index_TK.device)
        values.scatter_(1, column_TK, gates_TK.double() * norms_TK.double())
        self.gated_norms += values.sum(0)[:experts]
        chosen = torch.zeros(shape, dtype=torch.bool, device=index_TK.device).scatter_(1, column_TK, True)
        self.counts += chosen.sum(0)[:experts]

    def merge(self, other: ExpertStatistics) -> None:
        """Add the sums of another, which was collected apart. Needs no memory, so that it cannot fail half-way."""
        self.counts += other.counts
        self.gated_norms += other.gated_norms

    def as_json(self) -> dict[str, list[Any]]:
        """The sums as JSON, exact to the bit."""
        return {"counts": self.counts.tolist(), "gated_norms": [value.hex() for value in self.gated_norms.tolist()]}

    def set_json(self, sums: Mapping[str, list[Any]]) -> None:
        """Take over sums from `as_json`. ValueError, KeyError or TypeError where they are not such."""
        norms = [float.fromhex(value) for value in sums["gated_norms"]]
        counts = sums["counts"]
        if not len(norms) == len(counts) == len(self.counts):
            raise ValueError(f"sums of {len(counts)} experts, not of {len(self.counts)}")
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError("counts that are no numbers of tokens")
        if not all(math.isfinite(norm) and norm >= 0 for norm in norms):
            raise ValueError("sums that no norms can have")
        self.counts.copy_(torch.tensor(counts, dtype=torch.int64))
        self.gated_norms.copy_(torch.tensor(norms, dtype=torch.float64))

    def reap(self) -> torch.Tensor:
        """REAP scores, (E,) float64 on the CPU; 0 for an expert that no token was routed to."""
        return (self.gated_norms / self.counts.clamp(min=1)).cpu()


@dataclass
class ExpertsTap:
    """Listens to one experts module. `plain` is the forward the module had; `statistics` None means nobody listens.

    `grouped` says that `plain` is transformers' grouped_mm implementation, whose steps `grouped_experts` takes too, so
    that norms cost nearly nothing. Otherwise `plain` is run a second time for them.
    """

    plain: Callable[..., torch.Tensor]
    grouped: bool
    statistics: ExpertStatistics | None = None


def tap_experts(modules: Mapping[int, nn.Module]) -> dict[int, ExpertsTap]:
    """Make experts modules (by block) report to the returned taps. Their outputs stay the same bit for bit.

    Modules that dispatch through transformers' experts interface are switched to our entry in it, which no fused
    kernel bypasses; the others (older ones, which loop over their experts) get our forward in place of their own.
    """
    taps = {block: _make_tap(module) for block, module in modules.items()}
    for block, module in modules.items():
        module._streamprune_tap = taps[block]  # type: ignore[assignment]
        if dispatches_experts(module):
            module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
        else:
            module.forward = functools.partial(_tapped_forward, module)
    return taps


def _make_tap(module: nn.Module) -> ExpertsTap:
    earlier = getattr(module, "_streamprune_tap", None)
    if earlier is not None:
        # Tapped before: by now the module's own forward is ours.
        return ExpertsTap(earlier.plain, earlier.grouped)
    if not dispatches_experts(module):
        return ExpertsTap(type(module).forward, grouped=False)
    implementation = module.config._experts_implementation  # type: ignore[union-attr]
    if implementation in ALL_EXPERTS_FUNCTIONS:
        plain = ALL_EXPERTS_FUNCTIONS[implementation]
        return ExpertsTap(plain, grouped=plain is grouped_mm_experts_forward)
    return ExpertsTap(type(module).forward.__wrapped__, grouped=False)  # type: ignore[attr-defined]


def _tapped_forward(
    module: Any, hidden_states: torch.Tensor, *routing: torch.Tensor, **named: torch.Tensor
) -> torch.Tensor:
    """What an experts module runs once it is tapped: its plain forward, and the statistics if somebody listens."""
    tap: ExpertsTap = module._streamprune_tap
    statistics = tap.statistics
    if statistics is None:
        return tap.plain(module, hidden_states, *routing, **named)
    if type(module).__name__ in dense_experts.CLASSES:
        output = tap.plain(module, hidden_states)
        statistics.add(*dense_experts.routing(module, hidden_states, output))
        return output
    index_TK, gates_TK = (*routing, *(named[name] for name in ("top_k_index", "top_k_weights") if name in named))
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    if gates_TK.shape != index_TK.shape or len(index_TK) != len(hidden_TH):
        raise UnsupportedModelError(
            f"{type(module).__name__} got weights {list(gates_TK.shape)} for chosen experts {list(index_TK.shape)} and "
            f"{len(hidden_TH)} tokens; they should agree. Please report this model."
        )
    if tap.grouped and not getattr(module, "_is_expert_parallel", False):
        output, norms_TK = grouped_experts.forward_with_norms(module, hidden_TH, index_TK, gates_TK)
        statistics.add(index_TK, gates_TK, norms_TK)
        return output
    statistics.add(index_TK, gates_TK, bare_norms(tap, module, hidden_TH, index_TK, gates_TK))
    return tap.plain(module, hidden_states, *routing, **named)


def bare_norms(
    tap: ExpertsTap, module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The norm of every chosen expert's bare output, (T, K), through the module's own forward.

    Each pair of a token and a chosen expert is given to it as a token of its own with weight one, so that its code
    gives every expert's output with whatever biases, clamps or norms it applies.
    """
    outputs_PH = tap.plain(
        module,
        hidden_TH.repeat_interleave(index_TK.shape[1], dim=0),
        index_TK.reshape(-1, 1),
        torch.ones_like(gates_TK).reshape(-1, 1),
    ).reshape(-1, hidden_TH.shape[-1])
    exact = torch.float64 if outputs_PH.dtype == torch.float64 else torch.float32
    norms_P: torch.Tensor = torch.linalg.vector_norm(outputs_PH, dim=-1, dtype=exact)
    return norms_P.view(index_TK.shape)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _tapped_forward)
