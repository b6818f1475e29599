"""A run that rounds by GPTQ takes no more memory than planned, and less with fewer experts at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamprune.config import RunSettings
from streamprune.hardware.memory_plan import Limit, MemoryPlan, Room
from streamprune.pipeline.run import run
from streamprune.planning import memory_needs
from tests.helpers import known_family
from tests.peak import Peak
from tests.tiny import make_model, tiny_config, write_token_ids


def test_rounding_takes_no_more_than_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the command line sets it: what other threads make would not be seen here.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    config = tiny_config(known_family("qwen3_moe"))
    config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers = 256, 128, 2
    model = make_model(tmp_path / "model", config)
    tokens = write_token_ids(tmp_path / "ids.jsonl", sequences=20, length=48)
    plans: list[MemoryPlan] = []
    usual = memory_needs.choose

    def choose(*given: Any) -> MemoryPlan:
        plans.append(usual(*given))
        return plans[-1]

    monkeypatch.setattr(memory_needs, "choose", choose)

    def measure(name: str, weights: str) -> int:
        settings = RunSettings(
            model=str(model), output=tmp_path / name, calibration=(str(tokens),), keep=6, weights=weights,
            dtype="float32", device="cpu", batch_tokens=480,
        )  # fmt: skip
        with Peak() as peak:
            run(settings, quiet=True)
        return peak.nbytes

    plain, together = measure("plain", "source"), measure("together", "w4a16")
    assert plans[-1].experts_at_a_time == 6
    assert plain < together < plans[-1].device_bytes
    assert together > 0.4 * plans[-1].device_bytes
    monkeypatch.setattr(MemoryPlan, "experts_at_a_time", 1)
    single = measure("single", "w4a16")
    assert single < min(together, plans[-1].device_bytes)
    # Whoever has little memory rounds few at a time.
    monkeypatch.undo()
    plan = plans[-1]
    small = Limit(8 * (plan.needs.rounding.single + plan.needs.rounding.each), "", "")
    assert MemoryPlan("ram", 480, plan.needs, Room(small, None, small), "cpu").experts_at_a_time == 2
