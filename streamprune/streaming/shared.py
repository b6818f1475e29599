"""What the processes that share a run tell each other of its course.

A process that helps another with a run: it does what it is ordered to with its share of the micro-batches.

One run in several processes: the first leads, as one process alone would run; the others do what it orders.

All send their share of the micro-batches through every block. An order goes out before each step of the scorer, and at
its end all tell how they fared; what is known of the experts of a block is added up once, within the step.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from types import TracebackType
from typing import Any, TypeVar

import torch

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.distributed.joining import joined, name_of
from streamprune.distributed.processes import Processes
from streamprune.errors import OtherProcessError, ProcessesError, ResumeError, StreampruneError, ToldElsewhereError
from streamprune.hardware.device import choose_device
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.models.config import versions
from streamprune.planning.expert_counts import ExpertCounts
from streamprune.planning.memory_needs import plan_memory
from streamprune.planning.prepare import PreparedModel, prepare, selector_of
from streamprune.planning.pruning_plan import plan_with_counts
from streamprune.progress import Progress
from streamprune.saliency.scores import LayerStatistics
from streamprune.selection.select import Selector
from streamprune.streaming.batches import Shrink, Stopped
from streamprune.streaming.predictions import SequenceFigures
from streamprune.streaming.saved import Saved
from streamprune.streaming.scoring import LayerScorer
from streamprune.work.enter import StopRequest, listening
from streamprune.work.folder import WorkFolder
from streamprune.work.saved_states import BatchState


@dataclass(frozen=True)
class Job:
    """What the others have to know to help: all that was decided by what only the first process can read."""

    settings: RunSettings
    calibration: Calibration
    counts: ExpertCounts | None
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


def follow(processes: Processes) -> Any:
    """Help the first process for as long as it goes on; returns what it says came of it."""
    with listening() as stop:
        # A request to stop is the first process's to answer.
        stop.patient = True
        message: Any = processes.same(None)
        if isinstance(message, Job):
            try:
                message = _help(processes, message, stop)
            except ToldElsewhereError:
                raise
            except StreampruneError as error:
                processes.fail()
                raise OtherProcessError(f"{name_of(processes)}: {error}", error.exit_code) from error
    if message.status:
        raise ToldElsewhereError(message.status)
    return message.result


def _help(processes: Processes, job: Job, stop: StopRequest) -> End:
    settings, calibration = job.settings, job.calibration
    device = choose_device(settings.device, processes.local_rank)
    settings.check_device(device.type)
    prepared = prepare(settings, plan_with_counts(settings, job.counts))
    _check_alike(job, prepared)
    # On another machine the work folder need not be there, and nothing that has a name is written anyway.
    folder = settings.work_folder if settings.work_folder.is_dir() else Path(gettempdir())
    plan = plan_memory(settings, prepared, calibration, device, folder, processes)
    plan = agree(processes, calibration, plan)
    selector = selector_of(settings, prepared, calibration)
    with (
        Progress(prepared.layout.layer_count, quiet=True) as progress,
        LayerScorer(
            settings, prepared, calibration, plan, device, progress, folder, selector, stop, processes
        ) as scorer,
    ):
        last = _obey(processes, scorer, stop)
    # With nothing in memory any more, wait for what comes of it.
    end: Any = last if isinstance(last, End) else processes.same(None)
    assert isinstance(end, End)
    return end


def _obey(processes: Processes, scorer: LayerScorer, stop: StopRequest) -> End | Order:
    """Do what is ordered until there is nothing left for the scorer to do; returns what was said then."""
    told, restored = 0, False
    while True:
        order: Any = processes.same(None)
        if isinstance(order, End) or order.step == "rest":
            assert isinstance(order, (End, Order))
            return order
        try:
            _take_step(scorer, order)
        except Stopped:
            continue
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if not restored:
                raise
            # As in `LayerLoop`: whole, but of shapes that this model's blocks do not take.
            raise ResumeError(f"The hidden states that were saved do not go with this model: {error}") from error
        restored = order.step == "restore"
        if processes.local_rank == 0 and order.step in ("score", "replay"):
            # On a machine without the first process, which does so on its own.
            scorer.drop_cached_pages(order.block)
        processes.collect(Fared(bool(stop), scorer.batch_tokens, tuple(scorer.shrinks[told:])))
        told = len(scorer.shrinks)


def _take_step(scorer: LayerScorer, order: Order) -> None:
    match order:
        case Order("score", block):
            scorer.score_block(block)
        case Order("replay", block, kept):
            scorer.replay_layer(block, kept)
        case Order("read_off", block):
            scorer.read_off(block)
        case Order("save"):
            scorer.save(None)
        case Order("restore", saved=SavedElsewhere() as saved):
            scorer.restore(saved)


def _check_alike(job: Job, prepared: PreparedModel) -> None:
    """Refuse to help with another model or other libraries than the first process has, on another machine."""
    if prepared.checkpoint.fingerprint() != job.fingerprint:
        raise ProcessesError(
            f"{job.settings.model} is another model here than where the first process runs: its files differ. Copy "
            "them, or name a --revision."
        )
    here = versions()
    for name, there in job.versions.items():
        if here[name] != there:
            raise ProcessesError(f"{name} is {here[name]} here and {there} where the first process runs. Install one.")


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
    processes: Processes, settings: RunSettings, prepared: PreparedModel, calibration: Calibration, plan: MemoryPlan
) -> MemoryPlan:
    """Have the other processes prepare for a run as this one is; returns the plan of memory that all can keep to."""
    if processes.count == 1:
        return plan
    processes.at_work = True
    processes.same(Job(settings, calibration, prepared.plan.counts, prepared.checkpoint.fingerprint(), versions()))
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


class LeadingScorer(LayerScorer):
    """The scorer of the first process, or of the only one. Each of its steps is one of all processes."""

    def __init__(
        self,
        settings: RunSettings,
        prepared: PreparedModel,
        calibration: Calibration,
        plan: MemoryPlan,
        device: torch.device,
        progress: Progress,
        folder: Path,
        selector: Selector | None,
        stop: StopRequest,
        processes: Processes,
    ) -> None:
        super().__init__(settings, prepared, calibration, plan, device, progress, folder, selector, stop, processes)
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

    def replay_layer(self, index: int, kept: Sequence[int]) -> None:
        with self._ordered(Order("replay", index, tuple(kept))):
            super().replay_layer(index, kept)

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
