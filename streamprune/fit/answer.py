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
from streamprune.fit.cards import cards, cards_lines, cards_object
from streamprune.fit.engine_rules import NAMES
from streamprune.fit.engines import engine_notes, rounded_text
from streamprune.fit.estimate import Estimate, Fit, per_layer_note
from streamprune.fit.loading import decoded_bytes, loading_note
from streamprune.fit.nearest import COMPARED, nearest
from streamprune.fit.verdict import verdict_lines
from streamprune.hardware.gpus import MIB, budget_on_gpu, known_gpu
from streamprune.hardware.memory import GIB, format_bytes
from streamprune.hardware.nvml import list_gpus
from streamprune.models.config_json import minimum_keep
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.tables import Table
from streamprune.targets import MOST_TOKENS

if TYPE_CHECKING:
    from streamprune.fit.measure import Measured

#: Shares of experts removed, and contexts, that the table shows.
RATIOS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75)
CONTEXTS = (8192, 32768, 131072)
#: What `--json` says of a budget.
_OF_BUDGET = (
    "budget_bytes", "budget_from", "left_bytes", "fits", "max_experts_per_layer", "max_experts_in_all_layers",
    "max_context", "nearest",
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """`nbytes` that a served model may take; `label` says where the number comes from."""

    nbytes: int
    label: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One entry of the table: the total with `experts` per layer, one form of the weights and one context (tokens).

    `experts` is 0 for a model without experts, and None where its layers have different numbers. `fits` is None without
    a budget.
    """

    ratio: float
    experts: int | None
    weights: str
    context: int
    total_bytes: int
    fits: bool | None


def resolve_budget(budget_gib: float | None, gpu: str | None) -> Budget:
    """The budget from --budget-gib or --gpu, of which one is given.

    Raises SettingsError for an invalid size, for both options, and for an unknown GPU.
    """
    budget = known_budget(budget_gib, gpu)
    assert budget is not None
    return budget


def known_budget(budget_gib: float | None, gpu: str | None) -> Budget | None:
    """`resolve_budget`; without options the usable memory of this machine's GPU (the largest of several), None if no
    GPU with usable memory is found."""
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
            return None
        return Budget(best.usable_bytes, f"GPU {best.index}, {best.name}: usable now", best.notes)
    budget = Budget(int(budget_gib * GIB), f"--budget-gib {budget_gib:g}")
    if best is None or best.usable_bytes >= budget.nbytes:
        return budget
    note = (
        f"This machine's GPU has {format_bytes(best.usable_bytes)} usable now, less than the budget: `streamprune "
        "devices` shows which processes use the rest."
    )
    return replace(budget, notes=(note,))


def table(fit: Estimate) -> list[Cell]:
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
            fits = cell.fits if isinstance(cell, Fit) else None
            cells.append(Cell(ratio, cell.experts, form, context, cell.total, fits))
    return cells


def _forms(fit: Estimate) -> list[str]:
    """The forms of the weights that the table is to show: the source's, those that are compared, and the asked one."""
    return list(dict.fromkeys(("source", *COMPARED, fit.use.weights)))


def _left_out(fit: Estimate) -> Iterator[str]:
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


def fit_object(fit: Estimate, budget: Budget | None) -> dict[str, Any]:
    """What `--json` prints. Sizes in bytes; numbers of experts are null for a model without experts.

    For a model whose layers have different numbers they are lists, and what could be removed is null. The formats of
    quantized weights are listed with the one of most bytes first; what these take when decoded is null for plain ones.
    Without a budget what depends on it is null, and `cards` says what fits each known GPU.
    """
    weights = fit.footprint.weights
    found = {
        "model": fit.footprint.model,
        **estimate_object(fit),
        "weights": fit.use.weights,
        "weights_formats": list(weights.formats),
        "decoded_weights_bytes": decoded_bytes(fit),
        "source_experts_per_layer": _listed(weights.counts) if weights.counts else weights.count or None,
        "verdict": list(verdict_lines(_to_decide(fit))),
        "table": [vars(cell) for cell in table(fit)],
        "notes": list(_notes(fit, budget)),
    }
    if not isinstance(fit, Fit) or budget is None:
        return {**found, **dict.fromkeys(_OF_BUDGET), "cards": cards_object(cards(fit))}
    can_be_pruned = fit.footprint.spec is not None
    answers = (
        fit.budget,
        budget.label,
        fit.left,
        fit.fits,
        (fit.max_experts or 0) if can_be_pruned else None,
        (fit.max_total_experts or 0) if can_be_pruned else None,
        fit.max_context,
        [vars(option) for option in nearest(fit)],
    )
    return {**found, **dict(zip(_OF_BUDGET, answers, strict=True))}


def _to_decide(estimate: Estimate) -> Estimate:
    """What the verdict is about: the model as asked for; where that exceeds the budget, with as many experts as fit."""
    if not isinstance(estimate, Fit) or estimate.fits or not estimate.max_experts:
        return estimate
    return estimate.changed(keep=estimate.max_experts)


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


def fit_text(fit: Estimate, budget: Budget | None) -> str:
    """The answer for a terminal."""
    if isinstance(fit, Fit) and budget is not None:
        lines = [*_answer(fit, budget), *verdict_lines(_to_decide(fit)), *_options_lines(fit)]
    else:
        lines = [*cards_lines(fit, cards(fit)), *verdict_lines(fit)]
    notes = (f"note: {note}" for note in _notes(fit, budget))
    return "\n".join([*terms_lines(fit), "", *lines, *notes, "", *_table_lines(table(fit))])


def terms_lines(estimate: Estimate) -> list[str]:
    """Every term of the memory and their sum, for a terminal."""

    def bounds(low: int, high: int) -> str:
        return f"{format_bytes(low)} to {format_bytes(high)}"

    use = estimate.use
    sequences = "" if use.batch == 1 else f"{use.batch} sequences of "
    title = (
        f"{estimate.footprint.model}{_experts_text(estimate)}; weights {_weights_text(estimate)}, "
        f"{sequences}{use.context:,} tokens{_limit(estimate)}, cache {use.kv_dtype}"
    )
    rows = [
        (term.name, format_bytes(term.bytes), term.kind, bounds(term.low, term.high) if term.low < term.high else "")
        for term in estimate.terms
    ]
    rows.append(("total", format_bytes(estimate.total), "", bounds(*estimate.interval)))
    return Table(title, [""] * 4, rows, align="lrll").text()


def _limit(estimate: Estimate) -> str:
    return " (the model's limit)" if estimate.use.context == estimate.footprint.max_positions else ""


def _weights_text(estimate: Estimate) -> str:
    if estimate.use.weights in GGUF_TYPES:
        # (Of 16 bits each but for the small parts that stay in 32.)
        bits = 16 * estimate.weights_bytes / estimate.changed(weights="F16").weights_bytes
        return f"{estimate.use.weights} ({bits:.2f} bits each)"
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
    if not weights.count:
        return ""
    # (Of a pruned model "16 of 16" would read as if nothing had been removed.)
    of_all = "" if estimate.experts == weights.count else f" of {weights.count}"
    return f", {estimate.experts}{of_all} experts per layer"


def _answer(fit: Fit, budget: Budget) -> Iterator[str]:
    of = f"{format_bytes(fit.budget)} ({budget.label})"
    if fit.fits:
        yield f"It fits {of}, with {format_bytes(fit.left)} left."
        if fit.interval[1] > fit.budget:
            yield f"Tight: in the worst case it is {format_bytes(fit.interval[1] - fit.budget)} over."
    else:
        yield f"It does not fit {of}: {format_bytes(-fit.left)} over."
    spec, layers = fit.footprint.spec, fit.footprint.weights.sizes().expert_layers
    if spec is not None and fit.most_experts is None:
        yield f"Not even the fewest experts that the router needs (top-{spec.top_k}) fit."
    elif spec is not None and fit.max_experts == spec.count:
        yield f"All {spec.count} experts per layer fit."
    elif spec is not None and fit.max_experts is not None:
        # (If those that fit are no good number for --round-for, a note says so.)
        of_all = f"{fit.max_total_experts or 0:,} of {spec.count * layers:,} in total over all {layers} layers"
        # (Of the engines, only transformers takes different numbers.)
        takes_any = fit.max_total_experts is not None and fit.use.engine in (None, "transformers")
        in_all = f"; or {of_all}" if takes_any else ""
        yield f"Most experts that fit: {fit.max_experts} of {spec.count} in every layer{in_all}."
    if fit.max_context:
        limit = " (the model's limit)" if fit.max_context == fit.footprint.max_positions else ""
        yield f"Longest context that fits: {fit.max_context:,} tokens{limit}."


def _options_lines(fit: Fit) -> Iterator[str]:
    rows = [(option.settings, option.meaning) for option in nearest(fit)]
    if rows:
        yield from Table("Nearest settings that fit:", ["", ""], rows, align="ll").text()


def _notes(fit: Estimate, budget: Budget | None) -> Iterator[str]:
    yield from (*fit.footprint.notes, *(budget.notes if budget is not None else ()))
    loaded = loading_note(fit)
    if loaded is not None:
        yield loaded
    if fit.footprint.weights.counts is not None:
        note = per_layer_note(fit.footprint)
        yield f"{note[0].upper()}{note[1:]}"
    if not fit.footprint.weights.measured:
        yield (
            "Weight sizes are estimated from config.json; the checkpoint may have more, such as a multi-token-"
            "prediction layer."
        )
    yield from _left_out(fit)
    yield from _engine_notes(fit)


def _engine_notes(estimate: Estimate) -> Iterator[str]:
    """What engines make of the model, and of the most experts that fit."""
    use, footprint = estimate.use, estimate.footprint
    served, expert_bytes = footprint.served(use), footprint.expert_bytes(use.weights, use.width)
    if served is None:
        return
    if use.unrounded is not None and use.unrounded > served.count:
        yield rounded_text(use.round_for or "", served.count, use.unrounded, expert_bytes)
    yield from engine_notes(served, use.engine, expert_bytes)
    if not isinstance(estimate, Fit) or use.keep is not None or estimate.most_experts in (None, served.spec.count):
        return
    most, unrounded = estimate.max_experts, estimate.most_experts or 0
    if most is None:
        yield f"No number of experts up to the {unrounded} that fit is good for {NAMES[use.round_for or '']}."
    elif most < unrounded:
        yield rounded_text(use.round_for or "", most, unrounded, expert_bytes)
    else:
        yield from engine_notes(served.with_count(most), use.engine, expert_bytes)


def _table_lines(cells: Sequence[Cell]) -> list[str]:
    unit, name = (MIB, "MiB") if _look_alike(cells) else (GIB, "GiB")
    rows = []
    for (ratio, experts), group in groupby(cells, key=lambda cell: (cell.ratio, cell.experts)):
        totals = [f"{cell.total_bytes / unit:,.1f}{'*' if cell.fits else ' '}" for cell in group]
        rows.append([f"{ratio:.1%}", str(experts or "-"), *totals])
    columns = dict.fromkeys((cell.weights, cell.context) for cell in cells)
    headings = [f"{form} {_thousands(context)} " for form, context in columns]
    fits = "" if any(cell.fits is None for cell in cells) else "; * fits the budget"
    title = f"Totals in {name} by experts removed{fits}:"
    return Table(title, ["removed", "experts", *headings], rows, align="r").text()


def _look_alike(cells: Sequence[Cell]) -> bool:
    """Whether some column's totals differ by less than the tenth of a GiB that is shown, as those of tiny models."""
    columns: dict[tuple[str, int], list[int]] = defaultdict(list)
    for cell in cells:
        columns[cell.weights, cell.context].append(cell.total_bytes)
    return any(max(totals) > min(totals) > max(totals) - GIB / 10 for totals in columns.values())


def _thousands(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
