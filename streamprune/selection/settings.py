"""How the experts that stay are selected: method, schedule, and the mix of the calibration's sources."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.saliency.methods import DEFAULT_METHOD, METHODS
from streamprune.selection.schedules import DEFAULT_SCHEDULE, DEFAULT_SPREAD, SCHEDULES

#: `name=share`, with commas between. A name may hold commas and equals signs, a share cannot.
_ENTRY = re.compile(r"(?P<name>[^=]*.*?)=(?P<share>[^=,]*)(?:,|$)", re.DOTALL)
_LONGEST = 100_000
_EXAMPLE = "Write for example --mix code=0.5,general=0.5."


@dataclass(frozen=True)
class SelectionSettings:
    """What ranks the experts, and how their number is divided among the layers.

    - `method`: one of METHODS; `seed` is for `random` (None: 0).
    - `mix`: shares of the sources, such as `code=0.5,general=0.5`; None counts every token once.
    - `schedule`: one of SCHEDULES, or a JSON file with a list; `spread` (None: DEFAULT_SPREAD) is for the linear ones.
    - `floor`: the fewest experts that any layer keeps, if that is more than the router needs.
    - `protect_super_experts`: keep those that `super_experts` finds, for any score.

    Raises SettingsError if a value is impossible for any model.
    """

    method: str = DEFAULT_METHOD
    mix: str | None = None
    schedule: str = DEFAULT_SCHEDULE
    spread: float | None = None
    floor: int | None = None
    protect_super_experts: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"--method {self.method!r} is unknown. Choose one of: {', '.join(METHODS)}.")
        if self.mix is not None:
            parse_mix(self.mix)
        if not self.schedule:
            raise SettingsError(f"--schedule is empty. Choose one of: {', '.join(SCHEDULES)}, or a JSON file.")
        if self.spread is not None:
            if self.spread_used is None:
                takers = " and ".join(name for name, schedule in SCHEDULES.items() if schedule.has_spread)
                raise SettingsError(f"--spread {self.spread:g} is for --schedule {takers} only.")
            if not 0 <= self.spread < 1:
                raise SettingsError(
                    f"--spread {self.spread:g} is not between 0 and 1. It is added to the share of experts removed at "
                    f"one end and subtracted at the other, for example {DEFAULT_SPREAD}."
                )
        if self.floor is not None and self.floor < 1:
            raise SettingsError(f"--floor {self.floor}: at least one expert per layer must stay.")

    @property
    def has_schedule_file(self) -> bool:
        """Whether the schedule is a file with a list instead of a name."""
        return self.schedule not in SCHEDULES

    @property
    def shares(self) -> dict[str, float] | None:
        """The share of tokens that the mix gives each source it names, with the sum 1; None without a mix."""
        if self.mix is None:
            return None
        stated = parse_mix(self.mix)
        return {name: share / sum(stated.values()) for name, share in stated.items()}

    @property
    def spread_used(self) -> float | None:
        """The spread of a linear schedule; None for the others."""
        if self.has_schedule_file or not SCHEDULES[self.schedule].has_spread:
            return None
        return DEFAULT_SPREAD if self.spread is None else self.spread

    @property
    def needs_all_layers(self) -> bool:
        """Whether experts can only be selected after all layers are scored."""
        # The threshold of super experts is taken over all layers.
        return self.protect_super_experts or (not self.has_schedule_file and SCHEDULES[self.schedule].needs_scores)


def parse_mix(text: str) -> dict[str, float]:
    """The shares of tokens in a text such as `code=0.7,general=0.3`; they need not sum to 1.

    Raises SettingsError for an invalid mix: shares that are negative or not numbers, or all 0.
    """
    shares: dict[str, float] = {}
    position = 0
    while position < len(text) <= _LONGEST and (entry := _ENTRY.match(text, position)):
        name, share = entry["name"].strip(), -1.0
        with suppress(ValueError):
            share = float(entry["share"])
        if not 0 <= share < math.inf:
            raise SettingsError(f"--mix: {show(entry[0])} gives no share, a number of at least 0. {_EXAMPLE}")
        if name in shares:
            raise SettingsError(f"--mix names {show(name)} twice. {_EXAMPLE}")
        shares[name] = share
        position = entry.end()
    if position < len(text) or not shares or "" in shares:
        raise SettingsError(f"--mix {show(text)} is not a list of sources with their shares. {_EXAMPLE}")
    if not 0 < sum(shares.values()) < math.inf:
        raise SettingsError(f"--mix {show(text)}: the shares have the sum {sum(shares.values()):g}. {_EXAMPLE}")
    return shares


def token_shares(mix: str | None, sources: Sequence[str], tokens: Sequence[int]) -> dict[str, float]:
    """The share of each source in all tokens, weighted by the mix. Raises like `mix_weights`."""
    counted = [weight * count for weight, count in zip(mix_weights(mix, sources, tokens), tokens, strict=True)]
    return {name: part / sum(counted) for name, part in zip(sources, counted, strict=True)}


def mix_weights(mix: str | None, sources: Sequence[str], tokens: Sequence[int]) -> tuple[float, ...]:
    """How often each token of each source counts, so that the sources have the shares of tokens that `mix` states.

    The weight of source s is share_s · T / T_s, with T_s its tokens and T those of all sources: a mix that equals the
    sources' real shares has weights 1, as has no mix at all. Sources that the mix does not name get 0. Raises
    SettingsError for names that are not sources.
    """
    if mix is None:
        return (1.0,) * len(sources)
    shares = parse_mix(mix)
    known = ", ".join(f"{name} ({count:,} tokens)" for name, count in zip(sources[:20], tokens, strict=False))
    known += f" and {len(sources) - 20} more" if len(sources) > 20 else ""
    unknown = [name for name in shares if name not in sources]
    if unknown:
        raise SettingsError(f"--mix: there is no source {show(unknown[0])}. The scores have: {known}.")
    empty = [name for name, count in zip(sources, tokens, strict=True) if shares.get(name) and not count]
    if empty:
        raise SettingsError(f"--mix: source {empty[0]} has no tokens to count. The scores have: {known}.")
    total, all_tokens = sum(shares.values()), sum(tokens)
    return tuple(
        shares[name] / total * (all_tokens / count) if shares.get(name) else 0.0
        for name, count in zip(sources, tokens, strict=True)
    )
