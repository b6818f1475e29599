"""What the demo found, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

#: The two calibrations: every domain alike, and code alone (which is also that domain's name).
MIX = "mix"
CODE = "code"


@dataclass(frozen=True)
class Damage:
    """One model on the held-out text: domain -> nats per token.

    `losses` is the mean next-token loss, `divergences` the mean KL(unpruned ‖ this model).
    """

    losses: Mapping[str, float]
    divergences: Mapping[str, float]

    @property
    def mean_loss(self) -> float:
        """Over the domains, nats per token."""
        return fmean(self.losses.values())

    @property
    def mean_divergence(self) -> float:
        """Over the domains, nats per token."""
        return fmean(self.divergences.values())


@dataclass(frozen=True)
class Measured(Damage):
    """The same with the model's sizes; `experts` is per block."""

    experts: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Variant:
    """The model without a share `ratio` of its experts, chosen with one of the two calibrations (MIX or CODE)."""

    ratio: float
    calibration: str
    measured: Measured


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured. `model` and `output` are the folders of the unpruned and the pruned model,
    `calibration` is the mixed calibration file; `training_seconds` is None if the model was found ready."""

    model: Path
    output: Path
    calibration: Path
    training_seconds: float | None
    before: Measured
    variants: tuple[Variant, ...]

    def variant(self, ratio: float, calibration: str = MIX) -> Measured:
        """The figures of one variant; KeyError if it was not made."""
        for item in self.variants:
            if (item.ratio, item.calibration) == (ratio, calibration):
                return item.measured
        raise KeyError((ratio, calibration))

    @property
    def damages(self) -> tuple[tuple[float, float], ...]:
        """(share removed, mean KL in nats per token) of the variants calibrated on the mix, by rising share."""
        return tuple((item.ratio, item.measured.mean_divergence) for item in self.variants if item.calibration == MIX)

    @property
    def damage_is_graded(self) -> bool:
        """Whether removing more always did more damage."""
        values = [damage for _, damage in self.damages]
        return all(less < more for less, more in pairwise(values))
