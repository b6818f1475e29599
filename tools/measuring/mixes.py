"""What calibration mixes, methods and schedules cost the demo's model: scored once, pruned in many ways, measured.

Whether domain retention, which is known before pruning, predicts the damage that is measured afterwards; and which
differences between methods and schedules are larger than those that other text of the same kind would make.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np

from measuring.figures import KL, LOSS, MEAN, Estimate, check_held_out, combined, estimates, held_out_text
from measuring.training import HELD_OUT_SEQUENCES
from streamprune.calibration.builtin_text import DOMAINS
from streamprune.calibration.sequences import Calibration
from streamprune.config import PruneSettings, RunSettings
from streamprune.demo.demo import (
    CODE,
    Damage,
    DemoModel,
    Echo,
    figures_by_domain,
    measure,
    one_thread,
    write_recipe,
)
from streamprune.evaluation.metrics import Sums
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import run
from streamprune.saliency.scores import Array, Scores
from streamprune.saliency.scores_file import read_scores
from streamprune.selection.retention import retentions
from streamprune.selection.select import Selection
from streamprune.tables import Table

#: All domains but code.
GENERAL = tuple(name for name in DOMAINS if name != CODE)
BALANCED = "balanced"
#: The sources' shares, as `--mix` takes them.
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
        """The settings of `streamprune prune`."""
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
    """The result of one setup: besides the damage the experts kept by layer, and by domain the share of its saliency
    that the kept experts have (`selection.retention`)."""

    setup: Setup
    counts: tuple[int, ...]
    retention: Mapping[str, float]

    def general(self, values: Mapping[str, float]) -> float:
        """The mean over all domains but code."""
        return fmean(values[name] for name in GENERAL)


@dataclass(frozen=True)
class Study:
    """All that was measured, the setups in the order given. `sums` holds by setup what its figures follow from."""

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


def check_setups(setups: Iterable[Setup], held_out: int) -> None:
    """Raise SettingsError for what is impossible, before a model is trained for it."""
    check_held_out(held_out)
    for setup in setups:
        setup.settings(Path(), Path(), Path())


def study(model: DemoModel, setups: Iterable[Setup], echo: Echo = print, held_out: int = HELD_OUT_SEQUENCES) -> Study:
    """Score the demo's model once with every domain as a source, prune it by each of the setups, and measure the
    pruned models on `held_out` sequences of each domain.

    One thread does all of it, so that the same digits come out every time. Raises StreampruneError: see
    `check_setups`, `run` and `prune`.
    """
    wanted = list(dict.fromkeys(setups))
    check_setups(wanted, held_out)
    with one_thread(), tempfile.TemporaryDirectory(prefix="streamprune-mixes-") as name:
        scratch = Path(name)
        scores_file = _score(model, scratch)
        scores = read_scores(scores_file)
        text = held_out_text(model, held_out, scratch)
        evaluation = measure(model.folder, model.folder, text)
        before = Damage(figures_by_domain(evaluation, "loss"), figures_by_domain(evaluation, "kl"))
        cells, sums = [], {}
        for number, setup in enumerate(wanted, 1):
            settings = setup.settings(model.folder, scores_file, scratch / f"pruned-{number}")
            cell, sums[setup] = _prune_and_measure(setup, settings, scores, text)
            cells.append(cell)
            if number % 10 == 0 or number == len(wanted):
                echo(f"  {number} of {len(wanted)} models pruned and measured")
    return Study(scores.tokens, before, tuple(cells), sums)


def _score(model: DemoModel, folder: Path) -> Path:
    """Score the model on all calibration sequences, with a source per domain; returns the scores file.

    (The demo's own sequences and not `builtin`, which is drawn from the same text as the held-out sequences.)
    """
    recipe = write_recipe(folder, "calibration", model.calibration)
    scores = folder / "scores.safetensors"
    settings = RunSettings(
        model=str(model.folder), output=scores, only_score=True, calibration=(str(recipe),), device="cpu"
    )
    run(settings, quiet=True)
    return scores


def _prune_and_measure(
    setup: Setup, settings: PruneSettings, scores: Scores, text: Calibration
) -> tuple[Cell, tuple[Sums, ...]]:
    choice = Selection(prune(settings, quiet=True).layers)
    kept = retentions(scores, choice)
    # Models with the same number of experts in every layer bring no code, and must not need any.
    evaluation = measure(settings.output, Path(settings.model), text, trust_remote_code=not choice.is_uniform)
    cell = Cell(
        losses=figures_by_domain(evaluation, "loss"),
        divergences=figures_by_domain(evaluation, "kl"),
        setup=setup,
        counts=choice.counts,
        retention={each.source: each.kept for each in kept},
    )
    return cell, evaluation.sums


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


@dataclass(frozen=True)
class Pairs:
    """Of `total` pairs of choices and a domain, the `agreeing` ones: the choice that keeps more of the domain's
    saliency damages it less."""

    agreeing: int
    total: int

    @property
    def share(self) -> float:
        """The share that agrees; a coin would have a half."""
        return self.agreeing / self.total if self.total else float("nan")


@dataclass(frozen=True)
class Extremes:
    """One cell: the domain with the largest KL, and the domain that keeps the smallest share of its saliency."""

    cell: Cell
    most_damaged: str
    least_retained: str

    @property
    def agree(self) -> bool:
        """Whether they are the same domain."""
        return self.most_damaged == self.least_retained


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where one of the two is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    below, up_to = (array[:, None] > array).sum(1), (array[:, None] >= array).sum(1)
    ranks: Array = (below + up_to - 1) / 2
    return ranks


def correlation(cells: Iterable[Cell], relative: bool = False) -> float:
    """Spearman's correlation of retention and KL over every cell and domain; -1 if more kept is always less lost.

    With `relative` both are ranked within each domain, so that differences between domains do not count.
    """
    listed = list(cells)
    kept: list[float] = []
    lost: list[float] = []
    for domain in listed[0].divergences if listed else ():
        for values, wanted in (
            (kept, [cell.retention[domain] for cell in listed]),
            (lost, [cell.divergences[domain] for cell in listed]),
        ):
            values += _ranks(wanted).tolist() if relative else wanted
    return spearman(kept, lost)


def pairs(cells: Iterable[Cell]) -> Pairs:
    """Every two choices at the same share removed, by domain. Pairs that keep or lose the same do not count."""
    agreeing = total = 0
    for one, other in combinations(list(cells), 2):
        if one.setup.ratio != other.setup.ratio:
            continue
        for domain in one.divergences:
            kept = one.retention[domain] - other.retention[domain]
            lost = one.divergences[domain] - other.divergences[domain]
            total += bool(kept and lost)
            agreeing += kept * lost < 0
    return Pairs(agreeing, total)


def extremes(cell: Cell) -> Extremes:
    """The most damaged and the least retained domain of a cell; of equal ones the first."""
    damage, kept = cell.divergences, cell.retention
    return Extremes(cell, max(damage, key=damage.__getitem__), min(kept, key=kept.__getitem__))


#: What the others are compared with: `streamprune run`'s defaults.
REFERENCE = ("reap", "uniform")
WIDTH = 120
_REFERENCE_WORDS = " with ".join(REFERENCE)


@dataclass(frozen=True)
class Outcome:
    """One method and schedule at one share removed: by domain and for MEAN the KL divergence and the loss.

    Several `seeds` (of the method `random`) give their mean. The differences are those from REFERENCE at the same
    share: of each held-out sequence by itself, which is sharper than to compare the intervals of the two.
    """

    ratio: float
    method: str
    schedule: str
    seeds: tuple[int, ...]
    kl: Mapping[str, Estimate]
    loss: Mapping[str, Estimate]
    kl_difference: Mapping[str, Estimate]
    loss_difference: Mapping[str, Estimate]

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are compared with."""
        return (self.method, self.schedule) == REFERENCE


def outcomes(study: Study, setups: Iterable[Setup]) -> list[Outcome]:
    """An outcome per share removed, method and schedule, in the order of the setups, which are all of one mix.

    KeyError unless the study has REFERENCE at every share.
    """
    grouped: dict[tuple[float, str, str], list[Setup]] = {}
    for setup in setups:
        grouped.setdefault((setup.ratio, setup.method, setup.schedule), []).append(setup)
    found = []
    for (ratio, method, schedule), group in grouped.items():
        models = zip(*(study.sums[setup] for setup in group), strict=True)
        own = [combined(domain, [1 / len(group)] * len(group)) for domain in models]
        usual = study.sums[replace(group[0], method=REFERENCE[0], schedule=REFERENCE[1], seed=0)]
        change = [combined(pair, [1, -1]) for pair in zip(own, usual, strict=True)]
        figures = [estimates(study.before.losses, sums, column) for sums in (own, change) for column in (KL, LOSS)]
        found.append(Outcome(ratio, method, schedule, tuple(setup.seed for setup in group), *figures))
    return found


def outcome_tables(found: Sequence[Outcome]) -> Iterator[str]:
    """Lines: a table per share removed for KL divergence and for loss, each followed by what differs significantly."""
    yield from textwrap.wrap(
        "What each method and schedule costs each domain, balanced mix. ± is half of the 95 % interval of a bootstrap "
        "over the held-out sequences. The last column is the difference of the mean from that of "
        f"{_REFERENCE_WORDS}, taken sequence by sequence, with an interval of its own: sharper than comparing two "
        "intervals. Intervals are about other text, not about other models or other draws of `random` (whose mean is "
        "shown); and where nothing differs, one comparison in twenty would still seem to.",
        WIDTH,
        break_on_hyphens=False,
    )
    for ratio in dict.fromkeys(each.ratio for each in found):
        part = [each for each in found if each.ratio == ratio]
        yield ""
        yield f"KL divergence from the unpruned model, in nats per token, {ratio:.0%} removed"
        yield from _table([(each, each.kl, each.kl_difference) for each in part])
        yield from _verdict([(each, each.kl_difference) for each in part], "damage")
        yield ""
        yield f"Held-out loss in nats per token, {ratio:.0%} removed"
        yield from _table([(each, each.loss, each.loss_difference) for each in part])
        yield from _verdict([(each, each.loss_difference) for each in part], "loss")


def _table(rows: Sequence[tuple[Outcome, Mapping[str, Estimate], Mapping[str, Estimate]]]) -> list[str]:
    cells = [
        [
            f"{each.method}, {each.schedule}",
            *(_figure(estimate) for estimate in figures.values()),
            "" if each.is_reference else _figure(change[MEAN], "+.3f"),
        ]
        for each, figures, change in rows
    ]
    return Table("", ["method, schedule", *rows[0][1], "difference"], cells).text()


def _figure(estimate: Estimate, form: str = ".3f") -> str:
    return f"{estimate.mean:{form}} ±{(estimate.high - estimate.low) / 2:.3f}"


def _verdict(changes: Sequence[tuple[Outcome, Mapping[str, Estimate]]], what: str) -> list[str]:
    """Which choices differ from the reference in the mean by more than the paired interval, and which do not."""
    others = [(each, change[MEAN]) for each, change in changes if not each.is_reference]
    groups = {
        f"Less {what} than {_REFERENCE_WORDS}": [each for each, change in others if change.high < 0],
        "More": [each for each, change in others if change.low > 0],
        "No significant difference": [each for each, change in others if not change.is_apart_from_zero],
    }
    schedules = len({each.schedule for each, _ in changes})
    said = ". ".join(f"{words}: {_listed(group, schedules)}" for words, group in groups.items())
    return textwrap.wrap(f"{said}.", WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _listed(group: Sequence[Outcome], schedules: int) -> str:
    by_method: dict[str, list[str]] = {}
    for each in group:
        by_method.setdefault(each.method, []).append(each.schedule)
    groups = [
        f"{method} with {'every schedule' if len(names) == schedules > 1 else ', '.join(names)}"
        for method, names in by_method.items()
    ]
    return "; ".join(groups) or "none"
