"""The processes that share a run: this process's rank, and what they exchange. Needs no torch.

All of them run the same code, each on its share of the micro-batches. Only rank 0 reads the user's files, writes and
prints. What they exchange is small, except for hidden states that are saved or restored, so it goes through the host's
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from streamprune.errors import ProcessesError, ReportedElsewhereError, StreampruneError

if TYPE_CHECKING:
    # Commands that compute nothing run without torch.
    import torch


#: The variables of torchrun (and `accelerate launch`), then those of MPI's launchers, in the order of accelerate.
_VARIABLES = {
    "count": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "rank": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "local_count": ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "local_rank": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
}


@dataclass(frozen=True)
class Launched:
    """`count` processes were launched together, of which this is number `rank`, from 0.

    `local_count` of them are on this machine, and there this is number `local_rank`.
    """

    count: int = 1
    rank: int = 0
    local_count: int = 1
    local_rank: int = 0

    def export(self) -> None:
        """Set the environment variables of torchrun, which torch and accelerate read."""
        os.environ.update({names[0]: str(getattr(self, field)) for field, names in _VARIABLES.items()})


def launched() -> Launched:
    """How this process was launched, by the launcher's environment variables; without any, alone.

    Raises ProcessesError if they say that there are several processes, but not which of them this is.
    """
    count, rank, local_count, local_rank = map(_number, _VARIABLES.values())
    if count is None or count < 2:
        return Launched()
    if rank is None or rank >= count:
        said = "is not set" if rank is None else f"is {rank}"
        raise ProcessesError(
            f"The environment says that {count} processes were launched (WORLD_SIZE), but RANK {said}, so this "
            f"process does not know its rank. Launch them with torchrun or `accelerate launch`, or unset "
            f"WORLD_SIZE."
        )
    # Without a local count, all are assumed to be on this machine.
    local_count = count if local_count is None else max(1, local_count)
    return Launched(count, rank, local_count, rank % local_count if local_rank is None else local_rank)


def is_first() -> bool:
    """Whether this process prints: it runs alone, or is rank 0."""
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
    """An item of one process: the rank that has it, its number there, and its size."""

    process: int
    number: int
    size: int


class Processes:
    """All processes of a run. This base class is a single process, which sends nothing.

    All methods but `mine`, `asked` and `fail` are collective: every rank has to call them in the same order.
    They raise ProcessesError if another process is lost, and ReportedElsewhereError if that one reports why itself.
    """

    #: Which process this is, of how many; of those, how many are on this machine, and which of them this is.
    rank: int = 0
    count: int = 1
    local_count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads, writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`, which all have: every `count`-th item."""
        return list(items[self.rank :: self.count])

    def on_first(self, make: Callable[[], T]) -> T:
        """The return value of `make` in rank 0, which alone calls it, for all ranks. An error ends all of them."""
        if not self.is_first:
            status, value = self.broadcast((0, None))
            if status:
                raise ReportedElsewhereError(status)
            return value  # type: ignore[return-value]
        try:
            result = make()
        except BaseException as error:
            # (The others may be gone already.)
            with suppress(StreampruneError):
                self.broadcast((_exit_code(error), None))
            raise
        return self.broadcast((0, result))[1]

    def on_each(self, make: Callable[[], T]) -> T:
        """The return value of `make`, which every rank calls. An error of one rank ends all; that one reports it."""
        problem: StreampruneError | None = None
        try:
            value = make()
        except StreampruneError as error:
            problem = error
        statuses = self.collect(problem.exit_code if problem is not None else 0)
        # If several failed, rank 0 reports it: most likely for the same reason.
        if problem is not None and (self.is_first or not statuses[0]):
            raise problem
        if any(statuses):
            raise ReportedElsewhereError(max(statuses))
        return value

    def broadcast(self, value: T) -> T:
        """Rank 0's value, in all ranks."""
        return self.collect(value)[0]

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, in order, in all of them."""
        return [value]

    def add_up(self, values: torch.Tensor, maxima: Collection[int] = ()) -> None:
        """Replace `values` by their sums over all ranks, bit-identical in each; rows `maxima` by maxima."""

    def asked(self, stop: bool) -> bool:
        """Whether any process got a request to `stop`, as far as this one knows."""
        return stop

    def send(self, value: Any, process: int) -> None:
        """Send a nest of lists, tuples and dicts with tensors in it to another rank, which has to `receive` it."""
        raise AssertionError("there is no other process")

    def receive(self, process: int) -> Any:
        """What another rank sends, its tensors in the host's memory."""
        raise AssertionError("there is no other process")

    def fail(self) -> None:
        """Tell the other processes that this one reports its error itself."""

    def in_order(self, own: Iterable[tuple[int, int]]) -> list[Piece]:
        """The items of all ranks, given this one's as (place in the order of one process, size)."""
        found = [
            (place, process, number, size)
            for process, items in enumerate(self.collect(list(own)))
            for number, (place, size) in enumerate(items)
        ]
        return [Piece(process, number, size) for _, process, number, size in sorted(found)]

    def gather(self, pieces: Sequence[Piece], load: Callable[[int], T]) -> Iterator[T]:
        """In rank 0 all pieces, in order; the other ranks send theirs, and yield none. All must exhaust it.

        `load` gives this rank's own, by their number here. One piece is on its way at a time.
        """
        for piece in pieces:
            if self.is_first:
                yield load(piece.number) if piece.process == self.rank else self.receive(piece.process)
            elif piece.process == self.rank:
                self.send(load(piece.number), 0)

    def scatter(self, count: int, load: Callable[[int], T]) -> Iterator[T]:
        """This rank's share (as `mine` gives it) of `count` items, in order, which only rank 0 can `load`."""
        for number in range(count):
            owner = number % self.count
            if owner == self.rank:
                yield load(number) if self.is_first else self.receive(0)
            elif self.is_first:
                self.send(load(number), owner)


def _exit_code(error: BaseException) -> int:
    """The exit code with which an error ends a process."""
    if isinstance(error, StreampruneError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


#: One process, as nearly always.
ALONE = Processes()
