"""What the mix of the calibration text does to the demo's model: scored once, then pruned in many ways and measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from streamprune.choice.choose import Choice
from streamprune.choice.retention import retentions
from streamprune.demo.data import HELD_OUT_SEQUENCES
from streamprune.demo.measure import HeldOut, held_out_text
from streamprune.demo.recipe import write_recipe
from streamprune.demo.result import CODE, Damage
from streamprune.demo.train import torch_threads, trained_model
from streamprune.errors import SettingsError
from streamprune.evaluation.summary import Sums
from streamprune.pruning import prune
from streamprune.run import run
from streamprune.scores.file import read_scores
from streamprune.scores.scores import Scores
from streamprune.settings import PruneSettings, RunSettings
from streamprune.text.corpus import DOMAINS

#: Everything but code, the way a user who cares for code speaks of it.
GENERAL = tuple(name for name in DOMAINS if name != CODE)
BALANCED = "balanced"
#: What the sources count, as `--mix` takes it: `general` is the other domains, each alike.
MIXES = {
    "code only": {CODE: 1},
    "70/30": {CODE: 7} | dict.fromkeys(GENERAL, 1),
    "50/50": {CODE: len(GENERAL)} | dict.fromkeys(GENERAL, 1),
    BALANCED: dict.fromkeys(DOMAINS, 1),
}
RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Setup:
    """One way to prune: a mix of MIXES, the share of experts to remove, and how they are chosen.

    `seed` matters to the method `random` only.
    """

    mix: str
    ratio: float
    method: str = "reap"
    schedule: str = "uniform"
    seed: int = 0

    def settings(self, model: Path, scores: Path, output: Path) -> PruneSettings:
        """What `streamprune prune` is told."""
        return PruneSettings(
            model=str(model),
            output=output,
            scores=scores,
            ratio=self.ratio,
            mix=",".join(f"{name}={share}" for name, share in MIXES[self.mix].items()),
            method=self.method,
            schedule=self.schedule,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Cell(Damage):
    """What one setup left of the model: beside the damage the experts kept by layer, and by domain the share of its
    saliency that they have (`choice.retention`)."""

    setup: Setup
    counts: tuple[int, ...]
    retention: Mapping[str, float]

    def general(self, values: Mapping[str, float]) -> float:
        """The mean over all domains but code."""
        return fmean(values[name] for name in GENERAL)


@dataclass(frozen=True)
class Study:
    """All that was measured, the setups in the order they were given. `training_seconds` is None if the model was
    found ready; `model` is its folder. `sums` is, for each setup, what its figures follow from, by domain."""

    model: Path
    training_seconds: float | None
    calibration_tokens: int
    before: Damage
    cells: tuple[Cell, ...]
    sums: Mapping[Setup, tuple[Sums, ...]] = field(repr=False)

    def cell(self, setup: Setup) -> Cell:
        """The cell of one setup; KeyError if it was not made."""
        for each in self.cells:
            if each.setup == setup:
                return each
        raise KeyError(setup)


def study(
    folder: Path,
    setups: Iterable[Setup],
    steps: int = 700,
    seed: int = 0,
    echo: Callable[[str], None] = print,
    held_out: int = HELD_OUT_SEQUENCES,
) -> Study:
    """Train (or find) the demo's model under `folder`, score it once with every domain as a source, and prune it by
    each of the setups. The pruned models are measured on `held_out` sequences of each domain, and removed.

    One thread does all of it, so that the same digits come out every time. Raises StreampruneError: see
    `trained_model`, `run` and `prune`.
    """
    if not 1 < held_out <= HELD_OUT_SEQUENCES:
        raise SettingsError(
            f"{held_out} held-out sequences of each domain: 2 to {HELD_OUT_SEQUENCES} are possible (an interval needs "
            "two)."
        )
    wanted = list(dict.fromkeys(setups))
    for setup in wanted:
        # What is impossible is refused before minutes of training.
        setup.settings(folder, folder, folder)
    with torch_threads(1), tempfile.TemporaryDirectory(prefix="streamprune-mixes-") as name:
        trained = trained_model(folder, steps, seed, 1, echo)
        scratch = Path(name)
        scores_file = _score(trained.folder, trained.calibration, scratch)
        scores = read_scores(scores_file)
        # At even distances: from as many documents as there are.
        text = {
            domain: rows[torch.arange(held_out) * len(rows) // held_out] for domain, rows in trained.held_out.items()
        }
        measured_on = held_out_text(trained.folder, text, scratch)
        before = measured_on.measure(trained.folder).damage
        cells, sums = [], {}
        for number, setup in enumerate(wanted, 1):
            settings = setup.settings(trained.folder, scores_file, scratch / f"pruned-{number}")
            cell, sums[setup] = _prune_and_measure(setup, settings, scores, measured_on)
            cells.append(cell)
            if number % 10 == 0 or number == len(wanted):
                echo(f"  {number} of {len(wanted)} models pruned and measured")
    return Study(trained.folder, trained.seconds, scores.tokens, before, tuple(cells), sums)


def _score(model: Path, calibration: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Score the model on all calibration sequences, with a source per domain; gives the file of scores.

    (The demo's own sequences and not `builtin`, which is drawn from the same text as what is held out.)
    """
    recipe = write_recipe(folder, "calibration", calibration)
    scores = folder / "scores.safetensors"
    settings = RunSettings(model=str(model), output=scores, only_score=True, calibration=(str(recipe),), device="cpu")
    run(settings, quiet=True)
    return scores


def _prune_and_measure(
    setup: Setup, settings: PruneSettings, scores: Scores, held_out: HeldOut
) -> tuple[Cell, tuple[Sums, ...]]:
    layers = prune(settings, quiet=True).layers
    choice = Choice(layers)
    kept = retentions(scores.layers, scores.sources, choice, scores.spec.groups)
    # Standard models need no code of their own, and must not.
    found = held_out.measure(settings.output, trust_remote_code=not choice.is_uniform)
    cell = Cell(
        losses=found.damage.losses,
        divergences=found.damage.divergences,
        setup=setup,
        counts=choice.counts,
        retention={each.source: each.kept for each in kept},
    )
    return cell, found.sums


def mix_setups(ratios: Sequence[float] = RATIOS) -> list[Setup]:
    """Every mix with every share removed, as `reap` and `uniform` choose."""
    return [Setup(mix, ratio) for ratio in ratios for mix in MIXES]


def choice_setups(
    methods: Sequence[str], schedules: Sequence[str], ratios: Sequence[float], random_seeds: Sequence[int]
) -> list[Setup]:
    """Every method with every schedule at every share removed, with the balanced mix; `random` with several seeds."""
    return [
        Setup(BALANCED, ratio, method, schedule, seed)
        for ratio in ratios
        for method in methods
        for schedule in schedules
        for seed in (random_seeds if method == "random" else (0,))
    ]
