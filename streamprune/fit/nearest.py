"""What else would fit: the smallest changes to settings that do not fit, and other formats of the weights. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from streamprune.fit.estimate import Fit
from streamprune.hardware.gpus import GPUS
from streamprune.hardware.memory import GIB
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.quantize.schemes import SCHEMES, scheme_of

#: The schemes that stand for their number of bits where settings are suggested or compared; others of as many bits take
#: about as much.
COMPARED = ("fp8", "w4a16")


@dataclass(frozen=True)
class Option:
    """Settings that fit: what to add to the command, and in words what it means."""

    settings: str
    meaning: str


def nearest(fit: Fit) -> list[Option]:
    """For a model that does not fit, the smallest changes that make it fit, one setting at a time; else nothing."""
    return [] if fit.fits else list(_options(fit))


def most_experts(fit: Fit, weights: str) -> int | None:
    """The most experts per layer that fit with the weights in one of targets.WEIGHTS, and otherwise used as `fit` says.

    None if not even the fewest fit, or the weights cannot be so.
    """
    if fit.footprint.why_not(weights, fit.use.width) is not None:
        return None
    return fit.with_equal(None, weights=weights).max_experts


def other_formats(fit: Fit) -> str | None:
    """Which formats of the weights would keep more experts within the budget, as a sentence without its full stop.

    "with --weights fp8 83 of 128 experts fit, with w4a16 all 128"; None if none would keep more, or the weights are
    not in the source's format.
    """
    spec, before = fit.footprint.spec, most_experts(fit, "source") or 0
    if spec is None or fit.use.weights != "source":
        return None
    parts: list[str] = []
    for weights in COMPARED:
        most = most_experts(fit, weights) or 0
        if most > before:
            option = weights if parts else f"--weights {weights}"
            number = f"all {most}" if most == spec.count else f"{most}{'' if parts else f' of {spec.count}'}"
            parts.append(f"with {option} {number}{'' if parts else ' experts fit'}")
            before = most
    return ", ".join(parts) or None


def _smaller_gguf(fit: Fit) -> Iterator[Option]:
    """The next smaller quantization of llama.cpp that fits, with as many experts as asked for."""
    types = list(GGUF_TYPES)
    for weights in types[types.index(fit.use.weights) + 1 :]:
        if fit.changed(weights=weights).fits:
            yield Option(f"--gguf {weights}", "another quantization of llama.cpp")
            return


def _options(fit: Fit) -> Iterator[Option]:
    count = fit.footprint.weights.count
    if fit.max_experts is not None and fit.experts is not None and fit.max_experts < fit.experts:
        yield Option(f"--keep {fit.max_experts}", f"{fit.max_experts} of {count} experts in every layer")
    if fit.max_context:
        yield Option(f"--context {fit.max_context}", f"a context of {fit.max_context:,} tokens")
    if fit.footprint.cache.item_bytes(fit.use.kv_dtype) > 1 and fit.changed(kv_dtype="fp8").fits:
        yield Option("--kv-dtype fp8", "8-bit KV cache")
    if fit.changed(mtp="drop").fits:
        yield Option("--mtp drop", "without layers for multi-token prediction")
    if fit.use.weights in GGUF_TYPES:
        yield from _smaller_gguf(fit)
    for weights in _smaller(fit) if fit.use.weights not in GGUF_TYPES else ():
        smaller, words = fit.changed(weights=weights), "weights as stored"
        if weights in SCHEMES:
            words = f"weights quantized to {scheme_of(weights).bits} bits"
        if smaller.fits:
            yield Option(f"--weights {weights}", words)
            break
        if smaller.max_experts:
            keep = f"--keep {smaller.max_experts}"
            yield Option(f"--weights {weights} {keep}", f"{words}, and {smaller.max_experts} of {count} experts")
    large = [gpu for gpu in GPUS if gpu.usable_bytes >= fit.total]
    smallest = min(large, key=lambda gpu: gpu.usable_bytes, default=None)
    such = f", such as the {smallest.names[0].removeprefix('NVIDIA ')}" if smallest else ""
    yield Option(f"--budget-gib {_budget_gib(fit)}", f"a larger GPU{such}")


def _budget_gib(fit: Fit) -> str:
    """The budget that the settings need, in GiB, rounded up to one digit after the point.

    To more digits where that much would fit the unpruned model: `run` refuses to prune for such a budget.
    """
    unpruned, digits = fit.with_equal(None, width=None).total, 1
    budget = _ceil_gib(fit.total, digits)
    while fit.total < unpruned <= budget * GIB:
        digits += 1
        budget = _ceil_gib(fit.total, digits)
    return f"{float(budget):.{digits}f}".removesuffix(".0")


def _ceil_gib(nbytes: int, digits: int) -> Fraction:
    """Bytes in GiB, rounded up to so many digits after the point."""
    return Fraction(-(-nbytes * 10**digits // GIB), 10**digits)


def _smaller(fit: Fit) -> list[str]:
    """The forms of the weights that take less than theirs, the largest first."""
    width = fit.use.width
    known = [each for each in ("source", *COMPARED) if fit.footprint.why_not(each, width) is None]
    sizes = {each: fit.changed(weights=each).weights_bytes for each in known}
    smaller = [each for each in known if sizes[each] < fit.weights_bytes]
    return sorted(smaller, key=lambda each: -sizes[each])
