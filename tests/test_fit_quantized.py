"""`fit` of quantized models counts stored bytes: from headers, and from config.json alone, whole and pruned."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.fit.answer import fit_object, resolve_budget, table
from streamprune.fit.estimate import Fit, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.nearest import nearest
from streamprune.fit.published import published_facts
from streamprune.fit.structure import weights_of_checkpoint
from streamprune.fit.weights import Weights, weights_with
from streamprune.models.open import describe_model, load_config
from streamprune.models.skeleton import build_skeleton
from streamprune.targets import ServingSpec
from tests.full_size import config_only
from tests.helpers import prune, read_tensors, tree_bytes
from tests.hub_model import hub_for_this_process
from tests.mtp import add_mtp
from tests.quantized import Quantized, make_quantized, quantize
from tests.thorough import mostly_thorough
from tests.tiny import FAMILIES, make_model, tiny_config

GIB = 2**30
HIDDEN, VOCABULARY = 7168, 129_280

#: A scheme and a family; those of which config.json says everything that the sizes depend on.
EXACT = [
    ("fp8", "qwen3_moe"), ("fp8-16", "deepseek_v3"), ("fp8-128", "glm4_moe"), ("fp8", "minimax_m2"),
    ("fp8-channel", "qwen3_moe"), ("deepseek-v4", "qwen3_moe"), ("mxfp8", "minimax_m2"), ("mxfp4", "gpt_oss"),
    ("ct-fp8-channel", "qwen3_moe"), ("ct-fp8-block", "deepseek_v3"), ("ct-w4", "minimax_m2"),
    ("ct-w4-asymmetric", "qwen3_moe"), ("ct-w8", "glm4_moe"), ("ct-nvfp4a16", "qwen3_moe"), ("ct-mxfp4", "qwen3_moe"),
    ("ct-int8", "qwen3_moe"), ("ct-two-bits", "qwen3_moe"), ("ct-fp8-w4", "qwen3_moe"), ("kimi-k2", "deepseek_v3"),
    ("gptq", "qwen3_moe"), ("gptq-8", "minimax_m2"), ("awq", "glm4_moe"), ("autoround", "qwen3_moe"),
    ("autoround-awq", "qwen3_moe"),
]  # fmt: skip
#: Those of which it does not: the dtype of scales, a scale for activations, g_idx.
NEARLY = [
    ("fp8-bf16-scales", "qwen3_moe"), ("fp8-u8-scales", "deepseek_v3"), ("fp8-tensor", "qwen3_moe"),
    ("ct-fp8-tensor", "qwen3_moe"), ("ct-nvfp4", "qwen3_moe"), ("gptq-no-g_idx", "qwen3_moe"),
]  # fmt: skip
#: Tried in short runs too.
USUAL = {"fp8", "mxfp4", "deepseek-v4", "ct-fp8-channel", "ct-w4", "ct-int8", "kimi-k2", "gptq", "awq", "autoround"}


def alone(model: Path, folder: Path) -> Path:
    """A folder with nothing but the model's config.json."""
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


def weights_bytes(footprint: Footprint, **use: Any) -> int:
    return Fit(footprint, ServingSpec(**use), GIB).weights_bytes


def decoded(footprint: Footprint) -> int:
    return footprint.weights.decoded(footprint.itemsize).nbytes


@pytest.mark.parametrize(("scheme", "family"), mostly_thorough(EXACT, [case for case in EXACT if case[0] in USUAL]))
def test_headers_and_config_alone_give_the_stored_bytes(scheme: str, family: str, tmp_path: Path) -> None:
    made = make_quantized(tmp_path, scheme, family, dtype=torch.bfloat16)
    stored, plain = (open_checkpoint(folder).nbytes for folder in (made.source, made.reference))
    for folder in (made.source, alone(made.source, tmp_path / "config")):
        footprint = read_footprint(str(folder))
        assert weights_bytes(footprint) == footprint.weights.nbytes == stored
        assert footprint.weights.quantized
        assert decoded(footprint) == plain


