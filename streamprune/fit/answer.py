"""How much memory a model may take: from --budget-gib, a card's name, or the card in this machine.

What else would fit: the nearest settings when the answer is no; a table over ratio, weights and context. Pure.

The answer of `fit` for people and for programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from streamprune.config import MOST_TOKENS
from streamprune.errors import SettingsError
from streamprune.fit.estimate import Estimate, Fit, per_layer_note
from streamprune.hardware.gpus import Gpus, budget_on_gpu
from streamprune.hardware.known_gpus import GPUS, known_gpu
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.nvml import list_gpus
from streamprune.models.config_json import minimum_keep

if TYPE_CHECKING:
    from streamprune.fit.measure import Measured


GIB = 1024**3


@dataclass(frozen=True)
class Budget:
    """`nbytes` that a model and all that serves it may take; `label` says where the figure comes from."""

    nbytes: int
    label: str
    notes: tuple[str, ...] = ()


def resolve_budget(budget_gib: float | None, gpu: str | None) -> Budget:
    """The budget that the user named, else what is usable on this machine's card (the roomiest of several).

    Raises SettingsError for a budget that is no positive size, for both at once, for an unknown card, and when nothing
    is named and no card can be asked.
    """
    if budget_gib is not None and gpu is not None:
        raise SettingsError("Give either --budget-gib or --gpu, not both.")
    if budget_gib is not None:
        if not 0 < budget_gib < 2**20:
            raise SettingsError(f"--budget-gib {budget_gib:g} is not a size of memory. Write for example 24.")
        nbytes = int(budget_gib * GIB)
        return Budget(nbytes, f"--budget-gib {budget_gib:g}", _less_here(nbytes, list_gpus(ask_torch=False)))
    if gpu is not None:
        known = known_gpu(gpu)
        nbytes, notes = budget_on_gpu(known, list_gpus(ask_torch=False))
        return Budget(nbytes, f"--gpu {known.key}, what CUDA can use", tuple(notes))
    cards = list_gpus()
    best = max(cards.gpus, key=lambda card: card.usable_bytes or 0, default=None)
    if best is None or not best.usable_bytes:
        raise SettingsError(
            "No budget is given, and no card can be asked for one: name a card, such as --gpu rtx-3090, or give "
            f"--budget-gib. {' '.join(cards.notes)}"
        )
    return Budget(best.usable_bytes, f"card {best.index}, {best.name}: usable now", tuple(best.notes))


def _less_here(nbytes: int, cards: Gpus) -> tuple[str, ...]:
    """A sentence where cards are here and none of them has as much to give as the budget names."""
    usable = max((card.usable_bytes or 0 for card in cards.gpus), default=nbytes)
    if usable >= nbytes:
        return ()
    return (
        f"This machine's card can give {format_bytes(usable)} at present, less than the budget: `streamprune devices` "
        "shows what holds the rest.",
    )


#: Shares of experts removed, and contexts, that the table shows.
RATIOS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75)
CONTEXTS = (8192, 32768, 131072)


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


def fit_object(fit: Fit, budget: Budget) -> dict[str, Any]:
    """What `--json` prints. Sizes in bytes; numbers of experts are null for a model that has none.

    Of a model whose blocks have different numbers they are lists, and null where they ask what could be removed.
    """
    footprint = fit.footprint
    weights = footprint.weights
    can_be_pruned = footprint.spec is not None
    return {
        "model": footprint.model,
        **estimate_object(fit),
        "budget_from": budget.label,
        "weights_dtype": fit.use.weights_dtype,
        "source_experts_per_layer": _listed(weights.counts) if weights.counts else weights.count or None,
        "max_experts_per_layer": (fit.max_experts or 0) if can_be_pruned else None,
        "max_experts_in_all_layers": (fit.max_total_experts or 0) if can_be_pruned else None,
        "max_context": fit.max_context,
        "nearest": [vars(option) for option in nearest(fit)],
        "table": [vars(cell) for cell in table(fit)],
        "notes": [*footprint.notes, *budget.notes, *_notes(fit)],
    }


def measured_object(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Predicted and measured bytes per term, and how far the prediction is off, as JSON."""
    return [
        {
            "name": item.name,
            "kind": "measured",
            "bytes": item.measured,
            "predicted": item.predicted,
            "error": item.error,
        }
        for item in measured
    ]


def measured_lines(measured: Sequence[Measured]) -> list[str]:
    """The same for a terminal."""
    width = max(len(item.name) for item in measured)
    return ["Measured on the card, and how far the prediction is off:"] + [
        f"  {item.name:<{width}}  {format_bytes(item.measured):>11}  predicted {format_bytes(item.predicted):>11}  "
        f"{item.error:+.1%}"
        for item in measured
    ]


