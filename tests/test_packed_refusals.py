"""Quantized weights about which config.json and the tensors do not agree, or that no reader knows: each is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.pick import pick_formats, refuse_quantized, refuse_unread, stated_format
from streamprune.formats.plain import PLAIN
from tests import compressed, packers
from tests.schemes import SCHEMES
from tests.stored import AUTO_ROUND, PATH, entries, matrix, preset, read

Parts = dict[str, torch.Tensor]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def gptq(**options: Any) -> Parts:
    return packers.gptq(matrix(32, 64, 1), symmetric=False, **options).parts


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ({"bits": 8}, {}, r"64 inputs with codes of 4 bits in 2 group\(s\), but .* says 8 bits and group_size 32"),
        ({"group_size": 64}, {}, r"in 2 group\(s\), but config.json says 4 bits and group_size 64"),
        ({"group_size": -1}, {}, r"in 2 group\(s\), but .* group_size -1"),
        ({"dynamic": {".*up_proj": {"bits": 2}}}, {}, r"codes of 4 bits .* says 2 bits"),
        ({}, {"qweight": words(6, 32), "qzeros": words(2, 3)}, r"codes of 3 bits, which AutoGPTQ packs in one way and"),
        ({}, {"qweight": words(8, 31)}, r"does not fit GPTQ's layout"),
        ({}, {"qzeros": words(3, 4)}, r"does not fit GPTQ's layout"),
        ({}, {"qweight": words(8, 32).to(torch.int16)}, r"lacks GPTQ's qweight, qzeros \(both I32\) or scales"),
        ({}, {"qzeros": None}, r"lacks GPTQ's qweight, qzeros"),
        ({}, {"g_idx": words(63)}, r"does not fit GPTQ's layout.*g_idx \[in\]"),
        ({"desc_act": True}, {"g_idx": None}, r"no g_idx, which says in which of 2 groups each input is"),
        ({"dynamic": {"(": {}}}, {}, r"The pattern '\(' under dynamic in config.json is no regular expression"),
    ],
)  # fmt: skip
def test_gptq_that_does_not_fit(section: dict[str, Any], change: dict[str, torch.Tensor | None], reason: str) -> None:
    parts = {name: tensor for name, tensor in {**gptq(), **change}.items() if tensor is not None}
    with pytest.raises(UnsupportedModelError, match=reason):
        pick_formats(entries(parts), {"quantization_config": {**GPTQ, **section}})


def test_gptq_whose_values_cannot_be_right() -> None:
    outside = {**gptq(), "g_idx": torch.tensor([0, 2] * 32, dtype=torch.int32)}
    with pytest.raises(
        CheckpointError, match=rf"{PATH}.weight cannot be decoded. g_idx goes from 0 to 2, but .* 2 groups"
    ):
        read(outside, {"quantization_config": GPTQ})
    # Version 2 under the name of version 1: every weight would be off by one scale.
    other = packers.gptq(matrix(32, 64, 1), symmetric=True, version=2).parts
    with pytest.raises(
        CheckpointError, match=r"Zero points .* go from 9 to 9, but config.json calls them symmetric, .* 8"
    ):
        read(other, {"quantization_config": {**GPTQ, "sym": True}})


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ({"group_size": 64}, {}, r"in 2 group\(s\), but config.json says 4 bits and group_size 64"),
        ({"bits": 8}, {}, r"codes of 4 bits .* config.json says 8 bits"),
        ({}, {"qweight": words(64, 5)}, r"does not fit AWQ's layout gemm"),
        ({}, {"qweight": words(64, 4).long()}, r"does not fit AWQ's layout gemm"),
        ({}, {"qzeros": None}, r"does not fit AWQ's layout gemm"),
    ],
)
def test_awq_that_does_not_fit(section: dict[str, Any], change: dict[str, torch.Tensor | None], reason: str) -> None:
    given = {**packers.awq(matrix(32, 64, 1)).parts, **change}
    parts = {name: tensor for name, tensor in given.items() if tensor is not None}
    with pytest.raises(UnsupportedModelError, match=reason):
        pick_formats(entries(parts), {"quantization_config": {**AWQ, **section}})


def test_gptq_and_awq_are_not_taken_for_each_other() -> None:
    with pytest.raises(UnsupportedModelError, match="does not fit AWQ's layout gemm"):
        pick_formats(entries(gptq()), {"quantization_config": AWQ})
    with pytest.raises(UnsupportedModelError, match="does not fit GPTQ's layout"):
        pick_formats(entries(packers.awq(matrix(32, 64, 1)).parts), {"quantization_config": GPTQ})


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    """The first group's weights, to be changed."""
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return found


