"""What transformers loads of quantized weights where that is more than lies on the disk. No torch."""

from __future__ import annotations

from dataclasses import replace

from streamprune.fit.estimate import Estimate
from streamprune.hardware.memory import format_bytes
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.quantize.schemes import SCHEMES, scheme_of

#: What happens on loading, by `quant_method`, in transformers 5.17 to 5.23: `validate_environment` of its quantizers,
#: and for compressed-tensors the conversion to experts in one tensor, which has no quantized form.
_LOADING = {
    "mxfp4": "transformers keeps weights in MXFP4 only on a GPU of compute capability 7.5 or above (or an XPU), with "
    "triton 3.4 or later and the package `kernels`. Otherwise it decodes them, to {decoded}.",
    **dict.fromkeys(
        ("fp8", "mxfp8"),
        "transformers keeps weights in FP8 only on a GPU of compute capability 8.9 or above (or an XPU). Otherwise it "
        "decodes them, to {decoded}.",
    ),
    "compressed-tensors": "transformers decodes these weights, experts while it loads them and the rest when it first "
    "runs, to {decoded}. vLLM keeps them as stored.",
}


def decoded_bytes(estimate: Estimate) -> int | None:
    """Bytes of the weights if all quantized ones are decoded to the model's dtype; None if they are not quantized, or
    in a format that is not known here."""
    footprint, use = estimate.footprint, estimate.use
    if use.weights in SCHEMES:
        plain = footprint.forms.sizes("bf16", use.width) if footprint.forms is not None else None
        kept = footprint.weights.count if use.keep is None else use.keep
        if plain is not None and use.total is not None:
            return sum(plain.bytes_by_category(use.total / max(1, plain.expert_layers)).values())
        return sum(plain.bytes_by_category(kept).values()) if plain is not None else None
    if not footprint.weights.formats:
        return None
    weights = footprint.weights.decoded(footprint.itemsize)
    return Estimate(replace(footprint, weights=weights), replace(use, weights="source")).weights_bytes


def loading_note(estimate: Estimate) -> str | None:
    """What transformers loads where that differs from the stored weights; None where nothing is known of it."""
    weights, method = estimate.use.weights, estimate.footprint.quantization
    if weights in SCHEMES:
        method = scheme_of(weights).method
    if weights in GGUF_TYPES:
        return None
    text, decoded = _LOADING.get(method), decoded_bytes(estimate)
    if text is None or decoded is None or weights == "bf16":
        return None
    return text.format(decoded=format_bytes(decoded))
