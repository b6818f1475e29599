"""What a model really takes on a GPU: load it, run a prompt of the planned length, and read torch and NVML."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from streamprune.errors import ResourceError, SettingsError
from streamprune.fit.estimate import KV_CACHE, PREFILL_CHUNK, STATE, Estimate
from streamprune.hardware.device import (
    allocated_device_bytes,
    choose_device,
    is_gpu,
    most_allocated_device_bytes,
    most_reserved_device_bytes,
    reserved_device_bytes,
    reset_device_peaks,
)
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.nvml import gpu_of_device

#: The measured counterpart of all weight terms together.
ALL_WEIGHTS = "weights"


class Meter(Protocol):
    """Where the figures come from: torch's allocator, and NVML for everything on the GPU."""

    def allocated(self) -> int: ...
    def forget_peaks(self) -> None: ...
    def peak_allocated(self) -> int: ...
    def peak_reserved(self) -> int: ...
    def reserved(self) -> int: ...
    def on_gpu(self) -> int | None: ...


class CudaMeter:
    """The figures of one CUDA device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """What tensors hold now."""
        return allocated_device_bytes(self._device)

    def forget_peaks(self) -> None:
        """Count peaks from here on, with nothing in reserve."""
        reset_device_peaks(self._device)

    def peak_allocated(self) -> int:
        """The most that tensors have held since `forget_peaks`."""
        return most_allocated_device_bytes(self._device)

    def reserved(self) -> int:
        """What torch has reserved on the GPU now, tensors included."""
        return reserved_device_bytes(self._device)

    def peak_reserved(self) -> int:
        """The most that torch has reserved on the GPU since `forget_peaks`."""
        return most_reserved_device_bytes(self._device)

    def on_gpu(self) -> int | None:
        """What is in use on the GPU by all processes, from NVML; None where NVML does not answer."""
        gpu = gpu_of_device(self._device.index or 0)
        return gpu.used_bytes if gpu is not None and gpu.source != "torch" else None


@dataclass(frozen=True)
class Measured:
    """One term, or several together, as predicted and as measured, in bytes."""

    name: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """How far the prediction is off, relative to what was measured; negative where it is too small."""
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0


def measure(folder: str, estimate: Estimate, device_name: str, trust_remote_code: bool = False) -> tuple[Measured, ...]:
    """Load the model in `folder` onto a CUDA device, run the prompt that `estimate` was made for, and compare.

    Raises SettingsError without a CUDA device or for weights in another form than they are stored in, ResourceError
    when the GPU runs out of memory.
    """
    if estimate.use.weights_dtype != "source" or estimate.use.kv_dtype != "auto" or estimate.use.keep is not None:
        raise SettingsError("--measure loads the model as it is: leave out --weights-dtype, --kv-dtype and --keep.")
    device = choose_device(device_name)
    if not is_gpu(device):
        raise SettingsError("--measure reads a GPU's memory: give a CUDA --device.")
    meter = CudaMeter(device)
    before = meter.on_gpu()
    # The context, and cuBLAS with its workspace, come with the first product.
    square = torch.ones((64, 64), dtype=torch.bfloat16, device=device)
    torch.mm(square, square)
    del square
    after = meter.on_gpu()
    context = None if before is None or after is None else after - before - meter.reserved()
    try:
        return measure_with(meter, folder, estimate, device, context, before, trust_remote_code)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The GPU ran out of memory while {folder} was measured; {format_bytes(estimate.total)} were predicted. "
            f"{str(error).splitlines()[0]}"
        ) from None


def measure_with(
    meter: Meter,
    folder: str,
    estimate: Estimate,
    device: torch.device,
    context_bytes: int | None,
    before: int | None,
    trust_remote_code: bool,
) -> tuple[Measured, ...]:
    """`measure` with the figures of any meter. `before` is what was in use on the GPU at the beginning."""
    base = meter.allocated()
    model = _load(folder, device, trust_remote_code)
    # What loading took for a moment is neither the prompt's workspace nor the allocator's margin.
    meter.forget_peaks()
    weights = meter.allocated() - base
    cache = _run_prompt(model, estimate, device)
    cached = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))
    workspace = meter.peak_allocated() - base - weights - cached
    margin = meter.peak_reserved() - meter.peak_allocated()
    predicted_bytes = {term.name: term.bytes for term in estimate.terms}
    found = {
        ALL_WEIGHTS: (estimate.weights_bytes, weights),
        "cache and states": (predicted_bytes[KV_CACHE] + predicted_bytes.get(STATE, 0), cached),
        "prefill workspace": (predicted_bytes["prefill workspace"], workspace),
        "allocator margin": (predicted_bytes["allocator margin"], margin),
    }
    if context_bytes is not None:
        found["CUDA context"] = (predicted_bytes["CUDA context"], context_bytes)
    now = meter.on_gpu()
    if before is not None and now is not None:
        found["total"] = (estimate.total, now - before)
    return tuple(Measured(name, predicted, measured) for name, (predicted, measured) in found.items())


def _load(folder: str, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    problem: Exception | None = None
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            model: PreTrainedModel = auto.from_pretrained(
                folder, dtype="auto", device_map={"": device}, trust_remote_code=trust_remote_code
            )
            return model.eval()
        except ValueError as error:
            problem = problem or error
    raise SettingsError(f"transformers cannot load {folder} for text: {problem}")


@torch.no_grad()
def _run_prompt(model: PreTrainedModel, estimate: Estimate, device: torch.device) -> Any:
    """Run batch × context tokens in chunks, as an engine would, and return the filled cache."""
    size = (estimate.use.batch, estimate.use.context)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Different tokens, so that the router spreads them over the experts.
    ids = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(0)).to(device)
    # Logits of the last token alone, where the model lets us choose, as engines do.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = None
    for chunk in torch.split(ids, PREFILL_CHUNK, dim=1):
        cache = model(input_ids=chunk, past_key_values=cache, use_cache=True, **last).past_key_values
    return cache


def _tensors(cache: Any) -> list[torch.Tensor]:
    held = [vars(part) for part in (cache, *cache.layers)]
    leaves = pytree.tree_leaves(held)
    # A single number (the window's width as a tensor) is a setting, not a state.
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 1}.values())
