"""The formats of compressed-tensors, as llm-compressor and others write them.

Which they are is decided by a module's own tensors. What tensors cannot tell (bits, sizes of groups and blocks) is
stated in config.json by groups of modules; a group that does not agree with the tensors is not theirs. Layouts and
rules: compressed-tensors 0.20. Decoding needs not that library, whose own returns bfloat16 for values of four bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats import auto_round
from streamprune.formats.base import Format
from streamprune.formats.fp4 import GROUP, NV_GROUP, Fp4, Nvfp4
from streamprune.formats.fp8 import Fp8
from streamprune.formats.integers import Block, Int8, PackedIntegers, scales_shape
from streamprune.formats.quantization import Module, Quantization, Recognized

#: Values of `quant_method`.
METHODS = frozenset({"compressed-tensors"})

_FORMATS = frozenset({
    "dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
})  # fmt: skip
_FLOATS = frozenset({"F32", "BF16", "F16"})
_E4M3 = frozenset({"F8_E4M3"})
_POWERS = frozenset({"U8", "F8_E8M0"})
#: What belongs to a module's activations: it changes nothing of the weight.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")


@dataclass(frozen=True)
class Scheme:
    """What a group of config.json says of its modules' weights. `group` is the size of groups of columns."""

    name: str
    targets: tuple[str, ...]
    bits: int
    kind: str
    strategy: str
    group: int | None
    block: Block
    symmetric: bool
    packed: bool

    @property
    def shared(self) -> Block:
        """The blocks that share a scale; None if rows do, or the complete tensor."""
        return self.block if self.strategy == "block" else (1, self.group) if self.group else None

    @property
    def described(self) -> str:
        """The scheme for people."""
        size = self.group or (list(self.block) if self.block else "")
        return f"{self.name}: {self.kind} of {self.bits} bits, one scale for each {self.strategy} {size}".strip()


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    """The quantized weight of a module. Raises UnsupportedModelError if no group, or more than one, can be meant."""
    if stated.method not in METHODS and auto_round.packing(stated) != auto_round.COMPRESSED:
        return None
    values = module.tensors.get("weight_packed") or module.tensors.get("weight")
    if values is None or values.dtype not in ("I32", "U8", "I8", *_E4M3) or "weight_scale" not in module.tensors:
        return None
    if "weight_g_idx" in module.tensors:
        raise UnsupportedModelError(
            f"{module.of('weight_g_idx')}: groups of columns in the order of activations are not supported; "
            "compressed-tensors has dropped them too. Quantize again with actorder=weight."
        )
    schemes = _schemes(stated, module.path)
    meant = _best_match(module.path, schemes)
    # Names may be those of another version of the model: with none that fits, the tensors decide alone.
    found = [(scheme, _fit(module, values, scheme)) for scheme in meant or schemes]
    fitting = {recognized.format: recognized for _, recognized in found if isinstance(recognized, Recognized)}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    reasons = "; ".join(
        scheme.described + (f", but {reason}" if isinstance(reason, str) else "") for scheme, reason in found
    )
    raise UnsupportedModelError(
        f"{values.name} ({values.dtype} {list(values.shape)}) with {module.of('weight_scale')} "
        f"{list(module.tensors['weight_scale'].shape)} fits {'several' if fitting else 'none'} of the groups in "
        f"config.json that may be meant ({reasons or 'there is none'}). Compare config.json with the original's."
    )


def stated(path: str, quantization: Quantization) -> Format | None:
    """How a config.json says that the Linear weight of the module at `path` is stored; None: not in these formats.

    Raises UnsupportedModelError if several groups of equal rank name the module.
    """
    of_auto_round = auto_round.packing(quantization) == auto_round.COMPRESSED
    if quantization.method not in METHODS and not of_auto_round:
        return None
    ignored = quantization.values.get("ignore")
    if _rank(path, ignored if isinstance(ignored, list) else ()) is not None:
        return None
    schemes = _best_match(path, _schemes(quantization, path))
    formats = {_format(scheme) for scheme in schemes}
    if len(formats) > 1:
        raise UnsupportedModelError(
            f"config.json names {path} in several groups: {'; '.join(scheme.described for scheme in schemes)}."
        )
    return formats.pop() if formats else None


