"""This machine's NVIDIA GPUs. They are asked for through NVML (nvidia-ml-py), or through torch if NVML fails.

Both are imported when they are first needed. Nothing public raises: what cannot be known is None, and a note says why.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from typing import Any

from streamprune.hardware.gpus import (
    ASK_BUDGET,
    Gpu,
    GpuProcess,
    Gpus,
    MemoryFigures,
    MigInstance,
    bare_uuid,
    visible_gpus,
)
from streamprune.hardware.memory import format_bytes, process_name

# By the name of the error's class: the same in every version of nvidia-ml-py.
_REASONS = {
    "NVMLError_NotSupported": "the GPU or its driver does not support the question",
    "NVMLError_NoPermission": "this user is not permitted to ask",
    "NVMLError_NotFound": "there is none",
    "NVMLError_FunctionNotFound": "the driver is too old for the question",
    "NVMLLibraryMismatchError": "the driver is too old for the question",
    "NVMLError_LibraryNotFound": "there is no NVIDIA driver (libnvidia-ml.so.1 is not found)",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not loaded; see what `nvidia-smi` says",
    "NVMLError_LibRmVersionMismatch": "the NVIDIA driver was updated but the old one is loaded; restart the machine",
    "NVMLError_GpuIsLost": "the GPU has stopped answering; see `dmesg`, and restart the machine",
}
# Less than this in use beyond what processes hold is the driver's own, and no unseen process.
_UNEXPLAINED_BYTES = 512 * 1024**2
_UNEXPLAINED_SHARE = 0.02


def list_gpus(ask_torch: bool = True) -> Gpus:
    """All GPUs of this machine, asked through NVML; through torch, which is imported only then, if NVML fails.

    Without `ask_torch` there are then none: for those who can do without, importing torch would take seconds.
    """
    _, refusal = _ask("nvmlInit")
    if refusal is None:
        try:
            count, refusal = _ask("nvmlDeviceGetCount")
            if refusal is None:
                return _nvml_gpus(count)
            refusal = f"it cannot count the GPUs: {refusal}"
        finally:
            _ask("nvmlShutdown")
    note = f"NVML cannot be used: {refusal}."
    return _torch_gpus(note) if ask_torch else Gpus((), (note,))


def gpu_of_device(torch_index: int) -> Gpu | None:
    """The GPU that torch calls cuda:`torch_index`, or None if that is not known.

    NVML counts all GPUs by their place on the bus. CUDA counts those that CUDA_VISIBLE_DEVICES names, and without
    CUDA_DEVICE_ORDER=PCI_BUS_ID the fastest first. Where torch is loaded, the GPU's UUID settles it.
    """
    gpus = list_gpus().gpus
    uuid = _torch_uuid(torch_index)
    if uuid:
        return next((gpu for gpu in gpus if gpu.answers_to(uuid)), None)
    if gpus and all(gpu.source == "torch" for gpu in gpus):
        return next((gpu for gpu in gpus if gpu.index == torch_index), None)
    visible = list(visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")))
    if not 0 <= torch_index < len(visible):
        return None
    gpu = visible[torch_index]
    if len({each.name for each in gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        note = (
            f"cuda:{torch_index} was taken for this GPU by its place on the bus, but the GPUs differ and CUDA counts "
            "the fastest first. Set CUDA_DEVICE_ORDER=PCI_BUS_ID to be sure."
        )
        return replace(gpu, notes=(*gpu.notes, note))
    return gpu


# What torch sees.


def _torch_gpus(nvml_note: str) -> Gpus:
    """The GPUs that torch sees, with a note on why NVML was not asked; none if torch sees none either."""
    try:
        import torch
    except Exception as error:
        return Gpus((), (nvml_note, f"torch cannot be imported ({error}). {ASK_BUDGET}"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        # torch warns here when it finds a GPU that it cannot use, say because the driver is too old.
        said = f" ({str(caught[-1].message).splitlines()[0]})" if caught else ""
        return Gpus((), (nvml_note, f"torch {torch.__version__} sees no CUDA GPU either{said}. {ASK_BUDGET}"))
    figures_note = (
        "The figures are torch's, of what CUDA can see: what the driver reserves, its version, which processes hold "
        "memory, whether a display is attached and whether MIG is on are not known."
    )
    gpus, notes = [], [nvml_note, figures_note]
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            name = str(torch.cuda.get_device_name(index))
        except Exception as error:
            notes.append(f"GPU {index} is left out, because its memory cannot be known: {error}. {ASK_BUDGET}")
        else:
            gpus.append(Gpu(index, name, total, None, free, total - free, source="torch", uuid=_torch_uuid(index)))
    return Gpus(tuple(gpus), tuple(notes))


def _torch_uuid(index: int) -> str | None:
    """The UUID of what torch calls cuda:`index`; None unless torch is loaded and sees the GPU."""
    torch: Any = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available():
            return None
        return str(torch.cuda.get_device_properties(index).uuid)
    # torch built for other GPUs has no UUIDs, and CUDA can fail in many ways; without it there is still the index.
    except Exception:
        return None


# What NVML says.


def _ask(question: str, *args: Any, **options: Any) -> tuple[Any, str | None]:
    """NVML's answer and None, or None and the reason why there is none."""
    try:
        import pynvml
    except Exception as error:
        return None, f"the Python package nvidia-ml-py cannot be imported ({error})"
    try:
        return getattr(pynvml, question)(*args, **options), None
    except AttributeError:
        return None, f"the installed nvidia-ml-py has no {question}"
    # Besides NVMLError, the bindings let ctypes' errors, undecodable names (WSL) and version conflicts through.
    except Exception as error:
        return None, _REASONS.get(type(error).__name__) or str(error) or type(error).__name__


