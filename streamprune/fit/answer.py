"""The answer of `fit`: the budget, the estimate against it, the nearest settings that fit, and a table of others.

For people as terminal text, for programs as JSON. No torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

from streamprune.errors import SettingsError
from streamprune.fit.estimate import Estimate, Fit, per_layer_note
from streamprune.fit.loading import decoded_bytes, loading_note
from streamprune.fit.nearest import COMPARED, nearest
from streamprune.hardware.gpus import budget_on_gpu, known_gpu
from streamprune.hardware.memory import GIB, format_bytes
from streamprune.hardware.nvml import list_gpus
from streamprune.models.config_json import minimum_keep
from streamprune.tables import Table
from streamprune.targets import MOST_TOKENS

if TYPE_CHECKING:
    from streamprune.fit.measure import Measured

#: Shares of experts removed, and contexts, that the table shows.
RATIOS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75)
CONTEXTS = (8192, 32768, 131072)


@dataclass(frozen=True)
class Budget:
    """`nbytes` that a served model may take; `label` says where the number comes from."""

    nbytes: int
    label: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One entry of the table: the total with `experts` per layer, one form of the weights and one context (tokens).

    `experts` is 0 for a model without experts, and None where its layers have different numbers.
    """

    ratio: float
    experts: int | None
    weights: str
    context: int
    total_bytes: int
    fits: bool


def resolve_budget(budget_gib: float | None, gpu: str | None) -> Budget:
    """The budget from --budget-gib or --gpu, else the usable memory of this machine's GPU (the largest of several).

    Raises SettingsError for an invalid size, for both options, for an unknown GPU, and without options if no GPU with
    usable memory is found.
    """
    if budget_gib is not None and gpu is not None:
        raise SettingsError("Give either --budget-gib or --gpu, not both.")
    if budget_gib is not None and not 0 < budget_gib < 2**20:
        raise SettingsError(
            f"--budget-gib {budget_gib:g} must be above 0 and below 1048576 (GiB). Example: --budget-gib 24."
        )
    if gpu is not None:
        known = known_gpu(gpu)
        nbytes, notes = budget_on_gpu(known, list_gpus(ask_torch=False))
        return Budget(nbytes, f"--gpu {known.key}, usable by CUDA", tuple(notes))
    here = list_gpus(ask_torch=budget_gib is None)
    best = max(here.gpus, key=lambda each: each.usable_bytes, default=None)
    if budget_gib is None:
        if best is None or not best.usable_bytes:
            raise SettingsError(
                "No budget given, and no GPU with usable memory found: pass --gpu, such as --gpu rtx-3090, or "
                f"--budget-gib. {' '.join(here.notes)}"
            )
        return Budget(best.usable_bytes, f"GPU {best.index}, {best.name}: usable now", best.notes)
    budget = Budget(int(budget_gib * GIB), f"--budget-gib {budget_gib:g}")
    if best is None or best.usable_bytes >= budget.nbytes:
        return budget
    note = (
        f"This machine's GPU has {format_bytes(best.usable_bytes)} usable now, less than the budget: `streamprune "
        "devices` shows which processes use the rest."
    )
    return replace(budget, notes=(note,))


