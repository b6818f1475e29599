"""The experts of one layer that stay, given its scores and their number.

How a total number of experts is divided among the layers. Exact: the counts have just that sum.

Counts are made in steps: of one expert, or, where the router's groups of experts must stay equal in size, of one expert
in every group.

A schedule that the user wrote: how many experts each layer keeps, in a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from streamprune.config import SCHEDULES
from streamprune.errors import SettingsError
from streamprune.files.json_text import read_json_file, show
from streamprune.models.config_json import ExpertSpec, minimum_keep
from streamprune.selection.settings import Selection


def keep_highest(scores: Sequence[float], keep: int, groups: int = 1, protected: Sequence[int] = ()) -> tuple[int, ...]:
    """The numbers of the `keep` experts with the highest scores, ascending; equally many in each of `groups` groups.

    Groups are runs of consecutive experts, as routers define them. The `protected` stay whatever their score. Of equal
    scores the lower number stays. Raises SettingsError where there is no room for the protected.
    """
    size = len(scores) // groups
    check_room(protected, keep, len(scores), groups)
    kept: list[int] = []
    for group in range(groups):
        members = ranked(scores, range(group * size, (group + 1) * size), protected)
        kept.extend(sorted(members[: keep // groups]))
    return tuple(kept)


def ranked(scores: Sequence[float], experts: Sequence[int], protected: Sequence[int] = ()) -> list[int]:
    """`experts` from the one that stays longest to the one that goes first."""
    return sorted(experts, key=lambda expert: (expert not in protected, -scores[expert], expert))


def room_for(protected: Sequence[int], count: int, groups: int) -> int:
    """The fewest of `count` experts, equally many in each group, among which all the protected can be."""
    crowded = Counter(expert * groups // count for expert in protected)
    return max(crowded.values(), default=0) * groups


def check_room(protected: Sequence[int], keep: int, count: int, groups: int) -> None:
    """Raise SettingsError where `keep` of `count` experts cannot hold all the protected."""
    needed = room_for(protected, count, groups)
    if needed > keep:
        raise SettingsError(
            f"{len(protected)} super experts of one layer are to stay, {sorted(protected)}, but it keeps {keep} of "
            f"{count} experts{f' in {groups} equal groups' if groups > 1 else ''}. Keep at least {needed}, or leave "
            "--protect-super-experts out."
        )


def least_per_layer(spec: ExpertSpec, floor: int | None) -> int:
    """The fewest experts that a layer keeps: what the router needs or `floor`, rounded up to equal groups."""
    least = max(minimum_keep(spec), floor or 0)
    least = math.ceil(least / spec.groups) * spec.groups
    if least > spec.count:
        raise SettingsError(f"--floor {floor} is more than the {spec.count} experts that every layer has.")
    return least


def layer_counts(
    selection: Selection,
    spec: ExpertSpec,
    layers: int,
    total: int,
    scores: Sequence[Sequence[float]] | None = None,
    protected: Sequence[Sequence[int]] | None = None,
) -> tuple[int, ...]:
    """How many experts each of `layers` layers keeps; their sum is `total`.

    For `global` the scores (layers, E) are needed. `protected` are experts per layer that must have room; `uniform`
    makes none for them, since it promises equal counts. Raises SettingsError with the numbers where it cannot be done.
    (What a schedule file lists is read by `schedule_file`, not here.)
    """
    assert not selection.has_schedule_file
    shared = least_per_layer(spec, selection.floor)
    least = [shared] * layers
    if selection.schedule != "uniform" and protected is not None:
        least = [max(shared, room_for(experts, spec.count, spec.groups)) for experts in protected]
    check_total(spec, layers, total, sum(least), selection.floor)
    if selection.schedule == "global":
        assert scores is not None
        return _global(spec, total, least, scores, protected or [()] * layers)
    wanted = _wanted(selection, spec.count, layers, Fraction(total, layers))
    steps = _divided(
        [count / spec.groups for count in wanted],
        [number // spec.groups for number in least],
        spec.count // spec.groups,
        total // spec.groups,
    )
    return tuple(step * spec.groups for step in steps)


def check_total(spec: ExpertSpec, layers: int, total: int, least: int, floor: int | None = None) -> None:
    """Raise SettingsError unless `total` experts can be divided among the layers; `least` is their smallest total."""
    every = spec.count * layers
    if not least <= total <= every:
        why = f"the router picks {spec.top_k} per token" if not floor else f"--floor is {floor}"
        raise SettingsError(
            f"{total:,} experts cannot be divided among {layers} layers of {spec.count} experts: {least:,} must stay "
            f"({why}), and there are {every:,}. Keep between {least:,} and {every:,} in all."
        )
    if total % spec.groups:
        below = total // spec.groups * spec.groups
        raise SettingsError(
            f"{total:,} experts cannot be divided among {layers} layers: the router chooses among {spec.groups} groups "
            f"of experts, which must stay equal in size. Keep {below:,} or {below + spec.groups:,} in all."
        )


def _wanted(selection: Selection, count: int, layers: int, mean: Fraction) -> list[Fraction]:
    """The counts (layers,) that the schedule would have, before limits and rounding.

    Of `linear-decrease` the share removed is target + spread at the first layer and target − spread at the last.
    """
    if selection.schedule == "uniform" or layers == 1:
        return [mean] * layers
    spread = Fraction(str(selection.spread_used))
    sign = -1 if selection.schedule == "linear-decrease" else 1
    return [mean + sign * count * spread * (1 - Fraction(2 * layer, layers - 1)) for layer in range(layers)]


def _divided(wanted: Sequence[Fraction], least: Sequence[int], most: int, total: int) -> list[int]:
    """Whole numbers near `wanted` with the sum `total`, each at least its `least` and at most `most`.

    All are shifted by one amount, so that what the limits cut off is spread over the others; then rounded by largest
    remainders, of equal ones the first.
    """

    def shifted(shift: Fraction) -> list[Fraction]:
        return [min(max(want + shift, Fraction(low)), Fraction(most)) for want, low in zip(wanted, least, strict=True)]

    # Between two neighbours of these shifts the sum is a straight line, and nowhere does it fall.
    bends = sorted({low - want for want, low in zip(wanted, least, strict=True)} | {most - want for want in wanted})
    low, high = 0, len(bends) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(shifted(bends[middle])) <= total else (low, middle)
    begin, end = bends[low], bends[high]
    at_begin, at_end = sum(shifted(begin)), sum(shifted(end))
    slope = (end - begin) / (at_end - at_begin) if at_end > at_begin else Fraction(0)
    exact = shifted(begin + (total - at_begin) * slope)
    result = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda layer: (result[layer] - exact[layer], layer))
    for layer in by_remainder[: total - sum(result)]:
        result[layer] += 1
    return result


def _global(
    spec: ExpertSpec,
    total: int,
    least: Sequence[int],
    scores: Sequence[Sequence[float]],
    protected: Sequence[Sequence[int]],
) -> tuple[int, ...]:
    """Counts (layers,) when the experts of all layers are ranked together: each gets its least, the rest goes by score.

    With groups a step is the next best expert of each group, and has the sum of their scores.
    """
    size = spec.count // spec.groups
    steps: list[tuple[float, int, int]] = []
    for layer, values in enumerate(scores):
        groups = [
            ranked(values, range(group * size, (group + 1) * size), protected[layer]) for group in range(spec.groups)
        ]
        for step in range(least[layer] // spec.groups, size):
            steps.append((-sum(values[group[step]] for group in groups), layer, step))
    counts = list(least)
    for _, layer, _ in sorted(steps)[: (total - sum(least)) // spec.groups]:
        counts[layer] += spec.groups
    return tuple(counts)


def read_schedule_file(selection: Selection, spec: ExpertSpec, layers: int) -> tuple[int, ...]:
    """How many experts each of `layers` layers keeps, by the JSON list of numbers in the file `selection.schedule`.

    Whole numbers are experts to keep; numbers from 0 up to below 1 are shares to remove, rounded like --ratio: so much
    is removed at most. Raises SettingsError naming the file, and the entry that is not possible.
    """
    path = Path(selection.schedule)
    values = read_json_file(path, "--schedule", f"is one of {', '.join(SCHEDULES)}, or a JSON file with a list")
    what = f"--schedule {show(str(path))}"
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise SettingsError(f"{what} has to be a JSON list of numbers, one for each layer with experts.")
    if len(values) != layers:
        raise SettingsError(f"{what} lists {len(values)} numbers, but the model has {layers} layers with experts.")
    shares = all(0 <= value < 1 for value in values)
    least = least_per_layer(spec, selection.floor)
    counts = []
    for entry, value in enumerate(values, start=1):
        if not shares and (value != math.floor(value) or abs(value) >= 2**53):
            raise SettingsError(
                f"{what}, entry {entry}: {show(value)} is no number of experts. List only numbers of experts to "
                "keep, or only shares to remove (from 0 to below 1)."
            )
        count = _kept(value, spec) if shares else int(value)
        if not least <= count <= spec.count or count % spec.groups:
            multiple = f", in multiples of {spec.groups}" if spec.groups > 1 else ""
            raise SettingsError(
                f"{what}, entry {entry}: {show(value)} would keep {count} of {spec.count} experts. Every layer "
                f"keeps between {least} and {spec.count}{multiple}."
            )
        counts.append(count)
    if all(count == spec.count for count in counts):
        raise SettingsError(f"{what} keeps all {spec.count} experts of every layer, so nothing would be removed.")
    return tuple(counts)


def _kept(ratio: float, spec: ExpertSpec) -> int:
    # As in plan.resolve_keep, where the tolerance keeps 0.7 of 10 experts from becoming 6.999…
    keep = spec.count - math.floor(ratio * spec.count + 1e-9)
    return math.ceil(keep / spec.groups) * spec.groups


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(_as_float(value))


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
