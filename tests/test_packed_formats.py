"""Storage formats by themselves: packed by independent programs, decoded here, and what config.json alone says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamprune.formats import codes
from streamprune.formats.base import Format
from streamprune.formats.fp4 import Fp4, Nvfp4
from streamprune.formats.fp8 import Fp8
from streamprune.formats.gptq import Gptq
from streamprune.formats.integers import Int8, PackedIntegers
from streamprune.formats.mxfp4 import Mxfp4
from streamprune.formats.pick import stated_format
from tests import packers
from tests.schemes import SCHEMES
from tests.stored import AUTO_ROUND, PATH, PRESETS, matrix, preset, read

pack_to_int32 = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32

fuzz = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 4)
seeds = st.integers(0, 2**31)
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def check_sizes(storage: Format, packed: dict[str, tuple[str, tuple[int, ...]]], shape: torch.Size) -> None:
    """What the format says of sizes is what was stored, but for parts of activations and the dtype of scales."""
    stored = storage.stored_as(tuple(shape))
    weight = {part: each for part, each in packed.items() if not part.startswith(("input", "output"))}
    assert {part: each for part, (_, each) in stored.items()} == {part: each for part, (_, each) in weight.items()}
    for part, (dtype, _) in stored.items():
        assert dtype == weight[part][0] or "scale" in part or {dtype, weight[part][0]} == {"I8", "U8"}
    assert storage.plain_shape({part: each for part, (_, each) in packed.items()}) == tuple(shape)


@pytest.mark.parametrize("name", PRESETS)
@given(rows=st.integers(1, 3), columns=sizes, seed=seeds, dtype=floats)
@fuzz
def test_what_compressed_tensors_writes_means_what_it_reads(
    name: str, rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    weight = matrix(32 * rows, 32 * columns, seed, dtype)
    packed, config = preset(name, weight)
    found = read(packed.parts, config, dtype)
    # The library computes in the dtype of its scales, which rounds once too.
    assert torch.equal(found.values, packed.values.to(dtype))
    assert stated_format(PATH, config) == found.format
    if name != "tensor":
        check_sizes(found.format, dict(found.parts), weight.shape)


@given(rows=st.integers(1, 90), columns=st.integers(1, 90), seed=seeds)
@example(rows=8, columns=64, seed=0)  # fewer rows than a block has
@fuzz
def test_blocks_and_rows_need_not_be_whole(rows: int, columns: int, seed: int) -> None:
    weight = matrix(rows, columns, seed)
    for name in ("block", "channel", "int8", "int4-channel"):
        if name == "int4-channel" and columns % 8:
            continue
        packed, config = preset(name, weight)
        assert torch.equal(read(packed.parts, config).values, packed.values)


@given(bits=st.integers(1, 8), rows=sizes, columns=st.integers(1, 70), seed=seeds)
@fuzz
def test_codes_of_any_width_are_taken_out_of_words(bits: int, rows: int, columns: int, seed: int) -> None:
    half = 1 << (bits - 1)
    given = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(codes.unpack(pack_to_int32(given, bits), bits, columns), given.float() + half)


def test_mxfp8_has_its_blocks_whether_or_not_they_are_stated() -> None:
    packed = packers.fp8(matrix(32, 64, 1), (1, 32), scale_dtype=torch.uint8)
    for section in ({"quant_method": "mxfp8"}, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}):
        found = read(packed.parts, {"quantization_config": section})
        assert torch.equal(found.values, packed.values)
        assert found.format == stated_format(PATH, {"quantization_config": section})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_all_codes_of_fp8_are_decoded(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype)[None]
    decoded = Fp8().decode({"": values, "scale": torch.tensor(0.5)}, torch.float32)
    assert torch.equal(decoded.nan_to_num(7), (values.float() * 0.5).nan_to_num(7))
    assert decoded.isnan().sum() == values.float().isnan().sum() > 0


@given(
    bits=st.sampled_from([2, 4, 8]), rows=sizes, columns=sizes, group=st.sampled_from([16, 32, 48, 64, -1]),
    symmetric=st.booleans(), version=st.sampled_from([1, 2]), g_idx=st.sampled_from(["plain", "shuffled", "none"]),
    seed=seeds,
)  # fmt: skip
@fuzz
def test_gptq_by_definition(
    bits: int, rows: int, columns: int, group: int, symmetric: bool, version: int, g_idx: str, seed: int
) -> None:
    """Both versions of zero points, groups in any order, a last group that is smaller."""
    weight = matrix(16 * rows, 16 * columns, seed)
    size = group if group > 0 else weight.shape[1]
    packed = packers.gptq(weight, bits, size, symmetric, version, g_idx, seed)
    section = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": g_idx == "shuffled",
        "checkpoint_format": ["gptq", "gptq_v2"][version - 1],
    }  # fmt: skip
    found = read(packed.parts, {"quantization_config": section})
    assert torch.equal(found.values, packed.values)
    check_sizes(found.format, dict(found.parts), weight.shape)


@given(rows=sizes, columns=sizes, group=st.sampled_from([16, 32, -1]), symmetric=st.booleans(), seed=seeds)
@fuzz
def test_awq_by_definition(rows: int, columns: int, group: int, symmetric: bool, seed: int) -> None:
    weight = matrix(8 * rows, 32 * columns, seed)
    packed = packers.awq(weight, group if group > 0 else weight.shape[1], symmetric)
    section = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    found = read(packed.parts, {"quantization_config": section})
    assert torch.equal(found.values, packed.values)
    check_sizes(found.format, dict(found.parts), weight.shape)
    assert stated_format(PATH, {"quantization_config": section}) == found.format


@pytest.mark.parametrize(
    ("packing", "version"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, 1),
        ({"packing_format": "auto_round:gptq"}, 1),
        ({"packing_format": "auto_round:gptqmodel"}, 2),
        ({"packing_format": "auto_round"}, 2),
        ({"backend": "auto_round:gptq:exllamav2"}, 1),
        ({}, 1),
    ],
)
def test_autoround_s_packings_say_how_zero_points_are_stored(packing: dict[str, str], version: int) -> None:
    packed = packers.gptq(matrix(32, 64, 1), symmetric=False, version=version, g_idx="none")
    section = {**AUTO_ROUND, "bits": 4, "group_size": 32, "sym": False, **packing}
    assert torch.equal(read(packed.parts, {"quantization_config": section}).values, packed.values)


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        ("nvfp4", {"data_type": "nv_fp", "bits": 4, "group_size": 16}, Nvfp4()),
        ("mxfp4", {"data_type": "mx_fp", "bits": 4, "group_size": 32}, Fp4()),
        ("mxfp8", {"data_type": "mx_fp", "bits": 8, "group_size": 32}, Fp8((1, 32))),
    ],
)
def test_autoround_writes_the_layouts_of_compressed_tensors(
    name: str, section: dict[str, Any], expected: Format
) -> None:
    packed, _ = preset(name, matrix(32, 64, 2))
    section = {**AUTO_ROUND, **section, "packing_format": "auto_round:llm_compressor"}
    found = read(packed.parts, {"quantization_config": section})
    assert found.format == expected == stated_format(PATH, {"quantization_config": section})
    assert torch.equal(found.values, packed.values)


def section_of(scheme: str, plain: tuple[str, ...] = ()) -> dict[str, Any]:
    """The config.json of a published scheme, with the names of modules that stay plain."""
    made = SCHEMES[scheme]
    return {**made.outer, "quantization_config": made.section(list(plain))}


def autoround_fp8(group: Any) -> dict[str, Any]:
    """AutoRound's FP8: one scale a row, or for each block."""
    return {"quantization_config": {**AUTO_ROUND, "data_type": "fp", "bits": 8, "group_size": group}}


