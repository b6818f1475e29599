"""How a total number of experts is divided among the layers. To add a schedule: one function, one entry in SCHEDULES.

Counts are exact: they sum to the total. They change in steps of one expert, or, if the router's groups of experts must
stay equal in size, of one expert in every group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

from streamprune.models.config_json import ExpertSpec

DEFAULT_SPREAD = 0.15


@dataclass(frozen=True)
class Division:
    """What a schedule divides: `total` experts among layers that have `spec.count` each and keep `least` or more.

    `spread` is for schedules that have one. `scores` (layers, E) and the experts `protected` in each layer are only
    known after all layers are scored.
    """

    spec: ExpertSpec
    total: int
    least: Sequence[int]
    spread: float = DEFAULT_SPREAD
    scores: Sequence[Sequence[float]] = field(default=(), repr=False)
    protected: Sequence[Sequence[int]] = ()


def linear(slope: int, division: Division) -> list[int]:
    """The share removed changes evenly over the layers, by `spread` to either side of the target.

    It rises from the first layer to the last if `slope` is 1, falls if it is -1, and is the same in all layers if it is
    0; if the total is not divisible, the first layers then keep one step more.
    """
    layers, spec = len(division.least), division.spec
    mean, reach = Fraction(division.total, layers), slope * spec.count * Fraction(str(division.spread))
    wanted = [mean + reach * (1 - Fraction(2 * layer, max(1, layers - 1))) for layer in range(layers)]
    if layers == 1:
        wanted = [mean]
    steps = _divided(
        [count / spec.groups for count in wanted],
        [number // spec.groups for number in division.least],
        spec.count // spec.groups,
        division.total // spec.groups,
    )
    return [step * spec.groups for step in steps]


def global_ranking(division: Division) -> list[int]:
    """The experts of all layers are ranked together: each layer gets its least, the rest goes by score.

    With groups a step is the next best expert of each group, and has the sum of their scores.
    """
    spec = division.spec
    steps: list[tuple[float, int, int]] = []
    for layer, values in enumerate(division.scores):
        groups = ranked(values, spec, division.protected[layer])
        for step in range(division.least[layer] // spec.groups, spec.count // spec.groups):
            steps.append((-sum(values[group[step]] for group in groups), layer, step))
    counts = list(division.least)
    for _, layer, _ in sorted(steps)[: (division.total - sum(division.least)) // spec.groups]:
        counts[layer] += spec.groups
    return counts


@dataclass(frozen=True)
class Schedule:
    """A way to divide a total among the layers: its function, and what it does (in words, for the report)."""

    divide: Callable[[Division], list[int]]
    meaning: str
    #: Whether every layer keeps the same number.
    is_uniform: bool = False
    #: Whether it uses --spread.
    has_spread: bool = False
    #: Whether it divides by scores, which are only known after all layers are scored.
    needs_scores: bool = False


_LINEAR = "the share that is removed rises or falls evenly from the first layer to the last"
#: Every schedule by its name on the command line. Any other name is that of a file with a number for each layer.
SCHEDULES: Mapping[str, Schedule] = {
    "uniform": Schedule(partial(linear, 0), "every layer keeps equally many", is_uniform=True),
    "linear-decrease": Schedule(partial(linear, -1), _LINEAR, has_spread=True),
    "linear-increase": Schedule(partial(linear, 1), _LINEAR, has_spread=True),
    "global": Schedule(global_ranking, "the experts of all layers are ranked together", needs_scores=True),
}
DEFAULT_SCHEDULE = "uniform"


def ranked(scores: Sequence[float], spec: ExpertSpec, protected: Sequence[int] = ()) -> list[list[int]]:
    """The experts of each group, from the last to be removed to the first.

    Groups are runs of consecutive experts, as routers define them. The `protected` come first for any score; of equal
    scores the lower number comes first.
    """
    size = spec.count // spec.groups
    return [
        sorted(members, key=lambda expert: (expert not in protected, -scores[expert], expert))
        for members in (range(group * size, (group + 1) * size) for group in range(spec.groups))
    ]


def room_for(protected: Sequence[int], spec: ExpertSpec) -> int:
    """The fewest experts of a layer, equally many in each group, that include all protected ones."""
    per_group = Counter(expert * spec.groups // spec.count for expert in protected)
    return max(per_group.values(), default=0) * spec.groups


def _divided(wanted: Sequence[Fraction], least: Sequence[int], most: int, total: int) -> list[int]:
    """Integers near `wanted` with the sum `total`, each at least its `least` and at most `most`.

    All are shifted by one amount to compensate for the limits, then rounded by largest remainders (of equal ones, the
    first).
    """

    def shifted(shift: Fraction) -> list[Fraction]:
        return [min(max(want + shift, Fraction(low)), Fraction(most)) for want, low in zip(wanted, least, strict=True)]

    def sum_at(shift: Fraction) -> Fraction:
        return sum(shifted(shift), Fraction(0))

    # The sum is linear between two neighbours of these shifts, and never falls.
    bends = sorted({low - want for want, low in zip(wanted, least, strict=True)} | {most - want for want in wanted})
    place = bisect_right(bends, Fraction(total), 1, max(1, len(bends) - 1), key=sum_at)
    begin, end = bends[place - 1], bends[min(place, len(bends) - 1)]
    at_begin, at_end = sum_at(begin), sum_at(end)
    slope = (end - begin) / (at_end - at_begin) if at_end > at_begin else Fraction(0)
    exact = shifted(begin + (total - at_begin) * slope)
    result = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda layer: (result[layer] - exact[layer], layer))
    for layer in by_remainder[: total - sum(result)]:
        result[layer] += 1
    return result
