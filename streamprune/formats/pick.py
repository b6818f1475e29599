"""Which format each tensor of a checkpoint is stored in. Checkpoints in a format that is not supported are refused."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats import auto_round, awq, compressed_tensors, fp4, fp8, gptq, mxfp4
from streamprune.formats.awq import Awq
from streamprune.formats.base import WAY_OUT, Format, StoredTensor
from streamprune.formats.fp4 import Fp4, Nvfp4
from streamprune.formats.fp8 import Fp8
from streamprune.formats.gptq import Gptq
from streamprune.formats.integers import Int8, PackedIntegers
from streamprune.formats.mxfp4 import Mxfp4
from streamprune.formats.plain import PLAIN
from streamprune.formats.quantization import Module, Quantization, Recognized

#: Each takes the tensors of a module that are stored in its format, if there are some. Asked in this order.
RECOGNIZERS: tuple[Callable[[Module, Quantization], Recognized | None], ...] = (
    compressed_tensors.recognize,
    gptq.recognize,
    awq.recognize,
    fp8.recognize,
    fp4.recognize,
    mxfp4.recognize,
)
#: Each tells from the config alone whether the weight of a module is stored in its format. Asked in this order: experts
#: in FP4 belong to the method fp8.
STATED: tuple[Callable[[str, Quantization], Format | None], ...] = (
    compressed_tensors.stated,
    gptq.stated,
    awq.stated,
    fp4.stated,
    fp8.stated,
    mxfp4.stated,
)
#: Each tells by the config alone why weights in its format cannot be read, if so.
UNSUPPORTED: tuple[Callable[[Quantization], str | None], ...] = (
    compressed_tensors.unsupported,
    gptq.unsupported,
    awq.unsupported,
    auto_round.unsupported,
)
#: Values of `quant_method` for what the recognizers read.
METHODS = frozenset().union(*(each.METHODS for each in (auto_round, awq, compressed_tensors, fp8, gptq, mxfp4)))

#: Values of `quant_method` of checkpoints that have weights in a format.
METHODS_OF: Mapping[type[Format], frozenset[str]] = {
    Fp8: fp8.METHODS | compressed_tensors.METHODS | auto_round.METHODS,
    Fp4: fp8.METHODS | compressed_tensors.METHODS | auto_round.METHODS,
    Mxfp4: mxfp4.METHODS,
    Nvfp4: compressed_tensors.METHODS | auto_round.METHODS,
    Int8: compressed_tensors.METHODS,
    PackedIntegers: compressed_tensors.METHODS,
    Gptq: gptq.METHODS | auto_round.METHODS,
    Awq: awq.METHODS | auto_round.METHODS,
}

_FLOATS = {"BF16", "F16", "F32", "F64"}
_QUANTIZATION_NAME = re.compile(
    r"(scales?|scale_inv|scale_2|scale_ub|qscale_\w+|zero_points?|qweight|qzeros|g_idx|packed|weight_shape|blocks|absmax|"
    r"quant_map|quant_state[\w.]*)$"
)
#: Scales for quantized caches, which programs use only if asked to; they change no weight.
_OF_CACHES = re.compile(r"(^|\.)(q|k|v|kv)_scale$")
#: Why a method is refused.
_REFUSED = {
    "bitsandbytes": "no program loads cut bitsandbytes weights of experts: transformers 5 keeps experts in 16 bits",
    "modelopt": "transformers does not load it, so what its tensors mean could not be checked",
    "hqq": "its weights are pickled objects rather than tensors of a known layout",
    "torchao": "its weights are serialized tensor subclasses rather than tensors of a known layout",
}


def pick_formats(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """How every tensor of a checkpoint is stored, by its name; decided module by module.

    `config` is the checkpoint's config.json, which says what tensors cannot: block sizes, bits. Raises
    UnsupportedModelError for tensors that look like those of a format, but are not.
    """
    stated = Quantization.of(config)
    _refuse(stated)
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        path, _, leaf = name.rpartition(".")
        modules[path][leaf] = entry
    stored: dict[str, StoredTensor] = {}
    for path, members in modules.items():
        module = Module(path, members)
        for leaf, (plain, part, storage) in _parts_of(module, stated).items():
            stored[module.of(leaf)] = StoredTensor(module.of(plain), part, storage)
    return {name: stored[name] for name in tensors}


def _parts_of(module: Module, stated: Quantization) -> dict[str, tuple[str, str, Format]]:
    """For each tensor of a module the plain name of its parameter in the module, the part's name, and the format."""
    found: dict[str, tuple[str, str, Format]] = {}
    rest = dict(module.tensors)
    if not all(entry.dtype in _FLOATS and not _QUANTIZATION_NAME.search(leaf) for leaf, entry in rest.items()):
        for recognize in RECOGNIZERS:
            recognized = recognize(Module(module.path, rest), stated) if rest else None
            if recognized is not None:
                found |= {leaf: (*part, recognized.format) for leaf, part in recognized.parts.items()}
                rest = {leaf: entry for leaf, entry in rest.items() if leaf not in found}
    return found | {leaf: (leaf, "", PLAIN) for leaf in rest}