MINIMAX = {
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
}
DEEPSEEK_V4 = {"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP8 = {"text_config": {"quantization_config": {"quant_method": "mxfp8", "ignored_layers": ["model.layers.1.mlp["]}}}
GPTQ_PARTS = {
    "quantization_config": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2", "lm_head": True,
        "dynamic": {"-:.*\\.mlp\\.gate$": {}, "+:.*down_proj": {"bits": 8, "group_size": 32}},
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.gate", "up_proj"]],
    }
}  # fmt: skip
AUTO = {
    "quantization_config": {
        **AUTO_ROUND, "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq",
        "extra_config": {
            "model.layers.1.mlp.gate": {"bits": 16}, ".*self_attn.*": {"bits": 8}, "lm_head": {"bits": 4},
        },
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "path", "expected"),
    [
        ({}, PATH, None),
        (MINIMAX, "model.layers.1.block_sparse_moe.experts.3.w1", Fp8((128, 128))),
        (MINIMAX, "model.layers.1.block_sparse_moe.gate", None),
        (MINIMAX, "model.layers.1.mlp.gate_proj", Fp8((128, 128))),
        (MINIMAX, "lm_head", None),
        (DEEPSEEK_V4, "layers.0.ffn.experts.3.w1", Fp4()),
        (DEEPSEEK_V4, "layers.0.ffn.shared_experts.w1", Fp8((128, 128))),
        (DEEPSEEK_V4, "lm_head", None),
        (section_of("mxfp4"), "model.layers.10.mlp.experts", Mxfp4()),
        (section_of("mxfp4"), "model.layers.10.self_attn.q_proj", None),
        (section_of("mxfp4"), "model.layers.10.mlp.router", None),
        (MXFP8, "model.layers.1.mlp.up_proj", Fp8((1, 32))),
        (MXFP8, "model.layers.1.mlp[", None),
        (section_of("kimi-k2"), "model.layers.1.mlp.experts.0.gate_proj", PackedIntegers(4, 32)),
        (section_of("kimi-k2"), "model.layers.1.mlp.shared_experts.gate_proj", None),
        (section_of("kimi-k2"), "model.layers.0.mlp.gate_proj", None),
        (section_of("kimi-k2"), "model.layers.1.self_attn.q_proj", None),
        (section_of("ct-two-bits"), "model.layers.0.self_attn.q_proj", PackedIntegers(8, 32)),
        (section_of("ct-two-bits"), "model.layers.0.self_attn.v_proj", PackedIntegers(4, 32)),
        (section_of("ct-two-bits"), "model.layers.0.mlp.gate", None),
        (section_of("ct-int8", ("model.layers.0.mlp.gate",)), "model.layers.0.mlp.gate", None),
        (section_of("ct-int8"), "model.embed_tokens", None),
        (section_of("ct-int8"), PATH, Int8()),
        (GPTQ_PARTS, "model.layers.0.mlp.gate", None),
        (GPTQ_PARTS, "model.layers.0.self_attn.q_proj", Gptq(4, 128, less_one=False)),
        (GPTQ_PARTS, "model.layers.0.self_attn.k_proj", None),
        (GPTQ_PARTS, "model.layers.0.mlp.experts.0.down_proj", Gptq(8, 32, less_one=False)),
        (GPTQ_PARTS, "lm_head", Gptq(4, 128, less_one=False)),
        (section_of("gptq"), "lm_head", None),
        (section_of("awq"), "model.layers.0.mlp.gate", None),
        (AUTO, "model.layers.1.mlp.gate", None),
        (AUTO, PATH, Gptq(4, 128, symmetric=True, indexed=False)),
        (AUTO, "model.layers.1.self_attn.q_proj", Gptq(8, 128, symmetric=True, indexed=False)),
        (AUTO, "lm_head", Gptq(4, 128, symmetric=True, indexed=False)),
        (AUTO, "model.visual.merger", None),
        ({"quantization_config": {**AUTO_ROUND, "block_name_to_quantize": 5}}, "lm_head", None),
        (autoround_fp8(-1), PATH, Fp8()),
        (autoround_fp8([128, 128]), PATH, Fp8((128, 128))),
        (autoround_fp8(-1), "lm_head", None),
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