def bits(number: int) -> Callable[[Parts, dict[str, Any]], None]:
    return lambda parts, config: weights_of(config).update(num_bits=number)


def group(number: int) -> Callable[[Parts, dict[str, Any]], None]:
    return lambda parts, config: weights_of(config).update(group_size=number)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts, dict[str, Any]], None]:
    return lambda parts, config: parts.update({name: change(parts[name])})


def added(name: str, tensor: torch.Tensor) -> Callable[[Parts, dict[str, Any]], None]:
    return lambda parts, config: parts.update({name: tensor})


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("int4", bits(8), r"fits none of the groups .*group_0: int of 8 bits.*64 columns .* make 16 words, not 8"),
        ("int4", group(64), r"128 columns of 4 bits make 16 words, not 8"),
        ("int4", added("weight_zero_point", words(4, 2)), r"but there are zero points"),
        ("asymmetric", changed("weight_zero_point", lambda each: each[:3]), r"are I32 \[3, 2\], not I32 \[4, 2\]"),
        ("asymmetric", lambda parts, config: parts.pop("weight_zero_point"), r"but there are no zero points"),
        ("int4", lambda parts, config: parts.pop("weight_shape"), r"weight_shape is missing"),
        ("int4", changed("weight_scale", lambda each: each[:31]), r"scales are F32 \[31, 2\], not .* \[32, 2\]"),
        ("int4", changed("weight_scale", lambda each: each.to(torch.uint8)), r"scales are U8 \[32, 2\]"),
        ("int4", added("weight_g_idx", words(64)), r"weight_g_idx: groups of columns in the order of activations"),
        ("int4", lambda parts, config: weights_of(config).update(type="float"), r"values are packed whole numbers"),
        ("int8", changed("weight_scale", lambda each: each.repeat(1, 2)), r"scales are F32 \[32, 2\], not .*32, 1\]"),
        ("asymmetric-int8", changed("weight_zero_point", torch.Tensor.int), r"zero points are I32 \[32, 1\]"),
        ("int8", lambda parts, config: weights_of(config).update(type="float"), r"values are I8"),
        ("channel", lambda parts, config: weights_of(config).update(type="int"), r"values are F8_E4M3"),
        ("channel", bits(4), r"values are F8_E4M3"),
        ("block", lambda parts, config: weights_of(config).update(block_structure=[32, 32]), r"not .* \[1, 2\]"),
        ("mxfp8", group(16), r"scales are U8 \[32, 2\], not .* \[32, 4\]"),
        ("mxfp8", group(48), r"its 64 columns are no whole groups"),
        ("nvfp4", lambda parts, config: parts.pop("weight_global_scale"), r"there is no weight_global_scale"),
        ("nvfp4", added("weight_global_scale", torch.ones(2)), r"weight_global_scale is F32 \[2\]"),
        ("nvfp4", group(32), r"scales are F8_E4M3 \[32, 4\]"),
        ("mxfp4", group(16), r"scales are U8 \[32, 2\], not F8_E4M3 \[32, 4\]"),
        ("mxfp4", added("weight_global_scale", torch.ones(1)), r"there is a weight_global_scale"),
        ("mxfp4", lambda parts, config: weights_of(config).update(type="int"), r"values are two a byte"),
        ("int4", changed("weight_packed", lambda each: each[0]), r"it is no matrix"),
    ],
)  # fmt: skip
def test_groups_that_do_not_agree_with_the_tensors(
    name: str, damage: Callable[[Parts, dict[str, Any]], object], reason: str
) -> None:
    """Whatever the shapes contradict: neither the group nor the tensors are believed."""
    packed, config = preset(name.removeprefix("asymmetric-"), matrix(32, 64, 1))
    parts = dict(packed.parts)
    if name == "asymmetric-int8":
        weights_of(config).update(symmetric=False)
        parts["weight_zero_point"] = torch.zeros(32, 1, dtype=torch.int8)
        read(parts, config)
    damage(parts, config)
    with pytest.raises(UnsupportedModelError, match=reason):
        pick_formats(entries(parts), config)


