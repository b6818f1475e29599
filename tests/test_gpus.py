"""Which GPU a name or torch's number means, and what it has to give; NVML is played by a stand-in."""

from __future__ import annotations

import os

import pynvml as real
import pytest

from streamprune.errors import SettingsError
from streamprune.hardware.gpus import GPUS, Gpus, budget_on_gpu, find_known_gpu, known_gpu
from streamprune.hardware.nvml import gpu_of_device, list_gpus
from tests.fake_nvml import MIB, NOBODY, FakeCard, a100, fake_torch, install, printed

OWN = os.getpid()


@pytest.mark.parametrize(
    "name", ["rtx-4090", "RTX 4090", "rtx4090", "4090", "GeForce RTX 4090", "NVIDIA GeForce RTX 4090"]
)
def test_spellings_of_a_known_card(name: str) -> None:
    known = known_gpu(name)
    assert (known.key, known.total_bytes, known.usable_bytes) == ("rtx-4090", 24564 * MIB, 24082 * MIB)
    assert not known.estimated


def test_the_table_of_cards() -> None:
    measured = {
        known.key: (known.total_bytes // MIB, known.usable_bytes // MIB) for known in GPUS if not known.estimated
    }
    assert measured == {"rtx-3090": (24576, 24125), "rtx-4090": (24564, 24082), "rtx-5090": (32607, 32113)}
    for known in GPUS:
        assert known_gpu(known.key) == known
        assert all(find_known_gpu(name, known.total_bytes) == known for name in known.names)
        assert known.gap_bytes >= 451 * MIB
        assert known.usable_bytes <= 0.985 * known.total_bytes
    # Published for 16 GB GPUs of the RTX 50 series: 15.45 to 15.49 GiB.
    assert known_gpu("rtx-5080").usable_bytes <= 15.45 * 1024**3
    assert find_known_gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 16376 * MIB) is None
    assert find_known_gpu("NVIDIA GeForce RTX 3080", 12288 * MIB) is None


def test_unknown_cards_and_names_that_say_too_little() -> None:
    with pytest.raises(SettingsError, match=r"--gpu 'rtx-9999' is unknown.*rtx-3090, .*h200.*--budget-gib"):
        known_gpu("rtx-9999")
    with pytest.raises(SettingsError, match="Use --gpu rtx-4060-ti-8gb or --gpu rtx-4060-ti-16gb"):
        known_gpu("RTX 4060 Ti")


def test_the_budget_of_a_card_that_is_not_here() -> None:
    budget, notes = budget_on_gpu(known_gpu("rtx-3090"), Gpus((), ()))
    assert budget == 24125 * MIB
    assert notes == [
        "rtx-3090: CUDA can use 23.56 GiB of 24.00 GiB.",
        "No such GPU is visible here, so nothing is subtracted for a display or other programs on it.",
    ]
    assert "(estimated: no measurement of this GPU is known)." in budget_on_gpu(known_gpu("l4"), Gpus((), ()))[1][0]


def test_the_budget_of_a_card_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeCard(used=1800, compute=[(OWN, 600)], graphics=[(NOBODY, 1100)], active=1)
    install(monkeypatch, gpu)
    budget, notes = budget_on_gpu(known_gpu("rtx-3090"), list_gpus())
    # All that is in use except this process's own.
    assert budget == (24125 - 1200) * MIB
    assert notes[1] == (
        f"GPU 0 here is such a GPU: 1.17 GiB are in use there now (name unknown (pid {NOBODY}), 1.07 GiB; a display "
        "is attached), and subtracted."
    )
    # The first memory query counts the driver's part as used, which is not to be taken off twice.
    gpu.refuse["nvmlDeviceGetMemoryInfo_v2"] = real.NVML_ERROR_NOT_SUPPORTED
    assert budget_on_gpu(known_gpu("rtx-3090"), list_gpus())[0] == (24125 - (1800 + 318 - 451 - 600)) * MIB
    install(monkeypatch, FakeCard(used=9000), FakeCard())
    budget, notes = budget_on_gpu(known_gpu("rtx-3090"), list_gpus())
    assert budget == 24125 * MIB
    assert notes[1] == "2 such GPUs are here, of which GPU 1 has most left, and nothing else uses memory on it."


def test_a_card_of_the_same_name_but_another_size_is_not_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(name="NVIDIA GeForce RTX 3080", total=12288, used=700))
    budget, notes = budget_on_gpu(known_gpu("rtx-3080"), list_gpus())
    assert budget == (10240 - 512) * MIB
    assert notes[1].startswith("GPU 0 here has that name but 12.00 GiB: memory in use on it is not subtracted")


def test_the_budget_of_a_card_that_mig_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, a100())
    assert "MIG is enabled, so no process can use all of it" in budget_on_gpu(known_gpu("a100-80gb"), list_gpus())[1][1]


def test_which_card_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [FakeCard(uuid=f"GPU-{letter * 8}") for letter in "abc"]
    install(monkeypatch, *gpus)
    fake_torch(monkeypatch)  # no CUDA in torch, so that only the environment can tell

    def indices() -> list[int | None]:
        return [gpu.index if gpu else None for gpu in map(gpu_of_device, range(4))]

    assert indices() == [0, 1, 2, None]
    for setting, expected in {
        "2,0": [2, 0, None, None],
        "GPU-bbbb, GPU-aaaaaaaa": [1, 0, None, None],
        "1,7,0": [1, None, None, None],
        "-1": [None] * 4,
        "": [None] * 4,
        "MIG-GPU-cccccccc/1/0": [2, None, None, None],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        assert indices() == expected, setting
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert "note: CUDA_VISIBLE_DEVICES=2,0: with this setting a run uses only these GPUs: 2, 0.\n" in printed()
    # torch's UUID wins over the environment.
    fake_torch(monkeypatch, ("x", "b" * 8, 1, 1))
    assert indices()[0] == 1


def test_different_cards_in_an_unknown_order_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(), FakeCard(name="NVIDIA T4"))
    fake_torch(monkeypatch)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    gpu = gpu_of_device(0)
    assert gpu is not None
    assert "CUDA counts the fastest first. Set CUDA_DEVICE_ORDER=PCI_BUS_ID to be sure." in gpu.notes[-1]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu_of_device(0) == list_gpus().gpus[0]
