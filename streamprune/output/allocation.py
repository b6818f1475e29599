"""From scores to the experts that stay. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def keep_highest(scores: Sequence[float], keep: int, groups: int = 1) -> tuple[int, ...]:
    """The numbers of the `keep` experts with the highest scores, ascending; equally many in each of `groups` groups.

    Groups are runs of consecutive experts, as routers define them. Of equal scores the lower number stays.
    """
    size = len(scores) // groups
    kept: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        ranked = sorted(members, key=lambda expert: (-scores[expert], expert))
        kept.extend(sorted(ranked[: keep // groups]))
    return tuple(kept)
