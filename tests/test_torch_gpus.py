"""Where NVML does not answer: torch's figures, or a line that says why there are none; and torch only then."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pynvml as real
import pytest
import torch

from streamprune.hardware.gpus import budget_on_gpu, known_gpu
from streamprune.hardware.nvml import gpu_of_device, list_gpus
from tests.fake_nvml import MIB, FakeCard, fake_torch, install, printed, the_gpu

NOT_SUPPORTED = real.NVML_ERROR_NOT_SUPPORTED


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("LIBRARY_NOT_FOUND", "there is no NVIDIA driver (libnvidia-ml.so.1 is not found)."),
        ("DRIVER_NOT_LOADED", "the NVIDIA driver is installed but not loaded; see what `nvidia-smi` says."),
        ("LIB_RM_VERSION_MISMATCH", "the NVIDIA driver was updated but the old one is loaded; restart the machine."),
        ("UNKNOWN", "Unknown Error."),
    ],
)
def test_no_nvml_and_no_card_for_torch_either(monkeypatch: pytest.MonkeyPatch, error: str, said: str) -> None:
    install(monkeypatch, refuse={"nvmlInit": getattr(real, f"NVML_ERROR_{error}")})
    fake_torch(monkeypatch)
    text = printed()
    assert text.startswith(f"No NVIDIA GPU is visible.\n  NVML cannot be used: {said}\n")
    assert "torch 2.13.0 sees no CUDA GPU either. Give the memory with --budget-gib.\n" in text
    assert "\nRAM: " in text
    assert "\ndisk of " in text


def test_neither_nvml_bindings_nor_torch_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    text = printed()
    assert "NVML cannot be used: the Python package nvidia-ml-py cannot be imported (" in text
    assert "torch cannot be imported (" in text
    assert "Give the memory with --budget-gib." in text


def test_without_nvml_the_figures_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, refuse={"nvmlInit": real.NVML_ERROR_LIBRARY_NOT_FOUND})
    fake_torch(monkeypatch, ("NVIDIA GeForce RTX 4090", "aa-bb", 20000, 24082))
    gpu = the_gpu()
    assert (gpu.source, gpu.total_bytes, gpu.free_bytes) == ("torch", 24082 * MIB, 20000 * MIB)
    assert gpu.usable_bytes == gpu.free_bytes
    assert gpu_of_device(0) == gpu
    text = printed()
    assert "  processes unknown\n" in text
    assert "  reserved  unknown\n" in text
    assert "note: Memory sizes come from torch. Unknown: driver-reserved memory," in text
    assert budget_on_gpu(known_gpu("rtx-4090"), list_gpus())[0] == 20000 * MIB


def test_a_card_that_torch_cannot_ask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, refuse={"nvmlInit": real.NVML_ERROR_LIBRARY_NOT_FOUND})
    fake_torch(monkeypatch, ("NVIDIA H200", "aa", 1, 1))

    def fail(index: int) -> Any:
        raise RuntimeError("CUDA error: device is busy")

    sys.modules["torch"].cuda.mem_get_info = fail
    gpus = list_gpus()
    assert gpus.gpus == ()
    assert "GPU 0 is skipped, because its memory cannot be read: CUDA error: device is busy." in gpus.notes[-1]


def test_memory_by_torch_where_nvml_knows_the_card_but_not_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = {"nvmlDeviceGetMemoryInfo_v2": NOT_SUPPORTED, "nvmlDeviceGetMemoryInfo": NOT_SUPPORTED}
    gpus = [FakeCard(), FakeCard(name="NVIDIA GB10", uuid="GPU-cc-dd", refuse=refuse)]
    install(monkeypatch, *gpus)
    # torch counts the GPUs the other way round; UUIDs tell which is which.
    fake_torch(monkeypatch, ("NVIDIA GB10", "cc-dd", 90000, 122000), ("a", gpus[0].uuid.removeprefix("GPU-"), 1, 1))
    asked = []
    cuda = sys.modules["torch"].cuda
    answer = cuda.mem_get_info
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: asked.append(index) or answer(index))
    first, second = list_gpus().gpus
    assert asked == [0], "asking torch makes a CUDA context on that GPU"
    assert (first.source, second.source) == ("NVML v2", "torch")
    assert (second.free_bytes, second.total_bytes) == (90000 * MIB, 122000 * MIB)
    assert "does not report the memory (the GPU or its driver does not support this query)" in second.notes[0]
    assert gpu_of_device(0) == second
    assert gpu_of_device(1) == first
    fake_torch(monkeypatch)
    (only,) = list_gpus().gpus
    assert only == first
    assert "GPU 1 is skipped, because its memory cannot be read: " in printed()


def test_torch_is_not_imported_where_nvml_answers() -> None:
    script = (
        "import sys, pytest\n"
        "from tests.fake_nvml import FakeCard, install\n"
        "install(pytest.MonkeyPatch(), FakeCard(used=4000))\n"
        "from streamprune.cli import main\n"
        "main(['devices'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "GPU 0: NVIDIA GeForce RTX 3090" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_real_libraries_on_a_machine_without_a_card() -> None:
    done = subprocess.run([sys.executable, "-m", "streamprune", "devices"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("No NVIDIA GPU is visible.\n  NVML cannot be used: ")
    assert f"torch {torch.__version__} sees no CUDA GPU either" in done.stdout
