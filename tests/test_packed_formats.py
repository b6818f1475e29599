"""Storage formats by themselves: what tensors and config.json say of them, decoding, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from streamprune.formats.fp4 import Fp4
from streamprune.formats.fp8 import Fp8
from streamprune.formats.mxfp4 import Mxfp4
from streamprune.formats.pick import stated_format

MINIMAX = {
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
}
DEEPSEEK_V4 = {"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
GPT_OSS = {
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
}
MXFP8 = {"text_config": {"quantization_config": {"quant_method": "mxfp8", "ignored_layers": ["model.layers.1.mlp["]}}}


@pytest.mark.parametrize(
    ("config", "path", "expected"),
    [
        ({}, "model.layers.1.mlp.experts.3.up_proj", None),
        (MINIMAX, "model.layers.1.block_sparse_moe.experts.3.w1", Fp8((128, 128))),
        (MINIMAX, "model.layers.1.block_sparse_moe.gate", None),
        (MINIMAX, "model.layers.1.mlp.gate_proj", Fp8((128, 128))),
        (MINIMAX, "lm_head", None),
        (DEEPSEEK_V4, "layers.0.ffn.experts.3.w1", Fp4()),
        (DEEPSEEK_V4, "layers.0.ffn.shared_experts.w1", Fp8((128, 128))),
        (DEEPSEEK_V4, "lm_head", None),
        (GPT_OSS, "model.layers.10.mlp.experts", Mxfp4()),
        (GPT_OSS, "model.layers.10.self_attn.q_proj", None),
        (GPT_OSS, "model.layers.10.mlp.router", None),
        (MXFP8, "model.layers.1.mlp.up_proj", Fp8((1, 32))),
        (MXFP8, "model.layers.1.mlp[", None),
    ],
)
def test_the_config_alone_says_how_a_module_is_stored(config: dict[str, Any], path: str, expected: object) -> None:
    assert stated_format(path, config) == expected


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("model.layers.1", True),  # up to a dot
        ("model.layers.11", False),
        ("model.layers.1.mlp.up", False),
        ("up_proj", True),  # the end
        ("layers.1", False),
        (r"model\.layers\.\d+\.mlp", True),
        ("model.layers.2|model.layers.1", True),
    ],
)
def test_lists_of_modules_are_read_as_transformers_reads_them(name: str, left: bool) -> None:
    section = {"quant_method": "fp8", "modules_to_not_convert": [name]}
    path = "model.layers.1.mlp.up_proj"
    assert (stated_format(path, {"quantization_config": section}) is None) == left