@pytest.mark.parametrize(("scheme", "family"), mostly_thorough(NEARLY, NEARLY[:1] + NEARLY[3:4]))
def test_config_alone_may_not_say_everything(scheme: str, family: str, tmp_path: Path) -> None:
    made = make_quantized(tmp_path, scheme, family, dtype=torch.bfloat16)
    stored = open_checkpoint(made.source).nbytes
    assert weights_bytes(read_footprint(str(made.source))) == stored
    estimated = weights_bytes(read_footprint(str(alone(made.source, tmp_path / "config"))))
    # g_idx takes a part of matrices of 32 rows that it does not of larger ones.
    assert estimated != stored
    assert abs(estimated - stored) < (0.09 if scheme == "gptq-no-g_idx" else 0.005) * stored


@pytest.mark.parametrize(("scheme", "family"), mostly_thorough(EXACT, EXACT[:1] + EXACT[7:8]))
def test_pruned_bytes_are_those_of_the_output(scheme: str, family: str, tmp_path: Path) -> None:
    made = make_quantized(tmp_path, scheme, family, dtype=torch.bfloat16)
    result = prune(made.source, tmp_path / "out", keep=4)
    output = open_checkpoint(tmp_path / "out").nbytes
    assert result.summary["memory"]["weights_bytes"] == output
    for folder in (made.source, alone(made.source, tmp_path / "config")):
        assert weights_bytes(read_footprint(str(folder)), keep=4) == output
    # And the output, asked about as a whole.
    again = read_footprint(str(tmp_path / "out"))
    assert weights_bytes(again) == output
    assert again.weights.formats == read_footprint(str(made.source)).weights.formats


def test_a_budget_counts_stored_bytes(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, "fp8", "qwen3_moe")
    budget = Fit(read_footprint(str(made.source)), ServingSpec(context=128, keep=5), 0).total / GIB
    # The same model in plain float32 would need a quarter of the experts for that budget.
    result = prune(made.source, tmp_path / "out", budget_gib=budget, context=128)
    assert result.summary["experts_per_layer"] == 5
    assert result.summary["memory"]["fits"]
    assert result.summary["memory"]["weights_bytes"] == open_checkpoint(tmp_path / "out").nbytes
    plain = Fit(read_footprint(str(made.reference)), ServingSpec(context=128), int(budget * GIB))
    assert (plain.max_experts or 0) < 5


@pytest.mark.parametrize(("scheme", "family"), [("fp8", "qwen3_moe"), ("mxfp4", "gpt_oss"), ("fp8", "deepseek_v3")])
def test_names_and_roles_agree(scheme: str, family: str, tmp_path: Path) -> None:
    made = make_quantized(tmp_path, scheme, family)
    checkpoint = open_checkpoint(made.source)
    skeleton = build_skeleton(load_config(made.source), torch.float32)
    by_role = weights_of_checkpoint(checkpoint.config, skeleton, checkpoint.tensors)
    by_name = read_footprint(str(made.source)).weights
    assert by_name.facts == by_role.facts
    sizes = by_role.sizes().bytes_by_category(8)
    experts = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if ".experts." in name)
    assert sizes["experts"] == experts
    # A companion belongs to its expert: half of the experts take half of the bytes.
    assert by_role.sizes().bytes_by_category(4)["experts"] * 2 == experts
    config = read_footprint(str(alone(made.source, tmp_path / "config")))
    assert config.weights.sizes().bytes_by_category(8) == sizes
    predicting = [note for note in config.notes if "Not counted: 1 layer for multi-token prediction" in note]
    assert len(predicting) == (family == "deepseek_v3")


def stated_weights(folder: Path) -> Weights:
    """The weights that a config alone describes; without the caches, which take longer."""
    raw = json.loads((folder / "config.json").read_text())
    model = describe_model(folder, raw)
    facts = published_facts(model.skeleton.model, raw, model.skeleton, model.counts)
    return weights_with(facts, model.counts, measured=False)


def kept_bytes(weights: Weights, keep: int) -> int:
    return sum(weights.sizes().bytes_by_category(keep).values())