def estimate_object(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON, with the verdict where there is a budget. Sizes in bytes.

    `experts_per_layer` is one number where all blocks have the same, a list, in the blocks' order, where they differ,
    and null without experts or before it is decided which block keeps how many.
    """
    low, high = estimate.interval
    counts = estimate.footprint.weights.counts
    result = {
        "experts_per_layer": _listed(counts) if counts else estimate.experts or None,
        "experts_in_all_layers": estimate.total_experts or None,
        "context": estimate.use.context,
        "batch": estimate.use.batch,
        "kv_dtype": estimate.use.kv_dtype,
        "weights_bytes": estimate.weights_bytes,
        "kv_cache_bytes": estimate.kv_cache_bytes,
        "state_bytes": estimate.state_bytes,
        "total_bytes": estimate.total,
        "total_bytes_low": low,
        "total_bytes_high": high,
        "terms": [vars(term) for term in estimate.terms],
    }
    if isinstance(estimate, Fit):
        result |= {"budget_bytes": estimate.budget, "left_bytes": estimate.left, "fits": estimate.fits}
    return result


def fit_text(fit: Fit, budget: Budget) -> str:
    """The answer as lines for a terminal."""
    return "\n".join([*terms_lines(fit), "", *_verdict(fit, budget), "", *_table_lines(table(fit))])


def terms_lines(fit: Estimate) -> list[str]:
    """Every term of the memory and their sum."""
    use = fit.use
    lines = [
        f"{fit.footprint.model}{_experts_text(fit)}; weights {use.weights_dtype}, "
        f"{_sequences(use.batch)}{use.context:,} tokens, cache {use.kv_dtype}"
    ]
    width = max(len(term.name) for term in fit.terms)
    for term in fit.terms:
        bounds = f"  {format_bytes(term.low)} to {format_bytes(term.high)}" if term.low < term.high else ""
        lines.append(f"  {term.name:<{width}}  {format_bytes(term.bytes):>11}  {term.kind}{bounds}")
    low, high = fit.interval
    lines.append(f"  {'total':<{width}}  {format_bytes(fit.total):>11}  {format_bytes(low)} to {format_bytes(high)}")
    return lines


def _listed(counts: Mapping[int, int]) -> list[int]:
    return [counts[block] for block in sorted(counts)]


def _experts_text(fit: Estimate) -> str:
    weights = fit.footprint.weights
    if weights.counts is not None:
        numbers = weights.counts.values()
        return f", {min(numbers)} to {max(numbers)} experts per block, {fit.total_experts:,} in all"
    if fit.use.total is not None:
        blocks = weights.sizes(fit.use.weights_dtype).expert_layers
        return f", {fit.total_experts:,} of {weights.count * blocks:,} experts in all"
    return f", {fit.experts} of {weights.count} experts per block" if weights.count else ""


def _sequences(batch: int) -> str:
    return "" if batch == 1 else f"{batch} sequences of "


def _verdict(fit: Fit, budget: Budget) -> Iterator[str]:
    of = f"{format_bytes(fit.budget)} ({budget.label})"
    if fit.fits:
        yield f"It fits {of}, with {format_bytes(fit.left)} left."
        if fit.interval[1] > fit.budget:
            yield f"It is tight: at worst {format_bytes(fit.interval[1] - fit.budget)} would be missing."
    else:
        yield f"It does not fit {of}: {format_bytes(-fit.left)} are missing."
    if fit.footprint.spec is not None:
        yield _most_experts(fit)
    if fit.max_context:
        limit = " (the model's limit)" if fit.max_context == fit.footprint.max_positions else ""
        yield f"Longest context that fits: {fit.max_context:,} tokens{limit}."
    options = nearest(fit)
    if options:
        yield "Nearest settings that fit:"
        width = max(len(option.settings) for option in options)
        yield from (f"  {option.settings:<{width}}  {option.meaning}" for option in options)
    yield from (f"note: {note}" for note in (*fit.footprint.notes, *budget.notes, *_notes(fit)))


def _most_experts(fit: Fit) -> str:
    count, spec = fit.footprint.weights.count, fit.footprint.spec
    assert spec is not None
    if fit.max_experts is None:
        return f"Not even the fewest experts with which the router works (top-{spec.top_k}) fit."
    if fit.max_experts == count:
        return f"All {count} experts per block fit."
    text = f"Most experts that fit: {fit.max_experts} of {count} in every block"
    blocks = fit.footprint.weights.sizes("source").expert_layers
    if fit.max_total_experts is not None:
        text += f"; {fit.max_total_experts:,} of {count * blocks:,} in all {blocks} blocks together, however divided"
    return text + "."


def _notes(fit: Fit) -> Iterator[str]:
    if fit.footprint.weights.counts is not None:
        note = per_layer_note(fit.footprint)
        yield f"{note[0].upper()}{note[1:]}"
    limit = fit.footprint.max_positions
    if limit is not None and fit.use.context > limit:
        yield f"The model's config allows only {limit:,} tokens of context."
    if not fit.footprint.weights.measured:
        yield (
            "Sizes of the weights follow from config.json alone; a checkpoint may hold more, such as a multi-token-"
            "prediction layer."
        )


def _table_lines(cells: list[Cell]) -> Iterator[str]:
    columns = list(dict.fromkeys((cell.weights_dtype, cell.context) for cell in cells))
    yield "Totals in GiB by experts removed; * fits the budget:"
    yield f"{'removed':>8} {'experts':>8}" + "".join(
        f"{f'{form} {_thousands(context)}':>13}" for form, context in columns
    )
    for (ratio, experts), row in groupby(cells, key=lambda cell: (cell.ratio, cell.experts)):
        values = {(cell.weights_dtype, cell.context): cell for cell in row}
        yield f"{ratio:>8.1%} {experts or '-':>8}" + "".join(
            f"{f'{values[column].total_bytes / GIB:.1f}':>12}{'*' if values[column].fits else ' '}"
            for column in columns
        )


def _thousands(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
