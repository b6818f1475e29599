"""Threads that wait for one another, so that what has to happen at the same time does, or ends in an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

#: Long enough for the busiest machine. Nothing waits so long unless something is wrong.
PATIENCE = 60.0

Point = tuple[Any, ...]


class Points:
    """What has happened, in order, and whoever waits for it."""

    def __init__(self) -> None:
        self.seen: list[Point] = []
        self._changed = threading.Condition()

    def reach(self, *point: Any) -> None:
        with self._changed:
            self.seen.append(point)
            self._changed.notify_all()

    def await_(self, *point: Any) -> None:
        """Wait until something has happened; an error if it never does."""
        with self._changed:
            there = self._changed.wait_for(lambda: point in self.seen, PATIENCE)
        assert there, f"{point} does not come while another one waits for it; so far: {self.seen}"

    def await_count(self, count: int) -> None:
        """Wait until so many things have happened; an error if they never do."""
        with self._changed:
            there = self._changed.wait_for(lambda: len(self.seen) >= count, PATIENCE)
        assert there, f"nothing comes after {self.seen}, and {count} are waited for"

    def in_order(self, *points: Point) -> bool:
        """Whether each of these came for the last time before the next one came for the first time."""
        behind = [len(self.seen) - 1 - self.seen[::-1].index(point) for point in points]
        return all(last < self.seen.index(point) for last, point in zip(behind, points[1:], strict=False))


class Turn:
    """Counts micro-batches through the blocks."""

    def __init__(self, block: int, batches: int) -> None:
        self._batches = batches
        self._count = block * self._batches

    def now(self) -> Point:
        return divmod(self._count, self._batches)

    def next(self) -> Point:
        """The present one; the following one is next."""
        self._count += 1
        return divmod(self._count - 1, self._batches)


def wrapping(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`around(owner, name, before, after)` calls these with the arguments before and after a method is called."""

    def nothing(*_: Any) -> None: ...

    def wrap(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None] = nothing) -> None:
        usual = getattr(owner, name)

        def method(*arguments: Any, **named: Any) -> Any:
            before(*arguments)
            result = usual(*arguments, **named)
            after(*arguments)
            return result

        patch.setattr(owner, name, method)

    return wrap
