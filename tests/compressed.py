"""Weights in the formats of compressed-tensors, written and read back by that library.

Without it the tests that import this are skipped.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import generate_gparam

from tests.packers import Packed


def scheme_of(preset: str, targets: tuple[str, ...] = ("Linear",), **weights: Any) -> QuantizationScheme:
    """A preset of the library (`W4A16`), with other settings for the weights (`group_size`)."""
    scheme = preset_name_to_scheme(preset, list(targets))
    scheme.weights = scheme.weights.model_copy(update=weights)
    return scheme


def compressed(weight: torch.Tensor, format: str, scheme: QuantizationScheme) -> Packed:
    """A weight (O, I) in a format (`pack-quantized`); scales have the weight's dtype, as llm-compressor writes them."""
    arguments = scheme.weights
    least, most = _extremes(weight, arguments)
    given = {"weight": weight}
    if arguments.strategy == QuantizationStrategy.TENSOR_GROUP:
        given["weight_global_scale"] = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    scale, zero = calculate_qparams(least, most, arguments, global_scale=given.get("weight_global_scale"))
    given |= {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format)
    parts = {name: tensor.data.contiguous() for name, tensor in compressor.compress(given, scheme).items()}
    if scheme.input_activations is not None and scheme.input_activations.dynamic is False:
        parts["input_scale"] = torch.tensor([0.02], dtype=weight.dtype)
    if arguments.strategy == QuantizationStrategy.TENSOR_GROUP and scheme.input_activations is not None:
        parts["input_global_scale"] = torch.tensor([320.0])
    if format == "nvfp4-pack-quantized":
        # `decompress` gives bfloat16 whatever the model's dtype is; these are its own steps, in float32.
        codes = unpack_fp4_from_uint8(parts["weight_packed"], *weight.shape, dtype=torch.float32)
        scales, whole = parts["weight_scale"].float(), parts["weight_global_scale"]
        values = dequantize(codes, scales, args=arguments, global_scale=whole, dtype=torch.float32)
    else:
        values = compressor.decompress(dict(parts), scheme)["weight"]
    return Packed(parts, values.float())


def section(
    groups: dict[str, tuple[str, QuantizationScheme]], ignore: list[str], stated: bool = True
) -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it: by name of a group its format and scheme.

    Older versions did not state the format of each group (`stated`).
    """
    formats = {format for format, _ in groups.values()}
    written = {}
    for name, (format, scheme) in groups.items():
        written[name] = json.loads(scheme.model_dump_json(exclude={"format"}))
        if stated:
            written[name] = {**written[name], "format": format}
    return {
        "config_groups": written,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.13.0",
    }


def _extremes(weight: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of what shares a scale."""
    rows, columns = weight.shape
    match arguments.strategy:
        case QuantizationStrategy.TENSOR:
            return weight.min().reshape(1), weight.max().reshape(1)
        case QuantizationStrategy.CHANNEL:
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case QuantizationStrategy.BLOCK:
            high, wide = arguments.block_structure
            padding = (0, -columns % wide, 0, -rows % high)
            padded = torch.nn.functional.pad(weight, padding)
            blocks = padded.view(math.ceil(rows / high), high, -1, wide)
            return blocks.amin((1, 3)), blocks.amax((1, 3))
        case _:
            groups = weight.view(rows, -1, arguments.group_size)
            return groups.amin(-1), groups.amax(-1)
