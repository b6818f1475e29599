"""What the processes that share a run tell each other of its course."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamprune.memory.plan import MemoryPlan
from streamprune.quota import Quota
from streamprune.settings import RunSettings
from streamprune.streaming.batches import Shrink
from streamprune.streaming.stream import BatchState
from streamprune.text.calibration import Calibration
from streamprune.together.processes import Processes


@dataclass(frozen=True)
class Job:
    """What the others have to know to help: all that was decided by what only the first process can read."""

    settings: RunSettings
    calibration: Calibration
    quota: Quota | None
    counts: Mapping[int, int] | None
    fingerprint: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Order:
    """A step of the scorer: the name of its method, and what it takes."""

    step: str
    block: int = 0
    kept: tuple[int, ...] = ()
    saved: SavedElsewhere | None = None


@dataclass(frozen=True)
class SavedElsewhere:
    """Saved states as the others see them: what was saved with them. The states themselves are sent to them."""

    facts: Mapping[str, Any]
    count: int

    def __len__(self) -> int:
        return self.count

    def load(self, number: int) -> BatchState:
        raise AssertionError(f"state {number} is loaded by the first process alone")


@dataclass(frozen=True)
class End:
    """The run is over: its exit status, and what came of it."""

    status: int
    result: Any = None


@dataclass(frozen=True)
class Fared:
    """How a process stands after a step: whether it is asked to stop, and how large its micro-batches may be by now.

    `shrinks` are those within the step, of all processes but the first.
    """

    stop: bool
    batch_tokens: int
    shrinks: tuple[Shrink, ...] = ()


def agree(processes: Processes, calibration: Calibration, plan: MemoryPlan) -> MemoryPlan:
    """The plan with as many tokens per micro-batch as suit all: so few that each has a share, if that can be."""
    tokens = min(processes.collect(plan.batch_tokens))
    while True:
        batches = calibration.micro_batches(tokens)
        largest = max((batch.ids.shape for batch in batches if len(batch.ids) > 1), key=math.prod, default=None)
        if len(batches) >= processes.count or largest is None:
            return replace(plan, batch_tokens=tokens)
        tokens = math.prod(largest) - largest[1]
