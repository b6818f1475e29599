"""Weights rounded to the formats of results: read back by our decoders and by the formats' own programs."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from streamprune.checkpoint.reader import DTYPES
from streamprune.errors import NonFiniteError, SettingsError
from streamprune.formats.pick import stated_format
from streamprune.quantize.schemes import GROUPS, SCHEMES, Scheme, require_library, scheme_of
from tests.packers import E4M3
from tests.stored import PATH, entries, matrix, read

BaseCompressor = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
QuantizationConfig = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig

LIBRARY = [name for name in SCHEMES if name != "fp8"]
dtypes = st.sampled_from(["BF16", "F16", "F32"])


def scheme(name: str, columns: int = 32, dtype: str = "BF16") -> Scheme:
    return scheme_of(name, [columns], dtype=dtype)


def stored(made: Scheme, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parts by the names of their tensors in the module."""
    return {made.leaves[part]: tensor for part, tensor in parts.items()}


def config(made: Scheme, ignored: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """config.json, as it comes back from a file."""
    read: dict[str, Any] = json.loads(json.dumps({"quantization_config": made.config_section(ignored)}))
    return read


def rounded(made: Scheme, weight: torch.Tensor) -> torch.Tensor:
    scales = made.scales(weight)
    return made.rounded(made.round(weight, scales), scales)


@pytest.mark.parametrize("name", SCHEMES)
@given(rows=st.integers(1, 150), groups=st.integers(1, 5), seed=st.integers(0, 2**31), dtype=dtypes)
@settings(max_examples=15, deadline=None)
def test_what_is_packed_decodes_to_what_was_rounded(name: str, rows: int, groups: int, seed: int, dtype: str) -> None:
    weight = matrix(rows, 32 * groups, seed, DTYPES[dtype])
    made = scheme(name, 32 * groups, dtype)
    parts = made.encode(weight)
    found = read(stored(made, parts), config(made))
    assert made.format == stated_format(PATH, config(made))
    # A matrix within one block shows one scale, which may be that of a block or of the tensor.
    assert found.format == made.format or parts["scale"].numel() == 1
    assert torch.equal(found.values, rounded(made, weight))
    names = {leaf: part for part, leaf in made.leaves.items()}
    written = {names[name.rpartition(".")[2]]: (e.dtype, e.shape) for name, e in entries(stored(made, parts)).items()}
    assert written == made.stored(tuple(weight.shape))
    assert made.problem(tuple(weight.shape)) is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", LIBRARY)
def test_compressed_tensors_reads_the_same(name: str, dtype: str) -> None:
    weight = matrix(40, 96, 5, DTYPES[dtype])
    made = scheme(name, 96, dtype)
    section = config(made)["quantization_config"]
    group = QuantizationConfig.model_validate(section).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(section["format"])
    theirs = compressor.decompress(stored(made, made.encode(weight)), group)["weight"]
    assert theirs.dtype == DTYPES[dtype]
    assert torch.equal(theirs, rounded(made, weight).to(theirs.dtype))


def test_transformers_reads_whole_blocks_of_native_fp8_the_same() -> None:
    made, weight = scheme("fp8"), matrix(256, 384, 6)
    parts = made.encode(weight)
    theirs = Fp8Dequantize(None)._dequantize_one(parts[""], parts["scale"])
    assert torch.equal(theirs, rounded(made, weight))


def test_transformers_misreads_the_shapes_that_are_cautioned() -> None:
    made = scheme("fp8")
    for shape in [(256, 128), (100, 128), (192, 128), (576, 128), (128, 192)]:
        weight = torch.arange(shape[0] * shape[1]).float().view(shape)
        parts = made.encode(weight)
        try:
            theirs = Fp8Dequantize(None)._dequantize_one(parts[""], parts["scale"])
            right = torch.equal(theirs, rounded(made, weight))
        except ValueError:
            right = False
        assert right == (made.caution(shape) is None), shape
    assert scheme("w4a16").caution((192, 128)) is None


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_the_nearest_for_the_scales_as_stored(name: str) -> None:
    weight, made = matrix(12, 64, 7), scheme(name, 64)
    scales = made.scales(weight)
    half = 1 << (made.bits - 1)
    codes = torch.arange(-half, half).double()
    if name.startswith("fp8"):
        # The bytes 0x7f and 0xff are no numbers.
        codes = torch.from_numpy(E4M3[np.arange(256) & 127 != 127])
    each = made.rounded(torch.ones(weight.shape).to(made.code_dtype), scales).double()
    errors = (weight.double()[..., None] - codes * each[..., None]).abs()
    chosen = (weight.double() - rounded(made, weight).double()).abs()
    # A value in the middle of two codes may go to either: its quotient is rounded to float32, as is what codes mean.
    assert (chosen <= errors.amin(-1) + 1e-6 * each + 1e-7 * weight.abs()).all()
    assert made.round(weight, scales).float().unique().numel() > 10


@pytest.mark.parametrize("name", SCHEMES)
def test_values_beyond_the_codes_get_the_last_one(name: str) -> None:
    made = scheme(name)
    high = {"w8a16": 127.0, "w4a16": 7.0}.get(name, 448.0)
    low = -448.0 if high == 448 else -high - 1
    # GPTQ asks for such values: earlier columns move later ones.
    codes = made.nearest(torch.tensor([500.0, 1e30, -500, -1e30]) * 0.5, torch.tensor(0.25))
    assert codes.tolist() == [high, high, low, low]


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_are_of_the_largest_magnitude(name: str) -> None:
    weight, made = matrix(130, 160, 8), scheme(name, 160)
    high, wide = {"fp8": (128, 128), "fp8-dynamic": (1, 160)}.get(name, (1, 32))
    divisor = {"w8a16": 127.5, "w4a16": 7.5}.get(name, 448.0)
    scales = made.scales(weight)
    assert scales.dtype == (torch.float32 if name == "fp8" else torch.bfloat16)
    for i, row in enumerate(weight.split(high)):
        for j, block in enumerate(row.split(wide, 1)):
            assert scales[i, j] == (block.abs().max() / divisor).to(scales.dtype)


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_together_are_rounded_as_each_alone(name: str) -> None:
    weights, made = torch.stack([matrix(20, 160, seed) for seed in range(3)]), scheme(name, 160)
    scales = made.scales(weights)
    codes = made.round(weights, scales)
    together = made.rounded(codes, scales)
    for expert, weight in enumerate(weights):
        alone = made.scales(weight)
        assert torch.equal(alone, scales[expert])
        assert torch.equal(made.round(weight, alone).float(), codes[expert].float())
        assert torch.equal(rounded(made, weight), together[expert])


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros_and_one_huge_value_stays(name: str) -> None:
    made, weight = scheme(name), torch.zeros(4, 64)
    parts = made.encode(weight)
    assert (parts["scale"] > 0).all()
    assert torch.equal(made.format.decode(parts, torch.float32), weight)
    weight[1, 5], weight[2, 40] = 3e38, 1e-44
    found = rounded(made, weight)
    assert torch.isfinite(found).all()
    assert abs(found[1, 5] / 3e38 - 1) < 0.14 / made.bits**0.5
    assert found.count_nonzero() == 1


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    weight = torch.ones(3, 32)
    weight[1, 1] = value
    with pytest.raises(NonFiniteError, match=rf"\[3, 32\] hold NaN or infinity.*stored as {name}"):
        scheme(name).encode(weight)


def test_magnitudes_beyond_the_scales_dtype_are_refused() -> None:
    for name in ("w8a16", "w4a16"):
        with pytest.raises(NonFiniteError, match=r"scales in F16 reach \(largest magnitude 65504\)"):
            scheme(name, dtype="F16").encode(torch.full((1, 32), 65504.0, dtype=torch.float16))
        assert rounded(scheme(name, dtype="F16"), torch.full((1, 32), 6e4)).half().isfinite().all()


def test_the_group_is_the_largest_that_divides_all_columns() -> None:
    def group(*columns: int, split: tuple[int, ...] = (), ranks: int = 1) -> Any:
        return scheme_of("w4a16", columns, split, tensor_parallel=ranks).format.group

    assert group(2048, split=(768,)) == 128
    assert group(2048, split=(768,), ranks=2) == 128
    assert group(2048, split=(768,), ranks=4) == 64
    assert group(2880, split=(2880,)) == 64
    assert group(2688, 1856) == 64
    assert group(2048, 96) == 32
    assert scheme_of("fp8", [1000], [7], tensor_parallel=3).name == "fp8"
    assert {scheme("w8a16", columns).format.group for columns in GROUPS} == {*GROUPS}


def test_columns_that_no_group_divides_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"every 128, 64 or 32 columns .* divides 1000 columns\. Use --weights fp8"):
        scheme_of("w4a16", [2048, 1000])
    with pytest.raises(
        SettingsError, match=r"divides 768 columns over 5 ranks\. .* or --tensor-parallel 1 or 2 or 3 or 4"
    ):
        scheme_of("w8a16", [2048], [768], tensor_parallel=5)
    assert "60 columns are no whole groups of 32" in str(scheme("w4a16").problem((4, 60)))
    assert "is no matrix" in str(scheme("fp8").problem((4,)))
    assert "is no matrix" in str(scheme("fp8").problem((0, 4)))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="--weights int3 is none of fp8, fp8-dynamic, w8a16, w4a16"):
        scheme_of("int3", [32])
    with pytest.raises(SettingsError, match="dtype F64"):
        scheme("w4a16", dtype="F64")
    with pytest.raises(SettingsError, match="--tensor-parallel 0"):
        scheme_of("w4a16", [32], tensor_parallel=0)


