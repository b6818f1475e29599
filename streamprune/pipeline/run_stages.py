"""The stages through which each layer of a run goes: which there are follows from the settings."""

from __future__ import annotations

from collections.abc import Callable

from streamprune.calibration.sequences import MicroBatch
from streamprune.config import RunSettings
from streamprune.hardware.device import CPU
from streamprune.pipeline.output_target import OutputTarget
from streamprune.planning.prepare import PreparedModel
from streamprune.streaming.batches import Runtime
from streamprune.streaming.down_tensors import down_tensors
from streamprune.streaming.forward import PRUNED
from streamprune.streaming.imatrix_stage import ImatrixForwardStage
from streamprune.streaming.layer_errors import LayerErrors
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.quantize_stage import EncodeStage, QuantizeStage
from streamprune.streaming.refit_stage import RefitStage, own_use
from streamprune.streaming.refit_target import RefitTarget
from streamprune.streaming.stages import ForwardStage, PrunedForwardStage
from streamprune.streaming.written_tensors import WrittenTensors, written_tensors


def pruning_stages(
    runtime: Runtime,
    prepared: PreparedModel,
    first: ForwardStage,
    target: OutputTarget | None,
    errors: LayerErrors | None,
) -> list[ForwardStage]:
    """The stages after the `first`, which sends text through the original layers.

    With a `target` whatever is to be computed of the pruned layers, or summed in them, is; `errors` collects what they
    lose, if it is measured. Without any of it, no pruned layer runs.
    """
    settings, weights = runtime.settings, first.weights
    assert isinstance(settings, RunSettings)
    pruned_stream = target is not None and settings.propagate == "pruned"
    computes = target is not None and settings.sends_text
    if not pruned_stream and not computes and errors is None:
        return []
    written = None
    if settings.is_quantizing or computes:
        written = written_tensors(prepared, runtime.device)
    stages: list[ForwardStage] = []
    if computes and written is not None:
        if settings.refit:
            first.target = RefitTarget(weights)
        stages = computing_stages(runtime, settings, prepared, weights, written)
    forward = ImatrixForwardStage if computes and settings.imatrix is not None else PrunedForwardStage
    stages.append(forward(weights, prepared.pruned_layer, pruned_stream, errors=errors, written=written))
    return stages


# Seven parameters: a search has models and settings for each of its sides, of one pass.
def computing_stages(
    runtime: Runtime,
    settings: RunSettings,
    prepared: PreparedModel,
    weights: LayerWeights,
    written: WrittenTensors,
    side: str = PRUNED,
    use_of: Callable[[MicroBatch], str] = own_use,
) -> list[ForwardStage]:
    """The stages that compute what a side's layers become; `use_of` says what a micro-batch is for in them."""
    plan, make_pruned = runtime.plan, prepared.pruned_layer
    home = runtime.device if plan.place == "device" else CPU
    stages: list[ForwardStage] = []
    if settings.refit:
        stages.append(RefitStage(weights, make_pruned, down_tensors(prepared, written), home, side, use_of))
    if settings.needs_text:
        chunk = plan.experts_at_a_time
        stages.append(QuantizeStage(weights, make_pruned, written, home, chunk, side, lambda text: bool(use_of(text))))
    elif settings.refit and settings.is_quantizing:
        stages.append(EncodeStage(weights, written, side))
    return stages
