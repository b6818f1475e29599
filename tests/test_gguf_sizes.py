"""Memory planned for llama.cpp's quantizations: the sizes are those of `llama-quantize`, and a budget is planned so."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamprune.cli import main
from streamprune.cli.hints import WeightsChoice
from streamprune.errors import SettingsError
from streamprune.fit.estimate import Fit, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.weights import WeightFact
from streamprune.quantize.gguf_types import BLOCKS, GGUF_TYPES
from streamprune.reporting.facts import read_facts
from streamprune.targets import WEIGHTS, ServingSpec
from tests.helpers import known_family, prune
from tests.quantized import make_quantized
from tests.tiny import make_model, tiny_config, write_token_ids

GIB = 1024**3
_WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "num_hidden_layers": 3, "num_key_value_heads": 4, "num_experts_per_tok": 4, "vocab_size": 320,
    "num_local_experts": 11, "num_experts": 11, "n_routed_experts": 11, "moe_num_experts": 11,
    "num_nextn_predict_layers": 0, "kv_lora_rank": 256, "q_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "layer_types": ["full_attention"] * 3,
}  # fmt: skip
#: Changes of tiny models, and the bytes of all tensors that `llama-quantize` (2026-11) wrote of such models as Q4_K_M
#: and as Q8_0.
WRITTEN: dict[str, tuple[dict[str, Any], int, int]] = {
    "qwen3_moe": ({}, 4450432, 7945728),
    "mixtral": ({}, 4448896, 7944192),
    "qwen2_moe": ({}, 4809856, 8583168),
    "ernie4_5_moe": ({"moe_k": 4, "moe_layer_end_index": 2, "tie_word_embeddings": False}, 3807960, 6679640),
    "deepseek_v3": (
        {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "head_dim": 64, "qk_head_dim": 128},
        4183264,
        7366752,
    ),
    "gpt_oss": ({"head_dim": 64}, 4562740, 8058036),
}
#: The same of two models by quantization: grouped attention in nine layers, and eight experts in ten.
DEEPER: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "qwen3_moe": (
        {"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8,
         "num_local_experts": 8},
        {"Q2_K": 7140736, "Q3_K_S": 8227328, "Q3_K_M": 8854016, "Q3_K_L": 9139712, "Q4_0": 10127488, "Q4_K_S": 10340480,
         "Q4_K_M": 10950784, "Q5_K_S": 12202112, "Q5_K_M": 12550272, "Q6_K": 14406400, "Q8_0": 18445824,
         "IQ4_XS": 9875072, "IQ4_NL": 10340480, "MXFP4_MOE": 10925568, "F16": 34635264, "BF16": 34635264},
    ),
    "mixtral": (
        {"num_hidden_layers": 10, "num_attention_heads": 8, "intermediate_size": 512, "num_local_experts": 8},
        {"Q2_K": 12946304, "Q3_K_S": 15151104, "Q3_K_M": 16543744, "Q3_K_L": 17685504, "Q4_0": 19345024,
         "Q4_K_S": 19558016, "Q4_K_M": 20778624, "Q5_K_S": 23451264, "Q5_K_M": 24147584, "Q6_K": 27814144,
         "Q8_0": 35789824, "IQ4_XS": 18584704, "IQ4_NL": 19558016, "MXFP4_MOE": 19078144, "F16": 67277824,
         "BF16": 67277824},
    ),
}  # fmt: skip


def footprint_of(folder: Path, family: str, changes: dict[str, Any]) -> Footprint:
    """The footprint of a family's tiny model with wider matrices, whose config is written to `folder`."""
    config = tiny_config(known_family(family)).to_dict()
    wider = {name: value for name, value in _WIDE.items() if name in config}
    (folder / "config.json").write_text(json.dumps({**config, **wider, **changes, "architectures": None}))
    return read_footprint(str(folder))


def weights_of(footprint: Footprint, quantization: str, keep: int | None = None) -> int:
    sizes = footprint.sizes(quantization)
    return sum(sizes.bytes_by_category(footprint.weights.count if keep is None else keep).values())


@pytest.mark.parametrize("family", WRITTEN)
def test_sizes_are_those_that_llama_quantize_writes(family: str, tmp_path: Path) -> None:
    changes, q4_k_m, q8_0 = WRITTEN[family]
    footprint = footprint_of(tmp_path, family, changes)
    assert (weights_of(footprint, "Q4_K_M"), weights_of(footprint, "Q8_0")) == (q4_k_m, q8_0)


@pytest.mark.parametrize("family", DEEPER)
def test_every_quantization_in_every_layer(family: str, tmp_path: Path) -> None:
    changes, written = DEEPER[family]
    footprint = footprint_of(tmp_path, family, changes)
    assert {name: weights_of(footprint, name) for name in GGUF_TYPES} == written
    assert written.keys() == GGUF_TYPES.keys()


@pytest.mark.parametrize("hidden", [256, 384, 512])
@pytest.mark.parametrize(("family", "changes"), [("olmoe", {"num_experts": 8}), ("gpt_oss", {"head_dim": 64})])
def test_narrower_experts_are_as_those_of_a_model_that_is_so(
    family: str, changes: dict[str, Any], hidden: int, tmp_path: Path
) -> None:
    """Also where the hidden size is as large as the experts' channels, or twice as large, as in OLMoE and gpt-oss."""
    changes = {**changes, "hidden_size": hidden}
    made = footprint_of(tmp_path, family, {**changes, "intermediate_size": 128})
    narrowed = footprint_of(tmp_path, family, {**changes, "intermediate_size": 256})
    for quantization in ("Q4_K_M", "Q8_0"):
        sizes = narrowed.sizes(quantization, 128).bytes_by_category(8)
        assert sizes == made.sizes(quantization).bytes_by_category(8)