def stated_format(path: str, config: Mapping[str, Any]) -> Format | None:
    """The format in which, by the config.json alone, the weight of a Linear module or of joined experts is stored.

    `path` is the module's in the checkpoint; of experts in one tensor that of the module which holds it (`...experts`).
    None if the weight is plain, or the method is none of METHODS. Which modules are Linear, and what the model itself
    keeps in float32, the caller knows: embeddings, norms and most routers are never quantized, and not always listed.
    Raises UnsupportedModelError if the config contradicts itself, or describes what is not read here.
    """
    quantization = Quantization.of(config)
    _refuse(quantization)
    return next((found for each in STATED if (found := each(path, quantization)) is not None), None)


def format_names(tensors: Mapping[str, TensorEntry], stored: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """The formats of the quantized tensors, for people; first the one that most bytes are stored in."""
    sizes: dict[str, int] = defaultdict(int)
    for name, each in stored.items():
        if each.format is not PLAIN:
            sizes[each.format.name] += tensors[name].nbytes
    return tuple(sorted(sizes, key=lambda name: (-sizes[name], name)))


def storage_text(formats: Sequence[str], decoded: bool, new: str = "") -> str:
    """How an output stores what its source has in these formats, for people; empty if both are plain.

    `new` is the format that the output is quantized to, if it is.
    """
    text = " and ".join(formats)
    if new:
        return f"quantized to {new}{f' from {text}' if text else ''}"
    if not formats:
        return ""
    return f"bfloat16, decoded from {text}" if decoded else f"{text}, as in the source"


def refuse_unread(
    entry: TensorEntry, stored: StoredTensor, feeds_floats: bool | None, used: Collection[str] | None = None
) -> None:
    """Raise UnsupportedModelError for a tensor of quantized weights that belongs to no format.

    `feeds_floats` says whether the tensor feeds a floating-point parameter; None if the model ignores it. A companion
    that nothing reads must be fatal: transformers would silently load wrong weights. With `used`, the names of what
    the model uses and of the modules it is in, that of weights which the model ignores as well (a tower's scale) is
    none.
    """
    if stored.format is not PLAIN:
        return
    what = None
    ignored = feeds_floats is None and used is not None and not _is_beside(entry.name, used)
    named = _QUANTIZATION_NAME.search(entry.name) and not _OF_CACHES.search(entry.name)
    if feeds_floats is None and named and not ignored:
        what = f"{entry.name} ({entry.dtype} {list(entry.shape)}) belongs to quantized weights"
    elif feeds_floats and entry.dtype not in _FLOATS:
        what = f"{entry.name} has the dtype {entry.dtype} {list(entry.shape)}"
    if what is not None:
        alone = "; a scale of it would have another name, or is missing" if entry.dtype.startswith("F8_E") else ""
        raise UnsupportedModelError(
            f"The checkpoint is quantized: {what}, in no format that is known here{alone}. {WAY_OUT}"
        )


def _is_beside(name: str, used: Collection[str]) -> bool:
    """Whether a tensor lies in a module of `used` tensors, or is called like one (`experts.up_proj_scale`)."""
    return name.rpartition(".")[0] in used or _QUANTIZATION_NAME.sub("", name).rstrip("._") in used


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UnsupportedModelError for a checkpoint whose config says that its weights are in a format not read here."""
    if is_read(config):
        return
    stated = Quantization.of(config)
    raise UnsupportedModelError(
        f"The model in {folder} is quantized ({stated.method}), which is not supported: "
        f"{_unsupported(stated) or 'this format is not known here'}. {WAY_OUT}"
    )


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether the weights are plain, or in a format that is read here, as far as the config tells."""
    stated = Quantization.of(config)
    return not stated.method or (stated.method in METHODS and _unsupported(stated) is None)


def _refuse(stated: Quantization) -> None:
    """Raise UnsupportedModelError if a method that is read here is stated in a way that is not."""
    reason = _unsupported(stated) if stated.method in METHODS else None
    if reason is not None:
        raise UnsupportedModelError(f"config.json says that the model is quantized ({stated.method}), but {reason}.")


def _unsupported(stated: Quantization) -> str | None:
    """Why the weights are not read, as far as the config tells."""
    found = (each(stated) for each in UNSUPPORTED)
    reason = next((text for text in found if text is not None), None)
    return reason or next((text for name, text in _REFUSED.items() if stated.method.startswith(name)), None)


def check_stated(
    config: Mapping[str, Any], used: Iterable[StoredTensor], stored: Iterable[StoredTensor], folder: Path
) -> None:
    """Raise CheckpointError if the config calls the weights quantized, and no tensor is, or the other way round, or if
    it names a method that does not store them so: programs go by it, and would load something else. `used` are
    those of the `stored` tensors that the model uses."""
    stated = Quantization.of(config)
    found = {each.format for each in used} - {PLAIN}
    formats = {each.name for each in found}
    if stated.method and not formats and all(each.format is PLAIN for each in stored):
        raise CheckpointError(
            f"{folder}/config.json says that the weights are quantized ({stated.method}), but no tensor is. Was it "
            f"dequantized? Then remove {'.'.join(stated.path)} from config.json."
        )
    if formats and not stated.method:
        raise CheckpointError(
            f"{folder} has weights stored as {min(formats)}, but its config.json says nothing of it, so no program "
            "would load them. Add the model's quantization_config (it may lie beside, in quantize_config.json)."
        )
    others = {each.name for each in found if stated.method not in METHODS_OF.get(type(each), {stated.method})}
    if others:
        raise CheckpointError(
            f"{folder} has weights stored as {min(others)}, but its config.json says that they are quantized by "
            f"{stated.method}, which stores them in another way. Compare config.json with the original's."
        )
