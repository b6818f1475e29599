"""Within `decoded`, vLLM loads a quantized model as it always does, but computes with decoded weights.

vLLM's kernels for quantized experts need hardware that is not at hand everywhere (on CPUs: AMX). What comes before is
done by vLLM's own code: it reads config.json, decides which module has which scheme, makes the parameters, joins
projections, and puts the checkpoint's tensors in their places. Only then each quantized module gets plain weights, by
the arithmetic of this file, and vLLM's method for plain ones.

Written for vLLM 0.32. Runs in its environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

_QUANTIZATION = "vllm.model_executor.layers.quantization"
_SCHEMES = f"{_QUANTIZATION}.compressed_tensors.schemes"
_EXPERTS = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe"
#: Where kernels are chosen, which fails without hardware for them.
_FP8_LINEAR = (f"{_QUANTIZATION}.fp8", f"{_SCHEMES}.compressed_tensors_w8a8_fp8")
_FP8_EXPERTS = (f"{_QUANTIZATION}.fp8", f"{_EXPERTS}.compressed_tensors_moe_w8a8_fp8")


class _NoKernel:
    """Stands for the kernel of a linear layer, which is never called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def input_quant_key(self) -> None:
        """The inputs are not quantized."""


@contextmanager
def decoded() -> Iterator[None]:
    """Within the context vLLM computes with decoded weights."""
    import torch
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.model_loader import base_loader

    usual = base_loader.process_weights_after_loading

    def process(model: Any, *rest: Any) -> None:
        changed = [name for name, module in model.named_modules() if _decode(module)]
        print(f"decoded: {' '.join(changed)}", flush=True)
        assert changed, "vLLM made no quantized module of a quantized model"
        usual(model, *rest)

    patches = [patch.object(base_loader, "process_weights_after_loading", process)]
    # Its kernels for FP8 take none but 16 bits, which decoded weights need not.
    patches += [patch.object(Fp8Config, "get_supported_act_dtypes", lambda *_: [torch.float32])]
    patches += [patch(f"{module}.init_fp8_linear_kernel", _NoKernel) for module in _FP8_LINEAR]
    patches += [
        patch(f"{module}.select_fp8_moe_backend", lambda **_: (Fp8MoeBackend.CPU, None)) for module in _FP8_EXPERTS
    ]
    patches += [
        patch(f"{_SCHEMES}.compressed_tensors_wNa16.choose_mp_linear_kernel", lambda *_: _NoKernel),
        patch(
            f"{_EXPERTS}.compressed_tensors_moe_wna16.select_wna16_moe_backend",
            lambda **_: (WNA16MoEBackend.CPU, None),
        ),
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def _decode(module: Any) -> bool:
    """Turn a quantized module into a plain one; whether it was one."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    names = {name for name, _ in module.named_parameters(recurse=False)}
    found = False
    for stem in ("weight", "w13_weight", "w2_weight"):
        parts = {name.removeprefix(stem): getattr(module, name).data for name in names if name.startswith(stem)}
        scale = next((parts[part] for part in ("_scale", "_scale_inv") if part in parts), None)
        if scale is None:
            continue
        found = True
        values = _values(parts, scale, blocks="_scale_inv" in parts)
        for part in parts:
            delattr(module, stem + part)
        module.register_parameter(stem, _parameter(values))
    if found:
        routed = "w2_weight" in names or "w2_weight_packed" in names
        module.quant_method = UnquantizedFusedMoEMethod(module.moe_config) if routed else UnquantizedLinearMethod()
    return found


def _parameter(values: Any) -> Any:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)


def _values(parts: dict[str, Any], scale: Any, *, blocks: bool) -> Any:
    """Codes (..., out, in) times scales, float32: in blocks of 128 x 128, or for equal groups of columns in a row."""
    if "_packed" in parts:
        # As many codes in an int32 as fit, the first in its lowest bits, offset by half of their range.
        packed = parts["_packed"]
        bits = _bits(parts)
        shifts = packed.new_tensor(range(0, 32, bits))
        codes = ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2) - (1 << (bits - 1))
    else:
        codes = parts[""]
    codes = codes.float()
    high, wide = (128, 128) if blocks else (1, codes.shape[-1] // scale.shape[-1])
    spread = scale.float().repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return codes * spread[..., : codes.shape[-2], : codes.shape[-1]]


def _bits(parts: dict[str, Any]) -> int:
    """Bits of a code, from the number of columns that the checkpoint states."""
    columns = int(parts["_shape"].reshape(-1, 2)[0, 1])
    return int(32 * parts["_packed"].shape[-1] // columns)
