"""One micro-batch of one layer as the scoring pass computes it, under a magnifying glass.

The layer is loaded by the product's own loader and run by its own stream, within the model's own forward.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from measuring.milliseconds import TIMES, milliseconds
from measuring.processes import Job
from measuring.products import measure_products
from measuring.watching import SyncWarnings
from streamprune.common_settings import DEFAULT_BATCH_TOKENS
from streamprune.config import RunSettings
from streamprune.planning.prepare import calibrate, plan_pruning, prepare
from streamprune.saliency import combine
from streamprune.saliency import statistics as recording
from streamprune.saliency.hooks import ExpertsTap, recorded_width, sort_by_expert, tap_experts
from streamprune.saliency.statistics import ExpertStatistics
from streamprune.streaming.forward import LayerForward, non_finite_tokens
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState

#: Values that are worked on at a time behind the products: what is tried.
PART_VALUES = tuple(1 << power for power in (20, 22, 23, 24, 25))
KERNELS, NAME_LENGTH = 25, 80
#: Operations of the host in which it waits for the GPU, or may.
WAITING = ("Synchronize", "cudaMemcpy", "cudaMalloc", "cudaFree", "aten::item", "_local_scalar_dense", "aten::nonzero")


@dataclass
class Layer:
    """A loaded layer with one micro-batch before it, and all that it takes to run it as the scoring pass does."""

    stream: LayerForward
    module: nn.Module
    experts: nn.Module
    tap: ExpertsTap
    ids: torch.Tensor
    before: BatchState
    index: int
    total: ExpertStatistics
    device: torch.device

    def record(self) -> torch.Tensor:
        """The micro-batch with what is recorded, from its token ids to the sums. Call it within `listening`."""
        _, _, count = self.total.values.shape
        width = self.total.channels.shape[-1] if self.total.channels is not None else None
        self.tap.statistics = ExpertStatistics(count, self.device, width=width)
        ids = self.ids.to(self.device, non_blocking=True)
        after = self.stream.run_layer(self.index, self.module, ids, self.before)
        non_finite_tokens(after)
        self.total.merge(self.tap.statistics, 0)
        return _hidden(after)

    def plain(self) -> torch.Tensor:
        """The micro-batch by transformers' own grouped experts, with nothing recorded."""
        config: Any = self.experts.config
        before, config._experts_implementation = config._experts_implementation, "grouped_mm"
        try:
            ids = self.ids.to(self.device, non_blocking=True)
            return _hidden(self.stream.run_layer(self.index, self.module, ids, self.before))
        finally:
            config._experts_implementation = before

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record what goes through the layer meanwhile."""
        with self.tap.listening(self.module):
            yield

    def recorded(self) -> torch.Tensor:
        """`record` by itself."""
        with self.listening():
            return self.record()


def profile_layer(job: Job, settings: RunSettings) -> dict[str, Any]:
    """All figures of one layer. A step that fails leaves its error in the place of its figures, and costs no other."""
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    figures: dict[str, Any] = {}
    with _loaded(settings, device) as layer:
        sequences, length = layer.ids.shape
        figures |= {"tokens": sequences * length, "sequence_length": length, "layer": layer.index}
        steps: dict[str, Callable[[Layer], Any]] = {
            "outputs": _outputs, "timing": _timing, "part_sizes": _part_sizes, "sync_warnings": _sync,
            "kernels": _kernels, "products": _products,
        }  # fmt: skip
        for name, step in steps.items():
            try:
                figures[name] = step(layer)
            except Exception as error:
                figures[name] = {"error": f"{type(error).__name__}: {error}"[-1000:]}
        if device.type == "cuda":
            figures["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures


@contextmanager
def _loaded(settings: RunSettings, device: torch.device) -> Iterator[Layer]:
    """The second layer (the only one, where there is one), behind the first, with as many tokens as a run takes."""
    from streamprune.progress import Busy

    plan = plan_pruning(settings)
    prepared, calibration = prepare(settings, plan), calibrate(settings, plan)
    skeleton = prepared.skeleton
    taps = tap_experts({i: skeleton.layers[i].get_submodule(path) for i, path in skeleton.experts.items()})
    weights = LayerWeights(prepared, device, Busy(), prefetch=False)
    ids = calibration.micro_batches(DEFAULT_BATCH_TOKENS["cpu" if device.type == "cpu" else "gpu"])[0].ids
    index = min(1, len(skeleton.layers) - 1)
    with ExitStack() as stack:
        stack.callback(weights.close)
        weights.load_non_layer_weights()
        before = BatchState()
        if index:
            with weights.layer(0) as first:
                before = weights.forward.run_layer(0, first, ids.to(device), before)
        module = stack.enter_context(weights.layer(index))
        experts = module.get_submodule(skeleton.experts[index])
        total = ExpertStatistics(prepared.layout.spec.count, device, width=recorded_width(skeleton))
        yield Layer(weights.forward, module, experts, taps[index], ids, before, index, total, device)


def _outputs(layer: Layer) -> dict[str, Any]:
    """How far what a recording layer gives is from the plain one, of the layer and of its experts alone."""
    found: list[torch.Tensor] = []
    hook = layer.experts.register_forward_hook(lambda _, given, output: found.append(output))
    try:
        whole = [layer.recorded(), layer.recorded(), layer.plain(), layer.plain()]
    finally:
        hook.remove()
    return {name: _compared(*outputs) for name, outputs in (("layer", whole), ("experts", found))}


def _compared(one: torch.Tensor, again: torch.Tensor, plain: torch.Tensor, plain_again: torch.Tensor) -> dict[str, Any]:
    difference, wide = (one.float() - plain.float()).abs(), plain.float().abs()
    return {
        "max_difference_over_max": float(difference.max() / wide.max()),
        "mean_difference_over_mean": float(difference.mean() / wide.mean()),
        "same_to_the_bit": torch.equal(one, plain),
        "recorded_twice_the_same_to_the_bit": torch.equal(one, again),
        "plain_twice_the_same_to_the_bit": torch.equal(plain, plain_again),
    }


def _timing(layer: Layer) -> dict[str, Any]:
    plain = milliseconds(layer.plain, layer.device)
    with layer.listening():
        recording = milliseconds(layer.record, layer.device)
        submitting = _host_milliseconds(layer)
        with _without_kernel():
            by_torch = milliseconds(layer.record, layer.device)
    return {
        "submitting_ms": submitting,
        "plain_ms": plain,
        "recording_ms": recording,
        "recording_by_torch_ms": by_torch,
        "recording_over_plain": round(statistics.median(recording) / statistics.median(plain), 4),
        "recording_by_torch_over_plain": round(statistics.median(by_torch) / statistics.median(plain), 4),
        # Whether recording used our kernel, and why.
        "pair_kernel": combine.choices(),
    }


def _without_kernel() -> Any:
    """Within the context, torch combines the experts' outputs, whether or not our kernel could."""
    return patch.object(combine, "FEWEST_VALUES", sys.maxsize)


