"""The formats in which results are quantized: scales, codes, packing, and what config.json says of them.

A *scheme* is what compressed-tensors calls so: how a weight is rounded and stored. The four:

| name | a scale for | codes | as published by |
|---|---|---|---|
| `fp8` | each block of 128 x 128 | E4M3 | DeepSeek-V3 (arXiv:2412.19437, section 3.3.2), Qwen |
| `fp8-dynamic` | each row | E4M3 | compressed-tensors, preset FP8_DYNAMIC |
| `w8a16` | each group of columns in a row | 8-bit integers | compressed-tensors, preset W8A16, pack-quantized |
| `w4a16` | the same | 4-bit integers | compressed-tensors, preset W4A16, pack-quantized |

All are symmetric: the weight is code x scale. Scales are float32 for `fp8`; for the others they have the model's own
dtype, as llm-compressor writes them: programs decode to the scales' dtype, and would round to it in any case. Codes are
chosen for the scale as it is stored, after its own rounding.

A weight's codes and scales are the same bytes on every device: they come of single float32 operations on its values
(maximum, division, rounding, cast), each exact or rounded to nearest as IEEE 754 says. Needs no torch to be imported.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamprune.errors import NonFiniteError, SettingsError
from streamprune.formats.fp8 import Fp8
from streamprune.formats.integers import PackedIntegers

if TYPE_CHECKING:
    import torch

#: The names of all schemes, as `--weights` takes them.
SCHEMES = ("fp8", "fp8-dynamic", "w8a16", "w4a16")
#: Sizes of groups, best first. Smaller ones cost more bytes for scales than they are worth, and larger ones precision;
#: vLLM's Marlin kernels take no others (but for one group a row).
GROUPS = (128, 64, 32)
#: The blocks of `fp8`: the only size that kernels for native FP8 are made for.
BLOCK = (128, 128)

#: compressed-tensors' names: the preset with the scheme's settings, and the format that stores it.
_PRESETS = {
    "fp8-dynamic": ("FP8_DYNAMIC", "float-quantized"),
    "w8a16": ("W8A16", "pack-quantized"),
    "w4a16": ("W4A16", "pack-quantized"),
}
_BITS = {"w8a16": 8, "w4a16": 4}
#: The versions of compressed-tensors, as in pyproject.toml: from the first, below the second.
_VERSIONS = ((0, 20), (0, 21))
_INSTALL = "pip install 'streamprune[quantize]'"
#: The largest E4M3 value.
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded and stored; made by `scheme_of`.

    `format` is the class of `formats/` that reads what is written; its parts name those of `pack` and `stored`. Shapes:
    a matrix is (R, C) = (out, in), `...` are leading axes (experts), and scales are (r, c), one for each block.
    """

    name: str
    format: Fp8 | PackedIntegers

    @property
    def leaves(self) -> Mapping[str, str]:
        """For each part of the format the last segment of its tensor's name."""
        if isinstance(self.format, PackedIntegers):
            return {"packed": "weight_packed", "scale": "weight_scale", "shape": "weight_shape"}
        return {"": "weight", "scale": "weight_scale_inv" if self.format.block else "weight_scale"}

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.format.bits if isinstance(self.format, PackedIntegers) else 8

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes."""
        import torch

        return torch.float8_e4m3fn if isinstance(self.format, Fp8) else torch.int8

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many rows and columns of weights of this shape (..., R, C) share a scale; the last blocks may have
        fewer."""
        if isinstance(self.format, PackedIntegers):
            return 1, self.format.group or shape[-1]
        return self.format.block or (1, shape[-1])

    @property
    def method(self) -> str:
        """The `quant_method` of a config.json."""
        return "compressed-tensors" if self.name in _PRESETS else "fp8"

    def stored(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The safetensors dtype and the shape of each part of one matrix of this shape."""
        return self.format.stored_as(shape)

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so; None if it can."""
        if len(shape) != 2 or 0 in shape:
            return f"{list(shape)} is no matrix"
        group = self.format.group if isinstance(self.format, PackedIntegers) else None
        if group and shape[1] % group:
            return f"its {shape[1]} columns are no whole groups of {group}"
        return None

    def caution(self, shape: tuple[int, ...]) -> str | None:
        """What goes wrong with a matrix of this shape in a program that reads the format; None if nothing does.

        transformers 5.23 takes rows / rows of scales for the height of blocks (`Fp8Dequantize`), so that it decodes
        192 rows in two blocks of 96, and fails for 576. vLLM and our own decoder are right.
        """
        if not isinstance(self.format, Fp8) or self.format.block is None:
            return None
        for size, step, axis in zip(shape[-2:], self.format.block, ("rows", "columns"), strict=True):
            if size > step and size % step:
                return f"transformers decodes its {size} {axis} wrongly, or not at all: they are no multiple of {step}"
        return None

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales (..., r, c) of weights (..., R, C), as they are stored: largest magnitude / largest code.

        For b bits of integers that is (2^b - 1) / 2, as in compressed-tensors: the codes reach from -2^(b-1) to
        2^(b-1) - 1, and rounding cuts half a step at either end. A block of zeros, or whose scale is too small for its
        dtype, gets a positive scale that decodes to zeros. Raises NonFiniteError for NaN and infinity in the weights,
        and for magnitudes that the scales' dtype cannot hold.
        """
        import torch

        dtype = self._scale_dtype
        largest = self._blocks(weight).abs().amax((-3, -1))
        # A tensor, since CUDA multiplies with the reciprocal of a number instead, which rounds differently.
        scales = (largest / torch.full_like(largest, self._largest)).to(dtype)
        # The largest code decodes to a little more than the largest magnitude.
        if not torch.isfinite((scales.float() * self._largest_code).to(dtype)).all():
            raise NonFiniteError(
                f"Weights {list(weight.shape)} hold NaN or infinity, or values beyond what codes and scales in "
                f"{self.format.scale_dtype} reach (largest magnitude {largest.max().item():g}), so they cannot be "
                f"stored as {self.name}. Check the source's file; if it is sound, use other --weights."
            )
        # What compressed-tensors puts there, so that no program divides by zero.
        return scales.masked_fill(scales == 0, torch.finfo(dtype).eps)

    def round(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The nearest codes (..., R, C), float8_e4m3fn or int8, of weights by scales (..., r, c)."""
        values = self.nearest(self._blocks(weight), scales.float()[..., :, None, :, None])
        return _whole(values, weight.shape).to(self.code_dtype)

    def rounded(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The weights (..., R, C), float32, that codes and scales mean."""
        import torch

        values = self._blocks(codes.to(torch.float32, copy=True))
        return _whole(values.mul_(scales.float()[..., :, None, :, None]), codes.shape)

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The nearest codes of weights in float32, by a scale for each, float32 and broadcast; as float32 values."""
        codes = weight / scales
        if isinstance(self.format, Fp8):
            # Beyond its range, the cast of older versions of torch gives NaN; that of 2.13 clamps by itself.
            return codes.clamp_(-_E4M3_MAX, _E4M3_MAX).to(self.code_dtype).float()
        half = 1 << (self.bits - 1)
        return codes.round_().clamp_(-half, half - 1)

    def as_run(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What codes of `nearest` are for the programs that run a model, by a scale for each; float32.

        They decode integers to the scales' dtype, which rounds once more (in bfloat16, codes of 8 bits by up to a
        quarter of a step). FP8 is multiplied as it is, and the result scaled.
        """
        values = codes * scales
        return values.to(self._scale_dtype).float() if isinstance(self.format, PackedIntegers) else values

    def pack(self, codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts, as they are stored, of one matrix from its codes (R, C) and scales (r, c).

        Raises SettingsError without compressed-tensors, if it packs.
        """
        import torch

        if isinstance(self.format, Fp8):
            return {"": codes, "scale": scales}
        require_library(self.name)
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        return {
            "packed": pack_to_int32(codes, self.bits),
            "scale": scales,
            "shape": torch.tensor(codes.shape, device=codes.device),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts, as they are stored, of one matrix (R, C), rounded to nearest."""
        scales = self.scales(weight)
        return self.pack(self.round(weight, scales), scales)

    def pattern_of_experts(self, path: str) -> str:
        """What `config_section` takes for the modules of all experts in the list at `path`."""
        return path if self.name not in _PRESETS else rf"re:(.*\.)?{re.escape(path)}\..*"

    def config_section(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of a config.json, with the full names of Linear modules that stay plain.

        Raises SettingsError without compressed-tensors, if the scheme is one of its.
        """
        if self.name not in _PRESETS:
            return {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "modules_to_not_convert": list(ignored),
                "quant_method": self.method,
                "weight_block_size": list(BLOCK),
            }
        require_library(self.name)
        import compressed_tensors
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

        preset, form = _PRESETS[self.name]
        scheme = preset_name_to_scheme(preset, ["Linear"])
        scheme.format = form
        if isinstance(self.format, PackedIntegers):
            scheme.weights.group_size = self.format.group
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=list(ignored)
        )
        # What ModelCompressor.update_config, which needs a model, writes beside.
        beside = {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}
        return {**config.model_dump(mode="json"), **beside}

    @property
    def _scale_dtype(self) -> torch.dtype:
        import torch

        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[self.format.scale_dtype]

    @property
    def _largest(self) -> float:
        """What the largest magnitude is divided by."""
        return _E4M3_MAX if isinstance(self.format, Fp8) else ((1 << self.bits) - 1) / 2

    @property
    def _largest_code(self) -> float:
        return _E4M3_MAX if isinstance(self.format, Fp8) else float(1 << (self.bits - 1))

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """Values (..., R, C) in float32 by blocks (..., r, height, c, width), filled up with zeros."""
        import torch

        high, wide = self.block(values.shape)
        missing = -values.shape[-2] % high, -values.shape[-1] % wide
        values = values.float()
        if any(missing):
            values = torch.nn.functional.pad(values, (0, missing[1], 0, missing[0]))
        *outer, rows, columns = values.shape
        return values.reshape(*outer, rows // high, high, columns // wide, wide)


def _whole(blocks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Blocks (..., r, height, c, width) as the matrices of this shape (..., R, C) that they were filled up from."""
    matrix = blocks.flatten(-2).flatten(-3, -2)
    return matrix[..., : shape[-2], : shape[-1]].contiguous()


def scheme_of(
    name: str,
    columns: Collection[int] = (),
    split: Collection[int] = (),
    *,
    tensor_parallel: int = 1,
    dtype: str = "BF16",
) -> Scheme:
    """The scheme of this name for weights with so many columns.

    `columns` are the numbers of columns of the weights to be quantized; `split` of those whose columns an engine splits
    over its `tensor_parallel` ranks (down projections: the intermediate size; projections of attention's output).
    Groups get the largest of the sizes GROUPS that divides all of them, those of `split` on each rank. `dtype` is the
    model's (BF16, F16 or F32), which its scales get.

    Raises SettingsError if no size does, or for unknown names and dtypes.
    """
    if dtype not in ("BF16", "F16", "F32"):
        raise SettingsError(f"Scales of quantized weights cannot have the model's dtype {dtype}: use BF16, F16 or F32.")
    if tensor_parallel < 1:
        raise SettingsError(f"--tensor-parallel {tensor_parallel} is not at least 1.")
    if name == "fp8":
        return Scheme(name, Fp8(BLOCK))
    if name == "fp8-dynamic":
        return Scheme(name, Fp8(None, dtype))
    if name not in _BITS:
        raise SettingsError(f"--weights {name} is none of {', '.join(SCHEMES)}.")
    return Scheme(name, PackedIntegers(_BITS[name], _group(name, columns, split, tensor_parallel), scale_dtype=dtype))


def require_library(name: str) -> None:
    """Raise SettingsError if the scheme of this name needs compressed-tensors, and a version of it that serves is not
    installed. Does not import it."""
    if name not in _PRESETS:
        return
    try:
        version = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        version = None
    found = tuple(int(part) for part in (version or "0").split(".")[:2] if part.isdigit())
    if not _VERSIONS[0] <= found < _VERSIONS[1]:
        least, below = (".".join(map(str, each)) for each in _VERSIONS)
        raise SettingsError(
            f"--weights {name} needs compressed-tensors from {least} on, below {below}, and "
            f"{f'{version} is' if version else 'it is not'} installed: {_INSTALL}"
        )


def _group(name: str, columns: Collection[int], split: Collection[int], ranks: int) -> int:
    """The largest size of groups that divides all columns; see `scheme_of`."""
    found = _fitting(columns, split, ranks)
    if found is not None:
        return found
    step = GROUPS[-1]
    odd = [f"{size} columns" for size in sorted({*columns}) if size % step]
    odd += [f"{size} columns over {ranks} ranks" for size in sorted({*split}) if size % (step * ranks)]
    wants = "--weights fp8 or fp8-dynamic, which have no groups"
    others = [str(count) for count in range(1, ranks) if _fitting(columns, split, count)]
    if others:
        wants += f", or --tensor-parallel {' or '.join(others)}"
    raise SettingsError(
        f"--weights {name} gives every {', '.join(map(str, GROUPS[:-1]))} or {step} columns of a weight a scale, but "
        f"none of these sizes divides {' and '.join(odd)}. Use {wants}."
    )


def _fitting(columns: Collection[int], split: Collection[int], ranks: int) -> int | None:
    """The largest size of groups that divides all columns, those of `split` on each of the ranks."""
    for group in GROUPS:
        if all(size % group == 0 for size in columns) and all(size % (group * ranks) == 0 for size in split):
            return group
    return None
