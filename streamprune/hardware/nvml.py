"""This machine's NVIDIA GPUs. They are asked for through NVML (nvidia-ml-py), or through torch if NVML fails.

Both are imported when they are first needed. Nothing here raises: what cannot be known is None, and a note says why.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from typing import Any

from streamprune.hardware.gpus import (
    ASK_BUDGET,
    Gpu,
    GpuProcess,
    Gpus,
    MemoryFigures,
    MigInstance,
    visible_gpus,
)
from streamprune.hardware.memory import format_bytes, process_name


def torch_gpus(reason: str) -> Gpus:
    """The GPUs that torch sees, with a note that NVML failed for `reason`; none if torch sees none either."""
    notes = [f"NVML cannot be used: {reason}."]
    torch, refusal = _torch_with_gpus()
    if torch is None:
        return Gpus((), (notes[0], f"{refusal}. {ASK_BUDGET}"))
    notes.append(
        "The figures are torch's, of what CUDA can see: what the driver reserves, its version, which processes hold "
        "memory, whether a display is attached and whether MIG is on are not known."
    )
    gpus = []
    for index in range(torch.cuda.device_count()):
        try:
            memory = _figures(torch, index)
            name = str(torch.cuda.get_device_name(index))
        except Exception as error:
            notes.append(f"GPU {index} is left out, because its memory cannot be known: {error}. {ASK_BUDGET}")
            continue
        gpus.append(
            Gpu(
                index=index,
                name=name,
                total_bytes=memory.total,
                reserved_bytes=None,
                free_bytes=memory.free,
                used_bytes=memory.used,
                processes=None,
                driver=None,
                display=None,
                mig=None,
                source="torch",
                notes=(),
                uuid=torch_uuid(index),
            )
        )
    return Gpus(tuple(gpus), tuple(notes))


def torch_memory(uuid: str | None) -> MemoryFigures | None:
    """CUDA's figures for the GPU with this UUID, or None if torch does not see it."""
    torch, _ = _torch_with_gpus()
    if torch is None or uuid is None:
        return None
    try:
        for index in range(torch.cuda.device_count()):
            if torch_uuid(index) == uuid.removeprefix("GPU-"):
                return _figures(torch, index)
    except Exception:
        pass
    return None


def torch_uuid(index: int) -> str | None:
    """The UUID of what torch calls cuda:`index`, without the GPU- that NVML puts before it.

    None unless torch is loaded and sees the GPU.
    """
    torch: Any = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available():
            return None
        return str(torch.cuda.get_device_properties(index).uuid)
    # torch built for other GPUs has no UUIDs, and CUDA can fail in many ways; without it there is still the index.
    except Exception:
        return None


def _figures(torch: Any, index: int) -> MemoryFigures:
    free, total = torch.cuda.mem_get_info(index)
    return MemoryFigures(total, None, free, total - free, "torch")


def _torch_with_gpus() -> tuple[Any, str | None]:
    """torch and None, or None and why it cannot help."""
    try:
        import torch
    except Exception as error:
        return None, f"torch cannot be imported ({error})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return torch, None
    # torch warns here when it finds a GPU that it cannot use, say because the driver is too old.
    said = f" ({str(caught[-1].message).splitlines()[0]})" if caught else ""
    return None, f"torch {torch.__version__} sees no CUDA GPU either{said}"


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
_FIGURES = ("total", "free", "used")
# Less than this in use beyond what processes hold is the driver's own, and no unseen process.
_UNEXPLAINED_BYTES = 512 * 1024**2
_UNEXPLAINED_SHARE = 0.02


def list_gpus(ask_torch: bool = True) -> Gpus:
    """All GPUs of this machine, asked through NVML; through torch, which is imported only then, if NVML fails.

    Without `ask_torch` there are then none: for those who can do without, importing torch would take seconds.
    """
    try:
        import pynvml as nvml
    except Exception as error:
        return _without_nvml(f"the Python package nvidia-ml-py cannot be imported ({error})", ask_torch)
    _, refusal = _ask(nvml, "nvmlInit")
    if refusal:
        return _without_nvml(refusal, ask_torch)
    try:
        return _nvml_gpus(nvml)
    finally:
        _ask(nvml, "nvmlShutdown")


def _without_nvml(reason: str, ask_torch: bool) -> Gpus:
    return torch_gpus(reason) if ask_torch else Gpus((), (f"NVML cannot be used: {reason}.",))


def gpu_of_device(torch_index: int) -> Gpu | None:
    """The GPU that torch calls cuda:`torch_index`, or None if that is not known.

    NVML counts all GPUs by their place on the bus. CUDA counts those that CUDA_VISIBLE_DEVICES names, and without
    CUDA_DEVICE_ORDER=PCI_BUS_ID the fastest first. Where torch is loaded it knows the GPU's UUID, which settles it.
    """
    gpus = list_gpus().gpus
    uuid = torch_uuid(torch_index)
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


