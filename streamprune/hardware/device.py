"""The device that a run computes on: choosing it, its memory, streams and events. Only this file names kinds of GPUs.

Everything goes through `torch.accelerator`, so that NVIDIA and ROCm (which torch calls `cuda` too) are treated alike.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Sequence

import torch

from streamprune.errors import SettingsError
from streamprune.hardware.memory import peak_resident_bytes, release_freed_memory, says_out_of_memory

#: The kinds of accelerator that are supported, as torch calls them. To add "xpu", add it here and ask for its memory
#: in `memory_watch` (NVML knows NVIDIA GPUs only).
GPU_TYPES = ("cuda",)
CPU = torch.device("cpu")


def is_gpu(device: torch.device) -> bool:
    """Whether `device` has memory and streams of its own beside the CPU's."""
    return device.type in GPU_TYPES


def all_gpus() -> list[torch.device]:
    """The GPUs that torch can use in this process, in torch's order; empty where there are none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or not is_gpu(found):
        return []
    return [torch.device(found.type, index) for index in range(torch.accelerator.device_count())]


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device for --device: `auto` is the first GPU if there is one, else the CPU.

    Of several processes on this machine, number `local_rank` takes the GPU of that number. Raises SettingsError for a
    device that is unknown, unsupported or absent.
    """
    gpus = all_gpus() if name != "cpu" else []
    if name == "auto":
        return gpus[local_rank % len(gpus)] if gpus else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"--device {name!r} is unknown. Use auto, cpu or cuda:0.") from None
    if device.type != "cpu" and not is_gpu(device):
        raise SettingsError(f"--device {name}: only cpu and cuda are supported.")
    if is_gpu(device) and (device.index or 0) >= len(gpus):
        raise SettingsError(
            f"--device {name}: torch {torch.__version__} sees {len(gpus)} CUDA devices here. Use --device cpu, or "
            "install a CUDA build of torch and check `nvidia-smi`."
        )
    return device


def gpu_index(device: torch.device) -> int:
    """The number of a GPU as torch counts them; for one without a number, that of the current GPU."""
    return torch.accelerator.current_device_index() if device.index is None else device.index


def describe_host(device: torch.device) -> str:
    """Host name, processor architecture and device, for the log."""
    name = torch.get_device_module(device).get_device_name(device) if is_gpu(device) else "cpu"
    return f"{platform.node()} {platform.machine()} {name}"


# Memory of a GPU, in bytes.


def free_device_bytes(device: torch.device) -> int:
    """What a GPU has free now, with what this process's context takes already taken off."""
    # What torch's allocator holds unused is as good as free to us.
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(torch.accelerator.get_memory_info(device)[0]) + unused


def allocated_device_bytes(device: torch.device) -> int:
    """What tensors take on a GPU, once all work that was queued is done."""
    torch.accelerator.synchronize(device)
    return torch.accelerator.memory_allocated(device)


def reserved_device_bytes(device: torch.device) -> int:
    """What torch's allocator holds on a GPU, used or not."""
    return torch.accelerator.memory_reserved(device)


def most_allocated_device_bytes(device: torch.device) -> int:
    """The most that tensors have taken on a GPU since its peaks were last reset."""
    return torch.accelerator.max_memory_allocated(device)


def most_reserved_device_bytes(device: torch.device) -> int:
    """The most that torch's allocator has held on a GPU since its peaks were last reset."""
    return torch.accelerator.max_memory_reserved(device)


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that tensors have taken on a GPU since the last call; for the CPU the process's peak."""
    if not is_gpu(device):
        return peak_resident_bytes()
    peak = torch.accelerator.max_memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    return peak


def reset_device_peaks(device: torch.device) -> None:
    """Count the peaks of a GPU anew from here on, with nothing held unused by torch's allocator."""
    gc.collect()
    torch.accelerator.synchronize(device)
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)


def limit_device_bytes(device: torch.device, limit: int) -> None:
    """Let torch's allocator take at most `limit` bytes of a GPU; it reports that memory ran out beyond that."""
    total = torch.accelerator.get_memory_info(device)[1]
    fraction = min(1.0, max(0, limit) / total)
    torch.get_device_module(device).set_per_process_memory_fraction(fraction, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. For memory outside of a GPU's allocator torch has no class."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def free_after_failure(device: torch.device) -> None:
    """Free all memory that a failed computation held. Call it outside of the `except` clause that caught the error.

    (Within it, the error's traceback still holds the frames with the tensors.)
    """
    gc.collect()
    if is_gpu(device):
        torch.accelerator.empty_cache()
    release_freed_memory()


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor in RAM that a GPU can read and write by itself; in ordinary RAM where the system refuses that."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError:
        # Copies still work, but they do not overlap with computing.
        return torch.empty(tuple(shape), dtype=dtype)


# Work that is queued on a GPU. A stream is also a context manager: what is queued within goes to that stream.


def new_stream(device: torch.device) -> torch.Stream:
    """A stream of its own on a GPU."""
    return torch.Stream(device)


def current_stream(device: torch.device) -> torch.Stream:
    """The stream that this thread's work on that GPU goes to, whichever GPU is the current one."""
    return torch.accelerator.current_stream(device)


def record_event(stream: torch.Stream, timed: bool = False) -> torch.Event:
    """An event that is reached once all work queued on `stream` so far is done. Two `timed` events measure time."""
    event = torch.Event(stream.device, enable_timing=timed)
    event.record(stream)
    return event
