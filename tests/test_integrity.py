"""Checkpoints that do not belong to the model that their config describes, and weights that cannot be read plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamprune.checkpoint import reader
from streamprune.config import PruneSettings
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.output.verify import verify
from streamprune.pipeline.prune import prune as prune_from_scores
from tests.helpers import known_family, prune, read_tensors, token_ids
from tests.tiny import FAMILIES, make_model, tiny_config

QWEN, DEEPSEEK_V3 = (next(f for f in FAMILIES if f.id == name) for name in ("qwen3_moe", "deepseek_v3"))
NAME = "model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tiny_config(QWEN), max_shard_size="1GB")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(reader.ShardReader, "start", fail)


def change(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> None:
    """Replace, add or (None) remove tensors and config keys."""
    path = folder / "model.safetensors"
    state = load_file(path) | (tensors or {})
    save_file({name: t for name, t in state.items() if t is not None}, path, {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(stated))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", NAME])
def test_missing_tensors(name: str, model: Path, tmp_path: Path, no_weights: None) -> None:
    change(model, {name: None})
    with pytest.raises(CheckpointError, match=r"lacks the tensors|only 7 of the 8 experts"):
        prune(model, tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "qwen3_vl_moe"])
def test_experts_apart_that_transformers_does_not_join(family: str, tmp_path: Path, no_weights: None) -> None:
    """As most programs that quantize them write these models; nothing is missing."""
    source = make_model(tmp_path / "model", tiny_config(known_family(family)), max_shard_size="1GB")
    joined = {name: each for name, each in load_file(source / "model.safetensors").items() if ".experts." in name}
    apart = {
        name.replace(".experts.", f".experts.{number}.") + ".weight": each.clone()
        for name, experts in joined.items()
        for number, each in enumerate(experts)
    }
    change(source, {**dict.fromkeys(joined), **apart})
    with pytest.raises(UnsupportedModelError, match=r"every expert apart \(.*experts\.0\..*original"):
        prune(source, tmp_path / "out")


def test_a_missing_correction_bias(tmp_path: Path, no_weights: None) -> None:
    source = make_model(tmp_path / "model", tiny_config(DEEPSEEK_V3), max_shard_size="1GB")
    change(source, {"model.layers.2.mlp.gate.e_score_correction_bias": None})
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        prune(source, tmp_path / "out", keep=4)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_under_either_name(stored: str, model: Path, tmp_path: Path) -> None:
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    both = {"model.embed_tokens.weight": None, "lm_head.weight": None}
    change(model, both | {stored: embedding}, tie_word_embeddings=True)
    prune(model, tmp_path / "out")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(reloaded.get_output_embeddings().weight, embedding)
    assert reloaded(token_ids()).logits.isfinite().all()


def test_weights_in_eight_bits_without_a_word_in_the_config(model: Path, tmp_path: Path, no_weights: None) -> None:
    weight = load_file(model / "model.safetensors")[NAME]
    change(model, {NAME: weight.to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModelError, match=r"quantized: .*up_proj\.weight has the dtype F8_E4M3"):
        prune(model, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale", "_packed", "_zero_point"])
def test_scales_that_nothing_reads(suffix: str, model: Path, tmp_path: Path, no_weights: None) -> None:
    change(model, {NAME + suffix: torch.ones(1, 1)})
    with pytest.raises(UnsupportedModelError, match="belongs to quantized weights"):
        prune(model, tmp_path / "out")


def test_quantization_under_its_older_name(model: Path, tmp_path: Path, no_weights: None) -> None:
    change(model, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(UnsupportedModelError, match="compressed-tensors"):
        prune(model, tmp_path / "out")


def test_every_mtp_key_says_none(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(DEEPSEEK_V3), max_shard_size="1GB")
    keys = {"num_nextn_predict_layers": 1, "use_mtp": True, "mtp_layer_types": ["full"], "mtp_loss_scale": 2}
    change(source, {"mtp.layers.0.w": torch.ones(2)}, **keys)
    prune(source, tmp_path / "out", keep=4, mtp="drop")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[key] for key in keys] == [0, False, [], 2]


def test_routers_that_look_expert_numbers_up_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    """As DeepSeek-V4's first layers do: the table's shape does not depend on the experts, but its numbers do."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    plain = modeling.Qwen3MoeSparseMoeBlock.__init__

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        plain(self, *arguments, **keywords)
        self.register_buffer("tid2eid", torch.zeros(256, 2, dtype=torch.int64))

    monkeypatch.setattr(modeling.Qwen3MoeSparseMoeBlock, "__init__", init)
    table = {f"model.layers.{layer}.mlp.tid2eid": torch.zeros(256, 2, dtype=torch.int64) for layer in range(4)}
    change(model, dict(table))
    with pytest.raises(UnsupportedModelError, match="table of expert numbers"):
        prune(model, tmp_path / "out")


def test_encoder_decoders_are_refused(tmp_path: Path, no_weights: None) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "switch_transformers"}')
    with pytest.raises(UnsupportedModelError, match="switch_transformers is an encoder-decoder"):
        prune(tmp_path / "model", tmp_path / "out")


BIAS = "model.layers.{}.mlp.experts.{}.up_proj.bias"


def biases(model: Path) -> dict[str, torch.Tensor | None]:
    """Biases of experts as some GPTQ releases have them, although the model has none."""
    layers = range(json.loads((model / "config.json").read_text())["num_hidden_layers"])
    return {BIAS.format(layer, each): torch.full((32,), float(each)) for layer in layers for each in range(8)}


def test_tensors_of_experts_that_the_model_does_not_use_stay_with_their_experts(model: Path, tmp_path: Path) -> None:
    change(model, biases(model))
    layers = prune(model, tmp_path / "out", keep=5).layers
    prune_from_scores(
        PruneSettings(model=str(model), output=tmp_path / "again", scores=tmp_path / "out" / "scores", keep=5),
        quiet=True,
    )
    for output in (tmp_path / "out", tmp_path / "again"):
        found = {name: tensor for name, tensor in read_tensors(output).items() if name.endswith("up_proj.bias")}
        assert found.keys() == {BIAS.format(layer.index, expert) for layer in layers for expert in range(5)}
        for layer in layers:
            numbers = [int(found[BIAS.format(layer.index, place)][0]) for place in range(5)]
            assert numbers == list(layer.kept)
        verify(output, model)


def test_such_experts_cannot_be_narrower(model: Path, tmp_path: Path, no_weights: None) -> None:
    change(model, biases(model))
    with pytest.raises(UnsupportedModelError, match=r"tensors that the model does not use, such as .*up_proj\.bias"):
        prune(model, tmp_path / "out", keep=None, width=16)
