"""Measuring a model against its prediction. A card is needed for the real thing; the steps are shown on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from streamprune.cli import main
from streamprune.fit import measure as measuring
from streamprune.fit.estimate import Fit
from streamprune.fit.footprint import read_footprint
from streamprune.targets import ServingSpec
from tests.helpers import CPU
from tests.tiny import FAMILIES, make_model, tiny_config

MIB = 1024**2


class CpuMeter(TorchDispatchMode):
    """Counts the storages that torch's operators have made and that still live, as a card's allocator would."""

    def __init__(self, context: int | None, before: int | None) -> None:
        super().__init__()
        self.context, self.before = context, before
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count(pytree.tree_leaves(result))
        self._peak = max(self._peak, self.allocated())
        return result

    def count(self, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), leaf.numel() * leaf.element_size()))

    def allocated(self) -> int:
        self._alive = {key: item for key, item in self._alive.items() if not item[0].expired()}
        return sum(size for _, size in self._alive.values())

    def forget_peaks(self) -> None:
        self._peak = self.allocated()

    def peaks(self) -> tuple[int, int]:
        return self._peak, self._peak + 2 * MIB

    def on_gpu(self) -> int | None:
        return self.allocated() + 100 * MIB


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss", "qwen3_5_moe_text"])
def test_what_is_measured_is_what_was_counted(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and caches are exact, whatever the attention; the rest is what the meter says."""
    source = make_model(tmp_path / "model", tiny_config(next(item for item in FAMILIES if item.id == family)))
    estimate = Fit(read_footprint(str(source)), ServingSpec(context=40, batch=2), 10**9)
    load = measuring._load

    def load_counted(*arguments: Any) -> Any:
        # On the CPU weights are mapped from the file, or made in threads, where no operator is seen.
        model = load(*arguments)
        meter.count([*model.parameters(), *model.buffers()])
        return model

    monkeypatch.setattr(measuring, "_load", load_counted)
    with CpuMeter(300 * MIB, 50 * MIB) as meter:
        found = measuring.measure_with(meter, str(source), estimate, CPU, False)
    by_name = {item.name: item for item in found}
    assert by_name["cache and states"].error == 0
    # Buffers that are in no checkpoint (rotary frequencies) come on top of the weights.
    assert 0 <= by_name["weights"].measured - by_name["weights"].predicted < 16384
    assert by_name["prefill workspace"].measured > 0
    assert by_name["allocator margin"].measured == 2 * MIB
    assert by_name["CUDA context"].measured == 300 * MIB
    assert by_name["total"].predicted == estimate.total
    assert by_name["total"].measured > 50 * MIB


def test_what_loading_takes_for_a_moment_is_no_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    estimate = Fit(read_footprint(str(source)), ServingSpec(context=8), 10**9)
    load = measuring._load

    def load_wastefully(*arguments: Any) -> Any:
        torch.ones(64 * MIB, dtype=torch.uint8)
        return load(*arguments)

    monkeypatch.setattr(measuring, "_load", load_wastefully)
    with CpuMeter(None, None) as meter:
        found = measuring.measure_with(meter, str(source), estimate, CPU, False)
    assert 0 < {item.name: item for item in found}["prefill workspace"].measured < 32 * MIB


def test_peaks_begin_with_what_is_left_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the loader's peak nor the blocks that it left in the allocator's cache count as the prompt's."""
    gpu = {"allocated": 10, "reserved": 90, "peak allocated": 80, "peak reserved": 95}

    def reset(_: object) -> None:
        gpu.update({"peak allocated": gpu["allocated"], "peak reserved": gpu["reserved"]})

    accelerator = SimpleNamespace(
        synchronize=lambda _: None,
        memory_allocated=lambda _: gpu["allocated"],
        memory_reserved=lambda _: gpu["reserved"],
        max_memory_allocated=lambda _: gpu["peak allocated"],
        max_memory_reserved=lambda _: gpu["peak reserved"],
        empty_cache=lambda: gpu.update({"reserved": 12}),
        reset_peak_memory_stats=reset,
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(measuring, "gpu_of_device", lambda index: None)
    meter = measuring.GpuMeter(CPU)
    assert meter.peaks() == (80, 95)
    meter.forget_peaks()
    assert (meter.allocated(), meter.peaks()) == (10, (10, 12))


def test_errors_are_relative_to_what_was_measured() -> None:
    assert measuring.Measured("x", predicted=90, measured=100).error == pytest.approx(-0.1)
    assert measuring.Measured("x", predicted=103, measured=100).error == pytest.approx(0.03)


def test_without_a_card_measuring_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    result = CliRunner().invoke(main, ["fit", str(source), "--budget-gib", "8", "--context", "64", "--measure"])
    assert result.exit_code == 2
    assert "--measure loads the model on a GPU, but torch" in result.stderr
    result = CliRunner().invoke(
        main, ["fit", str(source), "--budget-gib", "8", "--context", "64", "--measure", "--keep", "4"]
    )
    assert result.exit_code == 2
    assert "leave out" in result.stderr


def test_measured_figures_are_printed_and_in_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (measuring.Measured("weights", 90, 100), measuring.Measured("total", 206, 200))
    monkeypatch.setattr(measuring, "measure", lambda *_: found)
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    arguments = ["fit", str(source), "--budget-gib", "8", "--context", "64", "--measure"]
    text = CliRunner().invoke(main, arguments).output
    assert "Measured on the GPU" in text
    assert "-10.0%" in text
    assert "+3.0%" in text
    answer = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert answer["measured"][1] == {"name": "total", "kind": "measured", "bytes": 200, "predicted": 206, "error": 0.03}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_5_moe_text"])
def test_the_prediction_holds_on_a_real_card(family: str, tmp_path: Path) -> None:
    """Weights and caches to a few KiB; tools/gpu_check takes the figures of large models."""
    source = make_model(tmp_path / "model", tiny_config(next(item for item in FAMILIES if item.id == family)))
    estimate = Fit(read_footprint(str(source)), ServingSpec(context=128), 10**10)
    by_name = {item.name: item for item in measuring.measure(str(source), estimate, "cuda:0")}
    assert by_name["cache and states"].error == 0
    assert abs(by_name["weights"].measured - by_name["weights"].predicted) < MIB