def _ask(nvml: Any, question: str, *args: Any, **options: Any) -> tuple[Any, str | None]:
    """The answer and None, or None and the reason why there is none."""
    try:
        return getattr(nvml, question)(*args, **options), None
    except AttributeError:
        return None, f"the installed nvidia-ml-py has no {question}"
    # Besides NVMLError, the bindings let ctypes' errors, undecodable names (WSL) and version conflicts through.
    except Exception as error:
        return None, _REASONS.get(type(error).__name__) or str(error) or type(error).__name__


def _nvml_gpus(nvml: Any) -> Gpus:
    count, refusal = _ask(nvml, "nvmlDeviceGetCount")
    if refusal:
        return torch_gpus(f"it cannot count the GPUs: {refusal}")
    driver, refusal = _ask(nvml, "nvmlSystemGetDriverVersion")
    notes = [f"The driver's version is not known, and will be missing from records: {refusal}."] if refusal else []
    gpus = []
    for index in range(count):
        handle, refusal = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        if refusal:
            notes.append(f"GPU {index} is left out, because NVML gives no access to it: {refusal}.")
            continue
        gpu, refusal = _nvml_gpu(nvml, handle, index, _text(driver))
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


def _nvml_gpu(nvml: Any, handle: Any, index: int, driver: str | None) -> tuple[Gpu | None, str | None]:
    """The GPU, or why there is none."""
    notes: list[str] = []
    name, refusal = _ask(nvml, "nvmlDeviceGetName", handle)
    if refusal:
        notes.append(f"The GPU's name is not known, so that its memory cannot be compared with known GPUs: {refusal}.")
    uuid = _text(_ask(nvml, "nvmlDeviceGetUUID", handle)[0])
    mig = _mig(nvml, handle, notes)
    instances = _instances(nvml, handle, notes) if mig else ()
    memory, refusal = _memory(nvml, handle, uuid, instances, notes)
    if memory is None:
        return None, refusal
    processes = _processes(nvml, handle, memory, notes)
    gpu = Gpu(
        index=index,
        name=_text(name) or "unknown NVIDIA GPU",
        total_bytes=memory.total,
        reserved_bytes=memory.reserved,
        free_bytes=memory.free,
        used_bytes=memory.used,
        processes=processes,
        driver=driver,
        display=_display(nvml, handle, notes),
        mig=mig,
        source=memory.source,
        notes=tuple(notes),
        uuid=uuid,
        instances=instances,
    )
    return gpu, None


def _memory(
    nvml: Any, handle: Any, uuid: str | None, instances: tuple[MigInstance, ...] | None, notes: list[str]
) -> tuple[MemoryFigures | None, str | None]:
    """NVML's second memory query, its first, the sum of the MIG parts, torch's figures: the first that answers."""
    memory, refusal, refusal_of_second = _nvml_memory(nvml, handle)
    if memory is not None:
        if refusal_of_second:
            notes.append(f"What the driver reserves is not known and is counted as used: {refusal_of_second}.")
        return memory, None
    if instances:
        notes.append(f"The memory of the whole GPU is not known ({refusal}): the figures are sums over its MIG parts.")
        total, free, used = (sum(getattr(part, f"{what}_bytes") for part in instances) for what in _FIGURES)
        return MemoryFigures(total, None, free, used, "NVML v1"), None
    memory = torch_memory(uuid)
    if memory is not None:
        notes.append(f"NVML does not report the memory ({refusal}): the figures are torch's, of what CUDA can see.")
        return memory, None
    return None, f"{refusal}, and torch does not see the GPU"


def _nvml_memory(nvml: Any, handle: Any) -> tuple[MemoryFigures | None, str | None, str | None]:
    """The figures of NVML's second memory query, or of its first, and why neither or only the first answers."""
    # The value of nvmlMemory_v2, should the bindings lack it: the structure's version and its size.
    version = getattr(nvml, "nvmlMemory_v2", 0x02000028)
    info, refusal_of_second = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle, version=version)
    if refusal_of_second is None:
        return MemoryFigures(info.total, info.reserved, info.free, info.used, "NVML v2"), None, None
    info, refusal = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    if refusal is None:
        return MemoryFigures(info.total, None, info.free, info.used, "NVML v1"), None, refusal_of_second
    return None, refusal, refusal_of_second


def _mig(nvml: Any, handle: Any, notes: list[str]) -> bool | None:
    """Whether the GPU is divided with MIG."""
    modes, refusal = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    if refusal is None:
        return bool(modes[0])
    if refusal == _REASONS["NVMLError_NotSupported"]:
        return False  # this kind of GPU cannot be divided, as NVML says by that
    notes.append(
        f"Whether the GPU is divided with MIG is not known: {refusal}. If it is, less can be used than is free."
    )
    return None


