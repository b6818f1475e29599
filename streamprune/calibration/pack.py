"""From documents to sequences of tokens: how much of each source is wanted, and how documents are packed or cut.

Sequences are made as they are needed, so that of a long source only a part is read. Nothing is padded, so that no
padding is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch

from streamprune.calibration.hub_data import open_dataset
from streamprune.calibration.recipe import Recipe, Source
from streamprune.calibration.records import TokenMaker, record_of
from streamprune.calibration.sources import Row, files_of, read_builtin, read_files, shuffled
from streamprune.config import DEFAULT_SAMPLES
from streamprune.errors import CalibrationError

#: Lengths that a bucketed document may have between one power of two and the next.
BUCKETS = 16


class Packer:
    """Divides documents, laid end to end, into full sequences of `length` tokens, each beginning with `prefix`."""

    def __init__(self, prefix: list[int], length: int) -> None:
        self._prefix, self._length = prefix, length
        self._buffer: list[int] = []

    def add(self, document: list[int]) -> Iterator[list[int]]:
        """Lay a document behind the last one; the sequences that are full now."""
        self._buffer += document
        begin = 0
        while True:
            head = _missing(self._prefix, self._buffer, begin)
            end = begin + self._length - len(head)
            if end > len(self._buffer):
                break
            yield head + self._buffer[begin:end]
            begin = end
        del self._buffer[:begin]


class Cutter:
    """Makes every document a sequence by itself, cut at `length`, and `bucketed` at the bucket below its own length."""

    def __init__(self, prefix: list[int], length: int, bucketed: bool) -> None:
        self._prefix, self._length, self._bucketed = prefix, length, bucketed

    def add(self, document: list[int]) -> Iterator[list[int]]:
        """The document's sequence; none for a document without tokens."""
        if document:
            sequence = (_missing(self._prefix, document, 0) + document)[: self._length]
            yield sequence[: bucket(len(sequence))] if self._bucketed else sequence


