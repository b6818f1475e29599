"""This machine's NVIDIA GPUs. They are read through NVML (nvidia-ml-py), or through torch if NVML fails.

Both are imported when they are first needed. Nothing public raises: unknown values are None, and a note says why.
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
    "NVMLError_NotSupported": "the GPU or its driver does not support this query",
    "NVMLError_NoPermission": "permission denied",
    "NVMLError_NotFound": "not found",
    "NVMLError_FunctionNotFound": "the driver is too old for this query",
    "NVMLLibraryMismatchError": "the driver is too old for this query",
    "NVMLError_LibraryNotFound": "there is no NVIDIA driver (libnvidia-ml.so.1 is not found)",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not loaded; see what `nvidia-smi` says",
    "NVMLError_LibRmVersionMismatch": "the NVIDIA driver was updated but the old one is loaded; restart the machine",
    "NVMLError_GpuIsLost": "the GPU has stopped answering; see `dmesg`, and restart the machine",
}
# A smaller difference between the memory in use and that of all processes is the driver's, not an unknown process.
_UNEXPLAINED_BYTES = 512 * 1024**2
_UNEXPLAINED_SHARE = 0.02


def list_gpus(ask_torch: bool = True) -> Gpus:
    """All GPUs of this machine, read through NVML; if NVML fails, through torch, which is imported only then.

    Without `ask_torch` there are none if NVML fails: for callers that need no GPU, since importing torch takes seconds.
    """
    error = _open()
    if error is None:
        count, error = _ask("nvmlDeviceGetCount")
        if error is None:
            return _nvml_gpus(count)
        error = f"the GPU count cannot be read: {error}"
    note = f"NVML cannot be used: {error}."
    return _torch_gpus(note) if ask_torch else Gpus((), (note,))


def with_processes_now(gpu: Gpu) -> Gpu | None:
    """The GPU with the processes that use memory on it now, and all else as it was; None if NVML gives no access to it.

    This asks NVML for the processes of that one GPU, and nothing else.
    """
    if _open() is not None:
        return None
    handle, error = _ask("nvmlDeviceGetHandleByIndex", gpu.index)
    return replace(gpu, processes=_processes(handle, [])) if error is None else None


def gpu_of_device(torch_index: int) -> Gpu | None:
    """The GPU that torch calls cuda:`torch_index`, or None if it is unknown.

    NVML counts all GPUs in PCI bus order. CUDA counts those that CUDA_VISIBLE_DEVICES names, and without
    CUDA_DEVICE_ORDER=PCI_BUS_ID the fastest first. If torch is loaded, the GPU is found by its UUID.
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
            f"cuda:{torch_index} was matched to this GPU by PCI bus order, but the GPUs differ and CUDA counts the "
            "fastest first. Set CUDA_DEVICE_ORDER=PCI_BUS_ID to be sure."
        )
        return replace(gpu, notes=(*gpu.notes, note))
    return gpu


# Through torch.


