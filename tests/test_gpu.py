"""What only a GPU can show."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from measuring.processes import Job, work
from measuring.shapes import build, config_of, write_tokens
from transformers import Qwen3MoeConfig
from transformers.integrations import moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from streamprune.checkpoint.index import open_checkpoint
from streamprune.models.open import open_model
from streamprune.saliency.combine import by_kernel, by_torch, try_kernel
from streamprune.saliency.hooks import tap_experts
from streamprune.saliency.scores import FIELDS
from streamprune.saliency.scores_file import read_scores
from streamprune.saliency.statistics import ExpertStatistics, Pairs, cosines, norms
from streamprune.streaming.layer_weights import LayerWeights
from tests.helpers import prune, read_tensors
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
def test_hidden_states_beside_the_gpu_give_the_same_scores_to_the_bit(states: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(SOME[0]))
    # Several micro-batches, so that states come and go while others are computed.
    on_gpu, elsewhere = (
        prune(source, tmp_path / place, device="cuda:0", states=place, batch_tokens=24) for place in ("device", states)
    )
    assert on_gpu.layers == elsewhere.layers


def test_what_the_tools_measure_on_a_gpu(tmp_path: Path) -> None:
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
        assert len(found["layers"]) == config["num_hidden_layers"]
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


@pytest.fixture(params=["bfloat16", "bfloat16, a product per expert", "float16"])
def product_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The ways of the grouped product: fused for bfloat16 on compute capability 9 and 10; elsewhere, and in float16, a
    product per expert by torch; and where torch has none, by transformers."""
    name, _, per_expert = request.param.partition(",")
    if per_expert:
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@pytest.mark.parametrize("tokens", [300, 4096])
def test_recording_changes_no_output_of_experts_of_a_real_size(tokens: int, product_dtype: torch.dtype) -> None:
    experts, given = experts_of(Qwen3MoeConfig(**QWEN), tokens, "cuda:0", product_dtype)
    plain = experts(*given)
    output, _ = recorded(experts, *given)
    again, _ = recorded(experts, *given)
    assert torch.equal(output, again)
    # bfloat16 has eight bits: another order of the sums costs the last one of them.
    torch.testing.assert_close(output, plain, rtol=2**-7, atol=float(plain.abs().max()) * 2**-8)


@pytest.mark.parametrize("tokens", [300, 4096])
def test_what_is_recorded_of_experts_of_a_real_size(tokens: int, product_dtype: torch.dtype) -> None:
    experts, given = experts_of(Qwen3MoeConfig(**QWEN), tokens, "cuda:0", product_dtype)
    _, statistics = recorded(experts, *given)
    check_against_dense(experts, given, statistics)


@pytest.mark.parametrize("gates", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("chosen", "hidden"), [(8, 2048), (6, 1408), (10, 5000)])
def test_the_kernel_that_combines_experts_gives_the_same_sums_to_the_bit(
    chosen: int, hidden: int, gates: torch.dtype
) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator("cuda").manual_seed(0)
    output = torch.randn(3000 * chosen, hidden, device="cuda", generator=generator)
    rows = torch.randperm(len(output), device="cuda", generator=generator).view(3000, chosen)
    weights = torch.rand(3000, chosen, device="cuda", generator=generator).to(gates)
    given = (output.to(torch.float16 if gates == torch.float16 else torch.bfloat16), rows, weights)
    ours, theirs = by_kernel(*given), by_torch(*given)
    assert torch.equal(ours.sums, theirs.sums)
    assert torch.equal(ours.peaks, theirs.peaks)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(ours.cosines, theirs.cosines, rtol=1e-5, atol=1e-5)
    choice = try_kernel(*given)
    assert choice.kernel, choice.why


def test_recording_waits_for_the_gpu_only_where_the_product_is_not_fused() -> None:
    experts, given = experts_of(Qwen3MoeConfig(**QWEN), 300, "cuda:0")
    # The first call loads kernels.
    recorded(experts, *given)
    fused = torch.cuda.get_device_capability(0)[0] in (9, 10)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with nullcontext() if fused else pytest.raises(RuntimeError, match="synchronizing"):
            recorded(experts, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


#: The experts of Qwen3-30B-A3B.
QWEN = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
}  # fmt: skip
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def experts_of(
    config: Qwen3MoeConfig, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Qwen3MoeExperts, Given]:
    """Random experts, computed in groups; and what they are given: tokens, choices and gates."""
    config._experts_implementation = "grouped_mm"
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * 0.03)
    hidden_TH = torch.randn(tokens, config.hidden_size, generator=generator, device=device).to(dtype)
    logits_TE = torch.randn(tokens, config.num_experts, generator=generator, device=device)
    gates_TK, index_TK = logits_TE.softmax(-1).topk(config.num_experts_per_tok)
    return experts, (hidden_TH, index_TK, (gates_TK / gates_TK.sum(-1, keepdim=True)).to(dtype))


