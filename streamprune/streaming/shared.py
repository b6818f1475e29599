"""One run in several processes: the first leads, as one process alone would run; the others do what it orders.

All send their share of the micro-batches through every block. An order goes out before each step of the scorer, and at
its end all tell how they fared; what is known of the experts of a block is added up once, within the step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

from streamprune.choice.chooser import Chooser
from streamprune.errors import ResumeError, StreampruneError
from streamprune.memory.plan import MemoryPlan
from streamprune.prepare import Prepared
from streamprune.progress import Progress
from streamprune.scores.statistics import LayerStatistics
from streamprune.settings import RunSettings
from streamprune.streaming.batches import Shrink, Stopped
from streamprune.streaming.examining import SequenceFigures
from streamprune.streaming.helping import follow
from streamprune.streaming.orders import End, Fared, Job, Order, SavedElsewhere, agree
from streamprune.streaming.saved import Saved
from streamprune.streaming.scoring import BlockScorer
from streamprune.text.calibration import Calibration
from streamprune.together.joining import joined
from streamprune.together.processes import Processes
from streamprune.work.folder import WorkFolder
from streamprune.work.resume import versions
from streamprune.work.stop import StopRequest

R = TypeVar("R")


def together(device: str, lead: Callable[[Processes], R]) -> R:
    """What `lead` returns, in all processes that were launched together; only the first one calls it.

    `device` is what --device says. In the others, errors of their own become an OtherProcessError, and whatever ends
    the first one a ToldElsewhereError with its exit status.
    """
    with joined(device) as processes:
        if not processes.is_first:
            result: R = follow(processes)
            return result
        try:
            result = lead(processes)
        except BaseException as error:
            _dismiss(processes, error)
            raise
        processes.same(End(0, result))
        return result


def call_in(
    processes: Processes, settings: RunSettings, prepared: Prepared, calibration: Calibration, plan: MemoryPlan
) -> MemoryPlan:
    """Have the other processes prepare for a run as this one is; returns the plan of memory that all can keep to."""
    if processes.count == 1:
        return plan
    quota, counts = prepared.decision.quota, prepared.counts
    processes.at_work = True
    processes.same(Job(settings, calibration, quota, counts, prepared.checkpoint.fingerprint(), versions()))
    plan = agree(processes, calibration, plan)
    processes.at_work = False
    return plan


def _dismiss(processes: Processes, error: BaseException) -> None:
    """Let the others end where they wait for an order. At work they notice themselves that this process is gone."""
    if processes.at_work:
        return
    usual = 130 if isinstance(error, KeyboardInterrupt) else 1
    # (They may be gone already.)
    with suppress(StreampruneError):
        processes.same(End(error.exit_code if isinstance(error, StreampruneError) else usual))


class LeadingScorer(BlockScorer):
    """The scorer of the first process, or of the only one. Each of its steps is one of all processes."""

    def __init__(
        self,
        settings: RunSettings,
        prepared: Prepared,
        calibration: Calibration,
        plan: MemoryPlan,
        device: torch.device,
        progress: Progress,
        folder: Path,
        chooser: Chooser | None,
        stop: StopRequest,
        processes: Processes,
    ) -> None:
        super().__init__(settings, prepared, calibration, plan, device, progress, folder, chooser, stop, processes)
        self._stop = stop
        self._least = plan.batch_tokens
        self._others: list[Shrink] = []

    @property
    def batch_tokens(self) -> int:
        return min(super().batch_tokens, self._least)

    @property
    def shrinks(self) -> list[Shrink]:
        return sorted([*super().shrinks, *self._others], key=lambda shrink: shrink.block)

    def score_block(self, index: int) -> LayerStatistics | None:
        with self._ordered(Order("score", index)):
            return super().score_block(index)

    def replay_block(self, index: int, kept: Sequence[int]) -> None:
        with self._ordered(Order("replay", index, tuple(kept))):
            super().replay_block(index, kept)

    def read_off(self, block: int) -> list[SequenceFigures]:
        with self._ordered(Order("read_off", block)):
            return super().read_off(block)

    def save(self, work: WorkFolder | None) -> None:
        with self._ordered(Order("save")):
            super().save(work)

    def restore(self, saved: Saved) -> int:
        # Refused, if they are not of this run, before the others hear of them.
        self.check(saved)
        try:
            with self._ordered(Order("restore", saved=SavedElsewhere(saved.facts, len(saved)))):
                return super().restore(saved)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if self._processes.count == 1:
                raise
            # The others have begun to take them over: there is no way back to older ones.
            raise ResumeError(
                f"The saved hidden states cannot be read any more: {error}. Check the disk, then run again."
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            # The others free what they hold too, and wait for what comes of the scores.
            self._processes.same(Order("rest"))

    @contextmanager
    def _ordered(self, order: Order) -> Iterator[None]:
        self._processes.at_work = True
        self._processes.same(order)
        try:
            yield
        except Stopped:
            self._processes.at_work = False
            raise
        fared = self._processes.collect(Fared(bool(self._stop), super().batch_tokens))
        self._processes.at_work = False
        self._least = min(each.batch_tokens for each in fared)
        self._others += [shrink for each in fared for shrink in each.shrinks]
        if any(each.stop for each in fared) and not self._stop:
            self._stop.signal = signal.SIGTERM
