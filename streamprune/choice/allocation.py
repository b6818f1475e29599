"""The experts of one layer that stay, given its scores and their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from streamprune.errors import SettingsError


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
