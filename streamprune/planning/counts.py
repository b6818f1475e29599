"""How far a model is pruned: how many experts stay, and how many channels each of them keeps. No torch.

Decided before a weight is read: from numbers, from a share, or from the memory that the result must fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamprune.errors import DoesNotFitError, SettingsError, UnsupportedModelError
from streamprune.fit.answer import Budget, resolve_budget
from streamprune.fit.engine_rules import Served
from streamprune.fit.engines import check_served, engine_notes, refusal, rounded_count, rounded_text
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.nearest import nearest
from streamprune.formats.quantization import Quantization
from streamprune.hardware.memory import format_bytes
from streamprune.models.config_json import ExpertSpec, WidthSpec, minimum_keep, resolve_keep
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.select import planned_counts, stated_counts
from streamprune.selection.widths import allowed_widths, check_width, default_multiple, width_for_share, width_notes
from streamprune.targets import PruningTarget


@dataclass(frozen=True)
class Prunable:
    """What can be removed of a model: experts in `layers`, and channels of each expert.

    `width` is None for experts that cannot be made narrower; `fixed_width` says why. `itemsize` is the bytes of a
    weight, `config` the model's config.json, empty where it is unknown.
    """

    spec: ExpertSpec
    layers: tuple[int, ...]
    width: WidthSpec | None
    fixed_width: str
    itemsize: int = 2
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def served(self, target: PruningTarget, counts: ExpertCounts) -> Served:
        """The result as an engine meets it. Of numbers that scores decide later, the extremes are assumed."""
        numbers = tuple(sorted(set(counts.per_layer.values()))) if counts.per_layer is not None else None
        if numbers is None:
            numbers = (counts.keep,) if counts.keep is not None else (minimum_keep(self.spec), self.spec.count)
        full = self.width.width if self.width is not None else None
        return Served(self.spec, numbers, target.stored_as, counts.width or full, self.itemsize, self.config)


@dataclass(frozen=True)
class ExpertCounts:
    """How many experts stay: `total` in `layers` layers together; `uniform` if each keeps the same number.

    `per_layer` are the numbers by layer, None if the scores of all layers decide them later. `width` is the number of
    channels that each of them keeps of `full_width`; None for all. `budget` is None if none was given; `notes` are
    remarks for the user. `unrounded` is the number that each layer would have kept, had it not been rounded down for an
    engine; `served` is the result as engines meet it, None where that was not asked.
    """

    total: int
    layers: int
    uniform: bool
    per_layer: Mapping[int, int] | None = None
    budget: Budget | None = None
    width: int | None = None
    full_width: int = 0
    notes: tuple[str, ...] = ()
    unrounded: int | None = None
    served: Served | None = field(default=None, repr=False)

    @property
    def keep(self) -> int | None:
        """Experts that stay in every layer; None where the layers may differ."""
        return self.total // self.layers if self.uniform else None

    def text(self, experts: int, selected: Mapping[int, int] | None = None) -> str:
        """How many of the `experts` of each layer stay, in words; `selected` are the numbers by layer, once known."""
        narrower = f", each with {self.width:,} of {self.full_width:,} channels" if self.width is not None else ""
        if self.keep is not None:
            return f"{self.keep} of {experts}{narrower}"
        text = f"{self.total:,} of {experts * self.layers:,} in all"
        numbers = (selected or self.per_layer or {}).values()
        return f"{text}, {min(numbers)} to {max(numbers)} per layer{narrower}" if numbers else text + narrower

    def estimate(self, target: PruningTarget, unpruned: Footprint) -> Estimate:
        """The memory of the pruned model, compared with the budget if there is one."""
        serving = replace(target.serving(unpruned.max_positions), keep=self.keep, width=self.width)
        if not self.uniform:
            serving = replace(serving, total=self.total)
            if self.per_layer:
                numbers = self.per_layer
                serving = replace(serving, widest=max(numbers.values()), last=numbers[max(numbers)])
        return self.against_budget(Estimate(unpruned, serving))

    def engine_notes(self, target: PruningTarget, unpruned: Footprint | None) -> Iterator[str]:
        """What engines make of the result, and what rounding for one costs, as notes.

        `unpruned` says what an expert takes; None if it is unknown.
        """
        if self.served is None:
            return
        expert_bytes = unpruned.expert_bytes(target.stored_as, self.width) if unpruned is not None else None
        if self.unrounded is not None and self.keep is not None and target.round_for is not None:
            yield rounded_text(target.round_for, self.keep, self.unrounded, expert_bytes)
        yield from engine_notes(self.served, target.serving_engine, expert_bytes)
        if target.gguf is not None and (why_not := refusal(self.served, "llama.cpp")):
            yield f"llama.cpp cannot make {target.gguf} of the result: {why_not}"

    def against_budget(self, estimate: Estimate) -> Estimate:
        """The estimate, as a Fit if there is a budget."""
        return Fit(estimate.footprint, estimate.use, self.budget.nbytes) if self.budget else estimate


def plan_counts(target: PruningTarget, model: Prunable, read_footprint: Callable[[], Footprint]) -> ExpertCounts:
    """How many experts stay in a model, and how many channels each of them keeps.

    `read_footprint` is called for a budget only. Raises DoesNotFitError if even the smallest model exceeds the budget,
    UnsupportedModelError for experts that cannot be made narrower, and SettingsError if the router cannot work with so
    few experts, nothing would be removed, the schedule cannot be met, or the engine of --for cannot take the result.
    """
    counts = _rounded(target, model, _wanted(target, model, read_footprint))
    return with_engine(target, model, _with_width_notes(target, model, counts))


def with_engine(target: PruningTarget, model: Prunable, counts: ExpertCounts) -> ExpertCounts:
    """The counts with what engines meet. Raises SettingsError if that of --for cannot take it."""
    served = model.served(target, counts)
    check_served(served, target.serving_engine)
    return replace(counts, served=served)


def _rounded(target: PruningTarget, model: Prunable, counts: ExpertCounts) -> ExpertCounts:
    """The counts, rounded down for the engine of --round-for. Raises SettingsError if no number is good for it."""
    keep = counts.keep
    if target.round_for is None or keep is None:
        return counts
    good = rounded_count(model.served(target, counts), target.round_for)
    if good == keep:
        return counts
    per_layer = dict.fromkeys(model.layers, good) if counts.per_layer is not None else None
    return replace(counts, total=good * counts.layers, per_layer=per_layer, unrounded=keep)


def _wanted(target: PruningTarget, model: Prunable, read_footprint: Callable[[], Footprint]) -> ExpertCounts:
    """How many experts stay before they are rounded for an engine."""
    _check_narrower(target, model)
    stated = stated_counts(target, model.spec, model.layers)
    if stated is not None:
        return _stated(target, stated, read_footprint)
    if target.budget_gib is not None or target.gpu is not None:
        return _within_budget(target, model, read_footprint())
    keep, width = _asked_for(target, model)
    total, uniform = keep * len(model.layers), SCHEDULES[target.schedule].is_uniform
    per_layer = planned_counts(target, model.spec, model.layers, total)
    return ExpertCounts(total, len(model.layers), uniform, per_layer, width=width)


def _with_width_notes(target: PruningTarget, model: Prunable, counts: ExpertCounts) -> ExpertCounts:
    """The counts with notes on the width and on the share that stays, where experts become narrower."""
    if counts.width is None or model.width is None:
        return counts
    share = counts.total / counts.layers / model.spec.count * counts.width / model.width.width
    # (For a named engine its own rules are listed.)
    widths = width_notes(counts.width, model.itemsize) if target.serving_engine is None else ()
    fewest = counts.total <= counts.layers * minimum_keep(model.spec)
    notes = (*_rounding_note(target, model.width, share, counts.unrounded is not None, fewest), *widths)
    return replace(counts, full_width=model.width.width, notes=notes)


def refuse_new_values(config: Mapping[str, Any], target: PruningTarget, refit: bool = False) -> None:
    """Raise UnsupportedModelError for a target that cuts or changes quantized weights, by the source's config.json."""
    method = Quantization.of(config).method
    if not method:
        return
    advice = "or prune the bfloat16 or float16 original, and quantize the result."
    if target.width is not None or target.by != "experts":
        raise UnsupportedModelError(
            f"The model's weights are quantized ({method}), so its experts cannot be made narrower: several channels "
            f"share a scale or a byte. Remove whole experts instead (omit --width and --by); {advice}"
        )
    if refit:
        raise UnsupportedModelError(
            f"The model's weights are quantized ({method}), so --refit cannot change them: the new down projections "
            f"would have to be quantized again, which loses what they mend. Omit --refit; {advice}"
        )


