"""GPUs as data: those known by name, those of this machine, budgets, and what `streamprune devices` prints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from streamprune.errors import SettingsError
from streamprune.hardware.memory import format_bytes

Source = Literal["NVML v2", "NVML v1", "torch"]
ASK_BUDGET = "Give the memory with --budget-gib."
MIB = 1024**2
# The memory that CUDA can use is published for a few GPUs only: 451 to 494 MiB, or up to 2 %, less than NVML's total.
# For other GPUs at least that much is subtracted: 16 GB GPUs of the RTX 50 series lose 482 MiB, which is 3 %.
_LEAST_GAP_MIB = 512
_LEAST_GAP_SHARE = 0.02


@dataclass(frozen=True)
class KnownGpu:
    """A GPU model and its memory, in bytes. `estimated`: the part that CUDA can use is derived, not measured."""

    key: str
    names: tuple[str, ...]  # as NVML reports them; some GPUs are sold under several
    total_bytes: int
    usable_bytes: int
    estimated: bool

    @property
    def gap_bytes(self) -> int:
        """The memory that NVML counts and CUDA cannot use, with nothing running."""
        return self.total_bytes - self.usable_bytes

    def is_named(self, name: str) -> bool:
        """Whether NVML's `name` is that of this GPU; older drivers omit the vendor."""
        return _spelling(name) in {_spelling(each) for each in self.names}


class _Row(msgspec.Struct):
    names: tuple[str, ...]
    total: int
    usable: int | None = None


def _read_known_gpus() -> Iterator[KnownGpu]:
    text = resources.files(__package__).joinpath("known_gpus.toml").read_bytes()
    for key, row in msgspec.toml.decode(text, type=dict[str, _Row]).items():
        usable = row.usable or row.total - max(_LEAST_GAP_MIB, round(row.total * _LEAST_GAP_SHARE))
        yield KnownGpu(key, row.names, row.total * MIB, usable * MIB, row.usable is None)


def _spelling(name: str) -> str:
    """A name without vendor, brand, case and separators."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "".join(word for word in words if word not in {"nvidia", "geforce", "tesla", "gpu"})


GPUS = tuple(_read_known_gpus())


def known_gpu(name: str) -> KnownGpu:
    """The GPU that `name` means: its key, or any usual spelling ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090").

    Raises SettingsError, with the names that are known, for any other, and for a name of several GPUs.
    """

    def is_meant(spellings: tuple[str, ...]) -> bool:
        return _spelling(name).removeprefix("rtx") in {_spelling(each).removeprefix("rtx") for each in spellings}

    found = [gpu for gpu in GPUS if is_meant((gpu.key,))] or [gpu for gpu in GPUS if is_meant(gpu.names)]
    if len(found) == 1:
        return found[0]
    if found:
        keys = " or ".join(f"--gpu {known.key}" for known in found)
        raise SettingsError(f"--gpu {name!r} is sold with different memory. Use {keys}.")
    raise SettingsError(
        f"--gpu {name!r} is unknown. Known GPUs: {', '.join(known.key for known in GPUS)}. "
        "For any other GPU give the memory that may be used: --budget-gib."
    )


def find_known_gpu(name: str, total_bytes: int) -> KnownGpu | None:
    """The known GPU for one that NVML reports, or None. Name and size must agree (within 2 %).

    Some names are sold with different memory, and switching ECC changes a GPU's total by 6 %.
    """
    for known in GPUS:
        if abs(known.total_bytes - total_bytes) <= 0.02 * known.total_bytes and known.is_named(name):
            return known
    return None


@dataclass(frozen=True)
class MemoryFigures:
    """A GPU's memory in bytes, and its source. Without `reserved_bytes`, the driver's part counts as used."""

    total_bytes: int
    reserved_bytes: int | None
    free_bytes: int
    used_bytes: int
    source: Source


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses memory on a GPU. None: unknown (another user's process; no sizes under WSL)."""

    pid: int
    name: str | None
    used_bytes: int | None

    def __str__(self) -> str:
        held = "size unknown" if self.used_bytes is None else format_bytes(self.used_bytes)
        return f"{self.name or 'name unknown'} (pid {self.pid}), {held}"


