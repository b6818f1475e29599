"""How a layer's experts reach its output, which decides what their refit can aim at.

If the layer adds their output to the residual stream as it is, or times a constant, the refit can aim at the layer's
whole output, and mend what earlier layers left there. If there is something else behind the experts (a norm), it aims
at their own output, which is then carried in a side of its own beside those of the two models. Which of the two it is
is measured: what is added to the experts' output must appear in the layer's output, for all tokens and values alike.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from streamprune.calibration.sequences import MicroBatch
from streamprune.refit.activations import down_sizes, output_shifted
from streamprune.streaming.forward import LayerForward, hidden_states_of
from streamprune.work.saved_states import BatchState

#: The side with the output of the original layer's experts.
EXPERTS = "experts"
#: How far the change of a layer's output may be from a constant times the change of its experts' output.
_MOST_DEVIATION = 0.02
#: Measured factors this close to 1 are taken as 1: with half precision that is the measurement's error.
_NEAR_ONE = 0.01


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

    s is a power of two, and about twice the largest value of the layer's output (..., H), so that it is not lost in the
    rounding of half precision, and that a norm behind the experts cannot hide.
    """
    signs = torch.randint(0, 2, (output.shape[-1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    largest = max(float(output.abs().amax()), torch.finfo(torch.float32).tiny)
    return (signs * 2.0 ** (math.floor(math.log2(largest)) + 1)).to(output.device)


def factor_of(output: torch.Tensor, shifted: torch.Tensor, shift: torch.Tensor) -> float | None:
    """The constant f with shifted - output = f x shift, for all tokens; None if there is none.

    `output` and `shifted` (..., H) are a layer's outputs without and with the shift of its experts' output.
    """
    ratios = (shifted.float() - output.float()) / shift
    factor = float(ratios.mean())
    deviation = float((ratios - factor).abs().amax())
    if not deviation <= _MOST_DEVIATION * abs(factor):
        return None
    return 1.0 if abs(factor - 1) < _NEAR_ONE else factor