def _text(answer: tuple[Any, str | None]) -> str | None:
    """An answer that is text; older bindings give bytes."""
    value = answer[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _nvml_gpus(count: int) -> Gpus:
    gpus, notes = [], []
    version = _ask("nvmlSystemGetDriverVersion")
    if version[1]:
        notes.append(f"The driver's version is not known, and will be missing from records: {version[1]}.")
    for index in range(count):
        handle, refusal = _ask("nvmlDeviceGetHandleByIndex", index)
        if refusal:
            notes.append(f"GPU {index} is left out, because NVML gives no access to it: {refusal}.")
            continue
        gpu, refusal = _nvml_gpu(handle, index, _text(version))
        if gpu is None:
            notes.append(f"GPU {index} is left out, because its memory cannot be known: {refusal}. {ASK_BUDGET}")
        else:
            gpus.append(gpu)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        notes.append(f"NVML works, but shows no GPU (a container may have been given none). {ASK_BUDGET}")
    elif visible is not None:
        names = ", ".join(str(gpu.index) for gpu in visible_gpus(tuple(gpus), visible)) or "none"
        notes.append(f"CUDA_VISIBLE_DEVICES={visible}: a run started here would see only these GPUs: {names}.")
    return Gpus(tuple(gpus), tuple(notes))


def _nvml_gpu(handle: Any, index: int, driver: str | None) -> tuple[Gpu | None, str | None]:
    """The GPU and None, or None and why there is none."""
    notes: list[str] = []
    name = _ask("nvmlDeviceGetName", handle)
    if name[1]:
        notes.append(f"The GPU's name is not known, so that its memory cannot be compared with known GPUs: {name[1]}.")
    uuid = _text(_ask("nvmlDeviceGetUUID", handle))
    mig = _mig(handle, notes)
    instances = _instances(handle, notes) if mig else ()
    memory, refusal = _memory(handle, uuid, instances, notes)
    if memory is None:
        return None, refusal
    gpu = Gpu(
        index=index,
        name=_text(name) or "unknown NVIDIA GPU",
        **vars(memory),
        processes=_processes(handle, memory, notes),
        driver=driver,
        display=_display(handle, notes),
        mig=mig,
        uuid=uuid,
        instances=instances,
    )
    return replace(gpu, notes=tuple(notes)), None


def _memory(
    handle: Any, uuid: str | None, instances: tuple[MigInstance, ...] | None, notes: list[str]
) -> tuple[MemoryFigures | None, str | None]:
    """NVML's second memory query, its first, the sum of the MIG parts, torch's figures: the first that answers."""
    memory, refusal, refusal_of_second = _nvml_memory(handle)
    if memory is not None:
        if refusal_of_second:
            notes.append(f"What the driver reserves is not known and is counted as used: {refusal_of_second}.")
        return memory, None
    if instances:
        notes.append(f"The memory of the whole GPU is not known ({refusal}): the figures are sums over its MIG parts.")
        figures = ((part.total_bytes, part.free_bytes, part.used_bytes) for part in instances)
        total, free, used = map(sum, zip(*figures, strict=True))
        return MemoryFigures(total, None, free, used, "NVML v1"), None
    for gpu in _torch_gpus("").gpus:
        if uuid is not None and gpu.uuid == bare_uuid(uuid):
            notes.append(f"NVML does not report the memory ({refusal}): the figures are torch's, of what CUDA can see.")
            return MemoryFigures(gpu.total_bytes, None, gpu.free_bytes, gpu.used_bytes, "torch"), None
    return None, f"{refusal}, and torch does not see the GPU"


def _nvml_memory(handle: Any) -> tuple[MemoryFigures | None, str | None, str | None]:
    """The figures of NVML's second memory query, or of its first, and why neither or only the first answers."""
    # nvmlMemory_v2, which not all bindings have: the structure's version and its size.
    info, refusal_of_second = _ask("nvmlDeviceGetMemoryInfo", handle, version=0x02000028)
    if refusal_of_second is None:
        return MemoryFigures(info.total, info.reserved, info.free, info.used, "NVML v2"), None, None
    info, refusal = _ask("nvmlDeviceGetMemoryInfo", handle)
    memory = None if refusal else MemoryFigures(info.total, None, info.free, info.used, "NVML v1")
    return memory, refusal, refusal_of_second


def _mig(handle: Any, notes: list[str]) -> bool | None:
    """Whether the GPU is divided with MIG."""
    modes, refusal = _ask("nvmlDeviceGetMigMode", handle)
    if refusal is None:
        return bool(modes[0])
    if refusal == _REASONS["NVMLError_NotSupported"]:
        return False  # this kind of GPU cannot be divided, as NVML says by that
    notes.append(
        f"Whether the GPU is divided with MIG is not known: {refusal}. If it is, less can be used than is free."
    )
    return None


def _instances(handle: Any, notes: list[str]) -> tuple[MigInstance, ...] | None:
    """The GPU's MIG parts; None if they may not be seen."""
    count, refusal = _ask("nvmlDeviceGetMaxMigDeviceCount", handle)
    instances = []
    for index in range(count or 0):
        part, refusal_of_part = _ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        if refusal_of_part == _REASONS["NVMLError_NotFound"]:
            continue  # the slots that no part takes
        memory = None
        if refusal_of_part is None:
            memory, refusal_of_part, _ = _nvml_memory(part)
        if memory is None:
            refusal = refusal_of_part
            continue
        uuid = _text(_ask("nvmlDeviceGetUUID", part))
        instances.append(MigInstance(index, uuid, memory.total_bytes, memory.free_bytes, memory.used_bytes))
    if refusal:
        notes.append(
            f"The GPU is divided with MIG, but not all its parts can be seen: {refusal}. A process can use one part "
            f"only. {ASK_BUDGET}"
        )
    elif not instances:
        notes.append("The GPU is divided with MIG, but has no parts yet, so that nothing can run on it.")
    return tuple(instances) if instances or not refusal else None


def _display(handle: Any, notes: list[str]) -> bool | None:
    """Whether a display is driven by the GPU or plugged into it."""
    active, refusal = _ask("nvmlDeviceGetDisplayActive", handle)
    plugged, refusal_of_mode = _ask("nvmlDeviceGetDisplayMode", handle)
    if refusal and refusal_of_mode:
        notes.append(f"Whether a display is attached, which takes memory when it is used, is not known: {refusal}.")
        return None
    return bool(active or plugged)


def _processes(handle: Any, memory: MemoryFigures, notes: list[str]) -> tuple[GpuProcess, ...] | None:
    """Who holds memory, over compute, graphics and MPS processes; None if it may not be known at all."""
    held: dict[tuple[int, Any, Any], int | None] = {}
    refusals = {}
    for kind in ("Compute", "Graphics", "MPSCompute"):
        question = f"nvmlDeviceGet{kind}RunningProcesses"
        entries, refusal = _ask(question, handle)
        if refusal:
            # Drivers from before 2022 answer only the older form.
            entries, refusal_of_older = _ask(f"{question}_v2", handle)
            if refusal_of_older:
                refusals[kind] = refusal
        for entry in entries or []:
            # A program that computes and draws is in two lists with the same figure; in two MIG parts it has two.
            key = (entry.pid, getattr(entry, "gpuInstanceId", None), getattr(entry, "computeInstanceId", None))
            held[key] = max((used for used in (held.get(key), entry.usedGpuMemory) if used is not None), default=None)
    if {"Compute", "Graphics"} <= refusals.keys():
        notes.append(f"Which processes hold memory is not known, so none can be named: {refusals['Compute']}.")
        return None
    for kind, refusal in refusals.items():
        if kind != "MPSCompute":  # most machines have no MPS, and drivers without it refuse
            notes.append(f"{kind} processes cannot be seen, so that what they hold has no name: {refusal}.")
    parts: dict[int, list[int | None]] = defaultdict(list)
    for (pid, *_), used in held.items():
        parts[pid].append(used)
    processes = tuple(
        GpuProcess(pid, process_name(pid), None if None in used else sum(part or 0 for part in used))
        for pid, used in sorted(parts.items())
    )
    _note_unexplained(processes, memory, notes)
    return processes


def _note_unexplained(processes: tuple[GpuProcess, ...], memory: MemoryFigures, notes: list[str]) -> None:
    """Say so where memory is in use and nobody can be named for it."""
    unknown = sum(process.used_bytes is None for process in processes)
    unexplained = memory.used_bytes - sum(process.used_bytes or 0 for process in processes)
    if unknown:
        notes.append(
            f"How much {unknown} of {len(processes)} processes hold is not known (WSL and Windows do not report it): "
            f"of the {format_bytes(memory.used_bytes)} in use it cannot be said who holds what."
        )
    elif unexplained > max(_UNEXPLAINED_BYTES, _UNEXPLAINED_SHARE * memory.total_bytes):
        notes.append(
            f"{format_bytes(unexplained)} are in use by processes that cannot be seen from here (outside this "
            "container, or Windows programs under WSL), so they cannot be named."
        )
