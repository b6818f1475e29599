"""What is decided and known about a model before its weights are read: how many experts stay, and where they are.

`ExpertCounts` come from a number, a share, or the memory that the result must fit. `ModelFacts` are kept with the
scores, so that a model need not be built to be pruned again. Needs no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.config import PruningTarget
from streamprune.errors import CheckpointError, DoesNotFitError, SettingsError
from streamprune.fit.answer import Budget, nearest, resolve_budget
from streamprune.fit.cache import CacheSizes
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.weights import weights_by_layout
from streamprune.hardware.memory import format_bytes
from streamprune.models.config_json import ExpertSpec, ModelShape, minimum_keep, resolve_keep
from streamprune.models.expert_layout import Layout, layout_from_json
from streamprune.models.per_layer_experts import LoadingFacts, loading_facts_from_json
from streamprune.output.plan import PrunePlan
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.select import planned_counts, stated_counts


@dataclass(frozen=True)
class ExpertCounts:
    """How many experts stay: `total` in `layers` layers together; `uniform` if each keeps the same number.

    `per_layer` are the numbers by layer, None if the scores of all layers decide them later. `width` is the number of
    channels that each of them keeps; None for all. `budget` is None if none was given.
    """

    total: int
    layers: int
    uniform: bool
    per_layer: Mapping[int, int] | None = None
    budget: Budget | None = None
    width: int | None = None

    @property
    def keep(self) -> int | None:
        """Experts that stay in every layer; None where the layers may differ."""
        return self.total // self.layers if self.uniform else None

    def text(self, experts: int, selected: Mapping[int, int] | None = None) -> str:
        """How many of the `experts` of each layer stay, in words; `selected` are the numbers by layer, once known."""
        if self.keep is not None:
            return f"{self.keep} of {experts}"
        text = f"{self.total:,} of {experts * self.layers:,} in all"
        numbers = (selected or self.per_layer or {}).values()
        return f"{text}, {min(numbers)} to {max(numbers)} per layer" if numbers else text

    def estimate(self, target: PruningTarget, unpruned: Footprint) -> Estimate:
        """The memory of the pruned model, compared with the budget if there is one."""
        serving = replace(target.serving, keep=self.keep)
        if not self.uniform:
            widest = max(self.per_layer.values()) if self.per_layer else None
            serving = replace(serving, total=self.total, widest=widest)
        return self.against_budget(Estimate(unpruned, serving))

    def against_budget(self, estimate: Estimate) -> Estimate:
        """The estimate, as a Fit if there is a budget."""
        return Fit(estimate.footprint, estimate.use, self.budget.nbytes) if self.budget else estimate


def plan_counts(
    target: PruningTarget, spec: ExpertSpec, layers: tuple[int, ...], read_footprint: Callable[[], Footprint]
) -> ExpertCounts:
    """How many experts stay in a model with the MoE layers `layers` and the experts `spec`.

    `read_footprint` is called for a budget only. Raises DoesNotFitError if even the fewest experts exceed the budget,
    and SettingsError if the router cannot work with so few, nothing would be removed, or the schedule cannot be met.
    """
    stated = stated_counts(target, spec, layers)
    if stated is not None:
        return _stated(target, stated, read_footprint)
    uniform = SCHEDULES[target.schedule].is_uniform
    if target.keep is not None or target.ratio is not None:
        total = resolve_keep(spec, target.keep, target.ratio) * len(layers)
        return ExpertCounts(total, len(layers), uniform, planned_counts(target, spec, layers, total))
    budget = resolve_budget(target.budget_gib, target.gpu)
    unpruned = read_footprint()
    fit = Fit(unpruned, target.serving, budget.nbytes)
    keep = _keep_that_fits(fit, budget)
    # MoE layers have equal sizes: for the memory only the total counts, not which layers keep one expert more.
    most = fit.max_total_experts or 0
    total = keep * len(layers) if uniform else most // spec.groups * spec.groups
    counts = ExpertCounts(total, len(layers), uniform, planned_counts(target, spec, layers, total), budget)
    return counts if uniform or counts.per_layer is None else _filled(target, counts, spec, unpruned)


def _filled(target: PruningTarget, counts: ExpertCounts, spec: ExpertSpec, unpruned: Footprint) -> ExpertCounts:
    """As many experts as fit: `counts` were found for a layer that keeps all its experts, which takes more memory."""
    assert counts.per_layer is not None
    layers = tuple(counts.per_layer)

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
    counts = ExpertCounts(total, len(per_layer), len(set(per_layer.values())) == 1, per_layer)
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
    if fit.max_experts == spec.count:
        raise SettingsError(
            f"The unpruned model takes {format_bytes(fit.total)} and already fits {format_bytes(fit.budget)} "
            f"({budget.label}), so nothing would be removed. Plan for a longer --context or larger --batch, or choose "
            "with --keep."
        )
    return fit.max_experts


@dataclass(frozen=True)
class _Memory:
    """What the memory of a model depends on in addition to its weights, as stored with the scores."""

    cache: CacheSizes
    shape: ModelShape
    itemsize: int
    max_positions: int | None


class _FactsJson(msgspec.Struct):
    tensors: dict[str, Any]
    loading: dict[str, Any]
    memory: _Memory | None


@dataclass(frozen=True)
class ModelFacts:
    """Where the experts are, how an output with different numbers of them is loaded, and what memory the model takes.

    `footprint` is that of the unpruned model; None if the size of its cache is unknown.
    """

    layout: Layout
    loading: LoadingFacts
    footprint: Footprint | None

    def as_json(self) -> dict[str, Any] | None:
        """The facts as JSON, less the spec; None for a checkpoint whose tensor names fit no pattern."""
        tensors = self.layout.as_json()
        if tensors is None:
            return None
        known = self.footprint
        memory = None
        if known is not None:
            memory = asdict(_Memory(known.cache, known.shape, known.itemsize, known.max_positions))
        return {"tensors": tensors, "loading": msgspec.to_builtins(self.loading), "memory": memory}

    def estimate(
        self,
        output: str,
        plan: PrunePlan,
        target: PruningTarget,
        counts: ExpertCounts,
        written: Mapping[str, TensorEntry],
    ) -> Estimate | None:
        """The memory of the finished model, with its weights counted in the written files."""
        if self.footprint is None:
            return None
        weights = weights_by_layout(written, self.layout, plan.counts)
        spec = None if weights.counts else replace(self.layout.spec, count=weights.count)
        footprint = replace(self.footprint, model=output, weights=weights, spec=spec)
        return counts.against_budget(Estimate(footprint, target.serving))


def facts_from_json(
    kept: Any,
    spec: ExpertSpec,
    model: str,
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int] | None = None,
    width: int | None = None,
) -> ModelFacts:
    """The facts that `ModelFacts.as_json` gave, for a checkpoint with these tensors: the source's, or an output's.

    `spec` is the source's; `counts` are the experts by layer of an output, None for the source itself; `width` are the
    channels of an output's experts, None if they have all.
    Raises CheckpointError for anything else: the JSON may be untrusted.
    """
    try:
        found = msgspec.convert(kept, _FactsJson)
        if not all(0 <= number < 2**40 for number in _numbers(msgspec.to_builtins(found.memory))):
            raise ValueError("a number out of range")
    except ValueError as error:
        raise CheckpointError(
            f"The memory facts in the scores file are invalid ({error}). Score the model again."
        ) from None
    layout = layout_from_json(found.tensors, spec, tensors, counts, width)
    loading, memory = loading_facts_from_json(found.loading), found.memory
    if memory is None:
        return ModelFacts(layout, loading, None)
    weights = weights_by_layout(tensors, layout, counts or dict.fromkeys(layout.expert_layers, spec.count))
    of_them = None if weights.counts else replace(spec, count=weights.count)
    footprint = Footprint(
        model,
        weights,
        of_them,
        memory.cache,
        memory.shape,
        itemsize=memory.itemsize,
        max_positions=memory.max_positions,
    )
    return ModelFacts(layout, loading, footprint)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int):
        yield value