def recorded(
    experts: Qwen3MoeExperts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> tuple[torch.Tensor, ExpertStatistics]:
    """The experts' output while somebody listens, and what was heard."""
    tap = tap_experts({0: experts})[0]
    tap.statistics, tap.residual_T = ExpertStatistics(experts.num_experts, hidden_TH.device), norms(hidden_TH)
    return experts(hidden_TH, index_TK, gates_TK), tap.statistics


def check_against_dense(experts: Qwen3MoeExperts, given: Given, statistics: ExpertStatistics) -> None:
    """Hold statistics against those of every chosen expert computed by itself in float32."""
    hidden_TH, index_TK, gates_TK = given
    output_TKH = torch.zeros(*index_TK.shape, hidden_TH.shape[1], device=hidden_TH.device)
    for expert in range(experts.num_experts):
        token, choice = torch.where(index_TK == expert)
        gate, up = (hidden_TH[token].float() @ experts.gate_up_proj[expert].float().T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        output_TKH[token, choice] = inner @ experts.down_proj[expert].float().T
    gates, lengths = gates_TK.float(), output_TKH.norm(dim=-1)
    sum_TH = (output_TKH * gates.unsqueeze(-1)).sum(dim=1)
    dots = (output_TKH * sum_TH.unsqueeze(1)).sum(dim=-1) * gates
    together = cosines(dots, gates, lengths, sum_TH.norm(dim=-1))
    expected = ExpertStatistics(experts.num_experts, hidden_TH.device)
    expected.add(Pairs(index_TK, gates_TK, gates_TK, lengths, output_TKH.abs().amax(-1), together), norms(hidden_TH))
    for field, ours, dense in zip(FIELDS, statistics.values, expected.values, strict=True):
        if field in ("tokens", "top_choices", "gates"):
            torch.testing.assert_close(ours, dense, rtol=1e-9, atol=0, msg=field)
        else:
            # Sums of many tokens: roundings to bfloat16 on the way even out.
            torch.testing.assert_close(ours, dense, rtol=0.02, atol=0.002 * float(dense.abs().max()), msg=field)


@pytest.mark.parametrize("family", SOME, ids=lambda family: family.id)
def test_energies_of_channels_on_the_gpu_equal_those_on_the_cpu(family: Family, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(family))
    energies = []
    for device in ("cpu", "cuda:0"):
        prune(source, tmp_path / device[:4], keep=family.keep, device=device)
        energies.append([layer.channels for layer in read_scores(tmp_path / device[:4]).layers])
    for on_cpu, on_gpu in zip(*energies, strict=True):
        torch.testing.assert_close(torch.from_numpy(on_gpu), torch.from_numpy(on_cpu), rtol=1e-2, atol=1e-6)


def test_a_refit_of_narrower_experts_on_the_gpu(tmp_path: Path) -> None:
    """The same bytes each time, and nearly those of the CPU."""
    source = make_model(tmp_path / "model", tiny_config(SOME[0]))
    text = (str(write_token_ids(tmp_path / "ids.jsonl", sequences=30)),)
    settings = {"keep": 5, "width": 16, "refit": True, "anchor": "none", "calibration": text}
    for name, device in (("cpu", "cpu"), ("one", "cuda:0"), ("two", "cuda:0")):
        prune(source, tmp_path / name, device=device, **settings)
    cpu, one, two = (read_tensors(tmp_path / name) for name in ("cpu", "one", "two"))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        torch.testing.assert_close(tensor, cpu[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("scheme", "family"),
    [("fp8", "qwen3_moe"), ("deepseek-v4", "deepseek_v3"), ("mxfp4", "gpt_oss"), ("ct-w4", "qwen3_moe"),
     ("ct-nvfp4", "qwen3_moe"), ("gptq-act-order", "qwen3_moe"), ("awq", "qwen3_moe")],
)  # fmt: skip
def test_quantized_weights_are_decoded_on_the_gpu_as_on_the_cpu(scheme: str, family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    # (Only here: the other tests run on machines without that library.)
    from tests.quantized import make_quantized

    opened = open_model(open_checkpoint(make_quantized(tmp_path, scheme, family).source))
    layers = []
    for device in ("cpu", "cuda:0"):
        weights = LayerWeights(opened, torch.device(device))
        with weights.layer(1) as layer:
            layers.append({name: tensor.cpu() for name, tensor in layer.state_dict().items()})
        weights.close()
    on_cpu, on_gpu = layers
    assert on_cpu.keys() == on_gpu.keys()
    assert all(torch.equal(tensor, on_gpu[name]) for name, tensor in on_cpu.items())
