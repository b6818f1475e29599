"""The ways in which quantized models are published: which weights are packed how, and what config.json says of it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tests import compressed, packers
from tests.packers import Packed

#: Published formats quantize these, and leave routers, norms, embeddings and the head as they are.
LINEAR = r"(_proj|\.w[123]|kv_a_proj_with_mqa)\.weight$"
EXPERT = r"\.experts\.\d+\..*\.weight$"
ATTENTION = r"\.self_attn\..*_proj(_with_mqa)?\.weight$"
FUSED = r"\.experts\.(gate_up|down)_proj$"

#: From a plain tensor's name and values to what is stored: tensors by their names in the module, and the plain values
#: that these mean. None: it stays as it is.
Pack = Callable[[str, torch.Tensor], Packed | None]


@dataclass(frozen=True)
class Scheme:
    """A way to publish a quantized model.

    `section` makes the `quantization_config` from the names of the modules that stay plain. `outer` is what else
    config.json says of it, `beside` the name of a file that repeats the section.
    """

    pack: Pack
    section: Callable[[list[str]], dict[str, Any]]
    outer: Mapping[str, Any] = field(default_factory=dict)
    beside: str | None = None
    #: How the plain model is saved, where that matters.
    save: Mapping[str, Any] = field(default_factory=dict)


def _each(*rules: tuple[str, Callable[..., Packed]]) -> Pack:
    """Weights by the first pattern that their name matches."""

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        for pattern, packer in rules:
            if re.search(pattern, name):
                seeded = isinstance(packer, partial) and packer.keywords.get("g_idx") == "shuffled"
                return packer(weight, seed=zlib.crc32(name.encode())) if seeded else packer(weight)
        return None

    return pack


def _per_tensor(
    weight: torch.Tensor, shape: tuple[int, ...], scale: str = "weight_scale", activation: str = "input_scale"
) -> Packed:
    """FP8 with one scale, and one for activations, which changes nothing of the weight."""
    rows, columns = weight.shape
    packed = packers.fp8(weight, (rows, columns), scale_name=scale, scale_shape=shape)
    return replace(packed, parts={**packed.parts, activation: torch.full(shape, 0.02)})


def _deepseek_v4_expert(weight: torch.Tensor) -> Packed:
    codes, exponents, values = packers.fp4(weight)
    return Packed({"weight": codes.view(torch.int8), "scale": exponents.view(torch.float8_e8m0fnu)}, values)


def _mxfp4(name: str, weight: torch.Tensor) -> Packed | None:
    """gpt-oss: experts (E, in, out) in one tensor, stored as (E, out, in / 32, 16) bytes of codes, and exponents."""
    if not re.search(FUSED, name):
        return None
    experts = [packers.fp4(expert.T) for expert in weight]
    leaf = name.rpartition(".")[2]
    blocks = torch.stack([codes.view(len(codes), -1, 16) for codes, _, _ in experts])
    parts = {f"{leaf}_blocks": blocks, f"{leaf}_scales": torch.stack([exponents for _, exponents, _ in experts])}
    return Packed(parts, torch.stack([values.T for _, _, values in experts]).contiguous())


def _fused_fp8(name: str, weight: torch.Tensor) -> Packed | None:
    """Experts (E, out, in) in one tensor, as transformers saves FP8 models of some families; attention as usual."""
    if not re.search(FUSED, name):
        return packers.fp8(weight, (32, 32)) if re.search(ATTENTION, name) else None
    experts = [packers.fp8(expert, (32, 32)) for expert in weight]
    leaf = name.rpartition(".")[2]
    codes, scales = (torch.stack([each.parts[part] for each in experts]) for part in ("weight", "weight_scale_inv"))
    return Packed({leaf: codes, f"{leaf}_scale_inv": scales}, torch.stack([each.values for each in experts]))


def _fp8(block: tuple[int, int] | None, **more: Any) -> Callable[[list[str]], dict[str, Any]]:
    """As in Qwen's FP8 releases: a list of hundreds of names."""
    shape = list(block) if block else None
    return lambda plain: {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": shape, **more,
        "modules_to_not_convert": plain,
    }  # fmt: skip


def _some_positive(weight: torch.Tensor) -> Packed:
    """GPTQ of a weight with rows that have no negative value, so that their zero points are 0."""
    rows = torch.arange(len(weight))[:, None]
    return packers.gptq(torch.where(rows % 3 == 0, weight.abs(), weight), symmetric=False)


def _linear(plain: list[str]) -> list[str]:
    return [name for name in plain if not re.search(r"norm$|embed_tokens$", name)]


def _compressed(
    *groups: tuple[str, str, Any], ignore: list[str] | None = None, stated: bool = True, outer: Mapping[str, Any] = {}
) -> Scheme:
    """A scheme of compressed-tensors: for each group the pattern of its weights, its format and its scheme."""
    rules = [(pattern, partial(compressed.compressed, format=form, scheme=scheme)) for pattern, form, scheme in groups]
    named = {f"group_{number}": (form, scheme) for number, (_, form, scheme) in enumerate(groups)}
    return Scheme(_each(*rules), lambda plain: compressed.section(named, ignore or _linear(plain), stated), outer)


