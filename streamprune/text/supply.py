"""The sequences of one source, made as they are asked for: of a long source only a part is ever read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from streamprune.errors import CalibrationError
from streamprune.text.files import files_of, read_builtin, read_files
from streamprune.text.hub_data import open_dataset
from streamprune.text.pack import Cutter, Packer
from streamprune.text.recipe import Recipe, Source
from streamprune.text.records import record_of
from streamprune.text.rows import Row, shuffled
from streamprune.text.shares import Goal
from streamprune.text.tokens import TokenMaker

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
class Opened:
    """A source that is open for reading: rows with their numbers, in the order in which they are used."""

    rows: Iterator[tuple[int, Row]]
    left_out: list[Path] = field(default_factory=list)


def open_source(source: Source, seed: int, commit: str | None = None) -> Opened:
    """Open a source; `commit` is that of its data set. Raises CalibrationError where it cannot be read."""
    seed = (seed if source.seed is None else source.seed) % _SEEDS
    rng = random.Random(seed)
    if source.builtin is not None:
        return Opened(shuffled(read_builtin(source.builtin, seed), rng, _HELD_BUILTIN))
    if source.dataset is not None:
        return Opened(shuffled(open_dataset(source, seed, commit), rng))
    taken, left_out = [], []
    for path in source.paths:
        files = files_of(path)
        taken += files[0]
        left_out += files[1]
    return Opened(shuffled(read_files(taken, rng), rng), left_out)


class Supply:
    """What is taken of a source: `sequences` with int64 token ids (L,), `tokens` of them together.

    `records` were drawn for that. `length` is the sequence length.
    """

    def __init__(self, source: Source, recipe: Recipe, goal: Goal, opened: Opened, maker: TokenMaker, length: int):
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
