"""Share removed × method × schedule: what each choice costs every domain, and which of the differences are more than
the luck of the text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streamprune.demo.mixes import Setup, Study
from streamprune.demo.report import table
from streamprune.evaluation.summary import Sums, combined, joined

#: The figure over all domains, which count alike.
MEAN = "mean"
#: The columns of `Sums` that the table tells of.
KL, LOSS = "kl", "loss"
#: What the others are compared with: what `streamprune run` does unless told otherwise.
REFERENCE = ("reap", "uniform")
WIDTH = 120
_REFERENCE_WORDS = " with ".join(REFERENCE)


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
    told = []
    for (ratio, method, schedule), group in grouped.items():
        models = zip(*(study.sums[setup] for setup in group), strict=True)
        own = [combined(domain, [1 / len(group)] * len(group)) for domain in models]
        usual = study.sums[replace(group[0], method=REFERENCE[0], schedule=REFERENCE[1], seed=0)]
        change = [combined(pair, [1, -1]) for pair in zip(own, usual, strict=True)]
        figures = [_estimates(study, sums, column) for sums in (own, change) for column in (KL, LOSS)]
        told.append(Outcome(ratio, method, schedule, tuple(setup.seed for setup in group), *figures))
    return told


def _estimates(study: Study, sums: Sequence[Sums], column: str) -> dict[str, Estimate]:
    told = {}
    for name, part in zip([*study.before.losses, MEAN], [*sums, joined(sums)], strict=True):
        interval = part.interval(column)
        assert interval is not None, "a study measures on two sequences or more of each domain"
        told[name] = Estimate(part.mean(column), *interval)
    return told


def outcome_tables(told: Sequence[Outcome]) -> Iterator[str]:
    """Lines: for KL divergence and for loss a table per share removed, and below it what the text leaves open."""
    yield from textwrap.wrap(
        "What each method and schedule costs each domain, balanced mix. ± is half of the 95 % interval of a bootstrap "
        "over the held-out sequences. The last column is the difference of the mean from that of "
        f"{_REFERENCE_WORDS}, taken sequence by sequence, with an interval of its own: sharper than comparing two "
        "intervals. All of it tells of other text, not of other models, nor of other draws of `random` (of which the "
        "mean is shown); and where nothing differs, one comparison in twenty would still seem to.",
        WIDTH,
        break_on_hyphens=False,
    )
    for ratio in dict.fromkeys(each.ratio for each in told):
        part = [each for each in told if each.ratio == ratio]
        yield ""
        yield f"KL divergence from the unpruned model, in nats per token, {ratio:.0%} removed"
        yield from _table([(each, each.kl, each.kl_difference) for each in part])
        yield from _verdict([(each, each.kl_difference) for each in part], "damage")
        yield ""
        yield f"Held-out loss in nats per token, {ratio:.0%} removed"
        yield from _table([(each, each.loss, each.loss_difference) for each in part])
        yield from _verdict([(each, each.loss_difference) for each in part], "loss")


def _table(rows: Sequence[tuple[Outcome, Mapping[str, Estimate], Mapping[str, Estimate]]]) -> list[str]:
    return table(
        ["method, schedule", *rows[0][1], "difference"],
        [
            [
                f"{each.method}, {each.schedule}",
                *(_figure(estimate) for estimate in figures.values()),
                "" if each.is_reference else _figure(change[MEAN], "+.3f"),
            ]
            for each, figures, change in rows
        ],
    )


def _figure(estimate: Estimate, form: str = ".3f") -> str:
    return f"{estimate.mean:{form}} ±{(estimate.high - estimate.low) / 2:.3f}"


def _verdict(changes: Sequence[tuple[Outcome, Mapping[str, Estimate]]], what: str) -> list[str]:
    """Which choices differ from the reference in the mean by more than the paired interval, and which do not."""
    others = [(each, change[MEAN]) for each, change in changes if not each.is_reference]
    groups = {
        f"Less {what} than {_REFERENCE_WORDS}": [each for each, change in others if change.high < 0],
        "More": [each for each, change in others if change.low > 0],
        "Not told apart from it": [each for each, change in others if not change.is_apart_from_zero],
    }
    schedules = len({each.schedule for each, _ in changes})
    said = ". ".join(f"{words}: {_listed(group, schedules)}" for words, group in groups.items())
    return textwrap.wrap(f"{said}.", WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _listed(group: Sequence[Outcome], schedules: int) -> str:
    by_method: dict[str, list[str]] = {}
    for each in group:
        by_method.setdefault(each.method, []).append(each.schedule)
    told = [
        f"{method} with {'every schedule' if len(names) == schedules > 1 else ', '.join(names)}"
        for method, names in by_method.items()
    ]
    return "; ".join(told) or "none"
