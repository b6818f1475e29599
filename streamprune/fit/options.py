"""What else would fit: the nearest settings when the answer is no; a table over ratio, weights and context. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from streamprune.cards.known import GPUS
from streamprune.choice.limits import minimum_keep
from streamprune.fit.estimate import Fit
from streamprune.settings import MOST_TOKENS

#: Shares of experts removed, and contexts, that the table shows.
RATIOS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75)
CONTEXTS = (8192, 32768, 131072)
GIB = 1024**3


@dataclass(frozen=True)
class Option:
    """Settings that fit: what to add to the command, and in words what it means."""

    settings: str
    meaning: str


@dataclass(frozen=True)
class Cell:
    """One entry of the table: `experts` per block in one form of weights, with one context (tokens).

    `experts` is 0 for a model that has none, and None where its blocks have different numbers.
    """

    ratio: float
    experts: int | None
    weights_dtype: str
    context: int
    total_bytes: int
    fits: bool


def nearest(fit: Fit) -> list[Option]:
    """The smallest changes, one kind at a time, that make a model fit which does not; empty where none does."""
    return [] if fit.fits else [*_fewer_experts(fit), *_less_cache(fit), *_smaller_weights(fit), *_larger_card(fit)]


def _fewer_experts(fit: Fit) -> Iterator[Option]:
    if fit.max_experts is not None and fit.experts is not None and fit.max_experts < fit.experts:
        count = fit.footprint.weights.count
        yield Option(f"--keep {fit.max_experts}", f"{fit.max_experts} of {count} experts in every block")


def _less_cache(fit: Fit) -> Iterator[Option]:
    if fit.max_context:
        yield Option(f"--context {fit.max_context}", f"a context of {fit.max_context:,} tokens")
    if fit.footprint.cache.item_bytes(fit.use.kv_dtype) > 1:
        smaller = Fit(fit.footprint, replace(fit.use, kv_dtype="fp8"), fit.budget)
        if smaller.fits:
            yield Option("--kv-dtype fp8", "keys and values in 8 bits")


def _smaller_weights(fit: Fit) -> Iterator[Option]:
    if fit.footprint.weights.quantized:
        return
    for dtype, words in (("fp8", "weights quantized to 8 bits"), ("int4", "weights quantized to 4 bits")):
        if dtype == fit.use.weights_dtype or (fit.use.weights_dtype == "int4"):
            continue
        smaller = Fit(fit.footprint, replace(fit.use, weights_dtype=dtype), fit.budget)
        if smaller.fits:
            yield Option(f"--weights-dtype {dtype}", words)
            return
        if smaller.max_experts:
            yield Option(
                f"--weights-dtype {dtype} --keep {smaller.max_experts}",
                f"{words}, and {smaller.max_experts} of {fit.footprint.weights.count} experts",
            )


def _larger_card(fit: Fit) -> Iterator[Option]:
    cards = [gpu for gpu in GPUS if gpu.usable_bytes >= fit.total]
    smallest = min(cards, key=lambda gpu: gpu.usable_bytes, default=None)
    such = f", such as the {smallest.name.removeprefix('NVIDIA ')}" if smallest else ""
    yield Option(f"--budget-gib {math.ceil(fit.total / GIB * 10) / 10:g}", f"a larger card{such}")


def table(fit: Fit) -> list[Cell]:
    """Totals over RATIOS × forms of weights × CONTEXTS, as far as the model allows them."""
    spec, weights = fit.footprint.spec, fit.footprint.weights
    longest = min(fit.footprint.max_positions or max(CONTEXTS), MOST_TOKENS // fit.use.batch)
    contexts = sorted({context for context in (*CONTEXTS, fit.use.context) if context <= longest} or {longest})
    forms = ["source"] if weights.quantized else ["source", "fp8", "int4"]
    cells = []
    for ratio in RATIOS if spec else RATIOS[:1]:
        keep = None
        if spec is not None and ratio:
            keep = math.ceil((spec.count - math.floor(ratio * spec.count + 1e-9)) / spec.groups) * spec.groups
            if keep < minimum_keep(spec):
                continue
        for form in forms:
            for context in contexts:
                use = replace(fit.use, keep=keep, weights_dtype=form, context=context)
                cell = Fit(fit.footprint, use, fit.budget)
                cells.append(Cell(ratio, cell.experts, form, context, cell.total, cell.fits))
    return cells
