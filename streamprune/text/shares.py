"""How much of each source: what its share asks for, and what is taken where it has less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from streamprune.errors import CalibrationError
from streamprune.settings import DEFAULT_SAMPLES
from streamprune.text.recipe import Recipe

#: How far the share that a source has of the tokens may be from the one that was asked for before the user is told.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Goal:
    """What is wanted of a source: so many sequences, or tokens, or records; and its share of all tokens, if stated."""

    sequences: int | None = None
    tokens: int | None = None
    records: int | None = None
    share: float | None = None


def goals_of(recipe: Recipe, samples: int | None, length: int) -> list[Goal]:
    """What is wanted of each source. `samples` is the user's number of sequences instead of the recipe's.

    Raises CalibrationError where a source with a share would get nothing.
    """
    if recipe.by_count:
        counts = [source.samples or 0 for source in recipe.sources]
        if samples is not None:
            counts = divided(samples, counts)
        _check_goals(recipe, counts, "records")
        return [Goal(records=count, sequences=None if recipe.mode == "packed" else count) for count in counts]
    weights = [source.share or 1.0 for source in recipe.sources]
    shares = [weight / sum(weights) for weight in weights]
    if samples is None and recipe.tokens is not None:
        tokens = recipe.tokens
        samples = max(1, tokens // length)
    else:
        samples = samples or recipe.samples or DEFAULT_SAMPLES
        tokens = samples * length
    counts = divided(samples, weights)
    if not recipe.strict:
        return [Goal(sequences=count) for count in counts]
    if recipe.mode == "packed":
        _check_goals(recipe, counts, f"sequences of {length} tokens")
        goals = [count * length for count in counts]
    else:
        goals = divided(tokens, weights)
        _check_goals(recipe, goals, "tokens")
    return [
        Goal(tokens=goal, share=share, records=source.samples)
        for goal, share, source in zip(goals, shares, recipe.sources, strict=True)
    ]


def _check_goals(recipe: Recipe, goals: Sequence[int], what: str) -> None:
    for source, goal in zip(recipe.sources, goals, strict=True):
        if goal == 0:
            raise CalibrationError(
                f"Source {source.name!r} of recipe {recipe.name!r} would get none of {sum(goals):,} {what}. Give more "
                "--samples."
            )


def divided(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts in proportion to weights, each less than 1 off; the largest remainders get one more."""
    # Exactly, since totals may be larger than what floating point can count.
    fractions = [Fraction(weight) for weight in weights]
    exact = [total * weight / sum(fractions) for weight in fractions]
    parts = [int(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


def fill_up(goals: Sequence[int], take: Callable[[int, int], int]) -> None:
    """Take as much as the goals say together; what some sources have not is taken of the others, in equal parts.

    `take(index, count)` takes up to `count` of a source and says how many it got: fewer if there are no more.
    """
    missing, wanted = sum(goals), dict(enumerate(goals))
    while missing and wanted:
        for index, count in list(wanted.items()):
            got = take(index, count)
            missing -= got
            if got < count:
                del wanted[index]
        wanted = dict(zip(wanted, divided(missing, [1.0] * len(wanted)), strict=True)) if wanted else {}
