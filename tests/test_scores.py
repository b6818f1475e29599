"""REAP scores against a plain float64 loop over experts, and everything that decides which experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from streamprune.models.skeleton import dispatches_experts
from streamprune.saliency.channels import channel_count
from streamprune.saliency.hooks import ExpertsTap, bare_pairs, forward_with_pairs
from streamprune.saliency.scores import FIELDS, pack, unpack
from streamprune.saliency.statistics import ExpertStatistics, Pairs
from tests.helpers import CPU, field_of, known_family, load_whole, prune, streamed, token_ids
from tests.tiny import FAMILIES, make_model, tiny_config

#: The activations (W,) of an expert, its down projection (H, W), and its bias (0 without).
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]


def silu_expert(module: Any, expert: int, x: torch.Tensor) -> Parts:
    """down(silu(gate(x)) · up(x)), the usual expert."""
    gate, up = (module.gate_up_proj[expert].double() @ x).chunk(2)
    return nn.functional.silu(gate) * up, module.down_proj[expert].double(), 0.0


def gpt_oss_expert(module: Any, expert: int, x: torch.Tensor) -> Parts:
    """gpt-oss: transposed weights, biases, gate and up interleaved, clamped at 7, swish with 1.702, up + 1."""
    both = x @ module.gate_up_proj[expert].double() + module.gate_up_proj_bias[expert].double()
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return hidden, module.down_proj[expert].double().T, module.down_proj_bias[expert].double()


def relu2_expert(module: Any, expert: int, x: torch.Tensor) -> Parts:
    """Nemotron-H: down(relu(up(x))²), without a gate."""
    return nn.functional.relu(module.up_proj[expert].double() @ x).square(), module.down_proj[expert].double(), 0.0


def output_of(parts: Parts) -> torch.Tensor:
    inner, down, bias = parts
    return down @ inner + bias


def experts_of(layer: nn.Module) -> Any:
    """The experts module of a layer of a loaded model; None without."""
    return next((module for module in layer.modules() if dispatches_experts(module)), None)


def reference(folder: Path, ids: torch.Tensor, expert_parts: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Statistics by block: the whole model runs, and every expert is evaluated token by token in float64."""
    model = load_whole(folder, dtype=torch.float32)
    result: dict[int, dict[str, torch.Tensor]] = {}
    entering: dict[int, torch.Tensor] = {}

    def listen(block: int, layer: Any) -> None:
        def enters(module: Any, arguments: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
            stream = arguments[0] if arguments else keywords["hidden_states"]
            entering[block] = stream.reshape(-1, stream.shape[-1]).double()

        def hook(module: Any, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
            hidden, chosen, weights = (*arguments, *keywords.values())
            sums = {name: torch.zeros(module.num_experts, dtype=torch.float64) for name in FIELDS}
            sums["channels"] = torch.zeros((module.num_experts, channel_count(module)), dtype=torch.float64)
            rows = zip(hidden.double(), entering[block], chosen.tolist(), weights.double(), strict=True)
            for x, residual, experts, gates in rows:
                parts = [expert_parts(module, expert, x) for expert in experts]
                outputs = list(map(output_of, parts))
                together = sum(gate * output for gate, output in zip(gates, outputs, strict=True))
                for expert, gate, (inner, down, _) in zip(experts, gates, parts, strict=True):
                    # (H, W): what each channel adds to the output.
                    sums["channels"][expert] += (gate * inner * down).square().sum(dim=0)
                for expert, gate, output in zip(experts, gates, outputs, strict=True):
                    gated = gate * output
                    sums["tokens"][expert] += 1
                    sums["gates"][expert] += gate
                    sums["gated_norms"][expert] += gated.norm()
                    sums["norms"][expert] += output.norm()
                    sums["squared_norms"][expert] += output.norm() ** 2
                    sums["squared_gated_norms"][expert] += gated.norm() ** 2
                    sums["peaks"][expert] = max(sums["peaks"][expert], output.abs().max())
                    sums["relative_energies"][expert] += gated.norm() ** 2 / residual.norm() ** 2
                    sums["cosines"][expert] += nn.functional.cosine_similarity(gated, together, dim=0)
                sums["top_choices"][experts[int(gates.argmax())]] += 1
            result[block] = sums

        layer.register_forward_pre_hook(enters, with_kwargs=True)
        experts_of(layer).register_forward_pre_hook(hook, with_kwargs=True)

    for block, layer in enumerate(model.model.layers):
        if experts_of(layer) is not None:
            listen(block, layer)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return result


@pytest.mark.parametrize(
    ("name", "expert_parts"),
    [
        ("qwen3_moe", silu_expert),  # softmax
        ("deepseek_v3", silu_expert),  # sigmoid, correction bias, groups, scaling
        ("gpt_oss", gpt_oss_expert),  # softmax over the chosen, biases in the fused experts
        ("nemotron_h", relu2_expert),  # no gate projection
    ],
)
def test_statistics_equal_a_float64_loop(name: str, expert_parts: Any, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.id == name)
    folder = make_model(tmp_path / "model", tiny_config(family))
    ids = token_ids(batch=2, length=48)
    expected = reference(folder, ids, expert_parts)
    _, statistics = streamed(folder, ids, torch.float32)
    assert statistics.keys() == expected.keys()
    for block, sums in expected.items():
        channels = statistics[block].channels
        assert channels is not None
        wanted = sums.pop("channels")
        torch.testing.assert_close(
            torch.from_numpy(channels[0]).double(), wanted, rtol=2e-6, atol=1e-6 * float(wanted.mean())
        )
        assert ((wanted > 0).all(dim=1) == torch.tensor(field_of(statistics[block], "tokens")).bool()).all()
        for name, wanted in sums.items():
            found = torch.tensor(field_of(statistics[block], name), dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


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
        output, pairs = forward_with_pairs(experts, hidden, index, gates.to(dtype))
        assert torch.equal(output, grouped_mm_experts_forward(experts, hidden, index, gates.to(dtype)))
        bare = bare_pairs(tap, experts, hidden, index, gates.to(dtype), output)
        for name in ("norms", "peaks"):
            torch.testing.assert_close(getattr(pairs, name), getattr(bare, name), msg=name)
        # A dot product in bfloat16 is rounded to three digits.
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(pairs.cosines, bare.cosines, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "granitemoe"])  # grouped, dense, plain
def test_large_outputs_in_float16_have_cosines(name: str, tmp_path: Path) -> None:
    """Outputs above 256, whose products no float16 can hold: what is recorded is that of float32."""
    folder = make_model(tmp_path / "model", tiny_config(known_family(name)))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if ("experts" in key and "down_proj" in key) or "output_linear" in key:
                tensors[key] = tensors[key] * 3000
        save_file(tensors, path, metadata={"format": "pt"})
    ids = token_ids(batch=1, length=32)
    exact, narrow = (streamed(folder, ids, dtype)[1] for dtype in (torch.float32, torch.float16))
    first = min(exact)
    assert max(field_of(exact[first], "peaks")) > 256
    wanted, found = (sum(field_of(statistics[first], "cosines")) for statistics in (exact, narrow))
    assert found == pytest.approx(wanted, rel=0.01)


def pairs_of(index: list[list[int]], gate: float = 0.5, norm: float = 4.0) -> Pairs:
    chosen = torch.tensor(index)
    gates, norms = torch.full(chosen.shape, gate), torch.full(chosen.shape, norm)
    return Pairs(chosen, gates, gates, norms, norms, torch.ones(chosen.shape))


def test_channels_of_sources_are_kept_apart() -> None:
    total = ExpertStatistics(3, CPU, sources=2, width=4)
    for source, energy in ((0, 1 / 3), (1, 0.1), (0, 0.7)):
        part = ExpertStatistics(3, CPU, width=4)
        assert part.channels is not None
        part.channels[0, 1, 2] = energy
        total.merge(part, source)
    layer = total.of_layer(5)
    assert layer.channels is not None
    assert layer.channels.dtype == np.float32
    expected = np.zeros((2, 3, 4), dtype=np.float32)
    expected[:, 1, 2] = np.float32(1 / 3 + 0.7), np.float32(0.1)
    assert layer.channels.tobytes() == expected.tobytes()


def test_statistics_do_not_count_indices_beyond_the_experts() -> None:
    statistics = ExpertStatistics(3, CPU)
    statistics.add(pairs_of([[0, 2], [3, 1], [9, 0]]), torch.full((3,), 2.0))
    layer = statistics.of_layer(0)
    assert field_of(layer, "tokens") == [2, 1, 1]
    assert field_of(layer, "gated_norms") == [4.0, 2.0, 2.0]
    assert field_of(layer, "relative_energies") == [2.0, 1.0, 1.0]
    # The first of equal gates is the top choice; of two tokens that is no expert at all.
    assert field_of(layer, "top_choices") == [1, 0, 0]


def test_a_residual_stream_of_zeros_divides_nothing() -> None:
    statistics = ExpertStatistics(2, CPU)
    statistics.add(pairs_of([[1]]), torch.zeros(1))
    assert field_of(statistics.of_layer(0), "relative_energies") == [0, 0]


def test_sources_are_kept_apart_and_packed_to_the_bit() -> None:
    total = ExpertStatistics(3, CPU, sources=2)
    for source, norm in ((0, 1 / 3), (1, 0.1), (0, 0.7)):
        part = ExpertStatistics(3, CPU)
        part.add(pairs_of([[0, 1]], norm=norm), torch.ones(1))
        total.merge(part, source)
    layer = total.of_layer(5)
    number = list(FIELDS).index("norms")
    assert layer.values[number, :, 0] == pytest.approx([1 / 3 + 0.7, 0.1])
    assert layer.values[list(FIELDS).index("peaks"), :, 0] == pytest.approx([0.7, 0.1])
    packed = pack(layer.values)
    assert unpack(packed, 2, 3).tobytes() == layer.values.tobytes()
    for wrong in (packed[:-8], "?", pack(ExpertStatistics(2, CPU).of_layer(5).values)):
        with pytest.raises(ValueError):  # noqa: PT011 (numpy's)
            unpack(wrong, 2, 3)


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
        assert a.tokens == b.tokens
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
            sums[expert] += gate * output_of(silu_expert(module, expert, x)).norm()
            counts[expert] += 1
    return (sums / counts.clamp(min=1)).tolist()


def calibration_ids(path: Path) -> list[list[int]]:
    import json

    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]