def _gptq(
    rules: tuple[tuple[str, Callable[..., Packed]], ...] = (), dynamic: Mapping[str, Any] = {}, **options: Any
) -> Scheme:
    """GPTQ with these options for all weights; those that match one of the `rules` have a packer of their own."""
    symmetric, version = options.get("symmetric", True), options.get("version", 1)

    def section(plain: list[str]) -> dict[str, Any]:
        return {
            "bits": options.get("bits", 4), "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            "desc_act": options.get("g_idx") == "shuffled",
            "dynamic": {"-:.*layers\\.\\d+\\.mlp\\.gate$": {}, **dynamic},
            "group_size": options.get("group", 32), "lm_head": False,
            "meta": {"damp_percent": 0.05, "quantizer": ["gptqmodel:4.0.0"], "true_sequential": True},
            "quant_method": "gptq", "sym": symmetric, "true_sequential": True,
        }  # fmt: skip

    return Scheme(_each(*rules, (LINEAR, partial(packers.gptq, **options))), section, beside="quantize_config.json")


def _autoround(
    packing: str,
    packer: Callable[..., Packed],
    rules: tuple[tuple[str, Callable[..., Packed]], ...] = (),
    extra: Mapping[str, Any] = {},
    symmetric: bool = True,
) -> Scheme:
    """AutoRound: names of what is not quantized are keys, and the section lies beside under a name of its own.

    Weights that match one of the `rules` have a packer of their own, of which `extra` tells.
    """

    def section(plain: list[str]) -> dict[str, Any]:
        return {
            "autoround_version": "0.16.1", "batch_size": 8, "bits": 4, "block_name_to_quantize": "model.layers",
            "data_type": "int",
            "extra_config": {**{name: {"bits": 16, "data_type": "fp"} for name in _linear(plain)}, **extra},
            "group_size": 32, "iters": 200, "packing_format": packing, "quant_method": "auto-round", "sym": symmetric,
        }  # fmt: skip

    return Scheme(_each(*rules, (LINEAR, packer)), section, beside="quantization_config.json")


_W4 = compressed.scheme_of("W4A16", group_size=32)
_E8M0, _BF16 = torch.float8_e8m0fnu, torch.bfloat16
_KIMI = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
_QK, _VO = ("re:.*self_attn\\.(q|k)_proj$",), ("re:.*self_attn\\.(v|o)_proj$",)
_EXPERTS = ("re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$",)

SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme(_each((LINEAR, partial(packers.fp8, block=(32, 32)))), _fp8((32, 32))),
    "fp8-16": Scheme(_each((LINEAR, partial(packers.fp8, block=(16, 16)))), _fp8((16, 16))),
    "fp8-128": Scheme(_each((LINEAR, partial(packers.fp8, block=(128, 128)))), _fp8((128, 128))),
    "fp8-bf16-scales": Scheme(_each((LINEAR, partial(packers.fp8, block=(32, 32), scale_dtype=_BF16))), _fp8((32, 32))),
    "fp8-e8m0-scales": Scheme(
        _each((LINEAR, partial(packers.fp8, block=(32, 32), scale_dtype=_E8M0))), _fp8((32, 32), scale_fmt="ue8m0")
    ),
    "fp8-u8-scales": Scheme(
        _each((LINEAR, partial(packers.fp8, block=(32, 32), scale_dtype=torch.uint8))),
        _fp8((32, 32), scale_fmt="ue8m0"),
    ),
    "fp8-static": Scheme(
        _each((LINEAR, partial(_per_tensor, shape=(), scale="weight_scale_inv", activation="activation_scale"))),
        _fp8(None, activation_scheme="static"),
    ),
    "fp8-tensor": Scheme(_each((LINEAR, partial(_per_tensor, shape=()))), _fp8(None, activation_scheme="static")),
    "fp8-tensor-1": Scheme(_each((LINEAR, partial(_per_tensor, shape=(1,)))), _fp8(None, activation_scheme="static")),
    "fp8-channel": Scheme(
        _each((LINEAR, lambda weight: packers.fp8(weight, (1, weight.shape[1]), scale_name="weight_scale"))), _fp8(None)
    ),
    "fp8-fused": Scheme(_fused_fp8, _fp8((32, 32)), save={"save_original_format": False}),
    "deepseek-v4": Scheme(
        _each(
            (EXPERT, _deepseek_v4_expert),
            (LINEAR, partial(packers.fp8, block=(32, 32), scale_dtype=_E8M0, scale_name="scale")),
        ),
        lambda plain: {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [32, 32],
        },
        {"expert_dtype": "fp4"},
    ),
    "mxfp8": Scheme(
        _each((LINEAR, partial(packers.fp8, block=(1, 32), scale_dtype=torch.uint8))),
        lambda plain: {
            "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "mxfp8",
            "weight_block_size": [1, 32], "ignored_layers": ["gate", "e_score_correction_bias", "lm_head"],
        },
    ),
    "mxfp4": Scheme(
        _mxfp4,
        lambda plain: {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    ),
    "ct-fp8-channel": _compressed((LINEAR, "float-quantized", compressed.scheme_of("FP8_DYNAMIC"))),
    "ct-fp8-tensor": _compressed((LINEAR, "float-quantized", compressed.scheme_of("FP8"))),
    "ct-fp8-block": _compressed(
        (LINEAR, "float-quantized", compressed.scheme_of("FP8_BLOCK", block_structure=[32, 32]))
    ),
    "ct-w4": _compressed((LINEAR, "pack-quantized", _W4)),
    "ct-w4-g128": _compressed((LINEAR, "pack-quantized", compressed.scheme_of("W4A16")), stated=False),
    "ct-w4-asymmetric": _compressed((LINEAR, "pack-quantized", compressed.scheme_of("W4A16_ASYM", group_size=32))),
    "ct-w8": _compressed((LINEAR, "pack-quantized", compressed.scheme_of("W8A16", group_size=32))),
    "ct-nvfp4": _compressed((LINEAR, "nvfp4-pack-quantized", compressed.scheme_of("NVFP4"))),
    "ct-nvfp4a16": _compressed((LINEAR, "nvfp4-pack-quantized", compressed.scheme_of("NVFP4A16"))),
    "ct-mxfp4": _compressed((LINEAR, "mxfp4-pack-quantized", compressed.scheme_of("MXFP4A16"))),
    "ct-int8": _compressed((LINEAR, "int-quantized", compressed.scheme_of("W8A8"))),
    "ct-two-bits": _compressed(
        (r"self_attn\.[qk]_proj\.weight$", "pack-quantized", compressed.scheme_of("W8A16", _QK, group_size=32)),
        (LINEAR, "pack-quantized", compressed.scheme_of("W4A16", (*_VO, *_EXPERTS), group_size=32)),
    ),
    "ct-fp8-w4": _compressed(
        (ATTENTION, "float-quantized", compressed.scheme_of("FP8_DYNAMIC", ("re:.*self_attn.*",))),
        (EXPERT, "pack-quantized", compressed.scheme_of("W4A16", _EXPERTS, group_size=32)),
    ),
    "ct-w4-channel": _compressed(
        (LINEAR, "pack-quantized", compressed.scheme_of("W4A16", strategy="channel", group_size=None))
    ),
    "ct-w3": _compressed((LINEAR, "pack-quantized", compressed.scheme_of("W3A16", group_size=32))),
    "ct-w4-everywhere": _compressed((
        r"(_proj|lm_head|embed_tokens)\.weight$", "pack-quantized",
        compressed.scheme_of("W4A16", ("Linear", "Embedding"), group_size=32),
    )),
    "ct-mxfp8": _compressed((LINEAR, "mxfp8-quantized", compressed.scheme_of("MXFP8A16"))),
    "kimi-k2": _compressed((EXPERT, "pack-quantized", _W4), ignore=_KIMI, stated=False),
    "gptq": _gptq(),
    "gptq-asymmetric": _gptq(symmetric=False),
    "gptq-v2": _gptq(symmetric=False, version=2),
    "gptq-8": _gptq(bits=8),
    "gptq-no-g_idx": _gptq(g_idx="none"),
    "gptq-act-order": _gptq(g_idx="shuffled", symmetric=False),
    "gptq-zero": _gptq(((LINEAR, _some_positive),), symmetric=False),
    "gptq-2": _gptq(bits=2, symmetric=False),
    "gptq-one-group": _gptq(group=-1),
    "gptq-dynamic": _gptq(
        ((ATTENTION, partial(packers.gptq, bits=8)),), {"+:.*self_attn\\..*": {"bits": 8, "group_size": 32}}
    ),
    "awq": Scheme(
        _each((LINEAR, packers.awq)),
        lambda plain: {
            "bits": 4, "group_size": 32, "modules_to_not_convert": ["gate"], "quant_method": "awq", "version": "gemm",
            "zero_point": True,
        },
    ),
    "autoround": _autoround("auto_round:auto_gptq", partial(packers.gptq, g_idx="none")),
    "autoround-awq": _autoround("auto_round:auto_awq", packers.awq, symmetric=False),
    "autoround-8": _autoround(
        "auto_round:gptqmodel", partial(packers.gptq, g_idx="none", version=2),
        ((ATTENTION, partial(packers.gptq, g_idx="none", version=2, bits=8)),), {".*self_attn.*": {"bits": 8}},
    ),
    "autoround-raw": _autoround(
        "auto_round", partial(packers.gptq, g_idx="none", symmetric=False, version=2), symmetric=False
    ),
}  # fmt: skip
