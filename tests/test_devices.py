"""What this machine's GPUs are, with NVML played by a stand-in for everything that can fail, and the real NVML."""

from __future__ import annotations

import inspect
import json
import os
import sys
from types import ModuleType

import psutil
import pynvml as real
import pytest
import torch

from streamprune.hardware.nvml import gpu_of_device, list_gpus
from tests import fake_nvml
from tests.fake_nvml import MIB, NOBODY, FakeCard, a100, fake_torch, install, printed, the_gpu

NOT_SUPPORTED, NO_PERMISSION = real.NVML_ERROR_NOT_SUPPORTED, real.NVML_ERROR_NO_PERMISSION
OWN, PARENT = os.getpid(), os.getppid()


def test_the_stand_in_takes_what_the_real_functions_take() -> None:
    names = [name for name in vars(fake_nvml._Module) if name.startswith("nvml") and name != "nvmlMemory_v2"]
    assert len(names) > 15
    for name in names:
        played = list(inspect.signature(getattr(fake_nvml._Module, name)).parameters)[1:]
        assert played == list(inspect.signature(getattr(real, name)).parameters), name


def test_a_card_with_everything_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # The program of this test computes and draws: it is in both lists and counts once.
    gpu = FakeCard(used=1500, compute=[(OWN, 900)], graphics=[(OWN, 900), (NOBODY, 300)], active=1)
    install(monkeypatch, gpu)
    found = the_gpu()
    assert (found.name, found.driver, found.source) == ("NVIDIA GeForce RTX 3090", "580.95.05", "NVML v2")
    assert (found.total_bytes, found.reserved_bytes) == (24576 * MIB, 318 * MIB)
    assert (found.used_bytes, found.free_bytes) == (1500 * MIB, 22758 * MIB)
    # CUDA loses 451 MiB of this GPU, of which the driver's 318 are gone already.
    assert found.usable_bytes == (22758 - (451 - 318)) * MIB
    assert (found.display, found.mig, found.notes) == (True, False, ())
    assert found.processes is not None
    assert [(p.pid, p.name, p.used_bytes) for p in found.processes] == [
        (OWN, psutil.Process().name(), 900 * MIB),
        (NOBODY, None, 300 * MIB),
    ]
    assert [process.pid for process in found.other_processes()] == [NOBODY]
    text = printed()
    for line in (
        "GPU 0: NVIDIA GeForce RTX 3090\n",
        "  total     24.00 GiB\n",
        "  reserved  318.00 MiB\n",
        "  free      22.22 GiB\n",
        "  usable    22.09 GiB (133.00 MiB less than free: CUDA cannot use all of it)\n",
        f"  processes {psutil.Process().name()} (pid {OWN}), 900.00 MiB\n",
        f"            name unknown (pid {NOBODY}), 300.00 MiB\n",
        "  driver    580.95.05\n",
        "  display   attached\n",
        "  MIG       off\n",
    ):
        assert line in text
    assert "note" not in text


def test_json_is_one_object_with_cards_notes_ram_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(used=40, compute=[(OWN, 40)]))
    told = json.loads(printed("--json"))
    assert set(told) == {"cards", "notes", "ram", "disk"}
    (gpu,) = told["cards"]
    assert gpu["total_bytes"] == 24576 * MIB
    assert gpu["usable_bytes"] == (24125 - 40) * MIB
    assert gpu["processes"] == [{"pid": OWN, "name": psutil.Process().name(), "used_bytes": 40 * MIB}]
    assert told["ram"]["total_bytes"] == psutil.virtual_memory().total > told["ram"]["available_bytes"] > 0
    assert told["disk"]["total_bytes"] > told["disk"]["free_bytes"] > 0


def test_memory_by_the_first_query_where_the_second_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(refuse={"nvmlDeviceGetMemoryInfo_v2": real.NVML_ERROR_FUNCTION_NOT_FOUND}))
    gpu = the_gpu()
    assert (gpu.source, gpu.reserved_bytes, gpu.used_bytes) == ("NVML v1", None, 318 * MIB)
    assert gpu.usable_bytes == 24125 * MIB
    assert (
        "  note      Driver-reserved memory is unknown and counted as used: the driver is too old for this query.\n"
    ) in printed()


def test_wsl_does_not_tell_what_a_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(used=5000, compute=[(OWN, None), (PARENT, None)]))
    text = printed()
    assert f"(pid {OWN}), size unknown\n" in text
    assert (
        "  note      The memory of 2 of 2 processes is unknown (WSL and Windows do not report it): of the 4.88 GiB in "
        "use, memory per process is unknown.\n"
    ) in text


def test_memory_in_use_by_processes_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(used=3000, compute=[(OWN, 1000)]))
    assert (
        "  note      1.95 GiB are in use by processes that are not visible from here (outside this container, or "
        "Windows programs under WSL), so they are not listed.\n"
    ) in printed()