def test_a_vision_tower_changes_nothing_of_the_text(tmp_path: Path) -> None:
    footprint = footprint_of(tmp_path, "qwen3_moe", {"num_hidden_layers": 9, "num_attention_heads": 8})
    name, shape = "visual.blocks.{}.attn.{}_proj.weight", (256, 256)
    tower = tuple(
        WeightFact(name.format(layer, role), "BF16", shape, 2 * 256 * 256, "vision", layer)
        for layer in range(20)
        for role in ("q", "k", "v")
    )
    both = replace(footprint, weights=replace(footprint.weights, facts=footprint.weights.facts + tower))
    for quantization in ("Q4_K_M", "Q2_K", "IQ4_NL"):
        assert weights_of(both, quantization) == weights_of(footprint, quantization) + 20 * 3 * 2 * 256 * 256


def test_blocks_are_those_of_the_library() -> None:
    gguf = pytest.importorskip("gguf")
    known = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {name: known[name] for name in BLOCKS} == BLOCKS


def test_a_budget_is_planned_for_what_llama_cpp_makes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    ids = write_token_ids(tmp_path / "ids.jsonl")
    unpruned = Fit(read_footprint(str(source)), ServingSpec(context=128, weights="Q4_K_M"), 0)
    budget = unpruned.changed(keep=5).total
    gib = ["--budget-gib", repr(budget / GIB), "--context", "128"]
    command = ["run", str(source), "-o", str(tmp_path / "out"), "--calibration", str(ids), *gib]
    result = CliRunner().invoke(main, [*command, "--gguf", "q4_k_m", "--json"])
    assert result.exit_code == 0, result.output
    told, summary = capfd.readouterr().err + result.stderr, json.loads(result.stdout)
    assert summary["experts_per_layer"] == 5
    assert summary["memory"]["total_bytes"] == budget
    assert not Fit(unpruned.footprint, ServingSpec(context=128), budget).max_experts, "in its own dtype too few fit"
    assert "narrower experts with a refit" in told
    assert "--best" not in told, "which does not go with --gguf"
    # The output is safetensors; what is left to do is printed.
    output = tmp_path / "out"
    lines = told.partition("Next, for Q4_K_M, with llama.cpp:\n")[2].splitlines()
    assert [shlex.split(line) for line in lines[:3]] == [
        ["python", "llama.cpp/convert_hf_to_gguf.py", str(output), "--outfile", f"{output}.gguf", "--outtype", "f32"],
        ["llama-quantize", f"{output}.gguf", f"{output}-Q4_K_M.gguf", "Q4_K_M"],
        ["llama-server", "-m", f"{output}-Q4_K_M.gguf", "-c", "128"],
    ]
    facts = read_facts(output)
    assert facts.record.use is not None
    assert facts.record.use.gguf == "Q4_K_M"
    assert not isinstance(facts.memory, str)
    assert facts.memory.after.total == budget
    card = (output / "README.md").read_text()
    assert f"--budget-gib {budget / GIB!r} --context 128 --gguf Q4_K_M" in card
    assert "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M" in card
    assert "vllm serve" not in card
    answered = CliRunner().invoke(main, ["fit", str(source), *gib, "--gguf", "Q4_K_M", "--json"])
    assert json.loads(answered.stdout)["max_experts_per_layer"] == 5
    assert json.loads(answered.stdout)["weights"] == "Q4_K_M"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_formats_of_outputs_are_taken_though_llama_cpp_has_one_of_the_name(weights: str) -> None:
    assert WeightsChoice().convert(weights, None, None) == weights


def test_fit_takes_decoded_weights_for_llama_cpp_as_run_does(tmp_path: Path) -> None:
    """Its converter does not read this MXFP4, so that --weights bf16 is what makes the GGUF possible."""
    source = str(make_quantized(tmp_path, "ct-mxfp4", "qwen3_moe").source)
    given = [source, "--budget-gib", "1", "--gguf", "Q4_K_M", "--for", "llama.cpp", "--keep", "5"]
    refused = CliRunner().invoke(main, ["fit", *given])
    assert refused.exit_code == 2
    assert "write them decoded with --weights bf16" in refused.stderr
    taken = CliRunner().invoke(main, ["fit", *given, "--weights", "bf16", "--json"])
    assert taken.exit_code == 0, taken.stderr
    assert json.loads(taken.stdout)["weights"] == "Q4_K_M"


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    for options, words in (
        (["--weights", "Q4_K_M"], "q4_k_m is a quantization of llama.cpp: write --gguf Q4_K_M."),
        (["--gguf", "Q4_K_M", "--weights", "fp8"], "from plain weights. Leave out --weights fp8"),
        (["--gguf", "Q4_K_M", "--weights", "bf16"], "are plain already. Leave it out."),
        (["--gguf", "Q4_K_X"], "is not one of"),
    ):
        for command in (["fit"], ["run", "-o", str(tmp_path / "out"), "--dry-run"]):
            result = CliRunner().invoke(main, [*command, str(source), "--budget-gib", "1", *options])
            assert result.exit_code == 2
            assert words.lower() in result.stderr.lower()
    with pytest.raises(
        SettingsError, match=r"already fits 1\.00 GiB \(--budget-gib 1\) as Q4_K_M, so nothing would be"
    ):
        prune(source, tmp_path / "out", budget_gib=1.0, gguf="Q4_K_M")