def _host_milliseconds(layer: Layer) -> float:
    """Milliseconds that the host takes to submit a recording micro-batch: where the GPU needs less, the GPU waits."""
    on_gpu = layer.device.type == "cuda"
    found = []
    for _ in range(TIMES[layer.device.type]):
        begun = time.perf_counter()
        layer.record()
        found.append((time.perf_counter() - begun) * 1000)
        if on_gpu:
            torch.cuda.synchronize(layer.device)
    return round(statistics.median(found), 3)


def _part_sizes(layer: Layer) -> dict[str, Any]:
    """Milliseconds of a recording micro-batch, by torch, for several sizes of the parts behind the products."""
    name = "CPU_PART_VALUES" if layer.device.type == "cpu" else "GPU_PART_VALUES"
    usual = getattr(recording, name)
    answer: dict[str, Any] = {"usual": usual, "ms": {}}
    try:
        for values in PART_VALUES:
            setattr(recording, name, values)
            with layer.listening(), _without_kernel():
                each = milliseconds(layer.record, layer.device, 1 if layer.device.type == "cpu" else 5)
            answer["ms"][str(values)] = statistics.median(each)
    finally:
        setattr(recording, name, usual)
    return answer


def _products(layer: Layer) -> dict[str, Any]:
    """The first product of the experts in several ways: with as many rows for each as this micro-batch has."""
    seen: list[torch.Tensor] = []
    hook = layer.experts.register_forward_pre_hook(lambda _, given: seen.extend(given[:2]))
    try:
        layer.plain()
    finally:
        hook.remove()
    hidden_TH, index_TK = seen[0].flatten(0, -2), seen[1]
    weight: Any = layer.experts.gate_up_proj
    rows = sort_by_expert(index_TK, len(weight))
    dtypes = (torch.bfloat16, torch.float16) if layer.device.type == "cuda" else (weight.dtype,)
    return measure_products(hidden_TH.index_select(0, rows.token_R), weight.detach(), rows.ends_E, dtypes)


def _sync(layer: Layer) -> dict[str, Any]:
    with SyncWarnings(str(layer.device)) as heard:
        layer.recorded()
    return heard.counts()


def _kernels(layer: Layer) -> dict[str, Any]:
    """What one recording micro-batch takes: kernels on a GPU, operators on a CPU; and where the host waits."""
    on_gpu = layer.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as profiler:
        layer.recorded()
        if on_gpu:
            torch.cuda.synchronize(layer.device)
    events = profiler.key_averages()
    cpu = [event for event in events if event.device_type.name == "CPU"]
    busy = [event for event in events if event.device_type.name == "CUDA"] if on_gpu else cpu
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(busy, key=lambda event: -float(getattr(event, spent)))
    waiting = [event for event in cpu if any(word in event.key for word in WAITING)]
    return {
        "total_ms": round(sum(float(getattr(event, spent)) for event in rows) / 1000, 3),
        "calls": sum(event.count for event in rows),
        "top": [_row(event, spent) for event in rows[:KERNELS]],
        "waiting": [_row(event, "cpu_time_total") for event in sorted(waiting, key=lambda each: -each.cpu_time_total)],
    }


def _row(event: Any, spent: str) -> list[Any]:
    """Name, milliseconds in all, calls."""
    return [event.key[:NAME_LENGTH], round(float(getattr(event, spent)) / 1000, 3), event.count]


def _hidden(state: BatchState) -> torch.Tensor:
    output = state.output
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def settings_for_profile(settings: RunSettings) -> RunSettings:
    """The settings of a scoring pass, whatever the others are: nothing is pruned, and nothing is written."""
    return replace(settings, keep=None, only_score=True)