@pytest.mark.parametrize("values", [torch.ones(()), torch.ones(4), torch.ones(1, 1, 1, 1)])
def test_fp8_that_is_no_matrix(values: torch.Tensor) -> None:
    parts = {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1)}
    with pytest.raises(UnsupportedModelError, match=r"weight_scale_inv \(F32 \[1\]\) does not fit"):
        pick_formats(entries(parts), {"quantization_config": {"quant_method": "fp8"}})


def two_groups(*targets: list[str]) -> dict[str, Any]:
    """Words of 4 or of 8 bits, one scale a row: the same shapes, as the header tells no number of columns."""
    scheme = compressed.scheme_of("W4A16", group_size=None, strategy="channel")
    made = compressed.section({"a": ("pack-quantized", scheme), "b": ("pack-quantized", scheme)}, [])
    for name, each, number in zip(("a", "b"), targets, (4, 8), strict=True):
        made["config_groups"][name]["targets"] = each
        made["config_groups"][name]["weights"] = {**made["config_groups"][name]["weights"], "num_bits": number}
    return {"quantization_config": made}


def test_of_two_groups_exactly_one_may_be_meant() -> None:
    parts = preset("int4-channel", weight := matrix(32, 64, 1))[0].parts
    expected = preset("int4-channel", weight)[0].values
    # A name before a pattern, a pattern before a class, as the library reads them.
    for first, second in (
        ([PATH], ["re:.*"]),
        (["re:.*up_proj"], ["Linear"]),
        ([PATH, "Linear"], ["re:.*"]),
        (["Linear"], ["re:.*k_proj"]),
    ):
        assert torch.equal(read(parts, two_groups(first, second)).values, expected)
        with pytest.raises(CheckpointError, match=r"weight_shape .* states \[32, 64\], but .* make \[32, 32\]"):
            read(parts, two_groups(second, first))
    several = r"fits several of the groups .*a: int of 4 bits.*; b: int of 8 bits"
    for first, second in ((["re:.*up_proj"], ["re:.*experts.*"]), (["model.other"], ["re:other"])):
        with pytest.raises(UnsupportedModelError, match=several):
            pick_formats(entries(parts), two_groups(first, second))
    with pytest.raises(UnsupportedModelError, match=rf"config.json names {PATH} in several groups: a: .*; b: "):
        stated_format(PATH, two_groups(["re:.*up_proj"], ["re:.*experts.*"]))
    with pytest.raises(UnsupportedModelError, match=r"'\(' in config.json is no regular expression"):
        pick_formats(entries(parts), two_groups(["re:("], ["Linear"]))


def test_rows_that_end_within_a_word_are_not_guessed() -> None:
    """Only weight_shape has the number of columns then, which no header tells."""
    packed, config = preset("int4-channel", matrix(32, 60, 1))
    with pytest.raises(CheckpointError, match=r"weight_shape \(INT4\) states \[32, 60\], but .* make \[32, 64\]"):
        read(packed.parts, config)


