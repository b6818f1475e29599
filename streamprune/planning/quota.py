"""How many experts stay: from a number, a share, or the memory that the result must fit. Needs no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from streamprune.config import PruningTarget
from streamprune.errors import DoesNotFitError, SettingsError
from streamprune.fit.answer import Budget, nearest, resolve_budget
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.hardware.memory import format_bytes
from streamprune.models.config_json import ExpertSpec, minimum_keep, resolve_keep
from streamprune.selection.select import planned_counts, selection_of, stated_counts


@dataclass(frozen=True)
class Quota:
    """So many experts stay, in `blocks` blocks together; `even` if each keeps the same number.

    `budget` is None where none was given, and `widest`, the number of the block that keeps most, until it is known.
    """

    total: int
    blocks: int
    even: bool
    budget: Budget | None = None
    widest: int | None = None

    @property
    def keep(self) -> int | None:
        """Experts that stay in every block; None where the blocks may differ."""
        return self.total // self.blocks if self.even else None

    def estimate(self, goal: PruningTarget, whole: Footprint) -> Estimate:
        """What the pruned model will take, held against the budget if there is one; `whole` is the model unpruned."""
        use = replace(goal.use, keep=self.keep)
        if not self.even:
            use = replace(use, total=self.total, widest=self.widest)
        return self.held_against(Estimate(whole, use))

    def held_against(self, estimate: Estimate) -> Estimate:
        """The estimate, as a Fit if there is a budget."""
        return Fit(estimate.footprint, estimate.use, self.budget.nbytes) if self.budget else estimate


def find_quota(
    goal: PruningTarget, spec: ExpertSpec, blocks: tuple[int, ...], read_footprint: Callable[[], Footprint]
) -> tuple[Quota, dict[int, int] | None]:
    """How many experts stay of a model whose `blocks` have experts like `spec`; and how many by block.

    The latter is None where only all the scores together decide that. Raises DoesNotFitError for a budget that not even
    the fewest experts meet, and SettingsError where the router could not work with so few, where nothing would be
    removed, or where the schedule cannot be met.
    """
    selection = selection_of(goal)
    stated = stated_counts(selection, spec, blocks)
    if stated is not None:
        return _stated_quota(goal, stated, read_footprint), stated
    read_once = cache(read_footprint)
    quota = _quota(goal, spec, blocks, read_once)
    counts = planned_counts(selection, spec, blocks, quota.total)
    if quota.even or counts is None:
        return quota, counts
    if quota.budget is not None:
        quota = _filled(goal, quota, spec, blocks, read_once())
        counts = planned_counts(selection, spec, blocks, quota.total)
        assert counts is not None  # as before
    return replace(quota, widest=max(counts.values())), counts


def kept_text(quota: Quota, count: int, counts: Mapping[int, int] | None) -> str:
    """How many experts stay, in words."""
    if quota.keep is not None:
        return f"{quota.keep} of {count}"
    text = f"{quota.total:,} of {count * quota.blocks:,} in all"
    return f"{text}, {min(counts.values())} to {max(counts.values())} per block" if counts else text


def _quota(
    goal: PruningTarget, spec: ExpertSpec, blocks: tuple[int, ...], read_footprint: Callable[[], Footprint]
) -> Quota:
    even = goal.schedule == "uniform"
    if goal.keep is not None or goal.ratio is not None:
        return Quota(resolve_keep(spec, goal.keep, goal.ratio) * len(blocks), len(blocks), even)
    budget = resolve_budget(goal.budget_gib, goal.gpu)
    fit = Fit(read_footprint(), goal.use, budget.nbytes)
    keep = _keep_that_fits(fit, budget)
    # Blocks are alike, so that it does not matter to the memory which of them has the experts beyond equal numbers.
    most = fit.max_total_experts or 0
    total = keep * len(blocks) if even else most // spec.groups * spec.groups
    return Quota(total, len(blocks), even, budget)


def _filled(goal: PruningTarget, quota: Quota, spec: ExpertSpec, blocks: tuple[int, ...], whole: Footprint) -> Quota:
    """The quota with the experts that fit besides: it was found as if a block kept all, which takes more workspace."""
    selection = selection_of(goal)

    def exceeds(total: int) -> bool:
        counts = planned_counts(selection, spec, blocks, total)
        assert counts is not None  # the schedule is one that needs no scores
        fit = replace(quota, total=total, widest=max(counts.values())).estimate(goal, whole)
        return not isinstance(fit, Fit) or not fit.fits

    # The first is known to fit.
    steps = range(quota.total, spec.count * len(blocks), spec.groups)
    return replace(quota, total=steps[bisect_left(steps, True, lo=1, key=exceeds) - 1])


def _stated_quota(goal: PruningTarget, counts: Mapping[int, int], read_footprint: Callable[[], Footprint]) -> Quota:
    """The quota of a schedule file, held against the budget if there is one."""
    total = sum(counts.values())
    quota = Quota(total, len(counts), even=len(set(counts.values())) == 1, widest=max(counts.values()))
    if goal.budget_gib is None and goal.gpu is None:
        return quota
    quota = replace(quota, budget=resolve_budget(goal.budget_gib, goal.gpu))
    fit = quota.estimate(goal, read_footprint())
    assert isinstance(fit, Fit)
    if not fit.fits:
        raise DoesNotFitError(
            f"With the {total:,} experts of {goal.schedule} the model takes {format_bytes(fit.total)}, "
            f"{format_bytes(-fit.left)} more than {format_bytes(fit.budget)}. At most "
            f"{fit.max_total_experts or 0:,} experts fit."
        )
    return quota


def _keep_that_fits(fit: Fit, budget: Budget) -> int:
    spec = fit.footprint.spec
    assert spec is not None  # only models with experts get here
    if fit.max_experts is None:
        least = minimum_keep(spec)
        smallest = Fit(fit.footprint, replace(fit.use, keep=least), fit.budget)
        options = "; ".join(f"{option.settings} ({option.meaning})" for option in nearest(smallest))
        raise DoesNotFitError(
            f"Even with the fewest experts with which the router works, {least} of {spec.count}, the model takes "
            f"{format_bytes(smallest.total)}, {format_bytes(-smallest.left)} more than {format_bytes(fit.budget)} "
            f"({budget.label}). Nearest settings that fit: {options}. `streamprune fit` shows every part."
        )
    if fit.max_experts == spec.count:
        raise SettingsError(
            f"The whole model takes {format_bytes(fit.total)} and fits {format_bytes(fit.budget)} ({budget.label}) as "
            "it is, so nothing would be removed. Plan for a longer --context or larger --batch, or choose with --keep."
        )
    return fit.max_experts