def test_processes_that_may_not_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = {"nvmlDeviceGetGraphicsRunningProcesses": NO_PERMISSION}
    install(monkeypatch, FakeCard(compute=[(OWN, 5)], refuse=refuse))
    gpu = the_gpu()
    assert gpu.processes is not None
    assert [process.pid for process in gpu.processes] == [OWN]
    assert gpu.notes == ("Graphics processes are not visible: their memory is not listed: permission denied.",)
    refuse["nvmlDeviceGetComputeRunningProcesses"] = NO_PERMISSION
    assert the_gpu().processes is None
    assert the_gpu().other_processes() == ()
    text = printed()
    assert "  processes unknown\n" in text
    assert "Processes using memory are unknown: permission denied.\n" in text


def test_an_older_driver_lists_processes_in_the_older_form(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeCard(compute=[(OWN, 5)], refuse={"nvmlDeviceGetComputeRunningProcesses_v3": NOT_SUPPORTED})
    install(monkeypatch, gpu)
    assert the_gpu().notes == ()
    assert [process.pid for process in the_gpu().processes or ()] == [OWN]


def test_unsupported_fields_are_unknown_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = dict.fromkeys(("nvmlDeviceGetDisplayActive", "nvmlDeviceGetDisplayMode"), NOT_SUPPORTED)
    refuse |= {"nvmlDeviceGetName": real.NVML_ERROR_UNKNOWN, "nvmlDeviceGetUUID": NOT_SUPPORTED}
    install(monkeypatch, FakeCard(refuse=refuse), refuse={"nvmlSystemGetDriverVersion": NOT_SUPPORTED})
    text = printed()
    for line in (
        "GPU 0: unknown NVIDIA GPU\n",
        "  driver    unknown\n",
        "  display   unknown\n",
        "  note      It is unknown whether a display is attached, which would use memory: the GPU or its driver does "
        "not support this query.\n",
        "  note      The GPU's name is unknown, so its memory cannot be compared with known GPUs: Unknown Error.\n",
    ):
        assert line in text
    assert text.endswith(
        "note: The driver version is unknown, and will be missing in records: the GPU or its driver does not support "
        "this query.\n"
    )


def test_names_come_as_bytes_from_older_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(name=b"GeForce RTX 3090"))
    assert the_gpu().name == "GeForce RTX 3090"
    assert the_gpu().usable_bytes == 24125 * MIB


def test_bindings_without_the_functions_are_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    fake_torch(monkeypatch)
    assert "NVML cannot be used: the installed nvidia-ml-py has no nvmlInit.\n" in printed()


def test_a_card_that_is_lost_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = FakeCard(refuse={"nvmlDeviceGetHandleByIndex": real.NVML_ERROR_GPU_IS_LOST})
    install(monkeypatch, lost, FakeCard())
    assert [gpu.index for gpu in list_gpus().gpus] == [1]
    assert "note: GPU 0 is skipped, because NVML gives no access to it: the GPU has stopped answering;" in printed()


def test_nvml_without_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    text = printed()
    assert text.startswith("No NVIDIA GPU is visible.\n  NVML works, but lists no GPU (in a container: ")
    assert "Give the memory with --budget-gib." in text


def test_of_a_card_that_mig_divides_one_part_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, a100())
    gpu = the_gpu()
    assert [part.index for part in gpu.instances or ()] == [0, 2]
    assert gpu.usable_bytes == (20096 - 12 - 4) * MIB
    text = printed()
    assert "  MIG       on\n  MIG 0     19.62 GiB total, 4.96 GiB free\n  MIG 2     19.62 GiB total" in text
    assert "  usable    19.61 GiB (a process can use only one MIG instance)\n" in text


def test_mig_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = dict.fromkeys(("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"), NO_PERMISSION)
    install(monkeypatch, a100(refuse=memory))
    gpu = the_gpu()
    assert gpu.total_bytes == 2 * 20096 * MIB
    assert "sizes are sums over its MIG instances." in gpu.notes[0]

    install(monkeypatch, a100(refuse={"nvmlDeviceGetMigDeviceHandleByIndex": NO_PERMISSION}))
    assert the_gpu().instances is None
    text = printed()
    assert "  usable    unknown\n" in text
    assert (
        "  note      MIG is enabled, but not all MIG instances are visible: permission denied. A process can use only "
        "one instance. Give the memory with --budget-gib.\n"
    ) in text

    install(monkeypatch, FakeCard(refuse={"nvmlDeviceGetMigMode": NO_PERMISSION}))
    assert the_gpu().mig is None
    assert "It is unknown whether MIG is enabled: permission denied." in printed()


@pytest.mark.gpu
def test_the_real_card() -> None:
    held = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda:0")
    gpu = gpu_of_device(0)
    assert gpu is not None
    assert gpu.source in {"NVML v2", "NVML v1"}
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.driver
    free, total = torch.cuda.mem_get_info(0)
    assert total <= gpu.total_bytes <= 1.05 * total
    # Nothing that NVML calls usable may be more than CUDA gives, but for what other programs do in the meantime.
    assert abs(gpu.usable_bytes - free) <= 0.02 * total
    assert gpu.used_bytes >= held.nbytes
    mine = [process for process in gpu.processes or () if process.pid == OWN]
    assert all(process.used_bytes is None or process.used_bytes >= held.nbytes for process in mine)
