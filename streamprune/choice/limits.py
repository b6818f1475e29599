"""How few experts a router works with, and how many a number or a share leaves. Pure."""

from __future__ import annotations

import math

from streamprune.errors import SettingsError
from streamprune.source.config_facts import ExpertSpec


def resolve_keep(spec: ExpertSpec, keep: int | None, ratio: float | None) -> int:
    """How many experts stay per block. Raises SettingsError when the router could not work with so few.

    With a ratio, floor(ratio × count) are removed, or as many fewer as the router's equal groups require.
    """
    least = minimum_keep(spec)
    if keep is None:
        assert ratio is not None
        # The tolerance keeps 0.7 of 10 experts from becoming 6.999…
        keep = spec.count - math.floor(ratio * spec.count + 1e-9)
        keep = math.ceil(keep / spec.groups) * spec.groups
        asked = f"--ratio {ratio:g} would keep {keep} of {spec.count} experts"
    else:
        asked = f"--keep {keep}"
    if keep < spec.top_k:
        raise SettingsError(
            f"{asked}, but the router picks {spec.top_k} experts per token. Keep at least {least} of {spec.count} "
            f"(--keep {least})."
        )
    if keep >= spec.count:
        raise SettingsError(
            f"{asked}: the model has {spec.count} experts per block, so nothing would be removed. "
            f"Keep between {least} and {spec.count - spec.groups}."
        )
    if keep % spec.groups:
        below, above = keep // spec.groups * spec.groups, math.ceil(keep / spec.groups) * spec.groups
        choices = [choice for choice in (below, above) if least <= choice < spec.count]
        raise SettingsError(
            f"{asked}: the router chooses among {spec.groups} groups of experts, which must stay equal in size, and "
            f"{keep} is not a multiple of {spec.groups}. Use --keep {' or '.join(map(str, choices)) or least}."
        )
    if keep < least:
        raise SettingsError(
            f"{asked} leaves {keep // spec.groups} experts in each of {spec.groups} groups, of which the router opens "
            f"{spec.topk_groups} to pick {spec.top_k} experts per token. Keep at least {least} (--keep {least})."
        )
    return keep


def minimum_keep(spec: ExpertSpec) -> int:
    """The fewest experts per block with which the router still works.

    A group-limited router rates a group by its two best experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), and the
    groups it opens must together hold top_k experts.
    """
    if spec.groups == 1:
        return spec.top_k
    per_group = max(2, math.ceil(spec.top_k / spec.topk_groups))
    return per_group * spec.groups
