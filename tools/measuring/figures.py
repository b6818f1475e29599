"""What the tools that measure pruned models on the demo's held-out text share: the text, means with intervals, and
what their JSON says about how it was made.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from measuring.training import HELD_OUT_SEQUENCES
from streamprune import __version__
from streamprune.calibration.sequences import Calibration
from streamprune.demo.demo import DemoModel, read_held_out
from streamprune.errors import SettingsError
from streamprune.evaluation.metrics import TOKENS, Sums, joined

#: The figure over all domains, which count alike.
MEAN = "mean"
#: The columns of `Sums` that are shown.
KL, LOSS = "kl", "loss"


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, in nats, and its 95 % bootstrap interval: what other text of the kind might have given."""

    mean: float
    low: float
    high: float

    @property
    def is_apart_from_zero(self) -> bool:
        """Whether the interval is all on one side of zero."""
        return self.low > 0 or self.high < 0


def check_held_out(held_out: int) -> None:
    """Raise SettingsError for a number of held-out sequences of each domain that cannot be measured on."""
    if not 1 < held_out <= HELD_OUT_SEQUENCES:
        raise SettingsError(
            f"{held_out} held-out sequences of each domain: 2 to {HELD_OUT_SEQUENCES} are possible (an interval needs "
            "two)."
        )


def evenly(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the rows at equal distances, so that they come from as many documents as there are."""
    return rows[torch.arange(count) * len(rows) // count]


def held_out_text(model: DemoModel, count: int, folder: Path) -> Calibration:
    """`count` held-out sequences of each domain, as text for `measure`; files go to `folder`."""
    return read_held_out(model.folder, {name: evenly(rows, count) for name, rows in model.held_out.items()}, folder)


def combined(models: Sequence[Sums], weights: Sequence[float]) -> Sums:
    """Figures of several models on the same text, added up with weights; 1 and -1 give the difference of two.

    Since the same sequences are drawn of each, its interval is that of a paired bootstrap.
    """

    def add(name: str, each: Sequence[torch.Tensor]) -> torch.Tensor:
        total = sum(weight * values for weight, values in zip(weights, each, strict=True))
        return each[0] if name == TOKENS else torch.as_tensor(total)

    return replace(
        models[0],
        columns={name: add(name, [model.columns[name] for model in models]) for name in models[0].columns},
        drawn={name: add(name, [model.drawn[name] for model in models]) for name in models[0].drawn},
        kl=None,
    )


def estimates(domains: Iterable[str], sums: Sequence[Sums], column: str) -> dict[str, Estimate]:
    """The mean of a column by domain and for MEAN, from the sums of each domain (two sequences or more)."""
    return {name: _estimate(part, column) for name, part in zip([*domains, MEAN], [*sums, joined(sums)], strict=True)}


def ratio(sums: Sequence[Sums], others: Sequence[Sums], column: str) -> Estimate:
    """The mean of a column over all domains, as a multiple of that of another model on the same text.

    The interval is that of a paired bootstrap.
    """
    own, other = joined(sums), joined(others)
    # `Sums` divides by the number of tokens: with the other model's sum in its place it gives ratios.
    part = replace(
        own,
        columns={column: own.columns[column], TOKENS: other.columns[column]},
        drawn={column: own.drawn[column], TOKENS: other.drawn[column]},
        kl=None,
    )
    return _estimate(part, column)


def _estimate(part: Sums, column: str) -> Estimate:
    interval = part.interval(column)
    assert interval is not None, "two sequences or more of each domain are measured on: `check_held_out`"
    return Estimate(part.mean(column), *interval)


def made_by(seconds: float) -> Mapping[str, Any]:
    """When figures were made, on what machine with which versions, and how long that took."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "streamprune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "seconds": round(seconds, 1),
    }