@pytest.mark.parametrize(("version", "says"), [("0.19.9", "0.19.9 is"), ("0.21.0", "0.21.0 is"), (None, "it is not")])
def test_another_compressed_tensors_is_refused(monkeypatch: pytest.MonkeyPatch, version: str | None, says: str) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(SettingsError, match=rf"{says} installed: pip install 'streamprune\[quantize\]'"):
        scheme("w4a16").encode(torch.ones(1, 32))
    with pytest.raises(SettingsError, match=r"from 0\.20 on, below 0.21"):
        scheme("fp8-dynamic").config_section([])
    require_library("fp8")
    assert scheme("fp8").encode(torch.ones(1, 32)).keys() == {"", "scale"}
    assert scheme("fp8").config_section([])["quant_method"] == "fp8"


def test_the_config_says_what_published_ones_say() -> None:
    ignored = ["model.layers.0.mlp.gate", "lm_head"]
    assert scheme("fp8").config_section(ignored) == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ignored,
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    section = scheme("w4a16", 64).config_section(ignored)
    group = section["config_groups"]["group_0"]
    assert (section["quant_method"], section["quantization_status"]) == ("compressed-tensors", "compressed")
    assert (section["format"], group["format"], section["ignore"]) == ("pack-quantized", "pack-quantized", ignored)
    assert group["targets"] == ["Linear"]
    assert group["weights"]["num_bits"] == 4
    assert (group["weights"]["group_size"], group["weights"]["symmetric"]) == (64, True)
    assert group["input_activations"] is None
    eight = scheme("w8a16", 96).config_section([])["config_groups"]["group_0"]["weights"]
    assert (eight["num_bits"], eight["group_size"]) == (8, 32)
    dynamic = scheme("fp8-dynamic").config_section(ignored)
    group = dynamic["config_groups"]["group_0"]
    assert dynamic["format"] == "float-quantized"
    assert (group["weights"]["strategy"], group["weights"]["type"]) == ("channel", "float")
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)


@pytest.mark.parametrize("name", SCHEMES)
def test_ignored_modules_are_plain_for_the_config_alone(name: str) -> None:
    made = scheme(name)
    written = config(made, ("model.layers.1.mlp.gate", "lm_head"))
    assert stated_format("model.layers.1.mlp.gate", written) is None
    assert stated_format("lm_head", written) is None
    assert stated_format("model.layers.1.mlp.gate_proj", written) == made.format
    assert stated_format("model.layers.11.mlp.gate", written) == made.format