def _check_narrower(target: PruningTarget, model: Prunable) -> None:
    """Raise unless the model allows the target's width, if it asks for one."""
    if target.width is None and target.by == "experts":
        return
    if model.width is None:
        raise UnsupportedModelError(
            f"The experts of this model cannot be made narrower: {model.fixed_width}. Remove experts instead: omit "
            "--width and --by."
        )
    if target.width is not None:
        check_width(model.width, target.width)


def _asked_for(target: PruningTarget, model: Prunable) -> tuple[int, int | None]:
    """Experts per layer and channels per expert (None: all) without a budget."""
    spec, width = model.spec, target.width
    if target.by == "experts" or target.ratio is None or model.width is None:
        if target.keep is None and target.ratio is None:
            return spec.count, width
        return resolve_keep(spec, target.keep, target.ratio, width is not None or target.changes_weights), width
    share = 1 - target.ratio
    if target.by == "channels":
        return spec.count, width_for_share(model.width, share, target.width_multiple)
    # Experts and channels by the same share each, as far as their steps allow.
    width = width_for_share(model.width, math.sqrt(share), target.width_multiple)
    return _experts_for_share(spec, share * model.width.width / width), width


def _experts_for_share(spec: ExpertSpec, share: float) -> int:
    """The fewest experts that are at least `share` of all, and that the router can work with."""
    wanted = math.ceil(share * spec.count / spec.groups - 1e-9) * spec.groups
    return min(spec.count, max(minimum_keep(spec), wanted))


