"""Facts about this machine: memory, disk, devices."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from streamprune.errors import ResourceError, SettingsError

if TYPE_CHECKING:
    import torch

GIB = 1024**3


def format_bytes(count: float) -> str:
    """A size for people, in binary units: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def peak_resident_bytes() -> int:
    """The most memory this process has had resident so far."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory_bytes() -> int:
    """Memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def total_memory_bytes() -> int:
    """All memory of this machine."""
    return int(psutil.virtual_memory().total)


def disk_bytes(folder: Path) -> tuple[int, int]:
    """The size of the file system of `folder`, which must exist, and what is free there for this user."""
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


def process_name(pid: int) -> str | None:
    """The name of a running process; None if there is none with this number, or it may not be seen."""
    try:
        return str(psutil.Process(pid).name())
    # Numbers that cannot be a process's are a ValueError or OverflowError, depending on the number.
    except (psutil.Error, ValueError, OverflowError):
        return None


def limit_library_memory() -> None:
    """Bound what libraries take beside our own data; works only before torch is imported. The user's settings win.

    - oneDNN's compiled CPU kernels: every number of tokens that an expert meets is a kernel of its own, and torch keeps
      1,024 of them: they grew to 1 GiB with the `mid` shape of tools/bench, where a block has 50 MiB.
    - transformers' loading threads: each leaves its own fragmented glibc arena behind (80 MiB with `mid`), and reading
      with four of them was not quicker than with one.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")


def release_freed_memory() -> None:
    """Give memory that was freed back to the system. glibc keeps it otherwise, so that a run would seem to grow."""
    # musl and macOS have no malloc_trim, and give freed memory back by themselves.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_disk(folder: Path, needed: int) -> None:
    """Raise ResourceError unless the file system of `folder` (which need not exist yet) has `needed` bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"The output needs {format_bytes(needed)} on the disk of {existing}, where {format_bytes(free)} are free. "
            f"Free {format_bytes(needed - free)}, choose another place with -o, or keep fewer experts."
        )


def check_memory(needed: int, what: str) -> None:
    """Raise ResourceError unless `needed` bytes of memory are available."""
    available = available_memory_bytes()
    if needed > available:
        raise ResourceError(
            f"{what} need {format_bytes(needed)} of memory, but only {format_bytes(available)} are available. "
            "Use fewer --samples, a shorter --seq-len, or close other programs."
        )


def choose_device(name: str) -> torch.device:
    """The torch device for --device: `auto` is the first CUDA card if there is one, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"--device {name!r} is unknown. Use auto, cpu or cuda:0.") from None
    if device.type not in {"cpu", "cuda"}:
        raise SettingsError(f"--device {name}: only cpu and cuda are supported.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here. Use "
            "--device cpu, or install a CUDA build of torch and check `nvidia-smi`."
        )
    return device


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that tensors have taken on the device since the last call; on the CPU the process's peak."""
    if device.type != "cuda":
        return peak_resident_bytes()
    import torch

    peak = int(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def describe_host(device: torch.device) -> str:
    """Host, processor architecture and device, for the log."""
    if device.type != "cuda":
        return f"{platform.node()} {platform.machine()} cpu"
    import torch

    return f"{platform.node()} {platform.machine()} {torch.cuda.get_device_name(device)}"
