"""Measures what a pruned model lost: by `streamprune eval` on held-out text, with the unpruned model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from streamprune.demo.recipe import write_recipe
from streamprune.demo.result import Damage
from streamprune.evaluation.evaluate import examine, read_data
from streamprune.evaluation.settings import EvalSettings
from streamprune.evaluation.summary import Sums
from streamprune.progress import Progress
from streamprune.text.calibration import Calibration


@dataclass(frozen=True)
class Found:
    """What one model lost, and the sums that it follows from by domain, in the order of `damage`."""

    damage: Damage
    sums: tuple[Sums, ...] = field(repr=False)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text with a source per domain, and the folder of the unpruned model that others are compared with."""

    original: Path
    data: Calibration = field(repr=False)

    def measure(self, model: Path, trust_remote_code: bool = False) -> Found:
        """Mean next-token loss and mean KL(unpruned ‖ model) by domain, in nats per token.

        Models with different numbers of experts per block come with code: `trust_remote_code`. Raises a
        StreampruneError for a model that cannot be streamed.
        """
        settings = _settings(model, self.original, (), trust_remote_code)
        with Progress(0, quiet=True) as progress:
            evaluation = examine(settings, self.data, progress)
        sources = evaluation.result["sources"]
        losses, divergences = ({each["name"]: each[what] for each in sources} for what in ("loss", "kl"))
        return Found(Damage(losses, divergences), evaluation.sums)


def held_out_text(original: Path, domains: Mapping[str, torch.Tensor], folder: Path) -> HeldOut:
    """The token ids of each domain, (N, L), read as `streamprune eval` reads them: from a recipe, left in `folder`."""
    recipe = write_recipe(folder, "held-out", domains)
    return HeldOut(original, read_data(_settings(original, None, (str(recipe),), False)))


def _settings(model: Path, original: Path | None, data: tuple[str, ...], trust_remote_code: bool) -> EvalSettings:
    return EvalSettings(
        model=str(model),
        against=str(original) if original is not None else None,
        data=data,
        trust_remote_code=trust_remote_code,
        device="cpu",
    )