@dataclass(frozen=True)
class MigInstance:
    """A MIG instance of a GPU. A process can only use the memory of one instance."""

    index: int
    uuid: str | None
    total_bytes: int
    free_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU. None means unknown, and `notes` say why and what follows.

    Driver-reserved memory is part of `used_bytes` only if `reserved_bytes` is None. `instances` are its MIG instances;
    None if not all are visible.
    """

    index: int
    name: str
    total_bytes: int
    reserved_bytes: int | None
    free_bytes: int
    used_bytes: int
    processes: tuple[GpuProcess, ...] | None = None
    driver: str | None = None
    display: bool | None = None
    mig: bool | None = None
    source: Source = "torch"
    notes: tuple[str, ...] = ()
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
        """Whether the GPU, or one of its MIG instances, has this UUID or one with this beginning."""
        uuids = [self.uuid, *(instance.uuid for instance in self.instances or ())]
        return any(own is not None and bare_uuid(own).startswith(bare_uuid(uuid)) for own in uuids)

    def other_processes(self) -> tuple[GpuProcess, ...]:
        """The other processes that use memory on the GPU, the largest first; unknown sizes come last."""
        others = [process for process in self.processes or () if process.pid != os.getpid()]
        return tuple(sorted(others, key=lambda process: -(process.used_bytes or 0)))


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine, and notes on all of them."""

    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...]


def bare_uuid(uuid: str) -> str:
    """A UUID as torch has it, without NVML's prefix (GPU-, MIG-)."""
    return uuid.removeprefix("GPU-").removeprefix("MIG-")


def visible_gpus(gpus: tuple[Gpu, ...], setting: str | None) -> Iterator[Gpu]:
    """The GPUs that `setting` (CUDA_VISIBLE_DEVICES) selects, in its order; all if it is not set (None).

    Like CUDA this stops at the first entry that matches no GPU, or more than one.
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


def budget_on_gpu(known: KnownGpu, gpus: Gpus) -> tuple[int, list[str]]:
    """The budget for --gpu in bytes, and notes that explain it.

    It is the memory that CUDA can use of such a GPU. If one is present, the memory in use by the display and other
    processes is subtracted; of several GPUs the one with most memory left counts.
    """
    of_total = f"{known.key}: CUDA can use {format_bytes(known.usable_bytes)} of {format_bytes(known.total_bytes)}"
    notes = [of_total + (" (estimated: no measurement of this GPU is known)." if known.estimated else ".")]
    present = [
        gpu for gpu in gpus.gpus if find_known_gpu(gpu.name, gpu.total_bytes) == known or _is_torch_view(known, gpu)
    ]
    if not present:
        return known.usable_bytes, [*notes, _absent(known, gpus)]
    # If the driver reserves more than usual, less can be used.
    left = {
        gpu.index: min(known.usable_bytes, gpu.total_bytes - (gpu.reserved_bytes or 0)) - _held_by_others(known, gpu)
        for gpu in present
    }
    gpu = max(present, key=lambda gpu: left[gpu.index])
    if gpu.mig:
        notes.append(
            f"GPU {gpu.index} here is such a GPU, but MIG is enabled, so no process can use all of it. "
            "For one MIG instance give its memory with --budget-gib."
        )
        return known.usable_bytes, notes
    which = f"GPU {gpu.index} here is such a GPU"
    if len(present) > 1:
        which = f"{len(present)} such GPUs are here, of which GPU {gpu.index} has most left"
    held = _held_by_others(known, gpu)
    if held == 0:
        notes.append(f"{which}, and nothing else uses memory on it.")
    else:
        notes.append(f"{which}: {format_bytes(held)} are in use there now{_holders(gpu)}, and subtracted.")
    return max(0, left[gpu.index]), notes


def _is_torch_view(known: KnownGpu, gpu: Gpu) -> bool:
    """Whether torch reports this GPU's memory: without the part that CUDA cannot use, so the total differs."""
    gap = known.total_bytes - gpu.total_bytes
    return gpu.source == "torch" and known.is_named(gpu.name) and 0 <= gap <= 0.05 * known.total_bytes


