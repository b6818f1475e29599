"""What the launcher of a process has told it: how many there are, and which one it is. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from streamprune.errors import ProcessesError

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
