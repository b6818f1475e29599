"""Watching memory during a run: the run's own against its caps, and what other processes take of its GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from streamprune.hardware import device as devices
from streamprune.hardware import memory as machine
from streamprune.hardware.device import gpu_index, is_gpu
from streamprune.hardware.gpus import Gpu, GpuProcess, other_processes
from streamprune.hardware.memory import format_bytes

#: Assumed size of the CUDA context on a GPU when NVML does not report it: kernels and the driver's data.
USUAL_CONTEXT = 512 * 1024**2
#: Growth of other processes below this is not reported.
NOTABLE_GROWTH = 64 * 1024**2


class MemoryCaps(Protocol):
    """The user's caps on memory; None for no cap."""

    @property
    def vram_gib(self) -> float | None: ...
    @property
    def ram_gib(self) -> float | None: ...
    @property
    def vram_bytes(self) -> int | None: ...
    @property
    def ram_bytes(self) -> int | None: ...


class MemoryWatch:
    """Keeps a run within --vram-gib and --ram-gib, and reports processes that take memory on its GPU meanwhile."""

    def __init__(self, settings: MemoryCaps, device: torch.device, say: Callable[[str], None]) -> None:
        self._settings, self._device, self._say = settings, device, say
        gpu = _gpu(device)
        self._others = {process.pid: process.used_bytes or 0 for process in other_processes(gpu)} if gpu else {}
        self._limit_gpu(gpu)

    def excess(self) -> str | None:
        """A text on how far resident memory is above --ram-gib, after freeing what can be freed; None if it is not."""
        cap = self._settings.ram_bytes
        if cap is None or machine.resident_bytes() <= cap:
            return None
        devices.free_after_failure(self._device)
        resident = machine.resident_bytes()
        if resident <= cap:
            return None
        return f"{format_bytes(resident)} are resident, with --ram-gib {self._settings.ram_gib:g} ({format_bytes(cap)})"

    def between_layers(self) -> None:
        """Report processes that took memory on the GPU, and adjust the allocator's limit to --vram-gib."""
        gpu = _gpu(self._device)
        if gpu is None:
            return
        now = other_processes(gpu)
        for process in newcomers(self._others, now):
            self._say(
                f"note: {process}, took memory on {self._device} while this run goes on; "
                f"{format_bytes(devices.free_device_bytes(self._device))} are free there for it."
            )
        # A process is reported again only if it grows further.
        self._others = {process.pid: process.used_bytes or 0 for process in now}
        self._limit_gpu(gpu)

    def holders(self) -> str:
        """A sentence on other processes with memory on the GPU, for messages; empty if none is known."""
        gpu = _gpu(self._device)
        others = other_processes(gpu)[:3] if gpu else ()
        return f" Others hold memory there too: {'; '.join(map(str, others))}." if others else ""

    def _limit_gpu(self, gpu: Gpu | None) -> None:
        if self._settings.vram_bytes is not None and is_gpu(self._device):
            devices.limit_device_bytes(
                self._device, self._settings.vram_bytes - _context(gpu, devices.reserved_device_bytes(self._device))
            )


def newcomers(before: dict[int, int], now: Sequence[GpuProcess]) -> list[GpuProcess]:
    """The processes that are new on a GPU or hold notably more than `before` (bytes by pid) says."""
    return [
        process
        for process in now
        if process.pid not in before or (process.used_bytes or 0) - before[process.pid] >= NOTABLE_GROWTH
    ]


def context_bytes(device: torch.device) -> int:
    """What CUDA itself takes on a GPU for this process, besides what torch's allocator holds."""
    return _context(_gpu(device), devices.reserved_device_bytes(device))


def _context(gpu: Gpu | None, reserved: int) -> int:
    own = [process.used_bytes for process in gpu.processes or () if process.pid == os.getpid()] if gpu else []
    if not own or own[0] is None or own[0] <= reserved:
        return USUAL_CONTEXT
    return own[0] - reserved


def _gpu(device: torch.device) -> Gpu | None:
    """The GPU that the run computes on; None on the CPU, or if it is unknown."""
    if not is_gpu(device):
        return None
    from streamprune.hardware.nvml import gpu_of_device

    return gpu_of_device(gpu_index(device))