def bucket(length: int) -> int:
    """The largest bucket's length that is not above `length`: one of sixteen between two powers of two."""
    step = max(1, (1 << (length.bit_length() - 1)) // BUCKETS)
    return length // step * step


def _missing(prefix: list[int], tokens: list[int], begin: int) -> list[int]:
    """What has to stand before these tokens: chat templates write the beginning-of-text token themselves."""
    return [] if prefix and tokens[begin : begin + len(prefix)] == prefix else prefix


#: How far the share that a source has of the tokens may be from the one that was asked for before the user is told.
TOLERANCE = 0.01


@dataclass(frozen=True)
class SourceTarget:
    """What is wanted of a source: so many sequences, or tokens, or records; and its share of all tokens, if stated."""

    sequences: int | None = None
    tokens: int | None = None
    records: int | None = None
    share: float | None = None


def goals_of(recipe: Recipe, samples: int | None, length: int) -> list[SourceTarget]:
    """What is wanted of each source. `samples` is the user's number of sequences instead of the recipe's.

    Raises CalibrationError where a source with a share would get nothing.
    """
    if recipe.by_count:
        counts = [source.samples or 0 for source in recipe.sources]
        if samples is not None:
            counts = divided(samples, counts)
        _check_goals(recipe, counts, "records")
        return [SourceTarget(records=count, sequences=None if recipe.mode == "packed" else count) for count in counts]
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
        return [SourceTarget(sequences=count) for count in counts]
    if recipe.mode == "packed":
        _check_goals(recipe, counts, f"sequences of {length} tokens")
        goals = [count * length for count in counts]
    else:
        goals = divided(tokens, weights)
        _check_goals(recipe, goals, "tokens")
    return [
        SourceTarget(tokens=goal, share=share, records=source.samples)
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


#: Built-in documents that are held at a time: the seed decides their order already, but pieces of one module follow
#: one another. Making many more would take seconds.
_HELD_BUILTIN = 64
#: Seeds of the libraries that shuffle are no larger.
_SEEDS = 2**32


@dataclass(frozen=True)
class _Made:
    """A sequence, and where it belongs among those of its source. Ready ones are never cut."""

    place: tuple[int, int]
    ids: list[int]
    is_ready: bool


@dataclass
class OpenedSource:
    """A source that is open for reading: rows with their numbers, in the order in which they are used."""

    rows: Iterator[tuple[int, Row]]
    left_out: list[Path] = field(default_factory=list)


def open_source(source: Source, seed: int, commit: str | None = None) -> OpenedSource:
    """Open a source; `commit` is that of its data set. Raises CalibrationError where it cannot be read."""
    seed = (seed if source.seed is None else source.seed) % _SEEDS
    rng = random.Random(seed)
    if source.builtin is not None:
        return OpenedSource(shuffled(read_builtin(source.builtin, seed), rng, _HELD_BUILTIN))
    if source.dataset is not None:
        return OpenedSource(shuffled(open_dataset(source, seed, commit), rng))
    taken, left_out = [], []
    for path in source.paths:
        files = files_of(path)
        taken += files[0]
        left_out += files[1]
    return OpenedSource(shuffled(read_files(taken, rng), rng), left_out)


class Supply:
    """What is taken of a source: `sequences` with int64 token ids (L,), `tokens` of them together.

    `records` were drawn for that. `length` is the sequence length.
    """

    def __init__(
        self, source: Source, recipe: Recipe, goal: SourceTarget, opened: OpenedSource, maker: TokenMaker, length: int
    ):
        self.source, self.goal = source, goal
        self.tokens = self.records = 0
        self._rows_seen = 0
        self._taken: list[tuple[tuple[int, int], torch.Tensor]] = []
        self._recipe, self._maker, self._length = recipe, maker, length
        self._made = self._make(opened.rows)

    @property
    def sequences(self) -> list[torch.Tensor]:
        """The sequences taken so far. Those of ready ids stand in the order of the source."""
        return [ids for _, ids in sorted(self._taken, key=lambda item: item[0])]

    def take(self, count: int) -> int:
        """Take up to `count` more sequences; how many there were."""
        for number in range(count):
            made = next(self._made, None)
            if made is None:
                return number
            self._keep(made)
        return count

    def take_tokens(self, goal: int) -> None:
        """Take sequences until there are `goal` tokens, or none are left. The last one is cut to size."""
        while self.tokens < goal:
            made = next(self._made, None)
            if made is None:
                return
            rest = goal - self.tokens
            if made.is_ready and self._taken and len(made.ids) > 2 * rest:
                # Too much by more than what is missing without it.
                return
            self._keep(made if made.is_ready else _Made(made.place, made.ids[:rest], False))

    def take_all(self) -> None:
        """Take all sequences of the records that may be drawn."""
        while self.take(1 << 10):
            pass

    def check_not_empty(self) -> None:
        """Raise CalibrationError, naming the source, if nothing was got of it."""
        name = self._recipe_name()
        if self._taken:
            return
        if self._rows_seen and not self.records and self.source.conditions:
            raise CalibrationError(f"{name}: none of its {self._rows_seen:,} records passes its 'filter'.")
        if not self.records:
            raise CalibrationError(f"{name}: there is no text in it. Give files that hold some.")
        raise CalibrationError(
            f"{name}: the text is shorter than one sequence of {self._length} tokens. Give more text or a smaller "
            "--seq-len."
        )

    def _recipe_name(self) -> str:
        if self._recipe.strict:
            return f"Source {self.source.name!r} of recipe {self._recipe.name!r}"
        return ", ".join(map(str, self.source.paths)) or self.source.name

    def check_goal(self) -> None:
        """Raise CalibrationError, naming the source, if it has less than what its recipe asks of it."""
        goal, name = self.goal, self._recipe_name()
        if goal.share is None and goal.records is not None and self.records < goal.records:
            raise CalibrationError(
                f"{name} is too short: it has {self.records:,} of the {goal.records:,} records that are asked for. "
                "Give it fewer 'samples', or all of them fewer with --samples."
            )
        if goal.tokens is None or self.tokens >= goal.tokens * 0.99:
            return
        within = f" in the {goal.records:,} records that may be drawn" if self.records == goal.records else ""
        raise CalibrationError(
            f"{name} is too short: it has {self.tokens:,} tokens{within}, {self.tokens / goal.tokens:.0%} of the "
            f"{goal.tokens:,} that its share of {goal.share or 0:.1%} asks for. Give fewer --samples, a smaller share, "
            "or more text."
        )

    def _keep(self, made: _Made) -> None:
        self._taken.append((made.place, torch.tensor(made.ids, dtype=torch.int64)))
        self.tokens += len(made.ids)

    def _make(self, rows: Iterator[tuple[int, Row]]) -> Iterator[_Made]:
        target: Packer | Cutter | None = None
        number = 0
        for index, row in rows:
            self._rows_seen += 1
            record = record_of(row, self.source)
            if record is None:
                continue
            self.records += 1
            if record.input_ids is not None:
                yield _Made((0, index), self._maker.ready(record), True)
            else:
                target = target or self._target()
                for ids in target.add(self._maker.document(record)):
                    number += 1
                    yield _Made((1, number), ids, False)
            if self.records == self.goal.records:
                return

    def _target(self) -> Packer | Cutter:
        if self._recipe.mode == "packed":
            return Packer(self._maker.prefix, self._length)
        return Cutter(self._maker.prefix, self._length, self._recipe.mode == "bucketed")
