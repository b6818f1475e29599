"""How a layer's experts reach its output, which decides what their refit can aim at.

If the layer adds their output to the residual stream as it is, or times a constant, the refit can aim at the layer's
whole output, and mend what earlier layers left there. If there is something else behind the experts (a norm), it aims
at their own output, which is then carried in a side of its own, next to those of the two models. Which of the two it is
is measured: what is added to the experts' output must appear in the layer's output, for all tokens and values alike.

It is measured once in a layer, by rank 0, on the first sequence of all, before anything else goes through the original
layer. So it does not depend on micro-batches and processes, and what is saved with the states says it after a stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from streamprune.calibration.sequences import MicroBatch
from streamprune.distributed.processes import Processes
from streamprune.models.skeleton import Skeleton
from streamprune.refit.activations import ExpertsCall, down_sizes, listening, output_shifted
from streamprune.streaming.forward import (
    ORIGINAL,
    LayerForward,
    hidden_states_of,
    side_of,
    with_side,
    without_side,
)
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState

#: The side with the output of the original layer's experts.
EXPERTS = "experts"
#: How far the change of a layer's output may be from a constant times the change of its experts' output, besides what
#: rounding explains; and how far in all.
_MOST_DEVIATION, _MOST_WITH_ROUNDING = 0.02, 0.2
#: Measured factors this close to 1 are taken as 1: with half precision that is the measurement's error.
_NEAR_ONE = 0.01


class RefitTarget:
    """What the refit of the current layer aims at, and the states that need it. Used by the original layer's stage."""

    def __init__(self, weights: LayerWeights) -> None:
        assert isinstance(weights.decoder, Skeleton)
        self._weights, self._paths = weights, weights.decoder.experts
        #: The factor of the current layer (see `measured_factor`), once it is known.
        self.factor: float | None = None
        self._known = False

    def decide(self, index: int, layer: nn.Module, processes: Processes) -> None:
        """Measure the factor of the loaded, original layer `index`, unless it is known; all ranks get that of rank 0.

        Raises ResourceError if memory runs out.
        """
        if not self._known and index in self._paths:
            self.factor = processes.on_first(lambda: self._measure(index, layer))
            self._known = True

    def listening(self, index: int, layer: nn.Module, batch: MicroBatch) -> AbstractContextManager[list[ExpertsCall]]:
        """Within the context, the list gets what `carried` needs."""
        carries = bool(batch.refit) and self._known and self.factor is None
        return listening(layer.get_submodule(self._paths[index])) if carries else nullcontext([])

    def carried(self, state: BatchState, calls: list[ExpertsCall]) -> BatchState:
        """The state after the layer, with its experts' output in a side of its own if the refit aims at that."""
        return with_side(state, EXPERTS, BatchState(calls[0].output)) if calls else without_side(state, EXPERTS)

    def reset(self) -> None:
        """Forget the current layer."""
        self._known, self.factor = False, None

    def saved(self) -> dict[str, Any]:
        """What is known of the current layer, as JSON."""
        return {"refit_factor": [self.factor] if self._known else []}

    @staticmethod
    def check(facts: Mapping[str, Any]) -> None:
        """Raise ValueError, KeyError or TypeError unless `facts` may have the result of `saved`."""
        for factor in facts["refit_factor"]:
            if factor is not None and not (type(factor) is float and factor and math.isfinite(factor)):
                raise ValueError("its factor of the experts' output is not valid")

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Restore what was saved."""
        known = facts["refit_factor"]
        self._known, self.factor = bool(known), known[0] if known else None

    def _measure(self, index: int, layer: nn.Module) -> float | None:
        weights, batches = self._weights, self._weights.batches
        assert batches is not None
        experts = layer.get_submodule(self._paths[index])

        def measure() -> AbstractContextManager[float | None]:
            batch, state = batches.first_sequence()
            before = side_of(state, ORIGINAL) if batch.two_sided else state
            return nullcontext(measured_factor(weights.forward, index, layer, experts, batch, before))

        with weights.making_room(
            measure, f"a sequence to see what layer {index} does with its experts' output"
        ) as found:
            return found


def measured_factor(
    forward: LayerForward, index: int, layer: nn.Module, experts: nn.Module, batch: MicroBatch, before: BatchState
) -> float | None:
    """What layer `index` multiplies its experts' output by before it adds it to the residual stream.

    None if it does not do that. `before` is the state that enters it. Takes two forwards of the micro-batch.
    """
    output = hidden_states_of(forward.run_layer(index, layer, batch.ids, before))
    if output.shape[-1] != down_sizes(experts)[1] or output.numel() != batch.ids.numel() * output.shape[-1]:
        return None
    shift = shift_for(output)
    with output_shifted(experts, shift):
        shifted = hidden_states_of(forward.run_layer(index, layer, batch.ids, before))
    return factor_of(output, shifted, shift)


def shift_for(output: torch.Tensor) -> torch.Tensor:
    """What is added to the experts' output to see what becomes of it: ±s for each of H values, float32.

    s is a power of two, and four to eight times the largest value of the layer's output (..., H) if its dtype can hold
    that, so that it is not lost in the rounding of half precision, and that a norm behind the experts cannot hide.
    """
    signs = torch.randint(0, 2, (output.shape[-1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    largest = max(float(output.abs().amax()), torch.finfo(torch.float32).tiny)
    exponent = min(math.floor(math.log2(largest)) + 3, math.floor(math.log2(torch.finfo(output.dtype).max)) - 2)
    return (signs * 2.0**exponent).to(output.device)


def factor_of(output: torch.Tensor, shifted: torch.Tensor, shift: torch.Tensor) -> float | None:
    """The constant f with shifted - output = f x shift, for all tokens; None if there is none.

    `output` and `shifted` (..., H) are a layer's outputs without and with the shift of its experts' output.
    """
    ratios = (shifted.float() - output.float()) / shift
    factor = float(ratios.mean())
    deviation = float((ratios - factor).abs().amax())
    # Rounding: of the experts' output, of its product with the factor, and of two sums with the rest of the layer's
    # output, which is at most the shift if that would overflow otherwise.
    rest = float((output.float() / shift).abs().amax())
    rounding = torch.finfo(output.dtype).eps * (2 * abs(factor) + 2 * rest)
    allowed = _MOST_DEVIATION * abs(factor) + rounding
    if not (deviation <= allowed and allowed <= _MOST_WITH_ROUNDING * abs(factor) and factor):
        return None
    return 1.0 if abs(factor - 1) < _NEAR_ONE else factor
