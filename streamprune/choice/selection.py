"""How the experts that stay are chosen: the settings of it, checked when they are made. How many stay is said apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamprune.choice.mix import parse_mix
from streamprune.errors import SettingsError
from streamprune.settings import METHODS, SCHEDULES

LINEAR = ("linear-decrease", "linear-increase")
DEFAULT_SPREAD = 0.15


@dataclass(frozen=True)
class Selection:
    """What ranks the experts, and how their number is divided among the layers.

    - `method`: one of `settings.METHODS`; `seed` is for `random`.
    - `mix`: shares of the sources, such as `code=0.5,general=0.5`; None counts every token once.
    - `schedule`: one of SCHEDULES, or a JSON file with a list. `spread` (None: DEFAULT_SPREAD) is for the linear ones.
    - `floor`: the fewest experts that any layer keeps, if that is more than the router needs.
    - `protect_super_experts`: keep those that `super_experts` finds, whatever their score.

    Raises SettingsError when a value is impossible whatever the model.
    """

    method: str = "reap"
    mix: str | None = None
    schedule: str = "uniform"
    spread: float | None = None
    floor: int | None = None
    protect_super_experts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"--method {self.method!r} is unknown. Choose one of: {', '.join(METHODS)}.")
        if self.mix is not None:
            parse_mix(self.mix)
        if not self.schedule:
            raise SettingsError(f"--schedule is empty. Choose one of: {', '.join(SCHEDULES)}, or a JSON file.")
        if self.spread is not None:
            if self.schedule not in LINEAR:
                raise SettingsError(f"--spread {self.spread:g} is for --schedule {' and '.join(LINEAR)} only.")
            if not (math.isfinite(self.spread) and 0 <= self.spread < 1):
                raise SettingsError(
                    f"--spread {self.spread:g} is not between 0 and 1. It is added to the share of experts removed at "
                    f"one end and taken off at the other, for example {DEFAULT_SPREAD}."
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
        if self.schedule not in LINEAR:
            return None
        return DEFAULT_SPREAD if self.spread is None else self.spread

    @property
    def needs_all_layers(self) -> bool:
        """Whether no layer can be decided before all of them are scored."""
        # The thresholds of super experts are taken over all layers, as is the ranking of `global`.
        return self.schedule == "global" or self.protect_super_experts