def _torch_gpus(nvml_note: str, only: str | None = None) -> Gpus:
    """The GPUs that torch sees (`only`: the one with this UUID), with a note on why NVML was not used."""
    try:
        import torch
    except Exception as error:
        return Gpus((), (nvml_note, f"torch cannot be imported ({error}). {ASK_BUDGET}"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        # torch warns here if it finds a GPU that it cannot use, for example because the driver is too old.
        said = f" ({str(caught[-1].message).splitlines()[0]})" if caught else ""
        return Gpus((), (nvml_note, f"torch {torch.__version__} sees no CUDA GPU either{said}. {ASK_BUDGET}"))
    figures_note = (
        "Memory sizes come from torch. Unknown: driver-reserved memory, the driver's version, the processes that use "
        "memory, whether a display is attached, and whether MIG is enabled."
    )
    gpus, notes = [], [nvml_note, figures_note]
    for index in range(torch.cuda.device_count()):
        if only is not None and _torch_uuid(index) != only:
            continue
        try:
            free, total = torch.cuda.mem_get_info(index)
            name = str(torch.cuda.get_device_name(index))
        except Exception as error:
            notes.append(f"GPU {index} is skipped, because its memory cannot be read: {error}. {ASK_BUDGET}")
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
    # torch built for other GPUs has no UUIDs, and CUDA can fail in many ways; then the index is used.
    except Exception:
        return None


# Through NVML.


def _open() -> str | None:
    """Initialise NVML, which stays so until the process ends; the reason if that fails.

    The library only counts a further initialisation, where one after a shutdown starts anew, between any two layers.
    (No process that is forked from this one asks NVML.)
    """
    return _ask("nvmlInit")[1]


def _ask(question: str, *args: Any, **options: Any) -> tuple[Any, str | None]:
    """NVML's answer and None, or None and the reason of the failure."""
    try:
        import pynvml
    except Exception as error:
        return None, f"the Python package nvidia-ml-py cannot be imported ({error})"
    try:
        return getattr(pynvml, question)(*args, **options), None
    except AttributeError:
        return None, f"the installed nvidia-ml-py has no {question}"
    # In addition to NVMLError, the bindings raise ctypes' errors, and others for undecodable names (WSL) and versions.
    except Exception as error:
        return None, _REASONS.get(type(error).__name__) or str(error) or type(error).__name__


def _ask_text(question: str, *args: Any) -> tuple[str | None, str | None]:
    """The same for an answer that is text; older bindings return bytes."""
    value, error = _ask(question, *args)
    return value.decode(errors="replace") if isinstance(value, bytes) else value, error


def _nvml_gpus(count: int) -> Gpus:
    gpus, notes = [], []
    version, error = _ask_text("nvmlSystemGetDriverVersion")
    if error:
        notes.append(f"The driver version is unknown, and will be missing in records: {error}.")
    for index in range(count):
        handle, error = _ask("nvmlDeviceGetHandleByIndex", index)
        if error:
            notes.append(f"GPU {index} is skipped, because NVML gives no access to it: {error}.")
            continue
        gpu, error = _nvml_gpu(handle, index, version)
        if gpu is None:
            notes.append(f"GPU {index} is skipped, because its memory cannot be read: {error}. {ASK_BUDGET}")
        else:
            gpus.append(gpu)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        notes.append(f"NVML works, but lists no GPU (in a container: start it with GPU access). {ASK_BUDGET}")
    elif visible is not None:
        names = ", ".join(str(gpu.index) for gpu in visible_gpus(tuple(gpus), visible)) or "none"
        notes.append(f"CUDA_VISIBLE_DEVICES={visible}: with this setting a run uses only these GPUs: {names}.")
    return Gpus(tuple(gpus), tuple(notes))


def _nvml_gpu(handle: Any, index: int, driver: str | None) -> tuple[Gpu | None, str | None]:
    """The GPU and None, or None and the reason of the failure."""
    notes: list[str] = []
    name, error = _ask_text("nvmlDeviceGetName", handle)
    if error:
        notes.append(f"The GPU's name is unknown, so its memory cannot be compared with known GPUs: {error}.")
    uuid = _ask_text("nvmlDeviceGetUUID", handle)[0]
    mig = _mig(handle, notes)
    instances = _instances(handle, notes) if mig else ()
    memory, error = _memory(handle, uuid, instances, notes)
    if memory is None:
        return None, error
    processes = _processes(handle, notes)
    if processes is not None:
        _note_unexplained(processes, memory, notes)
    gpu = Gpu(
        index=index,
        name=name or "unknown NVIDIA GPU",
        **vars(memory),
        processes=processes,
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
    """The first that works of: NVML's second memory query, its first, the sum of the MIG instances, torch's sizes."""
    memory, error, error_of_second = _nvml_memory(handle)
    if memory is not None:
        if error_of_second:
            notes.append(f"Driver-reserved memory is unknown and counted as used: {error_of_second}.")
        return memory, None
    if instances:
        notes.append(f"The GPU's total memory is unknown ({error}): sizes are sums over its MIG instances.")
        figures = ((part.total_bytes, part.free_bytes, part.used_bytes) for part in instances)
        total, free, used = map(sum, zip(*figures, strict=True))
        return MemoryFigures(total, None, free, used, "NVML v1"), None
    # Only this GPU: asking torch for a GPU's memory creates a CUDA context there.
    for gpu in _torch_gpus("", bare_uuid(uuid)).gpus if uuid is not None else ():
        notes.append(f"NVML does not report the memory ({error}): memory sizes come from torch.")
        return MemoryFigures(gpu.total_bytes, None, gpu.free_bytes, gpu.used_bytes, "torch"), None
    return None, f"{error}, and torch does not see the GPU"


def _nvml_memory(handle: Any) -> tuple[MemoryFigures | None, str | None, str | None]:
    """Sizes from NVML's second memory query, or its first; the reason why both failed; and why the second failed."""
    # nvmlMemory_v2, which not all bindings have: the structure's version and its size.
    info, error_of_second = _ask("nvmlDeviceGetMemoryInfo", handle, version=0x02000028)
    if error_of_second is None:
        return MemoryFigures(info.total, info.reserved, info.free, info.used, "NVML v2"), None, None
    info, error = _ask("nvmlDeviceGetMemoryInfo", handle)
    memory = None if error else MemoryFigures(info.total, None, info.free, info.used, "NVML v1")
    return memory, error, error_of_second


def _mig(handle: Any, notes: list[str]) -> bool | None:
    """Whether MIG is enabled on the GPU."""
    modes, error = _ask("nvmlDeviceGetMigMode", handle)
    if error is None:
        return bool(modes[0])
    if error == _REASONS["NVMLError_NotSupported"]:
        return False  # this kind of GPU does not support MIG
    notes.append(f"It is unknown whether MIG is enabled: {error}. If it is, less than the free memory can be used.")
    return None


def _instances(handle: Any, notes: list[str]) -> tuple[MigInstance, ...] | None:
    """The GPU's MIG instances; None if not all are visible."""
    count, error = _ask("nvmlDeviceGetMaxMigDeviceCount", handle)
    instances = []
    for index in range(count or 0):
        part, error_of_part = _ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        if error_of_part == _REASONS["NVMLError_NotFound"]:
            continue  # an unused slot
        memory = None
        if error_of_part is None:
            memory, error_of_part, _ = _nvml_memory(part)
        if memory is None:
            error = error_of_part
            continue
        uuid = _ask_text("nvmlDeviceGetUUID", part)[0]
        instances.append(MigInstance(index, uuid, memory.total_bytes, memory.free_bytes, memory.used_bytes))
    if error:
        notes.append(
            f"MIG is enabled, but not all MIG instances are visible: {error}. A process can use only one instance. "
            f"{ASK_BUDGET}"
        )
    elif not instances:
        notes.append("MIG is enabled, but no instance exists, so no process can run on the GPU.")
    return tuple(instances) if instances or not error else None


def _display(handle: Any, notes: list[str]) -> bool | None:
    """Whether a display is driven by the GPU or plugged into it."""
    active, error = _ask("nvmlDeviceGetDisplayActive", handle)
    plugged, error_of_mode = _ask("nvmlDeviceGetDisplayMode", handle)
    if error and error_of_mode:
        notes.append(f"It is unknown whether a display is attached, which would use memory: {error}.")
        return None
    return bool(active or plugged)


def _processes(handle: Any, notes: list[str]) -> tuple[GpuProcess, ...] | None:
    """The compute, graphics and MPS processes that use memory; None if they cannot be read."""
    held: dict[tuple[int, Any, Any], int | None] = {}
    errors = {}
    for kind in ("Compute", "Graphics", "MPSCompute"):
        question = f"nvmlDeviceGet{kind}RunningProcesses"
        entries, error = _ask(question, handle)
        if error:
            # Drivers from before 2022 only support the older query.
            entries, error_of_older = _ask(f"{question}_v2", handle)
            if error_of_older:
                errors[kind] = error
        for entry in entries or []:
            # A program that computes and draws is in two lists with the same size; in two MIG instances it has two.
            key = (entry.pid, getattr(entry, "gpuInstanceId", None), getattr(entry, "computeInstanceId", None))
            held[key] = max((used for used in (held.get(key), entry.usedGpuMemory) if used is not None), default=None)
    if {"Compute", "Graphics"} <= errors.keys():
        notes.append(f"Processes using memory are unknown: {errors['Compute']}.")
        return None
    for kind, error in errors.items():
        if kind != "MPSCompute":  # most machines have no MPS, and drivers without it fail here
            notes.append(f"{kind} processes are not visible: their memory is not listed: {error}.")
    parts: dict[int, list[int | None]] = defaultdict(list)
    for (pid, *_), used in held.items():
        parts[pid].append(used)
    return tuple(
        GpuProcess(pid, process_name(pid), None if None in used else sum(part or 0 for part in used))
        for pid, used in sorted(parts.items())
    )


def _note_unexplained(processes: tuple[GpuProcess, ...], memory: MemoryFigures, notes: list[str]) -> None:
    """Add a note if memory is in use by unknown processes."""
    unknown = sum(process.used_bytes is None for process in processes)
    unexplained = memory.used_bytes - sum(process.used_bytes or 0 for process in processes)
    if unknown:
        notes.append(
            f"The memory of {unknown} of {len(processes)} processes is unknown (WSL and Windows do not report it): "
            f"of the {format_bytes(memory.used_bytes)} in use, memory per process is unknown."
        )
    elif unexplained > max(_UNEXPLAINED_BYTES, _UNEXPLAINED_SHARE * memory.total_bytes):
        notes.append(
            f"{format_bytes(unexplained)} are in use by processes that are not visible from here (outside this "
            "container, or Windows programs under WSL), so they are not listed."
        )
