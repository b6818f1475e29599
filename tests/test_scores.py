"""REAP scores against a plain float64 loop over experts, and everything that decides which experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from streamprune.output.allocation import keep_highest
from streamprune.source.skeleton import dispatches_experts
from streamprune.streaming.grouped_experts import forward_with_norms
from streamprune.streaming.saliency import ExpertsTap, ExpertStatistics, bare_norms
from tests.helpers import load_whole, prune, streamed, token_ids
from tests.tiny import FAMILIES, make_model, tiny_config


def silu_expert(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) · up(x)), the usual expert."""
    gate, up = (module.gate_up_proj[expert].double() @ x).chunk(2)
    return module.down_proj[expert].double() @ (nn.functional.silu(gate) * up)


def gpt_oss_expert(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """gpt-oss: transposed weights, biases, gate and up interleaved, clamped at 7, swish with 1.702, up + 1."""
    both = x @ module.gate_up_proj[expert].double() + module.gate_up_proj_bias[expert].double()
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return hidden @ module.down_proj[expert].double() + module.down_proj_bias[expert].double()


def reference(folder: Path, ids: torch.Tensor, expert_output: Any) -> dict[int, tuple[list[float], list[int]]]:
    """Scores and counts by block: the whole model runs, and every expert is evaluated token by token in float64."""
    model = load_whole(folder, dtype=torch.float32)
    result = {}

    def listen(block: int, experts: Any) -> None:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
            hidden, chosen, weights = (*arguments, *keywords.values())
            sums, counts = [0.0] * module.num_experts, [0] * module.num_experts
            for x, experts_of_x, gates in zip(hidden.double(), chosen.tolist(), weights.double(), strict=True):
                for expert, gate in zip(experts_of_x, gates, strict=True):
                    sums[expert] += float(gate * expert_output(module, expert, x).norm())
                    counts[expert] += 1
            result[block] = ([s / max(c, 1) for s, c in zip(sums, counts, strict=True)], counts)

        experts.register_forward_pre_hook(hook, with_kwargs=True)

    for block, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            listen(block, layer.mlp.experts)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return result


@pytest.mark.parametrize(
    ("name", "expert_output"),
    [
        ("qwen3_moe", silu_expert),  # softmax
        ("deepseek_v3", silu_expert),  # sigmoid, correction bias, groups, scaling
        ("gpt_oss", gpt_oss_expert),  # softmax over the chosen, biases in the fused experts
    ],
)
def test_reap_equals_a_float64_loop(name: str, expert_output: Any, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.id == name)
    folder = make_model(tmp_path / "model", tiny_config(family))
    ids = token_ids(batch=2, length=48)
    expected = reference(folder, ids, expert_output)
    _, statistics = streamed(folder, ids, torch.float32)
    assert statistics.keys() == expected.keys()
    for block, (scores, counts) in expected.items():
        assert statistics[block].counts.tolist() == counts
        torch.testing.assert_close(
            statistics[block].reap(), torch.tensor(scores, dtype=torch.float64), rtol=1e-6, atol=0.0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_fast_path_equals_the_one_that_knows_nothing(name: str, dtype: torch.dtype) -> None:
    """With and without gates, biases, interleaved and transposed weights: same output to the bit, same norms."""
    family = next(family for family in FAMILIES if family.id == name)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    experts = next(m for m in whole.modules() if dispatches_experts(m))
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.2)
    hidden = torch.randn(50, 64).to(dtype)
    gates, index = torch.randn(50, 8).softmax(-1).topk(2)
    tap = ExpertsTap(grouped_mm_experts_forward, grouped=True)
    with torch.no_grad():
        output, norms = forward_with_norms(experts, hidden, index, gates.to(dtype))
        assert torch.equal(output, grouped_mm_experts_forward(experts, hidden, index, gates.to(dtype)))
        torch.testing.assert_close(norms, bare_norms(tap, experts, hidden, index, gates.to(dtype)))


def test_statistics_do_not_count_indices_beyond_the_experts() -> None:
    statistics = ExpertStatistics(3, torch.device("cpu"))
    statistics.add(torch.tensor([[0, 2], [3, 1], [9, 0]]), torch.full((3, 2), 0.5), torch.full((3, 2), 4.0))
    assert statistics.counts.tolist() == [2, 1, 1]
    assert statistics.reap().tolist() == [2.0, 2.0, 2.0]


def test_an_expert_without_tokens_scores_zero() -> None:
    statistics = ExpertStatistics(2, torch.device("cpu"))
    statistics.add(torch.tensor([[1]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    assert statistics.reap().tolist() == [0.0, 3.0]


def test_the_highest_stay_in_order_and_ties_go_to_the_lower_number() -> None:
    assert keep_highest([0.5, 3.0, 0.5, 2.0], 3) == (0, 1, 3)
    assert keep_highest([1.0] * 4, 2) == (0, 1)


def test_groups_lose_equally() -> None:
    scores = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]
    assert keep_highest(scores, 4) == (0, 1, 2, 3)
    assert keep_highest(scores, 4, groups=2) == (0, 1, 6, 7)


def test_scores_do_not_depend_on_how_many_stay(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    few, many = (prune(source, tmp_path / f"keep{keep}", keep=keep) for keep in (2, 7))
    assert [layer.scores for layer in few.layers] == [layer.scores for layer in many.layers]
    for a, b in zip(few.layers, many.layers, strict=True):
        assert set(a.kept) < set(b.kept)


def test_scores_do_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    one, all_at_once = (prune(source, tmp_path / f"b{tokens}", batch_tokens=tokens) for tokens in (1, 10**6))
    for a, b in zip(one.layers, all_at_once.layers, strict=True):
        assert a.counts == b.counts
        assert a.kept == b.kept
        torch.testing.assert_close(torch.tensor(a.scores), torch.tensor(b.scores), rtol=1e-5, atol=0)


def test_propagating_the_pruned_output_scores_on_the_pruned_model(tmp_path: Path) -> None:
    """Block 0 is scored alike; the later blocks see what the pruned blocks before them give."""
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    plain = prune(source, tmp_path / "plain", keep=3)
    pruned = prune(source, tmp_path / "pruned", keep=3, propagate="pruned")
    assert plain.layers[0] == pruned.layers[0]
    assert plain.layers[1].scores != pruned.layers[1].scores
    # The second block's scores are those of a model whose first block is pruned already and whose others are whole.
    assert pruned.layers[1].scores == pytest.approx(scores_behind_pruned_block(source, pruned), rel=1e-5)


def scores_behind_pruned_block(source: Path, result: Any) -> list[float]:
    """Block 1's scores with block 0's removed experts masked out of its router, on the calibration tokens."""
    ids = [torch.tensor(line) for line in calibration_ids(source.parent / "calibration.jsonl")]
    model = load_whole(source, dtype=torch.float32)
    kept = torch.tensor(result.layers[0].kept)
    first = model.model.layers[0].mlp
    cut = type(first)(model.config)
    cut.load_state_dict(first.state_dict())
    cut.gate.weight.data = first.gate.weight.data[kept]
    cut.gate.num_experts = cut.experts.num_experts = len(kept)
    cut.experts.gate_up_proj.data = first.experts.gate_up_proj.data[kept]
    cut.experts.down_proj.data = first.experts.down_proj.data[kept]
    model.model.layers[0].mlp = cut.eval()
    found: dict[str, Any] = {}

    def hook(module: Any, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
        found["call"] = (module, *arguments, *keywords.values())

    model.model.layers[1].mlp.experts.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.stack(ids), use_cache=False)
    module, hidden, chosen, weights = found["call"]
    sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8)
    for x, experts, gates in zip(hidden.double(), chosen.tolist(), weights.double(), strict=True):
        for expert, gate in zip(experts, gates, strict=True):
            sums[expert] += gate * silu_expert(module, expert, x).norm()
            counts[expert] += 1
    return (sums / counts.clamp(min=1)).tolist()


def calibration_ids(path: Path) -> list[list[int]]:
    import json

    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]
