"""In words: how much of a model is removed, what is known to happen then, and what would lose less. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.nearest import other_formats
from streamprune.quantize.gguf_types import GGUF_TYPES

#: Up to which share removed of the experts' weights what is usual. The paper has results at 25 % and 50 %; beyond 65 %
#: nothing is published that holds up, and on this project's small models the loss grows fastest there
#: (tools/README.md, what pruning costs).
_USUAL = (
    (0.30, "at about 25 % models usually lose little"),
    (
        0.65,
        "around 50 % the loss is noticeable and depends on the model and the text: almost none on code for models such "
        "as Qwen3-Coder-480B, more for small ones",
    ),
    (1.00, "beyond 65 % expect breakage, such as loops and lost abilities; published results are for 25 % and 50 %"),
)
_PAPER = "arXiv:2510.13999"


def share_removed(estimate: Estimate) -> float:
    """The share of the experts' weights that is removed, from 0 to 1; 0 without experts."""
    weights, use = estimate.footprint.weights, estimate.use
    if not weights.count or weights.counts is not None:
        return 0.0
    layers = weights.sizes().expert_layers
    kept = estimate.total_experts / (weights.count * layers) if layers else 1.0
    full = estimate.footprint.width or estimate.footprint.shape.expert
    return 1 - kept * (min(1.0, use.width / full) if use.width is not None and full else 1.0)


def verdict(share: float) -> str | None:
    """What is known to happen where this share of the experts' weights is removed; None where nothing is."""
    if share <= 0:
        return None
    usual = next(text for most, text in _USUAL if share <= most)
    return f"{share:.0%} of the experts' weights are removed: {usual} ({_PAPER})."


def verdict_lines(estimate: Estimate) -> Iterator[str]:
    """`verdict` of an estimate, and what would lose less in the same memory: its budget, or else what it takes."""
    said = verdict(share_removed(estimate))
    if said is None:
        return
    yield f"{said} Measure yours with --evaluate."
    budget = estimate.budget if isinstance(estimate, Fit) else estimate.total
    ways = []
    formats = other_formats(Fit(estimate.footprint, estimate.use, budget))
    if formats is not None:
        ways.append(formats)
    if estimate.use.width is None and _can_be_narrower(estimate.footprint):
        ways.append(
            "narrower experts with a refit (`run --by channels --refit`) lose less than fewer ones in our tests"
        )
    if ways:
        # (What llama.cpp makes of a candidate it does not measure.)
        measured = "" if estimate.use.weights in GGUF_TYPES else " `run --best` measures them."
        yield f"What may lose less in the same memory: {'; '.join(ways)}.{measured}"


def _can_be_narrower(footprint: Footprint) -> bool:
    if footprint.quantization:
        return False
    known = footprint.forms is not None and footprint.why_not("source", 1) is None
    return footprint.width is not None or known
