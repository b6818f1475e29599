"""What the launcher of a process has told it: how many there are, and which one it is. No torch.

Several processes that share one run, seen from one of them: what they agree on and what they send each other.

The first one (rank 0) leads: it alone reads what the user gave, writes, and talks. All that goes to and fro is small
but hidden states that are saved or restored, so that it goes through the host's memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from streamprune.errors import ProcessesError

if TYPE_CHECKING:
    # Commands that compute nothing do without it.
    import torch


#: The variables of torchrun (and `accelerate launch`), then those of MPI's launchers, in the order of accelerate.
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


@dataclass(frozen=True)
class Launched:
    """`count` processes were launched together, of which this is number `rank`, from 0.

    `local_count` of them are on this machine, and there this is number `local_rank`.
    """

    count: int = 1
    rank: int = 0
    local_count: int = 1
    local_rank: int = 0

    def hand_on(self) -> None:
        """Put this into the environment under torchrun's names, which torch and accelerate read."""
        values = (self.count, self.rank, self.local_count, self.local_rank)
        for names, value in zip((_COUNT, _RANK, _LOCAL_COUNT, _LOCAL_RANK), values, strict=True):
            os.environ[names[0]] = str(value)


def launched() -> Launched:
    """How this process was launched, by its environment; alone where that says nothing of others.

    Raises ProcessesError where it says that there are several, but not which of them this is.
    """
    count = _number(_COUNT)
    if count is None or count < 2:
        return Launched()
    rank, local_count, local_rank = _number(_RANK), _number(_LOCAL_COUNT), _number(_LOCAL_RANK)
    if rank is None or rank >= count:
        said = "is not set" if rank is None else f"is {rank}"
        raise ProcessesError(
            f"The environment says that {count} processes were launched (WORLD_SIZE), but RANK {said}, so that this "
            f"one does not know which it is. Launch them with torchrun or `accelerate launch`, or unset WORLD_SIZE."
        )
    # Without word of machines, all are taken to be on this one.
    local_count = count if local_count is None else max(1, local_count)
    return Launched(count, rank, local_count, rank % local_count if local_rank is None else local_rank)


def is_first() -> bool:
    """Whether this process is the one that talks to the user: alone, or the first of several."""
    return launched().rank == 0


def _number(names: tuple[str, ...]) -> int | None:
    """The first of these environment variables that is a number and not negative."""
    for name in names:
        text = os.environ.get(name, "").strip()
        if text.isascii() and text.isdecimal():
            return int(text)
    return None


T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """An item of one process: whose it is, its number there, and its size."""

    process: int
    number: int
    size: int


class Processes:
    """All processes of a run. As it stands here, one process alone: it agrees with itself, and nothing is sent.

    All methods but `mine`, `owner` and `asked` have to be called by all processes in the same order. Those that talk
    raise ProcessesError when another process is lost, and ToldElsewhereError when that one has said why.
    """

    #: Which process this is, of how many; of those, how many are on this machine, and which of them this is.
    rank: int = 0
    count: int = 1
    local_count: int = 1
    local_rank: int = 0
    #: Whether the others are at work by now, and do not wait for a word of the first one. (Kept by that one.)
    at_work: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of what all have: every `count`-th item."""
        return list(items[self.rank :: self.count])

    def owner(self, number: int) -> int:
        """The process in whose share the item of this number is."""
        return number % self.count

    def same(self, value: T) -> T:
        """The first process's value, in all of them."""
        return value

    def collect(self, value: T) -> list[T]:
        """The values of all processes, by their ranks."""
        return [value]

    def add_up(self, values: torch.Tensor, maxima: Collection[int] = ()) -> None:
        """Replace `values` by their sums over all processes, to the bit the same in each; rows `maxima` by maxima."""

    def asked(self, stop: bool) -> bool:
        """Whether any process was asked to `stop`, as far as this one knows by now."""
        return stop

    def send(self, value: Any, process: int) -> None:
        """Send a nest of lists, tuples and dicts with tensors in it to another process, which has to `receive` it."""
        raise AssertionError("there is no other process")

    def receive(self, process: int) -> Any:
        """What another process sends, its tensors in the host's memory."""
        raise AssertionError("there is no other process")

    def fail(self) -> None:
        """Let the others know that this process has told the user itself why it ends."""

    def in_order(self, own: Iterable[tuple[int, int]]) -> list[Piece]:
        """The items of all processes, given this one's as (place in the common order, size)."""
        found = [
            (place, process, number, size)
            for process, items in enumerate(self.collect(list(own)))
            for number, (place, size) in enumerate(items)
        ]
        return [Piece(process, number, size) for _, process, number, size in sorted(found)]

    def bring(
        self, pieces: Sequence[Piece], load: Callable[[int], Any], take: Callable[[Callable[[int], Any]], None]
    ) -> None:
        """In the first process, call `take` with what gives the n-th of all pieces; it must ask for each, in order.

        `load` gives this process's own, by their number here. One piece is on its way at a time.
        """
        if self.is_first:
            take(
                lambda place: (
                    load(pieces[place].number)
                    if pieces[place].process == self.rank
                    else self.receive(pieces[place].process)
                )
            )
            return
        for piece in pieces:
            if piece.process == self.rank:
                self.send(load(piece.number), 0)

    def hand_out(self, count: int, load: Callable[[int], Any]) -> Iterator[Any]:
        """This process's share of `count` items, in order, of which only the first process can `load` any."""
        for number in range(count):
            owner = self.owner(number)
            if not self.is_first:
                if owner == self.rank:
                    yield self.receive(0)
                continue
            item = load(number)
            if owner == self.rank:
                yield item
            else:
                self.send(item, owner)


#: One process, as nearly always.
ALONE = Processes()
