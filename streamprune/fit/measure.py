"""The measured memory of a model on a GPU: load it, run a prompt of the planned length, and read torch and NVML."""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from streamprune.errors import ResourceError, SettingsError
from streamprune.fit.estimate import PREFILL_CHUNK, Estimate
from streamprune.hardware.device import all_gpus, choose_device, is_gpu
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.nvml import gpu_of_device
from streamprune.targets import ServingSpec


class GpuMeter:
    """The memory of one GPU in bytes, as torch's allocator and NVML report it.

    `before` is the memory in use on the GPU at the beginning, by all processes, and `context` that of CUDA itself for
    this process; both None if NVML fails.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.before = self.on_gpu()
        # The first matrix product creates the context and cuBLAS's workspace.
        square = torch.ones((64, 64), dtype=torch.bfloat16, device=device)
        torch.mm(square, square)
        del square
        after, reserved = self.on_gpu(), torch.accelerator.memory_reserved(device)
        self.context = None if self.before is None or after is None else after - self.before - reserved

    def allocated(self) -> int:
        """The memory of all tensors now."""
        torch.accelerator.synchronize(self._device)
        return int(torch.accelerator.memory_allocated(self._device))

    def forget_peaks(self) -> None:
        """Reset the peaks, after emptying torch's allocator."""
        gc.collect()
        torch.accelerator.synchronize(self._device)
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(self._device)

    def peaks(self) -> tuple[int, int]:
        """The peak of tensors, and of torch's allocator, since `forget_peaks`."""
        accelerator, device = torch.accelerator, self._device
        return int(accelerator.max_memory_allocated(device)), int(accelerator.max_memory_reserved(device))

    def on_gpu(self) -> int | None:
        """The memory in use on the GPU by all processes, from NVML; None if NVML fails."""
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
    if replace(estimate.use, context=1, batch=1) != ServingSpec(context=1):
        raise SettingsError("--measure loads the model as it is: leave out --weights, --kv-dtype, --keep and --width.")
    if not all_gpus():
        raise SettingsError(
            f"--measure loads the model on a GPU, but torch {torch.__version__} sees none here: install a CUDA build "
            "of torch and check `nvidia-smi`, or leave out --measure."
        )
    device = choose_device(device_name)
    if not is_gpu(device):
        raise SettingsError("--measure reads a GPU's memory: give a CUDA --device.")
    try:
        return measure_with(GpuMeter(device), folder, estimate, device, trust_remote_code)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The GPU ran out of memory while {folder} was measured; {format_bytes(estimate.total)} were predicted. "
            f"{str(error).splitlines()[0]}"
        ) from None


def measure_with(
    meter: GpuMeter, folder: str, estimate: Estimate, device: torch.device, trust_remote_code: bool
) -> tuple[Measured, ...]:
    """`measure` with the figures of any meter."""
    base = meter.allocated()
    model = _load(folder, device, trust_remote_code)
    # What loading took for a moment is neither the prompt's workspace nor the allocator's margin.
    meter.forget_peaks()
    weights = meter.allocated() - base
    cache = _run_prompt(model, estimate, device)
    cached = sum(tensor.nbytes for tensor in _cached_tensors(cache))
    peak_allocated, peak_reserved = meter.peaks()
    predicted = {term.name: term.bytes for term in estimate.terms}
    found = [
        Measured("weights", estimate.weights_bytes, weights),
        Measured("cache and states", estimate.kv_cache_bytes + estimate.state_bytes, cached),
        Measured("prefill workspace", predicted["prefill workspace"], peak_allocated - base - weights - cached),
        Measured("allocator margin", predicted["allocator margin"], peak_reserved - peak_allocated),
    ]
    if meter.context is not None:
        found.append(Measured("CUDA context", predicted["CUDA context"], meter.context))
    now = meter.on_gpu()
    if meter.before is not None and now is not None:
        found.append(Measured("total", estimate.total, now - meter.before))
    return tuple(found)


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


def _cached_tensors(cache: Any) -> list[torch.Tensor]:
    held = [vars(part) for part in (cache, *cache.layers)]
    leaves = pytree.tree_leaves(held)
    # A single number (the window's width as a tensor) is a setting, not a state.
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 1}.values())
