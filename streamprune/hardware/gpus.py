"""GPUs as data: usable memory, processes that hold it, budgets, and what `streamprune devices` prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from streamprune.hardware.known_gpus import KnownGpu, find_known_gpu, is_named
from streamprune.hardware.memory import available_memory_bytes, disk_bytes, format_bytes, total_memory_bytes

Source = Literal["NVML v2", "NVML v1", "torch"]
ASK_BUDGET = "Give the memory with --budget-gib."


@dataclass(frozen=True)
class MemoryFigures:
    """One answer on a GPU's memory, in bytes. Without `reserved`, what the driver reserves is part of `used`."""

    total: int
    reserved: int | None
    free: int
    used: int
    source: Source


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory on a GPU. None: not known (another user's process; no figures under WSL)."""

    pid: int
    name: str | None
    used_bytes: int | None

    def __str__(self) -> str:
        held = "size unknown" if self.used_bytes is None else format_bytes(self.used_bytes)
        return f"{self.name or 'name unknown'} (pid {self.pid}), {held}"


@dataclass(frozen=True)
class MigInstance:
    """A part of a GPU that is divided with MIG. A process can use the memory of one part only."""

    index: int
    uuid: str | None
    total_bytes: int
    free_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU. None means that it could not be known, and `notes` say why and what follows.

    What the driver reserves is part of `used_bytes` only if `reserved_bytes` is None. `instances` are the parts of a
    GPU that MIG divides; None where they may not be seen.
    """

    index: int
    name: str
    total_bytes: int
    reserved_bytes: int | None
    free_bytes: int
    used_bytes: int
    processes: tuple[GpuProcess, ...] | None
    driver: str | None
    display: bool | None
    mig: bool | None
    source: Source
    notes: tuple[str, ...]
    uuid: str | None = None
    instances: tuple[MigInstance, ...] | None = ()

    @property
    def usable_bytes(self) -> int:
        """What a new process can have now: never more than is free, and with MIG the part with most free memory."""
        if self.mig:
            return max((instance.free_bytes for instance in self.instances or ()), default=0)
        known = find_known_gpu(self.name, self.total_bytes)
        # torch's figures are CUDA's own. Estimates stay out of it: they take off more than CUDA really keeps back.
        if known is None or known.estimated or self.source == "torch":
            return self.free_bytes
        if self.reserved_bytes is None:
            return min(self.free_bytes, known.usable_bytes)
        return max(0, self.free_bytes - max(0, known.gap_bytes - self.reserved_bytes))

    def answers_to(self, uuid: str) -> bool:
        """Whether the GPU, or one of its MIG parts, has this UUID, or one that begins like it."""
        # NVML says what it is the UUID of (GPU-, MIG-), torch does not.
        uuids = [self.uuid, *(instance.uuid for instance in self.instances or ())]
        return any(own is not None and _bare(own).startswith(_bare(uuid)) for own in uuids)


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine, and notes on all of them."""

    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...]


def visible_gpus(gpus: tuple[Gpu, ...], setting: str | None) -> Iterator[Gpu]:
    """The GPUs that `setting` (CUDA_VISIBLE_DEVICES) leaves, in its order; all if it is not set (None).

    Like CUDA this stops at the first entry that is no GPU, or more than one.
    """
    if setting is None:
        yield from gpus
        return
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            found = [gpu for gpu in gpus if gpu.index == int(entry)]
        else:
            # GPU-<uuid>, the start of one, MIG-<uuid>, or the older MIG-GPU-<uuid>/<instance>/<instance>.
            wanted = entry.removeprefix("MIG-").split("/")[0] if entry.startswith("MIG-GPU-") else entry
            found = [gpu for gpu in gpus if wanted.startswith(("GPU-", "MIG-")) and gpu.answers_to(wanted)]
        if len(found) != 1:
            return
        yield found[0]


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-")


def other_processes(gpu: Gpu, own_pid: int | None = None) -> tuple[GpuProcess, ...]:
    """Who holds memory on the GPU beside this process (`own_pid`), the largest first; unknown sizes come last."""
    own_pid = os.getpid() if own_pid is None else own_pid
    others = [process for process in gpu.processes or () if process.pid != own_pid]
    return tuple(sorted(others, key=lambda process: -(process.used_bytes or 0)))


def budget_on_gpu(known: KnownGpu, gpus: Gpus) -> tuple[int, list[str]]:
    """What --gpu means here, in bytes, and sentences that say how it came about.

    It is what CUDA can use of such a GPU. If one is present, what the display and other processes hold of it now is
    taken off; of several the one that has most left counts.
    """
    notes = [f"{known.key}: CUDA can use {format_bytes(known.usable_bytes)} of {format_bytes(known.total_bytes)}."]
    if known.estimated:
        notes[0] = f"{notes[0][:-1]} (estimated: no measurement of this GPU is known)."
    present = [
        gpu for gpu in gpus.gpus if find_known_gpu(gpu.name, gpu.total_bytes) == known or _is_torch_view(known, gpu)
    ]
    if not present:
        return known.usable_bytes, [*notes, _absent(known, gpus)]
    gpu = max(present, key=lambda gpu: _left(known, gpu))
    if gpu.mig:
        notes.append(
            f"GPU {gpu.index} here is such a GPU, but divided with MIG, so that no process can use all of it. "
            "For one part give its memory with --budget-gib."
        )
        return known.usable_bytes, notes
    capacity, held = _capacity(known, gpu), _held_by_others(known, gpu)
    which = f"GPU {gpu.index} here is such a GPU"
    if len(present) > 1:
        which = f"{len(present)} such GPUs are here, of which GPU {gpu.index} has most left"
    if held == 0:
        notes.append(f"{which}, and nothing else holds memory on it.")
    else:
        notes.append(f"{which}: {format_bytes(held)} are in use there now{_holders(gpu)}, and taken off.")
    return max(0, capacity - held), notes


