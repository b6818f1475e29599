"""This machine's memory, cores and disk, this process's memory, and sizes as text. Needs no torch."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from pathlib import Path

import psutil

from streamprune.errors import ResourceError

GIB = 1024**3
#: Options of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: With --ram-gib, larger allocations get their own pages, which are returned when they are freed. glibc's own limit
#: grows to 32 MiB, and fragmentation then took a run of 530 MiB to 577 to 660 MiB; with 8 MiB it took 502 to 529 MiB,
#: in 1.1 times the time (with 1 MiB 498 MiB, in 1.65 times the time).
_OWN_PAGES = 8 * 2**20


def format_bytes(count: float) -> str:
    """A size for people, in binary units: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def peak_resident_bytes() -> int:
    """The peak of this process's resident memory."""
    try:
        # (In getrusage, a new process on Linux starts with the peak of its parent.)
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory_bytes() -> int:
    """Memory that is available without swapping."""
    return int(psutil.virtual_memory().available)


def core_count() -> int:
    """The cores of this machine that this process may compute on."""
    # Hyper-threads do not multiply matrices faster.
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def process_name(pid: int) -> str | None:
    """The name of a running process; None if it does not exist or is not visible."""
    try:
        return str(psutil.Process(pid).name())
    # Impossible process numbers raise ValueError or OverflowError, depending on the number.
    except (psutil.Error, ValueError, OverflowError):
        return None


def resident_bytes() -> int:
    """The memory that this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def limit_library_memory(tight: bool = False) -> None:
    """Limit the memory of libraries. Works only before torch is imported. Environment variables of the user win.

    `tight` is for runs with --ram-gib: no compiled kernel is kept. (With `mid` a run's peak fell from 826 to 493 MiB,
    and it was not measurably slower.)

    - oneDNN's compiled CPU kernels: each number of tokens of an expert compiles its own kernel, and torch keeps 1,024
      of them: they grew to 1 GiB with the `mid` shape of tools/bench, where a layer has 50 MiB.
    - transformers' loading threads: each leaves its own fragmented glibc arena behind (80 MiB with `mid`), and reading
      with four of them was not quicker than with one.
    - glibc gives every large tensor its own pages and returns them with it: the system's work on those pages was a
      fifth of the scoring pass. So freed memory is kept until `release_freed_memory` returns it; but not with a cap,
      where large tensors return theirs at once.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and tight:
        set_option(_M_MMAP_THRESHOLD, _OWN_PAGES)
    # Older versions of glibc accept at most 32 MiB. (If both failed, glibc would use its lowest threshold.)
    elif set_option is not None and (set_option(_M_MMAP_THRESHOLD, GIB) or set_option(_M_MMAP_THRESHOLD, 32 * 2**20)):
        set_option(_M_TRIM_THRESHOLD, GIB)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1" if tight else "256")
    if tight:
        # torch's own cache of the same kernels.
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")


def release_freed_memory() -> None:
    """Return freed memory to the system. Otherwise glibc keeps it, and the run seems to grow."""
    # musl and macOS have no malloc_trim; they return freed memory anyway.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def says_out_of_memory(text: str) -> bool:
    """Whether the text of an error of torch or its libraries says that memory ran out."""
    text = text.lower()
    # oneDNN's whole message if a CPU kernel gets no memory (seen under `ulimit -v`). If a kernel does not exist, the
    # message names the "primitive descriptor".
    if "could not create a primitive" in text and "descriptor" not in text:
        return True
    return any(
        words in text
        for words in ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed", "bad_alloc")
    )


def free_disk_bytes(folder: Path) -> int:
    """The free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(existing_folder(folder)).free


def existing_folder(path: Path) -> Path:
    """`path` if it exists, else its nearest parent that does."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_disk(folder: Path, needed: int) -> None:
    """Raise ResourceError unless the file system of `folder` (which need not exist yet) has `needed` bytes free."""
    free = free_disk_bytes(folder)
    if free < needed:
        raise ResourceError(
            f"The output needs {format_bytes(needed)} on the disk of {existing_folder(folder)}, where "
            f"{format_bytes(free)} are free. Free {format_bytes(needed - free)}, choose another disk "
            "with -o, or keep fewer experts."
        )
