"""What only a GPU can show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from measuring.processes import Job, work
from measuring.shapes import build, config_of, write_tokens

from tests.helpers import prune
from tests.test_evaluate import measured
from tests.test_evaluate_run import found
from tests.tiny import FAMILIES, Family, make_model, tiny_config, write_token_ids

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


@pytest.mark.parametrize("states", ["ram", "disk"])
def test_hidden_states_beside_the_card_give_the_same_scores_to_the_bit(states: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(SOME[0]))
    # Several micro-batches, so that states come and go while others are computed.
    on_card, elsewhere = (
        prune(source, tmp_path / place, device="cuda:0", states=place, batch_tokens=24) for place in ("device", states)
    )
    assert on_card.layers == elsewhere.layers


def test_what_the_tools_measure_on_a_card(tmp_path: Path) -> None:
    """Each kind of process of tools/gpu_check on a small model, before the large ones take their minutes."""
    config = config_of("tiny")
    job = Job("forward", tmp_path / "model", tmp_path / "tokens.jsonl", tmp_path / "output", "cuda:0", 2)
    build(config, job.model, job.device)
    write_tokens(job.tokens, 8, 64, config["vocab_size"])
    forward = work(job)
    assert forward["computing_seconds"] > 0
    for kind in ("score", "run"):
        found = work(replace(job, kind=kind, vram_gib=4.0))
        assert found["summary"]["calibration_tokens"] == 8 * 64
        assert len(found["blocks"]) == config["num_hidden_layers"]
        assert 0 < found["vram_allocated_bytes"] <= found["vram_reserved_bytes"] <= 4 * 2**30
    assert work(replace(job, kind="matrix"))["flop_per_second"] > 1e11


@pytest.mark.parametrize("family", SOME, ids=lambda family: family.id)
def test_what_is_lost_is_the_same_on_the_gpu(family: Family, tmp_path: Path) -> None:
    """Beside the scoring, and of the files afterwards; the vocabulary in slices."""
    source, data = make_model(tmp_path / "model", tiny_config(family)), write_token_ids(tmp_path / "ids.jsonl", 20)
    given = {"keep": family.keep, "dtype": "float32", "calibration": (str(data),), "evaluate": True}
    for device in ("cpu", "cuda:0"):
        prune(source, tmp_path / device[:4], device=device, **given)
    here, there = (found(tmp_path / device)["all"] for device in ("cpu", "cuda"))
    recipe = tmp_path / "cuda.held-out" / "recipe.json"
    again = measured(tmp_path / "cuda", source, recipe, dtype="float32", device="cuda:0")["all"]
    for name in ("loss", "kl", "top1_agreement"):
        assert there[name] == pytest.approx(here[name], rel=0.05, abs=1e-3), "the kept experts may differ in a tie"
        assert again[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6)