def test_gpt_oss_20b(tmp_path: Path) -> None:
    """The published index's total_size, from the config alone."""
    footprint = read_footprint(str(config_only("gpt-oss-20b", tmp_path / "model")))
    assert weights_bytes(footprint) == 13_761_264_768
    assert footprint.weights.formats == ("MXFP4",)
    # 24 layers of 32 experts of 3 x 2,880 x 2,880 values: 17 bytes for every 32 of them.
    packed = sum(fact.nbytes for fact in footprint.weights.facts if fact.dtype == "U8")
    assert packed == 24 * 32 * 3 * 2880 * 2880 // 32 * 17
    # All in 16 bits: what transformers loads without kernels.
    assert decoded(footprint) == 41_829_514_368
    expert = 24 * (3 * 2880 * 2880 // 32 * 17 + 2 * (2 * 2880 + 2880) + 2 * (2880 + 1))
    assert weights_bytes(footprint, keep=24) == 13_761_264_768 - 8 * expert


def test_deepseek_r1(tmp_path: Path) -> None:
    """Its FP8 release has one layer more, for multi-token prediction, which transformers does not build."""
    weights = stated_weights(config_only("deepseek-r1", tmp_path / "model"))
    facts = weights.facts
    assert weights.formats == ("FP8 (blocks of 128 x 128)",)
    assert weights.nbytes == kept_bytes(weights, 256) == 673_150_611_808
    # That layer: all of the last one, its own embeddings and head, a projection of both streams, and three norms.
    last = [fact for fact in facts if fact.layer == 60]
    values = Counter({"BF16": 2 * HIDDEN * VOCABULARY + 2 * HIDDEN**2 + 3 * HIDDEN})
    for fact in (*facts, *last):
        values[fact.dtype] += torch.Size(fact.shape).numel()
    # What the Hub's page of the repository says of its files, in values.
    assert values == {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}
    # The bias that corrects the router's choice is kept in float32; the other ones are scales.
    bias = [fact for fact in facts if fact.name.endswith("e_score_correction_bias")]
    assert {(fact.dtype, fact.shape) for fact in bias} == {("F32", (256,))}
    ragged = next(fact for fact in facts if fact.name.endswith("layers.0.self_attn.kv_a_proj_with_mqa.weight_scale"))
    assert ragged.shape == (5, 56), "576 rows take five blocks of 128"


def test_qwen3_30b_fp8(tmp_path: Path) -> None:
    """Blocks of 128 x 128, and a list of all that stays plain, layer by layer."""
    folder = config_only("qwen3-30b-a3b", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    left = ("input_layernorm", "post_attention_layernorm", "mlp.gate", "self_attn.q_norm", "self_attn.k_norm")
    names = ["lm_head", "model.norm", *(f"model.layers.{layer}.{name}" for layer in range(48) for name in left)]
    section = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": names,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    weights = stated_weights(folder)
    # Matrices of 768 x 2,048 for each of 128 experts; queries and output of 4,096 x 2,048, keys and values of 512.
    quantized = 48 * (128 * 3 * 768 * 2048 + 2 * 4096 * 2048 + 2 * 512 * 2048)
    embeddings_and_head = 2 * 151_936 * 2048
    routers, norms = 48 * 128 * 2048, 48 * (2 * 2048 + 2 * 128) + 2048
    expected = quantized + quantized // 128**2 * 4 + 2 * (embeddings_and_head + routers + norms)
    assert weights.nbytes == kept_bytes(weights, 128) == expected
    expert = 48 * (3 * 768 * 2048 + 3 * 6 * 16 * 4 + 2048 * 2)
    assert kept_bytes(weights, 96) == expected - 32 * expert


def test_a_list_leaves_modules_plain(tmp_path: Path) -> None:
    """Shared experts and the first attention stay plain; tied embeddings count once."""
    made = make_quantized(tmp_path, "fp8", "glm4_moe")
    config = json.loads((made.source / "config.json").read_text())
    whole = read_footprint(str(made.source)).weights
    config["quantization_config"]["modules_to_not_convert"] += [
        "model.layers.0.self_attn", "model.layers.1.mlp.shared_experts", "model.layers.1.mlp.experts",
    ]  # fmt: skip
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    less = read_footprint(str(tmp_path / "config")).weights
    plain = {fact.name for fact in less.facts if not fact.format}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"} <= plain
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in plain
    assert "model.layers.2.mlp.experts.0.down_proj.weight" not in plain
    head = next(fact.nbytes for fact in whole.facts if fact.category == "head")
    assert not any(fact.category == "head" for fact in less.facts)
    assert less.decoded(4).nbytes == whole.decoded(4).nbytes - head


@pytest.mark.parametrize(
    ("part", "listed", "formats"),
    [("", ["model.visual"], {""}), ("", [], {"", "FP8 (blocks of 32 x 32)"}), ("text_config", [], {""})],
)
def test_towers_of_multimodal_models(part: str, listed: list[str], formats: set[str], tmp_path: Path) -> None:
    """Names in lists have the prefix of the published model, which transformers' text class leaves out."""
    family = next(family for family in FAMILIES if family.id == "qwen3_5_moe")
    tiny_config(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = ["lm_head", "model.language_model.layers.0.mlp.shared_expert", *listed]
    section = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": names}
    (config[part] if part else config)["quantization_config"] = section
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = read_footprint(str(tmp_path)).weights.facts
    assert {fact.format for fact in facts if fact.category == "vision"} == formats
    shared = {fact.layer for fact in facts if "shared_expert.up_proj" in fact.name and fact.format}
    assert shared == {1, 2, 3}
    assert {fact.format for fact in facts if fact.category == "router"} == {""}


def test_prediction_layers_in_headers(tmp_path: Path) -> None:
    """Quantized as the others, with companions."""
    made = make_quantized(tmp_path, "fp8", "glm4_moe")
    path = add_mtp(made.source)
    footprint = read_footprint(str(made.source))
    mtp = sum(each.nbytes for name, each in read_tensors(made.source).items() if name.startswith(f"{path}."))
    assert {term.name: term.bytes for term in Fit(footprint, ServingSpec(), GIB).terms}["weights: MTP"] == mtp
    assert weights_bytes(footprint) == open_checkpoint(made.source).nbytes
    assert weights_bytes(footprint) - weights_bytes(footprint, keep=7) == footprint.weights.sizes().expert_bytes()


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "granitemoe"])
def test_experts_in_one_tensor_keep_their_axis(family: str) -> None:
    """FP8 of models that are saved with all experts in one tensor: the scales have the experts along the first axis."""
    kind = next(each for each in FAMILIES if each.id == family)
    config = tiny_config(kind)
    skeleton = build_skeleton(config, torch.bfloat16)
    raw = {**config.to_dict(), "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    counts = dict.fromkeys(skeleton.experts, 8)
    facts = published_facts(skeleton.model, raw, skeleton, counts)
    experts = [fact for fact in facts if fact.category == "experts"]
    assert {fact.format for fact in experts} == {"FP8 (blocks of 32 x 32)"}
    assert all(fact.shape[0] == 8 and fact.rows is not None for fact in experts)
    scales = {fact.shape[1:] for fact in experts if fact.name.endswith("scale")}
    values = {fact.shape[1:] for fact in experts if not fact.name.endswith("scale")}
    assert scales == {(-(-rows // 32), -(-columns // 32)) for rows, columns in values}


def test_experts_without_an_axis_of_their_own_are_refused(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.id == "dbrx")
    tiny_config(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    with pytest.raises(UnsupportedModelError, match=r"experts in .*mlp\.\w1 have no axis of their own. Name its check"):
        read_footprint(str(tmp_path))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return make_quantized(tmp_path_factory.mktemp("gpt-oss"), "mxfp4", "gpt_oss")


def test_other_dtypes_of_quantized_weights(gpt_oss: Quantized) -> None:
    footprint = read_footprint(str(gpt_oss.source))
    # Plain tensors stay as they are, in float32.
    reference = open_checkpoint(gpt_oss.reference).tensors
    decoded = sum(each.nbytes // (2 if name in gpt_oss.parts else 1) for name, each in reference.items())
    assert weights_bytes(footprint, weights="bf16") == decoded
    with pytest.raises(SettingsError, match="with --weights fp8 is unknown here"):
        weights_bytes(footprint, weights="fp8")
    small = Fit(footprint, ServingSpec(context=128), 0)
    assert {cell.weights for cell in table(small)} == {"source"}
    assert not any("weights" in option.settings for option in nearest(replace(small, budget=small.total - 1)))
    wide = replace(small.changed(weights="bf16"), budget=small.total)
    assert {cell.weights for cell in table(wide)} == {"source", "bf16"}
    assert any(option.settings == "--weights source" for option in nearest(wide))


def test_the_answer_names_the_format(gpt_oss: Quantized) -> None:
    command = ["fit", str(gpt_oss.source), "--budget-gib", "24", "--context", "128"]
    text = CliRunner().invoke(main, command).stdout
    assert ", 8 experts per layer; weights as stored: MXFP4, 128 tokens" in text
    assert "note: transformers keeps weights in MXFP4 only on a GPU of compute capability 7.5" in text
    found = json.loads(CliRunner().invoke(main, [*command, "--json", "--keep", "4"]).stdout)
    assert (found["weights"], found["weights_formats"]) == ("source", ["MXFP4"])
    assert found["decoded_weights_bytes"] > 2 * found["weights_bytes"]
    decoded_text = CliRunner().invoke(main, [*command, "--weights", "bf16"]).stdout
    assert "weights bf16, 128 tokens" in decoded_text
    assert "transformers keeps" not in decoded_text


def test_plain_weights_have_no_format(gpt_oss: Quantized) -> None:
    budget = resolve_budget(24, None)
    found = fit_object(Fit(read_footprint(str(gpt_oss.reference)), ServingSpec(context=128), budget.nbytes), budget)
    assert (found["weights_formats"], found["decoded_weights_bytes"]) == ([], None)
    assert not any("transformers" in note for note in found["notes"])


def test_formats_that_cannot_be_pruned_are_still_counted(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, "fp8", "qwen3_moe", dtype=torch.bfloat16)
    config = json.loads((made.source / "config.json").read_text())
    (made.source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    footprint = read_footprint(str(made.source))
    assert weights_bytes(footprint) == open_checkpoint(made.source).nbytes
    assert any(note.startswith("This model can be served, but not pruned. The model in") for note in footprint.notes)
    with pytest.raises(SettingsError, match=r"not read here \(BF16, F32, F8_E4M3\), .* --weights bf16 is unknown"):
        weights_bytes(footprint, weights="bf16")
    with pytest.raises(SettingsError, match=r"not read here .* --gguf Q4_K_M is unknown"):
        weights_bytes(footprint, weights="Q4_K_M")
    unread = read_footprint(str(alone(made.source, tmp_path / "config")))
    assert any("quantized (bitsandbytes), but the sizes are of plain ones" in note for note in unread.notes)


@pytest.mark.parametrize(("scheme", "name"), [("fp8", "qwen3_moe"), ("mxfp4", "gpt_oss")])
def test_headers_of_a_model_on_the_hub(scheme: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = next(family for family in FAMILIES if family.id == name)
    # Large enough that headers are a small part of a file.
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}
    plain = make_model(tmp_path / "plain", tiny_config(replace(kind, sizes={**kind.sizes, **sizes})))
    made = quantize(plain, tmp_path, scheme)
    command = ["--budget-gib", "24", "--context", "128", "--json"]
    here = json.loads(CliRunner().invoke(main, ["fit", str(made.source), *command]).stdout)
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        server.add("org/model", tree_bytes(made.source))
        result = CliRunner().invoke(main, ["fit", "org/model", *command])
        assert json.loads(result.stdout) == here | {"model": "org/model"}
        assert here["weights_bytes"] == open_checkpoint(made.source).nbytes
        pruned = ["run", "org/model", "--budget-gib", str(here["total_bytes"] / GIB - 0.0001), "--context", "128"]
        planned = CliRunner().invoke(main, [*pruned, "-o", str(tmp_path / "out"), "--dry-run", "--json"])
        assert planned.exit_code == 0, planned.output
        assert json.loads(planned.stdout)["experts_per_layer"] < 8
        cached = [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.is_file()]
        assert not cached, "nothing of the weights was downloaded"
