"""The answer of `fit` for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from streamprune.fit.budget import Budget
from streamprune.fit.estimate import Estimate, Fit, uneven_note
from streamprune.fit.options import Cell, nearest, table
from streamprune.machine import format_bytes

if TYPE_CHECKING:
    from streamprune.fit.measure import Measured

GIB = 1024**3


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
        blocks = weights.sizes(fit.use.weights_dtype).moe_blocks
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
    blocks = fit.footprint.weights.sizes("source").moe_blocks
    if fit.max_total_experts is not None:
        text += f"; {fit.max_total_experts:,} of {count * blocks:,} in all {blocks} blocks together, however divided"
    return text + "."


def _notes(fit: Fit) -> Iterator[str]:
    if fit.footprint.weights.counts is not None:
        note = uneven_note(fit.footprint)
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
