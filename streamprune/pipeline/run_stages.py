"""The stages through which each layer of a run goes: which there are follows from the settings."""

from __future__ import annotations

from streamprune.config import RunSettings
from streamprune.hardware.device import CPU
from streamprune.pipeline.output_target import OutputTarget
from streamprune.planning.prepare import PreparedModel
from streamprune.streaming.batches import Runtime
from streamprune.streaming.down_tensors import down_tensors
from streamprune.streaming.imatrix_stage import ImatrixForwardStage
from streamprune.streaming.layer_errors import LayerErrors
from streamprune.streaming.quantize_stage import EncodeStage, QuantizeStage
from streamprune.streaming.refit_stage import RefitStage
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
    stages = _computing_stages(runtime, prepared, first, written) if computes and written is not None else []
    forward = ImatrixForwardStage if computes and settings.imatrix is not None else PrunedForwardStage
    stages.append(forward(weights, prepared.pruned_layer, pruned_stream, errors=errors, written=written))
    return stages


def _computing_stages(
    runtime: Runtime, prepared: PreparedModel, first: ForwardStage, written: WrittenTensors
) -> list[ForwardStage]:
    settings, weights, plan = runtime.settings, first.weights, runtime.plan
    assert isinstance(settings, RunSettings)
    home = runtime.device if plan.place == "device" else CPU
    stages: list[ForwardStage] = []
    if settings.refit:
        first.target = RefitTarget(weights)
        stages.append(RefitStage(weights, prepared.pruned_layer, down_tensors(prepared, written), home))
    if settings.needs_text:
        stages.append(QuantizeStage(weights, prepared.pruned_layer, written, home, plan.experts_at_a_time))
    elif settings.is_quantizing:
        stages.append(EncodeStage(weights, written))
    return stages
