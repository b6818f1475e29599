"""What only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import prune
from tests.tiny import FAMILIES, Family, make_model, tiny_config

pytestmark = pytest.mark.gpu
SOME = [family for family in FAMILIES if family.id in {"qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"}]


@pytest.mark.parametrize("family", SOME, ids=lambda family: family.id)
def test_scores_on_the_gpu_equal_those_on_the_cpu(family: Family, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(family))
    cpu, gpu = (prune(source, tmp_path / d[:4], keep=family.keep, device=d) for d in ("cpu", "cuda:0"))
    for a, b in zip(cpu.layers, gpu.layers, strict=True):
        assert sum(a.tokens) == sum(b.tokens)
        torch.testing.assert_close(torch.tensor(a.scores), torch.tensor(b.scores), rtol=1e-3, atol=1e-6)


def test_two_runs_on_the_gpu_give_the_same_scores_to_the_bit(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(SOME[0]))
    first, second = (prune(source, tmp_path / name, device="cuda:0") for name in ("a", "b"))
    assert first.layers == second.layers
