"""What enters the down projections of an experts module: the tokens routed to each expert, and their activations.

For modules that dispatch through transformers' experts interface, whose attributes say how their weights lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamprune.models.skeleton import dispatches_experts

#: The last part of the name of the parameter with all down projections of a layer.
DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertsCall:
    """One call of an experts module: its input (T, H), the chosen experts and their weights (T, K), and its output."""

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    output: torch.Tensor


def why_unseen(module: nn.Module) -> str | None:
    """Why what enters each of these experts cannot be seen; None if it can."""
    if dispatches_experts(module):
        return None
    return (
        f"{type(module).__name__} does not run through transformers' experts interface, so its activations cannot be "
        "seen"
    )


def why_not_linear(module: nn.Module) -> str | None:
    """Why a layer's output is not linear in these experts' down projections, as far as can be seen; None if it is."""
    name, unseen = type(module).__name__, why_unseen(module)
    if unseen is not None:
        return unseen
    down = getattr(module, DOWN, None)
    if not isinstance(down, torch.Tensor) or down.dim() != 3:
        return f"{name} has no {DOWN} of all experts"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} has a norm behind each expert's down projection"
    return None


def down_sizes(module: Any) -> tuple[int, int]:
    """The intermediate size of each expert, and the size of its output."""
    _, first, second = module.down_proj.shape
    return (first, second) if module.is_transposed else (second, first)


def activation(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """The input (n, I) of an expert's down projection, before the gate weight, for inputs (n, H) of the module.

    The same steps as in transformers' forward of the module, for one expert.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    inner = nn.functional.linear(hidden, weight.T if module.is_transposed else weight, bias)
    activated: torch.Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return activated


@contextmanager
def listening(module: nn.Module) -> Iterator[list[ExpertsCall]]:
    """Within the context, every call of the module is added to the list. Changes nothing of the computation."""
    calls: list[ExpertsCall] = []

    def record(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> None:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | named
        hidden = given["hidden_states"]
        # Copies, since the layer may go on to change both in place.
        flat, output = (each.reshape(-1, each.shape[-1]).clone() for each in (hidden, output))
        calls.append(ExpertsCall(flat, given["top_k_index"], given["top_k_weights"], output))

    hook = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def output_shifted(module: nn.Module, shift: torch.Tensor) -> Iterator[None]:
    """Within the context, the module returns its output plus `shift` (H,), in the output's dtype."""

    def add(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + shift.to(output.dtype)

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