def _held_by_others(known: KnownGpu, gpu: Gpu) -> int:
    """What the display and other processes hold now: all that is in use, less this process's own part."""
    own = sum(process.used_bytes or 0 for process in gpu.processes or () if process.pid == os.getpid())
    # NVML's first query counts the driver's own part as used: about what CUDA cannot use, not to be taken off twice.
    return max(0, gpu.used_bytes - (known.gap_bytes if gpu.source == "NVML v1" else 0) - own)


def _holders(gpu: Gpu) -> str:
    """Who uses the memory, in brackets: at most three processes by name, and the display."""
    others = gpu.other_processes()
    holders = [str(process) for process in others[:3]]
    if len(others) > 3:
        holders.append(f"{len(others) - 3} more")
    if gpu.display:
        holders.append("a display is attached")
    return f" ({'; '.join(holders)})" if holders else ""


def _absent(known: KnownGpu, gpus: Gpus) -> str:
    """Why nothing is subtracted: no such GPU here, or one of another size."""
    for gpu in gpus.gpus:
        if known.is_named(gpu.name):
            return (
                f"GPU {gpu.index} here has that name but {format_bytes(gpu.total_bytes)}: memory in use on it is not "
                "subtracted. For that GPU give --budget-gib."
            )
    return "No such GPU is visible here, so nothing is subtracted for a display or other programs on it."


def devices_object(gpus: Gpus, folder: Path) -> dict[str, Any]:
    """What `devices --json` prints, in bytes; unknown values are null."""
    ram, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return {
        "cards": [{**asdict(gpu), "usable_bytes": gpu.usable_bytes} for gpu in gpus.gpus],
        "notes": list(gpus.notes),
        "ram": {"total_bytes": ram.total, "available_bytes": ram.available},
        "disk": {"folder": str(folder.absolute()), "total_bytes": disk.total, "free_bytes": disk.free},
    }


def devices_text(gpus: Gpus, folder: Path) -> str:
    """What `devices` prints: a paragraph per GPU, then RAM and disk, and notes on unknown values."""
    ram, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    lines = [line for gpu in gpus.gpus for line in (*_gpu_lines(gpu), "")]
    if not gpus.gpus:
        lines = ["No NVIDIA GPU is visible.", *(f"  {note}" for note in gpus.notes), ""]
    lines += [
        f"RAM: {format_bytes(ram.total)} total, {format_bytes(ram.available)} available",
        f"disk of {folder.absolute()}: {format_bytes(disk.total)} total, {format_bytes(disk.free)} free",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in gpus.notes if gpus.gpus)])


def _gpu_lines(gpu: Gpu) -> list[str]:
    processes = ["unknown"] if gpu.processes is None else [str(process) for process in gpu.processes] or ["none"]
    rows = [
        ("total", format_bytes(gpu.total_bytes)),
        ("reserved", "unknown" if gpu.reserved_bytes is None else format_bytes(gpu.reserved_bytes)),
        ("used", format_bytes(gpu.used_bytes)),
        ("free", format_bytes(gpu.free_bytes)),
        ("usable", _usable(gpu)),
        *(("" if row else "processes", process) for row, process in enumerate(processes)),
        ("driver", gpu.driver or "unknown"),
        ("display", {None: "unknown", True: "attached", False: "none"}[gpu.display]),
        ("MIG", {None: "unknown", True: "on", False: "off"}[gpu.mig]),
        *(
            (f"MIG {part.index}", f"{format_bytes(part.total_bytes)} total, {format_bytes(part.free_bytes)} free")
            for part in gpu.instances or ()
        ),
        ("source", gpu.source),
        *(("note", note) for note in gpu.notes),
    ]
    return [f"GPU {gpu.index}: {gpu.name}", *(f"  {label:<10}{value}" for label, value in rows)]


def _usable(gpu: Gpu) -> str:
    """The memory that a new process can use, and why it differs from the free memory."""
    usable = format_bytes(gpu.usable_bytes)
    if gpu.mig:
        return f"{usable} (a process can use only one MIG instance)" if gpu.usable_bytes else "unknown"
    kept = gpu.free_bytes - gpu.usable_bytes
    return f"{usable} ({format_bytes(kept)} less than free: CUDA cannot use all of it)" if kept else usable
