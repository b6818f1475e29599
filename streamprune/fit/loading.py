"""What transformers loads of quantized weights where that is more than lies on the disk. No torch."""

from __future__ import annotations

from dataclasses import replace

from streamprune.fit.estimate import Estimate
from streamprune.hardware.memory import format_bytes

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
    footprint = estimate.footprint
    if not footprint.weights.formats:
        return None
    weights = footprint.weights.decoded(footprint.itemsize)
    use = replace(estimate.use, weights_dtype="source")
    return Estimate(replace(footprint, weights=weights), use).weights_bytes


def loading_note(estimate: Estimate) -> str | None:
    """What transformers loads where that differs from the stored weights; None where nothing is known of it."""
    text, decoded = _LOADING.get(estimate.footprint.quantization), decoded_bytes(estimate)
    if text is None or decoded is None or estimate.use.weights_dtype != "source":
        return None
    return text.format(decoded=format_bytes(decoded))
