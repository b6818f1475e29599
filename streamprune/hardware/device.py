"""The device that a run computes on: choosing it, its memory, streams and events.

Everything here uses `torch.accelerator`, so that NVIDIA and ROCm (which torch also calls `cuda`) are treated alike. In
addition to this file only `nvml` names a kind of GPU.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Sequence

import torch

from streamprune.errors import SettingsError
from streamprune.hardware import memory as machine
from streamprune.hardware.gpus import Gpu, GpuProcess
from streamprune.hardware.memory import format_bytes, peak_resident_bytes, release_freed_memory, says_out_of_memory
from streamprune.hardware.nvml import gpu_of_device, with_processes_now

#: The supported kinds of accelerators, as torch calls them. To add "xpu", add it here and read its memory in `_gpu_of`
#: (NVML only supports NVIDIA GPUs).
GPU_TYPES = ("cuda",)
CPU = torch.device("cpu")
#: Assumed size of the CUDA context on a GPU when NVML does not report it: kernels and the driver's data.
USUAL_CONTEXT = 512 * 1024**2
#: Smaller growth of other processes is not reported.
NOTABLE_GROWTH = 64 * 1024**2


def is_gpu(device: torch.device) -> bool:
    """Whether `device` has memory and streams of its own, apart from the CPU's."""
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


def describe_host(device: torch.device) -> str:
    """Host name, processor architecture and device, for the log."""
    name = torch.get_device_module(device).get_device_name(device) if is_gpu(device) else "cpu"
    return f"{platform.node()} {platform.machine()} {name}"


# Memory of a GPU, in bytes.


def free_device_bytes(device: torch.device) -> int:
    """The free memory of a GPU now, after this process's CUDA context."""
    # Memory that torch's allocator has reserved but not allocated can be used too.
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(torch.accelerator.get_memory_info(device)[0]) + unused


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that tensors have taken on a GPU since the last call; for the CPU the process's peak."""
    if not is_gpu(device):
        return peak_resident_bytes()
    peak = torch.accelerator.max_memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    return peak


def limit_device_bytes(device: torch.device, limit: int) -> None:
    """Let torch's allocator take at most `limit` bytes of a GPU; beyond that it raises out-of-memory errors."""
    total = torch.accelerator.get_memory_info(device)[1]
    fraction = min(1.0, max(0, limit) / total)
    torch.get_device_module(device).set_per_process_memory_fraction(fraction, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory. (Outside of the GPU's allocator torch has no error class for it.)"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def lack_of_memory(act: Callable[[], object]) -> str | None:
    """None if `act` succeeded, or the first line of the error if it ran out of memory; other errors are raised.

    After the return the error's traceback no longer keeps the tensors of its frames, so their memory can be freed.
    """
    try:
        act()
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def free_after_failure(device: torch.device) -> None:
    """Free all memory of a failed computation. Call it outside of the `except` clause that caught the error.

    (Inside it, the error's traceback still keeps the frames with the tensors.)
    """
    gc.collect()
    if is_gpu(device):
        torch.accelerator.empty_cache()
    release_freed_memory()


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor in page-locked RAM, which a GPU reads and writes by itself; in ordinary RAM if that fails."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError:
        # Copies still work, but they do not overlap with computing.
        return torch.empty(tuple(shape), dtype=dtype)


def record_event(stream: torch.Stream, timed: bool = False) -> torch.Event:
    """An event that is reached once all work queued on `stream` so far is done. Two `timed` events measure time."""
    event = torch.Event(stream.device, enable_timing=timed)
    event.record(stream)
    return event


# Watching memory during a run.


class MemoryWatch:
    """Keeps a run within --vram-gib and --ram-gib (`caps` in bytes, in this order; None: no cap), and reports processes
    that take memory on its GPU during the run."""

    def __init__(self, caps: tuple[int | None, int | None], device: torch.device, say: Callable[[str], None]) -> None:
        self._vram, self._ram = caps
        self._device, self._say = device, say
        self._gpu = gpu = _gpu_of(device)
        self._others = {process.pid: process.used_bytes or 0 for process in gpu.other_processes()} if gpu else {}
        self._limit_gpu(gpu)

    def excess(self) -> str | None:
        """A text if resident memory is above --ram-gib, after freeing what can be freed; otherwise None."""
        cap = self._ram
        if cap is None or machine.resident_bytes() <= cap:
            return None
        free_after_failure(self._device)
        resident = machine.resident_bytes()
        if resident <= cap:
            return None
        return f"{format_bytes(resident)} are resident, with --ram-gib {cap / 2**30:g} ({format_bytes(cap)})"

    def between_layers(self) -> None:
        """Report processes that took memory on the GPU, and adjust the allocator's limit to --vram-gib."""
        gpu = self._gpu_now()
        if gpu is None:
            return
        now = gpu.other_processes()
        for process in newcomers(self._others, now):
            self._say(
                f"note: another process took memory on {self._device} during this run: {process}; "
                f"{format_bytes(free_device_bytes(self._device))} are left for this run."
            )
        # A process is reported again only if it grows further.
        self._others = {process.pid: process.used_bytes or 0 for process in now}
        self._limit_gpu(gpu)

    def holders(self) -> str:
        """A sentence on other processes with memory on the GPU, for messages; empty if none is known."""
        gpu = self._gpu_now()
        others = gpu.other_processes()[:3] if gpu else ()
        return f" Other processes hold memory there too: {'; '.join(map(str, others))}." if others else ""

    def _gpu_now(self) -> Gpu | None:
        """The GPU with its processes now; all else is asked for again only if they were unknown last time."""
        known = self._gpu
        self._gpu = with_processes_now(known) if known and known.processes is not None else _gpu_of(self._device)
        return self._gpu

    def _limit_gpu(self, gpu: Gpu | None) -> None:
        if self._vram is not None and is_gpu(self._device):
            limit_device_bytes(self._device, self._vram - _context(gpu, self._device))


def newcomers(before: dict[int, int], now: Sequence[GpuProcess]) -> list[GpuProcess]:
    """The processes that are new on a GPU, or use notably more memory than `before` (bytes by pid)."""
    return [
        process
        for process in now
        if process.pid not in before or (process.used_bytes or 0) - before[process.pid] >= NOTABLE_GROWTH
    ]


def context_bytes(device: torch.device) -> int:
    """The bytes that CUDA itself takes on a GPU for this process, in addition to torch's allocator."""
    return _context(_gpu_of(device), device)


def _context(gpu: Gpu | None, device: torch.device) -> int:
    reserved = torch.accelerator.memory_reserved(device)
    own = [process.used_bytes for process in gpu.processes or () if process.pid == os.getpid()] if gpu else []
    if not own or own[0] is None or own[0] <= reserved:
        return USUAL_CONTEXT
    return own[0] - reserved


def _gpu_of(device: torch.device) -> Gpu | None:
    """The run's GPU as NVML describes it; None on the CPU, or if it is unknown."""
    if not is_gpu(device):
        return None
    return gpu_of_device(torch.accelerator.current_device_index() if device.index is None else device.index)