def _instances(nvml: Any, handle: Any, notes: list[str]) -> tuple[MigInstance, ...] | None:
    """The GPU's MIG parts; None if they may not be seen."""
    count, refusal = _ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle)
    instances = []
    for index in range(count or 0):
        part, refusal_of_part = _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        if refusal_of_part == _REASONS["NVMLError_NotFound"]:
            continue  # the slots that no part takes
        memory = None
        if refusal_of_part is None:
            memory, refusal_of_part, _ = _nvml_memory(nvml, part)
        if memory is None:
            refusal = refusal_of_part
            continue
        uuid = _text(_ask(nvml, "nvmlDeviceGetUUID", part)[0])
        instances.append(MigInstance(index, uuid, memory.total, memory.free, memory.used))
    if refusal:
        notes.append(
            f"The GPU is divided with MIG, but not all its parts can be seen: {refusal}. A process can use one part "
            f"only. {ASK_BUDGET}"
        )
    elif not instances:
        notes.append("The GPU is divided with MIG, but has no parts yet, so that nothing can run on it.")
    return tuple(instances) if instances or not refusal else None


def _display(nvml: Any, handle: Any, notes: list[str]) -> bool | None:
    """Whether a display is driven by the GPU or plugged into it."""
    active, refusal = _ask(nvml, "nvmlDeviceGetDisplayActive", handle)
    plugged, refusal_of_mode = _ask(nvml, "nvmlDeviceGetDisplayMode", handle)
    if refusal and refusal_of_mode:
        notes.append(f"Whether a display is attached, which takes memory when it is used, is not known: {refusal}.")
        return None
    return bool(active or plugged)


def _processes(nvml: Any, handle: Any, memory: MemoryFigures, notes: list[str]) -> tuple[GpuProcess, ...] | None:
    """Who holds memory, over compute, graphics and MPS processes; None if it may not be known at all."""
    held: dict[tuple[int, Any, Any], int | None] = {}
    refusals = {}
    for kind in ("Compute", "Graphics", "MPSCompute"):
        entries, refusal = _running(nvml, handle, kind)
        if refusal:
            refusals[kind] = refusal
        for entry in entries:
            # A program that computes and draws is in two lists with the same figure; in two MIG parts it has two.
            key = (entry.pid, getattr(entry, "gpuInstanceId", None), getattr(entry, "computeInstanceId", None))
            held[key] = max((used for used in (held.get(key), entry.usedGpuMemory) if used is not None), default=None)
    if {"Compute", "Graphics"} <= refusals.keys():
        notes.append(f"Which processes hold memory is not known, so none can be named: {refusals['Compute']}.")
        return None
    for kind, refusal in refusals.items():
        if kind != "MPSCompute":  # most machines have no MPS, and drivers without it refuse
            notes.append(f"{kind} processes cannot be seen, so that what they hold has no name: {refusal}.")
    by_pid: dict[int, list[int | None]] = {}
    for (pid, *_), used in held.items():
        by_pid.setdefault(pid, []).append(used)
    processes = tuple(
        GpuProcess(pid, process_name(pid), None if None in parts else sum(part or 0 for part in parts))
        for pid, parts in sorted(by_pid.items())
    )
    _note_unexplained(processes, memory, notes)
    return processes


def _running(nvml: Any, handle: Any, kind: str) -> tuple[list[Any], str | None]:
    """NVML's list of one kind of processes, or an empty one and why."""
    entries, refusal = _ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses", handle)
    if refusal:
        # Drivers from before 2022 answer only the older form.
        entries, refusal_of_older = _ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v2", handle)
        refusal = refusal if refusal_of_older else None
    return entries or [], refusal


def _note_unexplained(processes: tuple[GpuProcess, ...], memory: MemoryFigures, notes: list[str]) -> None:
    """Say so where memory is in use and nobody can be named for it."""
    unknown = sum(process.used_bytes is None for process in processes)
    unexplained = memory.used - sum(process.used_bytes or 0 for process in processes)
    if unknown:
        notes.append(
            f"How much {unknown} of {len(processes)} processes hold is not known (WSL and Windows do not report it): "
            f"of the {format_bytes(memory.used)} in use it cannot be said who holds what."
        )
    elif unexplained > max(_UNEXPLAINED_BYTES, _UNEXPLAINED_SHARE * memory.total):
        notes.append(
            f"{format_bytes(unexplained)} are in use by processes that cannot be seen from here (outside this "
            "container, or Windows programs under WSL), so they cannot be named."
        )


def _text(value: Any) -> str | None:
    """Names come as bytes from older bindings."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