def _rounding_note(
    target: PruningTarget, width: WidthSpec, share: float, is_rounded: bool, fewest: bool
) -> tuple[str, ...]:
    """A note if another share of the experts' weights stays than was asked for, because of the steps of widths.

    `is_rounded`: the number of experts was rounded for an engine. `fewest`: the router needs all that stay.
    """
    if target.by == "experts" or target.ratio is None or abs(share - (1 - target.ratio)) < 0.005:
        return ()
    multiple = target.width_multiple or default_multiple(width.width)
    experts = ", and the router needs the experts that stay" if fewest else ""
    if is_rounded:
        experts = f", and --round-for {target.round_for} keeps fewer experts"
    return (
        f"{1 - share:.1%} of the experts' weights are removed instead of {target.ratio:.1%}, because widths are "
        f"multiples of {multiple} (--width-multiple){experts}.",
    )


def _within_budget(target: PruningTarget, model: Prunable, unpruned: Footprint) -> ExpertCounts:
    """As much as fits the budget."""
    spec, layers, uniform = model.spec, model.layers, SCHEDULES[target.schedule].is_uniform
    budget = resolve_budget(target.budget_gib, target.gpu)
    fit = Fit(unpruned, target.serving(unpruned.max_positions), budget.nbytes)
    as_gguf = f" as {target.gguf}" if target.gguf is not None else ""
    if target.width is None and fit.fits and not target.changes_weights:
        raise SettingsError(
            f"The unpruned model takes {format_bytes(fit.total)} and already fits {format_bytes(fit.budget)} "
            f"({budget.label}){as_gguf}, so nothing would be removed. Plan for a longer --context or larger --batch, "
            "or choose with --keep."
        )
    width = target.width if target.by == "experts" or fit.fits else _width_that_fits(target, model, fit, budget)
    fit = fit.changed(width=width)
    keep = spec.count if target.by == "channels" else _keep_that_fits(fit, budget)
    # MoE layers have equal sizes: for the memory only the total counts, not which layers keep one expert more.
    most = fit.max_total_experts or 0
    total = keep * len(layers) if uniform else most // spec.groups * spec.groups
    counts = ExpertCounts(total, len(layers), uniform, planned_counts(target, spec, layers, total), budget, width)
    return counts if uniform or counts.per_layer is None else _filled(target, counts, model, unpruned)


