"""A stand-in for NVML's Python bindings: the functions that streamprune asks, with the errors of the real ones.

Nothing but the answers is played: errors are the real package's own classes, and tests/test_devices.py holds the
functions' parameters against the real ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml as real
import pytest
from click.testing import CliRunner

from streamprune.cli import main
from streamprune.hardware.gpus import Gpu
from streamprune.hardware.nvml import list_gpus

MIB = 1024**2
NOBODY = 2**22 + 1  # more than the number of any process on Linux
Processes = list[tuple[int, int | None]]  # pid, and MiB or None


@dataclass
class FakeCard:
    """What NVML would say of one GPU, in MiB. `refuse`: functions of the C library, and the error each returns."""

    name: str | bytes = "NVIDIA GeForce RTX 3090"
    total: int = 24576
    reserved: int = 318
    used: int = 0
    compute: Processes = field(default_factory=list)
    graphics: Processes = field(default_factory=list)
    active: int = 0
    plugged: int = 0
    mig: int | None = None
    parts: list[FakeCard | None] = field(default_factory=list)
    uuid: str = "GPU-8a1e7d9c-0001-4b6f-9c2e-3d5f7a9b1c2d"
    refuse: dict[str, int] = field(default_factory=dict)

    def ask(self, function: str) -> None:
        if function in self.refuse:
            raise real.NVMLError(self.refuse[function])


def install(monkeypatch: pytest.MonkeyPatch, *gpus: FakeCard, refuse: dict[str, int] | None = None) -> Any:
    """Make `import pynvml` find the stand-in, with these GPUs; `refuse` is for questions that are about no GPU."""
    module = _Module(list(gpus), refuse or {})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def fake_torch(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, str, int, int]) -> None:
    """torch with these CUDA GPUs: name, UUID, free and total MiB."""
    cuda = SimpleNamespace(
        is_available=lambda: bool(gpus),
        device_count=lambda: len(gpus),
        get_device_name=lambda index: gpus[index][0],
        get_device_properties=lambda index: SimpleNamespace(uuid=gpus[index][1]),
        mem_get_info=lambda index: (gpus[index][2] * MIB, gpus[index][3] * MIB),
    )
    module = ModuleType("torch")
    module.cuda, module.__version__ = cuda, "2.13.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", module)


def a100(**fields: Any) -> FakeCard:
    parts = [FakeCard(total=20096, reserved=12, used=used, uuid=f"MIG-{used}") for used in (15000, 4)]
    return FakeCard(
        **{"name": "NVIDIA A100-SXM4-80GB", "total": 81920, "mig": 1, "parts": [parts[0], None, parts[1]], **fields}
    )


def printed(*options: str) -> str:
    """What `streamprune devices` prints, which must succeed."""
    result = CliRunner().invoke(main, ["devices", *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def the_gpu() -> Gpu:
    """The only GPU."""
    (gpu,) = list_gpus().gpus
    return gpu


def _entries(processes: Processes) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib * MIB) for pid, mib in processes]


class _Module(ModuleType):
    """The module; `asked` are the questions so far, in order."""

    nvmlMemory_v2 = real.nvmlMemory_v2
    NVMLError = real.NVMLError

    def __init__(self, gpus: list[FakeCard], refuse: dict[str, int]) -> None:
        super().__init__("pynvml")
        self.gpus, self.refuse, self.asked = gpus, refuse, list[str]()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("nvmlDevice", "nvmlInit")):
            self.asked.append(name)
        return super().__getattribute__(name)

    def _library(self, function: str) -> None:
        if function in self.refuse:
            raise real.NVMLError(self.refuse[function])
        if "nvmlInit" not in self.asked and function != "nvmlInit":
            raise real.NVMLError(real.NVML_ERROR_UNINITIALIZED)

    def nvmlInit(self) -> None:
        self._library("nvmlInit")

    def nvmlSystemGetDriverVersion(self) -> str:
        self._library("nvmlSystemGetDriverVersion")
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        self._library("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        self._library("nvmlDeviceGetHandleByIndex")
        self.gpus[index].ask("nvmlDeviceGetHandleByIndex")
        return self.gpus[index]

    def nvmlDeviceGetName(self, handle: FakeCard) -> str | bytes:
        handle.ask("nvmlDeviceGetName")
        return handle.name

    def nvmlDeviceGetUUID(self, handle: FakeCard) -> str:
        handle.ask("nvmlDeviceGetUUID")
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: FakeCard, version: int | None = None) -> SimpleNamespace:
        handle.ask("nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo")
        assert version in (None, 0x02000028)
        used = handle.used if version else handle.used + handle.reserved
        info = {"total": handle.total, "used": used, "free": handle.total - handle.reserved - handle.used}
        if version:
            info["reserved"] = handle.reserved
        return SimpleNamespace(**{key: mib * MIB for key, mib in info.items()})

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeCard) -> list[SimpleNamespace]:
        if "nvmlDeviceGetComputeRunningProcesses_v3" in handle.refuse:
            raise real.NVMLLibraryMismatchError("Unversioned function called")
        handle.ask("nvmlDeviceGetComputeRunningProcesses")
        return _entries(handle.compute)

    def nvmlDeviceGetComputeRunningProcesses_v2(self, handle: FakeCard) -> list[SimpleNamespace]:
        handle.ask("nvmlDeviceGetComputeRunningProcesses")
        return _entries(handle.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeCard) -> list[SimpleNamespace]:
        handle.ask("nvmlDeviceGetGraphicsRunningProcesses")
        return _entries(handle.graphics)

    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, handle: FakeCard) -> list[SimpleNamespace]:
        return self.nvmlDeviceGetGraphicsRunningProcesses(handle)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: FakeCard) -> list[SimpleNamespace]:
        raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetDisplayActive(self, handle: FakeCard) -> int:
        handle.ask("nvmlDeviceGetDisplayActive")
        return handle.active

    def nvmlDeviceGetDisplayMode(self, handle: FakeCard) -> int:
        handle.ask("nvmlDeviceGetDisplayMode")
        return handle.plugged

    def nvmlDeviceGetMigMode(self, device: FakeCard) -> list[int]:
        device.ask("nvmlDeviceGetMigMode")
        if device.mig is None:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        return [device.mig, device.mig]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeCard) -> int:
        device.ask("nvmlDeviceGetMaxMigDeviceCount")
        return len(device.parts)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeCard, index: int) -> FakeCard:
        device.ask("nvmlDeviceGetMigDeviceHandleByIndex")
        part = device.parts[index]
        if part is None:
            raise real.NVMLError(real.NVML_ERROR_NOT_FOUND)
        return part
