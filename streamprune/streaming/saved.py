"""How far a run is, and the hidden states of all processes: saved and restored in the order of one process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from streamprune.distributed.processes import Processes
from streamprune.errors import NonFiniteError
from streamprune.saliency.statistics import ExpertStatistics
from streamprune.work.folder import WorkFolder
from streamprune.work.records import is_count
from streamprune.work.saved_states import BatchState


@dataclass
class Point:
    """How far the block in work is: micro-batches done of pass 0 (the original block) or 1 (the pruned one).

    `total` are the sums over the micro-batches of pass 0 that are done.
    """

    block: int
    passing: int = 0
    done: int = 0
    total: ExpertStatistics | None = None
    #: Number, tokens, and tokens with NaN or infinite states of the micro-batches that nobody has looked at yet.
    unchecked: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)

    def check_finite(self, dtype: torch.dtype) -> None:
        """Look at them now. Raises NonFiniteError, which says that they were computed in `dtype`."""
        unchecked, self.unchecked = self.unchecked, []
        for number, tokens, count in unchecked:
            bad = int(count)
            if bad:
                raise NonFiniteError(
                    f"Block {self.block}, batch {number}: {bad} of {tokens} tokens have NaN or infinite states, so "
                    f"that no score could be trusted. Computed in {dtype}; try --dtype float32 or bfloat16, and check "
                    "that the model itself works."
                )


class Saved(Protocol):
    """States that were saved: so many, with what was saved beside them."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def load(self, number: int) -> BatchState: ...


def point_of(saved: Saved) -> Point:
    """How far saved states say that they are. Raises ValueError, KeyError or TypeError for facts that no run has."""
    facts = saved.facts
    point = Point(facts["block"], facts["pass"], facts["done"])
    numbers = (point.block, point.passing, point.done, facts["batch_tokens"], *facts["sizes"])
    if not all(map(is_count, numbers)) or point.passing > 1 or not point.done <= len(facts["sizes"]) == len(saved):
        raise ValueError("facts that no run has")
    return point


def save_all(
    processes: Processes,
    work: WorkFolder | None,
    own: Iterable[tuple[int, int]],
    load: Callable[[int], BatchState],
    facts: Mapping[str, Any],
) -> None:
    """Save the states of all processes, and with them these facts and the `sizes` of the micro-batches.

    `own` are this process's micro-batches as (place among those of all, sequences), and `load` gives their states. Only
    the first process has a work folder; the others send it theirs, one at a time.
    """
    pieces = processes.in_order(own)

    def parts(number: int) -> tuple[Any, Any]:
        state = load(number)
        return state.output, state.carried

    def take(piece: Callable[[int], Any]) -> None:
        assert work is not None
        told = {"sizes": [piece.size for piece in pieces], **facts}
        work.states.save(len(pieces), lambda place: BatchState(*piece(place)), told)

    processes.bring(pieces, parts, take)


def share_of(processes: Processes, saved: Saved) -> Iterator[BatchState]:
    """This process's share of saved states, in order; the first process sends the others theirs, one at a time."""

    def parts(place: int) -> tuple[Any, Any]:
        state = saved.load(place)
        return state.output, state.carried

    for output, carried in processes.hand_out(len(saved), parts):
        yield BatchState(output, carried)