def _is_torch_view(known: KnownGpu, gpu: Gpu) -> bool:
    """torch reports the GPU's memory without what CUDA cannot use, so that the table's total does not match."""
    gap = known.total_bytes - gpu.total_bytes
    return gpu.source == "torch" and is_named(known, gpu.name) and 0 <= gap <= 0.05 * known.total_bytes


def _capacity(known: KnownGpu, gpu: Gpu) -> int:
    """What CUDA can use of this very GPU when nothing runs: less than the table says if the driver reserves more."""
    return min(known.usable_bytes, gpu.total_bytes - (gpu.reserved_bytes or 0))


def _held_by_others(known: KnownGpu, gpu: Gpu) -> int:
    """What the display and other processes hold now: all that is in use, less this process's own part."""
    held = gpu.used_bytes
    if gpu.source == "NVML v1":
        # Here the driver's own part counts as used; it is about what CUDA cannot use, and is not to be taken off twice.
        held -= known.gap_bytes
    own = (process.used_bytes or 0 for process in gpu.processes or () if process.pid == os.getpid())
    return max(0, held - sum(own))


def _left(known: KnownGpu, gpu: Gpu) -> int:
    return _capacity(known, gpu) - _held_by_others(known, gpu)


def _holders(gpu: Gpu) -> str:
    """By whom, for a sentence: at most three processes by name, and the display."""
    holders = [str(process) for process in other_processes(gpu)[:3]]
    if len(other_processes(gpu)) > 3:
        holders.append(f"{len(other_processes(gpu)) - 3} more")
    if gpu.display:
        holders.append("a display is attached")
    return f" ({'; '.join(holders)})" if holders else ""


def _absent(known: KnownGpu, gpus: Gpus) -> str:
    """Why nothing is taken off: no such GPU here, or one of another size."""
    for gpu in gpus.gpus:
        if is_named(known, gpu.name):
            return (
                f"GPU {gpu.index} here has that name but {format_bytes(gpu.total_bytes)}: nothing was taken off for "
                "what runs on it. For that GPU give --budget-gib."
            )
    return "No such GPU is visible here, so nothing is taken off for a display or other programs on it."


def devices_object(gpus: Gpus, folder: Path) -> dict[str, Any]:
    """Everything as one object for --json, in bytes; null where something is not known."""
    total, free = disk_bytes(folder)
    return {
        "cards": [{**asdict(gpu), "usable_bytes": gpu.usable_bytes} for gpu in gpus.gpus],
        "notes": list(gpus.notes),
        "ram": {"total_bytes": total_memory_bytes(), "available_bytes": available_memory_bytes()},
        "disk": {"folder": str(folder.absolute()), "total_bytes": total, "free_bytes": free},
    }


def devices_text(gpus: Gpus, folder: Path) -> str:
    """The same for people: a paragraph per GPU, then RAM and disk, and what could not be known."""
    lines = []
    for gpu in gpus.gpus:
        lines += [*_gpu_lines(gpu), ""]
    if not gpus.gpus:
        lines += ["No NVIDIA GPU is visible.", *(f"  {note}" for note in gpus.notes), ""]
    total, free = disk_bytes(folder)
    lines += [
        f"RAM: {format_bytes(total_memory_bytes())} total, {format_bytes(available_memory_bytes())} available",
        f"disk of {folder.absolute()}: {format_bytes(total)} total, {format_bytes(free)} free",
    ]
    if gpus.gpus:
        lines += [f"note: {note}" for note in gpus.notes]
    return "\n".join(lines)


def _gpu_lines(gpu: Gpu) -> list[str]:
    rows = [
        ("total", format_bytes(gpu.total_bytes)),
        ("reserved", _known(gpu.reserved_bytes)),
        ("used", format_bytes(gpu.used_bytes)),
        ("free", format_bytes(gpu.free_bytes)),
        ("usable", _usable(gpu)),
        *_process_rows(gpu),
        ("driver", gpu.driver or "unknown"),
        ("display", _known(gpu.display, "attached", "none")),
        ("MIG", _known(gpu.mig, "on", "off")),
        *(
            (f"MIG {part.index}", f"{format_bytes(part.total_bytes)} total, {format_bytes(part.free_bytes)} free")
            for part in gpu.instances or ()
        ),
        ("source", gpu.source),
        *(("note", note) for note in gpu.notes),
    ]
    return [f"GPU {gpu.index}: {gpu.name}", *(f"  {label:<10}{value}" for label, value in rows)]


def _usable(gpu: Gpu) -> str:
    """What a new process can have, and where this differs from what is free."""
    usable = format_bytes(gpu.usable_bytes)
    if gpu.mig:
        return f"{usable} (a process can use one MIG part only)" if gpu.usable_bytes else "unknown"
    kept = gpu.free_bytes - gpu.usable_bytes
    return f"{usable} ({format_bytes(kept)} less than free: CUDA cannot use all of it)" if kept else usable


def _process_rows(gpu: Gpu) -> list[tuple[str, str]]:
    """A row per process that holds memory, labelled once."""
    if gpu.processes is None:
        return [("processes", "unknown")]
    if not gpu.processes:
        return [("processes", "none")]
    return [("" if row else "processes", str(process)) for row, process in enumerate(gpu.processes)]


def _known(value: int | bool | None, yes: str = "", no: str = "") -> str:
    """A size or a yes or no; `unknown` for None."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return yes if value else no
    return format_bytes(value)