def _width_that_fits(target: PruningTarget, model: Prunable, fit: Fit, budget: Budget) -> int:
    """The largest width that fits: with all experts, or with the same share of the experts.

    Raises DoesNotFitError if none does.
    """
    assert model.width is not None
    full, spec = model.width.width, model.spec
    widths = allowed_widths(model.width, target.width_multiple)

    def with_width(width: int) -> Fit:
        keep = None if target.by == "channels" else _experts_for_share(spec, width / full)
        return fit.changed(width=width, keep=keep)

    # A scheme may not take every width: then what is wrong with the smallest is said below.
    possible = [width for width in widths if fit.footprint.why_not(fit.use.weights, width) is None]
    fitting = [width for width in possible if with_width(width).fits]
    if not fitting:
        smallest = with_width((possible or widths)[0])
        instead = "too (--by both)" if target.by == "channels" else "alone (--by experts)"
        raise DoesNotFitError(
            f"Even with {smallest.use.width} of {full} channels per expert the model takes "
            f"{format_bytes(smallest.total)}, {format_bytes(-smallest.left)} more than {format_bytes(fit.budget)} "
            f"({budget.label}). Remove experts {instead}, or plan for a shorter --context."
        )
    return fitting[-1]


def _filled(target: PruningTarget, counts: ExpertCounts, model: Prunable, unpruned: Footprint) -> ExpertCounts:
    """As many experts as fit: `counts` were found for a layer that keeps all its experts, which takes more memory."""
    assert counts.per_layer is not None
    spec, layers = model.spec, model.layers

    def with_total(total: int) -> ExpertCounts:
        return replace(counts, total=total, per_layer=planned_counts(target, spec, layers, total))

    def exceeds(total: int) -> bool:
        fit = with_total(total).estimate(target, unpruned)
        return not isinstance(fit, Fit) or not fit.fits

    # steps[0] fits.
    steps = range(counts.total, spec.count * len(layers), spec.groups)
    return with_total(steps[bisect_left(steps, True, lo=1, key=exceeds) - 1])


def _stated(
    target: PruningTarget, per_layer: Mapping[int, int], read_footprint: Callable[[], Footprint]
) -> ExpertCounts:
    """The counts of a schedule file, compared with the budget if there is one."""
    total = sum(per_layer.values())
    uniform = len(set(per_layer.values())) == 1
    counts = ExpertCounts(total, len(per_layer), uniform, per_layer, width=target.width)
    if target.budget_gib is None and target.gpu is None:
        return counts
    counts = replace(counts, budget=resolve_budget(target.budget_gib, target.gpu))
    fit = counts.estimate(target, read_footprint())
    assert isinstance(fit, Fit)
    if not fit.fits:
        raise DoesNotFitError(
            f"With the {total:,} experts of {target.schedule} the model takes {format_bytes(fit.total)}, "
            f"{format_bytes(-fit.left)} more than {format_bytes(fit.budget)}. At most "
            f"{fit.max_total_experts or 0:,} experts fit."
        )
    return counts


def _keep_that_fits(fit: Fit, budget: Budget) -> int:
    spec = fit.footprint.spec
    assert spec is not None  # only models with experts get here
    if fit.max_experts is None:
        least = minimum_keep(spec)
        smallest = Fit(fit.footprint, replace(fit.use, keep=least), fit.budget)
        options = "; ".join(f"{option.settings} ({option.meaning})" for option in nearest(smallest))
        raise DoesNotFitError(
            f"Even with the minimum that the router needs, {least} of {spec.count} experts, the model takes "
            f"{format_bytes(smallest.total)}, {format_bytes(-smallest.left)} more than {format_bytes(fit.budget)} "
            f"({budget.label}). Nearest settings that fit: {options}. `streamprune fit` shows every part."
        )
    return fit.max_experts