def unsupported(quantization: Quantization) -> str | None:
    """Why weights as config.json describes them cannot be read, as far as that says it."""
    if quantization.method not in METHODS:
        return None
    values = quantization.values
    sparse = values.get("sparsity_config") or {}
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        return f"its weights are stored sparse ({sparse['format']})"
    transforms = values.get("transform_config") or {}
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        return "its weights are rotated, which programs undo while they run it (transform_config)"
    groups = values.get("config_groups")
    named = (
        [each.get("format") for each in groups.values() if isinstance(each, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    unknown = [each for each in (values.get("format"), *named) if each is not None and str(each) not in _FORMATS]
    if unknown:
        return f"the format {unknown[0]} of compressed-tensors is not known here"
    try:
        _schemes(quantization)
    except UnsupportedModelError as error:
        return str(error).rstrip(".")
    return None


def _schemes(quantization: Quantization, path: str = "") -> tuple[Scheme, ...]:
    """The groups with quantized weights. Raises UnsupportedModelError if one is not understood."""
    if quantization.method not in METHODS:
        return _of_auto_round(path, quantization)
    groups = quantization.values.get("config_groups")
    if not isinstance(groups, Mapping):
        raise UnsupportedModelError("config.json states no config_groups, which say how weights are quantized.")
    whole = quantization.values.get("format")
    schemes = (_scheme(name, group, whole) for name, group in groups.items())
    return tuple(scheme for scheme in schemes if scheme is not None)


def _scheme(name: str, group: Any, whole: Any) -> Scheme | None:
    """A group of config.json; None if it leaves weights plain."""
    if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
        raise UnsupportedModelError(f"The group {name} of config_groups in config.json has no list of targets.")
    weights = group.get("weights")
    form = group.get("format") or whole
    if not isinstance(weights, Mapping) or form == "dense":
        return None
    order = weights.get("actorder")
    if order is True or str(order).lower() in ("group", "dynamic"):
        raise UnsupportedModelError(
            f"The group {name} of config_groups in config.json has groups of columns in the order of activations "
            f"(actorder: {order}), which are not supported."
        )
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    kind, block = str(weights.get("type", "int")).lower(), weights.get("block_structure")
    strategy = str(strategy).lower()
    grouped = strategy in ("group", "tensor_group")
    pair = _pair([int(part) for part in block.split("x") if part.isdigit()] if isinstance(block, str) else block)
    known = strategy in ("tensor", "channel", "group", "tensor_group", "block")
    known = known and bits in {"int": range(1, 9), "float": (4, 8)}.get(kind, ())
    if not known or (grouped and not _sizes([size])) or (strategy == "block" and pair is None):
        raise UnsupportedModelError(
            f"The group {name} of config_groups in config.json is not understood: {kind} of {bits} bits, strategy "
            f"{strategy}, group_size {size}, block_structure {block}."
        )
    targets = tuple(target for target in group["targets"] if isinstance(target, str))
    return Scheme(
        name, targets, int(bits), kind, strategy, size if grouped else None, pair,
        weights.get("symmetric", True) is not False, _is_packed(str(form), group),
    )  # fmt: skip


def _is_packed(form: str, group: Mapping[str, Any]) -> bool:
    """Whether a group's values are packed into words or bytes: by its format, where that is stated for the group.

    Otherwise compressed-tensors packs weights whose activations stay plain (W4A16), and no others (W8A8).
    """
    if form in _FORMATS - {"mixed-precision"}:
        return "pack" in form
    return not group.get("input_activations")


def _sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def _pair(value: Any) -> Block:
    return (value[0], value[1]) if isinstance(value, (list, tuple)) and len(value) == 2 and _sizes(value) else None


def _of_auto_round(path: str, quantization: Quantization) -> tuple[Scheme, ...]:
    """The one scheme of a module in AutoRound's packing of this name: values of 4 or 8 bits, floating point."""
    values = auto_round.settings(path, quantization)
    if values is None:
        return ()
    data, bits, size = str(values.get("data_type")), values.get("bits"), values.get("group_size")
    if bits not in ((4, 8) if "mx_fp" in data else (4,) if "nv_fp" in data else ()) or not _sizes([size]):
        raise UnsupportedModelError(
            f"config.json says that {path or 'weights'} are {data} of {bits} bits in groups of {size}, packed as "
            f"{quantization.values.get('packing_format')}, which is not known here."
        )
    return (Scheme("the model", ("Linear",), int(str(bits)), "float", "group", size, None, True, bits == 4),)


def _best_match(path: str, schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
    """Those that name the module at `path` most directly: by its name, else by a pattern, else by its class."""
    ranks = [(rank, scheme) for scheme in schemes if (rank := _rank(path, scheme.targets)) is not None]
    best = min((rank for rank, _ in ranks), default=0)
    return tuple(scheme for rank, scheme in ranks if rank == best)


def _rank(path: str, targets: Iterable[Any]) -> int | None:
    """How targets name the module at `path`: 0 by its name, 1 by a pattern (from its beginning), 2 by its class."""
    ranks = set()
    for target in targets:
        if target == path:
            ranks.add(0)
        elif isinstance(target, str) and target.startswith("re:"):
            if _pattern(target.removeprefix("re:")).match(path):
                ranks.add(1)
        elif target == ("Embedding" if "embed" in path.rpartition(".")[2] else "Linear"):
            ranks.add(2)
    return min(ranks, default=None)


@lru_cache(maxsize=1024)
def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnsupportedModelError(f"{pattern!r} in config.json is no regular expression: {error}.") from error


def _format(scheme: Scheme) -> Format:
    if scheme.kind == "int":
        if not scheme.packed:
            return Int8(scheme.shared, scheme.symmetric)
        return PackedIntegers(scheme.bits, scheme.group, scheme.symmetric)
    if scheme.bits == 4:
        return Nvfp4() if scheme.group == NV_GROUP else Fp4()
    # llm-compressor writes scales in the model's dtype.
    return Fp8(scheme.shared, "BF16", scheme.strategy == "tensor")


def _fit(module: Module, values: TensorEntry, scheme: Scheme) -> Recognized | str:
    """The weight as the scheme says, or why it does not fit."""
    zero = module.tensors.get("weight_zero_point")
    if len(values.shape) != 2:
        return "it is no matrix"
    if (zero is None) != scheme.symmetric:
        return "there are zero points" if scheme.symmetric else "there are no zero points"
    fit = {"I32": _fit_words, "U8": _fit_floats}.get(values.dtype, _fit_values)
    fitted = fit(module, values, scheme)
    if isinstance(fitted, str):
        return fitted
    storage, parts = fitted
    parts |= {name: name for name in _OF_ACTIVATIONS if name in module.tensors}
    return Recognized(storage, {leaf: ("weight", part) for leaf, part in parts.items()})


_Fitted = tuple[Format, dict[str, str]] | str


def _fit_values(module: Module, values: TensorEntry, scheme: Scheme) -> _Fitted:
    """One tensor of the weight's own shape, F8_E4M3 or I8: float-, int-, naive- and mxfp8-quantized."""
    rows, columns = values.shape
    scale, zero = module.tensors["weight_scale"], module.tensors.get("weight_zero_point")
    floats = values.dtype in _E4M3
    if scheme.kind != ("float" if floats else "int") or (floats and scheme.bits != 8):
        return f"values are {values.dtype}"
    if scheme.kind == "float" and not scheme.symmetric:
        return "floating-point values have no zero points"
    reason = _misfit(scale, scheme, rows, columns, _FLOATS | _POWERS if floats else _FLOATS)
    if reason is None and zero is not None and (zero.dtype, zero.shape) != ("I8", scale.shape):
        reason = f"zero points are {zero.dtype} {list(zero.shape)}"
    if reason is not None:
        return reason
    parts = {"weight": "", "weight_scale": "scale"} | ({"weight_zero_point": "zero"} if zero is not None else {})
    return Fp8(scheme.shared) if floats else Int8(scheme.shared, scheme.symmetric), parts


def _fit_words(module: Module, packed: TensorEntry, scheme: Scheme) -> _Fitted:
    """Whole numbers in words of 32 bits: pack-quantized."""
    rows, words = packed.shape
    scale, zero = module.tensors["weight_scale"], module.tensors.get("weight_zero_point")
    if scheme.kind != "int" or scheme.strategy == "block":
        return "values are packed whole numbers"
    shape = module.tensors.get("weight_shape")
    if shape is None or shape.shape != (2,):
        return "weight_shape is missing"
    columns = scale.shape[-1] * scheme.group if scheme.group and scale.shape else words * 32 // scheme.bits
    if words != math.ceil(columns * scheme.bits / 32):
        return (
            f"{columns} columns of {scheme.bits} bits make {math.ceil(columns * scheme.bits / 32)} words, not {words}"
        )
    reason = _misfit(scale, scheme, rows, columns, _FLOATS)
    if reason is None and zero is not None:
        wanted = ("I32", (math.ceil(rows * scheme.bits / 32), scale.shape[-1]))
        if (zero.dtype, zero.shape) != wanted or scheme.strategy == "tensor":
            reason = f"zero points are {zero.dtype} {list(zero.shape)}, not {wanted[0]} {list(wanted[1])}"
    if reason is not None:
        return reason
    parts = {"weight_packed": "packed", "weight_scale": "scale", "weight_shape": "shape"}
    return PackedIntegers(scheme.bits, scheme.group, scheme.symmetric), parts | (
        {"weight_zero_point": "zero"} if zero is not None else {}
    )


def _fit_floats(module: Module, packed: TensorEntry, scheme: Scheme) -> _Fitted:
    """Two E2M1 values a byte: nvfp4-pack-quantized and mxfp4-pack-quantized."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    scale, whole = module.tensors["weight_scale"], module.tensors.get("weight_global_scale")
    if (scheme.kind, scheme.bits) != ("float", 4) or scheme.group not in (GROUP, NV_GROUP):
        return "values are two a byte"
    reason = _misfit(scale, scheme, rows, columns, _E4M3 if scheme.group == NV_GROUP else _POWERS)
    if reason is None and (whole is not None) != (scheme.group == NV_GROUP):
        reason = "there is a weight_global_scale" if whole else "there is no weight_global_scale"
    if reason is None and whole is not None and (whole.dtype != "F32" or math.prod(whole.shape) != 1):
        reason = f"weight_global_scale is {whole.dtype} {list(whole.shape)}"
    if reason is not None:
        return reason
    parts = {"weight_packed": "packed", "weight_scale": "scale"}
    return (Fp4(), parts) if whole is None else (Nvfp4(), parts | {"weight_global_scale": "global_scale"})


def _misfit(scale: TensorEntry, scheme: Scheme, rows: int, columns: int, dtypes: frozenset[str]) -> str | None:
    """Why the scales are not those of a matrix (rows, columns) by the scheme."""
    if scheme.group and columns % scheme.group:
        return f"its {columns} columns are no whole groups"
    wanted = scales_shape(scheme.shared, rows, columns)
    fits = scale.shape == wanted
    if scheme.strategy == "tensor":
        fits, wanted = math.prod(scale.shape) == 1, (1, 1)
    elif scheme.strategy == "channel":
        fits = scale.shape in (wanted, (rows,))
    if fits and scale.dtype in dtypes:
        return None
    return f"scales are {scale.dtype} {list(scale.shape)}, not {'/'.join(sorted(dtypes))} {list(wanted)}"