def table(fit: Fit) -> list[Cell]:
    """Totals over RATIOS × forms of the weights × CONTEXTS, as far as the model allows them."""
    spec = fit.footprint.spec
    longest = min(fit.footprint.max_positions or max(CONTEXTS), MOST_TOKENS // fit.use.batch)
    contexts = sorted({context for context in (*CONTEXTS, fit.use.context) if context <= longest} or {longest})
    forms = [each for each in _forms(fit) if fit.footprint.why_not(each, fit.use.width) is None]
    cells = []
    for ratio in RATIOS if spec else RATIOS[:1]:
        keep = None
        if spec is not None and ratio:
            keep = math.ceil((spec.count - math.floor(ratio * spec.count + 1e-9)) / spec.groups) * spec.groups
            if keep < minimum_keep(spec):
                continue
        for form, context in product(forms, contexts):
            cell = fit.changed(keep=keep, weights=form, context=context)
            cells.append(Cell(ratio, cell.experts, form, context, cell.total, cell.fits))
    return cells


def _forms(fit: Fit) -> list[str]:
    """The forms of the weights that the table is to show: the source's, those that are compared, and the asked one."""
    return list(dict.fromkeys(("source", *COMPARED, fit.use.weights)))


def _left_out(fit: Fit) -> Iterator[str]:
    """Which forms of the weights the table leaves out, and why, if the other notes do not say it."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for form in _forms(fit):
        reason = fit.footprint.why_not(form, fit.use.width)
        if reason is not None:
            reasons[reason].append(form)
    known = " ".join(fit.footprint.notes)
    for reason, forms in reasons.items():
        if fit.footprint.weights.counts is None and reason not in known:
            yield f"The table leaves out --weights {' and '.join(forms)}. {reason}"


def fit_object(fit: Fit, budget: Budget) -> dict[str, Any]:
    """What `--json` prints. Sizes in bytes; numbers of experts are null for a model without experts.

    For a model whose layers have different numbers they are lists, and what could be removed is null. The formats of
    quantized weights are listed with the one of most bytes first; what these take when decoded is null for plain ones.
    """
    weights = fit.footprint.weights
    can_be_pruned = fit.footprint.spec is not None
    return {
        "model": fit.footprint.model,
        **estimate_object(fit),
        "budget_from": budget.label,
        "weights": fit.use.weights,
        "weights_formats": list(weights.formats),
        "decoded_weights_bytes": decoded_bytes(fit),
        "source_experts_per_layer": _listed(weights.counts) if weights.counts else weights.count or None,
        "max_experts_per_layer": (fit.max_experts or 0) if can_be_pruned else None,
        "max_experts_in_all_layers": (fit.max_total_experts or 0) if can_be_pruned else None,
        "max_context": fit.max_context,
        "nearest": [vars(option) for option in nearest(fit)],
        "table": [vars(cell) for cell in table(fit)],
        "notes": list(_notes(fit, budget)),
    }


def estimate_object(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON, with the verdict if there is a budget. Sizes in bytes.

    `experts_per_layer` is one number if all layers have the same, a list in the order of layers if they differ, and
    null without experts or before the experts are divided among the layers.
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


def measured_object(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Predicted and measured bytes per term, and how far the prediction is off, as JSON."""
    keys = ("name", "kind", "bytes", "predicted", "error")
    rows = ((each.name, "measured", each.measured, each.predicted, each.error) for each in measured)
    return [dict(zip(keys, row, strict=True)) for row in rows]


def measured_lines(measured: Sequence[Measured]) -> list[str]:
    """The same for a terminal."""
    rows = [
        (each.name, format_bytes(each.measured), f"predicted {format_bytes(each.predicted)}", f"{each.error:+.1%}")
        for each in measured
    ]
    return Table("Measured on the GPU, and how far the prediction is off:", [""] * 4, rows).text()


def fit_text(fit: Fit, budget: Budget) -> str:
    """The answer for a terminal."""
    return "\n".join([*terms_lines(fit), "", *_verdict(fit, budget), "", *_table_lines(table(fit))])


def terms_lines(estimate: Estimate) -> list[str]:
    """Every term of the memory and their sum, for a terminal."""

    def bounds(low: int, high: int) -> str:
        return f"{format_bytes(low)} to {format_bytes(high)}"

    use = estimate.use
    sequences = "" if use.batch == 1 else f"{use.batch} sequences of "
    title = (
        f"{estimate.footprint.model}{_experts_text(estimate)}; weights {_weights_text(estimate)}, "
        f"{sequences}{use.context:,} tokens, cache {use.kv_dtype}"
    )
    rows = [
        (term.name, format_bytes(term.bytes), term.kind, bounds(term.low, term.high) if term.low < term.high else "")
        for term in estimate.terms
    ]
    rows.append(("total", format_bytes(estimate.total), "", bounds(*estimate.interval)))
    return Table(title, [""] * 4, rows, align="lrll").text()


def _weights_text(estimate: Estimate) -> str:
    formats = estimate.footprint.weights.formats
    if not formats or estimate.use.weights != "source":
        return estimate.use.weights
    return f"as stored: {' and '.join(formats)}"


def _listed(counts: Mapping[int, int]) -> list[int]:
    return [counts[layer] for layer in sorted(counts)]


def _experts_text(estimate: Estimate) -> str:
    weights = estimate.footprint.weights
    if weights.counts is not None:
        numbers = weights.counts.values()
        return f", {min(numbers)} to {max(numbers)} experts per layer, {estimate.total_experts:,} in all"
    if estimate.use.total is not None:
        layers = weights.sizes().expert_layers
        return f", {estimate.total_experts:,} of {weights.count * layers:,} experts in all"
    return f", {estimate.experts} of {weights.count} experts per layer" if weights.count else ""


def _verdict(fit: Fit, budget: Budget) -> Iterator[str]:
    of = f"{format_bytes(fit.budget)} ({budget.label})"
    if fit.fits:
        yield f"It fits {of}, with {format_bytes(fit.left)} left."
        if fit.interval[1] > fit.budget:
            yield f"Tight: in the worst case it is {format_bytes(fit.interval[1] - fit.budget)} over."
    else:
        yield f"It does not fit {of}: {format_bytes(-fit.left)} over."
    spec, layers = fit.footprint.spec, fit.footprint.weights.sizes().expert_layers
    if spec is not None and fit.max_experts is None:
        yield f"Not even the fewest experts that the router needs (top-{spec.top_k}) fit."
    elif spec is not None and fit.max_experts == spec.count:
        yield f"All {spec.count} experts per layer fit."
    elif spec is not None:
        of_all = f"{fit.max_total_experts or 0:,} of {spec.count * layers:,} in total over all {layers} layers"
        in_all = f"; or {of_all}" if fit.max_total_experts is not None else ""
        yield f"Most experts that fit: {fit.max_experts} of {spec.count} in every layer{in_all}."
    if fit.max_context:
        limit = " (the model's limit)" if fit.max_context == fit.footprint.max_positions else ""
        yield f"Longest context that fits: {fit.max_context:,} tokens{limit}."
    rows = [(option.settings, option.meaning) for option in nearest(fit)]
    if rows:
        yield from Table("Nearest settings that fit:", ["", ""], rows, align="ll").text()
    yield from (f"note: {note}" for note in _notes(fit, budget))


def _notes(fit: Fit, budget: Budget) -> Iterator[str]:
    yield from (*fit.footprint.notes, *budget.notes)
    loaded = loading_note(fit)
    if loaded is not None:
        yield loaded
    if fit.footprint.weights.counts is not None:
        note = per_layer_note(fit.footprint)
        yield f"{note[0].upper()}{note[1:]}"
    limit = fit.footprint.max_positions
    if limit is not None and fit.use.context > limit:
        yield f"The model's config allows only {limit:,} tokens of context."
    if not fit.footprint.weights.measured:
        yield (
            "Weight sizes are estimated from config.json; the checkpoint may have more, such as a multi-token-"
            "prediction layer."
        )
    yield from _left_out(fit)


def _table_lines(cells: Sequence[Cell]) -> list[str]:
    rows = []
    for (ratio, experts), group in groupby(cells, key=lambda cell: (cell.ratio, cell.experts)):
        totals = [f"{cell.total_bytes / GIB:.1f}{'*' if cell.fits else ' '}" for cell in group]
        rows.append([f"{ratio:.1%}", str(experts or "-"), *totals])
    columns = dict.fromkeys((cell.weights, cell.context) for cell in cells)
    headings = [f"{form} {_thousands(context)} " for form, context in columns]
    title = "Totals in GiB by experts removed; * fits the budget:"
    return Table(title, ["removed", "experts", *headings], rows, align="r").text()


def _thousands(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
