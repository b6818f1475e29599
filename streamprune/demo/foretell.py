"""Whether domain retention, which is known before pruning, foretells the damage, which is measured afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from streamprune.demo.mixes import Cell
from streamprune.scores.statistics import Array


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

    With `relative` both are ranked within each domain: that a domain is harmed more easily than others, however much
    of it is kept, then does not count.
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