def compressed_section(**changes: Any) -> dict[str, Any]:
    made = SCHEMES["ct-w4"].section([])
    weights = changes.pop("weights", {})
    made["config_groups"]["group_0"]["weights"] |= weights
    return {**made, **changes}


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({**GPTQ, "checkpoint_format": "marlin"}, r"repacked for one program \(checkpoint_format marlin\)"),
        ({**GPTQ, "is_marlin_format": True}, r"repacked for one program \(checkpoint_format marlin\)"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, r"checkpoint_format gptq_p"),
        ({**AWQ, "version": "gemv"}, r"only gemm is read, not gemv"),
        ({**AWQ, "backend": "llm-awq"}, r"only gemm is read, not llm-awq"),
        ({**AUTO_ROUND, "packing_format": "auto_round:mlx"}, r"packing_format auto_round:mlx is not known here"),
        ({**AUTO_ROUND, "data_type": "mx_int"}, r"data_type mx_int is not known here"),
        ({**AUTO_ROUND, "rotation_config": {"hadamard_type": "quarot"}}, r"rotated, which AutoRound undoes"),
        (compressed_section(format="marlin-24"), r"the format marlin-24 of compressed-tensors is not known here"),
        (compressed_section(format=["pack-quantized"]), r"the format \['pack-quantized'\] of compressed-tensors"),
        (compressed_section(sparsity_config={"format": "sparse-24-bitmask"}), r"stored sparse \(sparse-24-bitmask\)"),
        (compressed_section(transform_config={"config_groups": {"u": {}}}), r"weights are rotated.*transform_config"),
        (compressed_section(weights={"actorder": "group"}), r"in the order of activations \(actorder: group\)"),
        (compressed_section(weights={"strategy": "token"}), r"group_0 of config_groups .* not understood: .* token"),
        (compressed_section(weights={"num_bits": 6, "type": "float"}), r"not understood: float of 6 bits"),
        (compressed_section(weights={"group_size": 0}), r"not understood: .* group_size 0"),
        (
            compressed_section(config_groups={"W4A16": ["Linear"]}),
            r"group W4A16 of config_groups .* no list of targets",
        ),
        (compressed_section(config_groups=None), r"config.json states no config_groups"),
    ],
)
def test_what_the_config_alone_tells_is_refused_before_anything_is_read(section: dict[str, Any], reason: str) -> None:
    config = {"quantization_config": section}
    with pytest.raises(UnsupportedModelError, match=rf"is quantized \({section['quant_method']}\).*{reason}.*original"):
        refuse_quantized(config, Path("model"))
    # Also where that was not asked: for a header that is there already, or for none.
    for call in (lambda: pick_formats({}, config), lambda: stated_format(PATH, config)):
        with pytest.raises(UnsupportedModelError, match=reason):
            call()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_published_schemes_are_not_refused_by_their_config(scheme: str) -> None:
    refuse_quantized({"quantization_config": SCHEMES[scheme].section(["lm_head"])}, Path("model"))
    assert stated_format("lm_head", {"quantization_config": SCHEMES[scheme].section(["lm_head"])}) is None


@pytest.mark.parametrize("name", ["k_scale", "kv_scale"])
def test_scales_of_caches_belong_to_no_weight(name: str) -> None:
    """Programs use them only where asked to; every other scale that nothing consumes is fatal."""
    scale = entries({name: torch.ones(1), "weight_scale": torch.ones(1)}, "model.layers.0.self_attn")
    stored = pick_formats(scale, {"quantization_config": SCHEMES["ct-fp8-channel"].section([])})
    assert {each.format for each in stored.values()} == {PLAIN}
    cache, weight = scale
    refuse_unread(scale[cache], stored[cache], None)
    with pytest.raises(UnsupportedModelError, match=r"weight_scale .* belongs to quantized weights"):
        refuse_unread(scale[weight], stored[weight], None)
