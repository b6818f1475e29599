"""Sending micro-batches through a layer, in halves if memory runs out, and storing their states between layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration, MicroBatch
from streamprune.common_settings import ComputeSettings
from streamprune.distributed.processes import ALONE, Processes
from streamprune.errors import ResourceError
from streamprune.hardware.device import CPU, MemoryWatch, free_after_failure, is_gpu, lack_of_memory, record_event
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.memory_plan import MOST_SUBMITTED, MemoryPlan
from streamprune.progress import Busy, Progress
from streamprune.streaming.forward import without_side
from streamprune.streaming.states import HiddenStates, first_of
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder
from streamprune.work.saved_states import BatchState, SavedStates

#: Takes the number, the tokens and the state of a micro-batch; returns its new state, or None to keep the old one.
Compute = Callable[[int, MicroBatch, BatchState], BatchState | None]
#: Takes how many micro-batches are done, and the last of them.
Commit = Callable[[int, MicroBatch], None]
#: Whether a micro-batch is among those that are computed.
Among = Callable[[MicroBatch], bool]


def every(batch: MicroBatch) -> bool:
    """Selects all micro-batches."""
    return True


class Stopped(Exception):
    """The user has requested to stop, and a micro-batch has just been finished."""


@dataclass(frozen=True)
class Runtime:
    """What all code that streams a model needs. `folder` is for hidden states on disk."""

    settings: ComputeSettings
    plan: MemoryPlan
    device: torch.device
    progress: Progress
    folder: Path
    stop: StopRequest = field(default_factory=StopRequest)
    busy: Busy = field(default_factory=Busy)
    processes: Processes = ALONE


@dataclass(frozen=True)
class Shrink:
    """Memory ran out in layer `block` with `sequences` of `tokens` tokens at a time; then it was `to` sequences."""

    block: int
    sequences: int
    tokens: int
    to: int
    reason: str


class MicroBatches:
    """The calibration tokens in micro-batches, and their states. If memory runs out they shrink permanently.

    `batch_tokens` is the current limit of tokens at a time; `shrinks` lists every reduction of it. `drop_prefetch`
    frees prefetched weights, and returns whether there were any. Each of several processes has a share of the
    micro-batches that a single process would have, so that the results are bit-identical.
    """

    def __init__(
        self, runtime: Runtime, calibration: Calibration, drop_prefetch: Callable[[], bool] = lambda: False
    ) -> None:
        self._runtime, self._calibration, self._drop_prefetch = runtime, calibration, drop_prefetch
        self._settings, self._plan, self._device = runtime.settings, runtime.plan, runtime.device
        self._progress, self._processes, self._stop = runtime.progress, runtime.processes, runtime.stop
        self._submitted: deque[torch.Event] = deque()
        self._among: Among = every
        self.batch_tokens = runtime.plan.batch_tokens
        self.shrinks: list[Shrink] = []
        #: Where the hidden states are: "device", "ram" or "disk".
        self.place = runtime.plan.place
        caps = runtime.settings.vram_bytes, runtime.settings.ram_bytes
        self.watch = MemoryWatch(caps, runtime.device, runtime.progress.say)
        self._share_out(calibration.micro_batches(runtime.plan.batch_tokens))
        home = self._device if self.place == "device" else CPU
        on_disk = runtime.folder if self.place == "disk" else None
        self._states = HiddenStates(len(self._batches), home, on_disk, computing=self._device, busy=self._runtime.busy)

    def close(self) -> None:
        """Free the states."""
        self._states.close()

    def run(
        self,
        layer: int,
        compute: Compute,
        commit: Commit = lambda done, batch: None,
        start: int = 0,
        among: Among = every,
        may_stop: bool = True,
    ) -> None:
        """Call `compute` for the micro-batches that `among` selects, from number `start` on, and store its results.

        `commit` is called when a micro-batch has succeeded and can no longer fail. One that runs out of memory is
        computed again in halves. Raises ResourceError if memory runs out for a single sequence, and Stopped between two
        micro-batches when the user stops the run and it `may_stop` here, once all ranks have done the same ones.
        """
        self._among = among
        number, stopped = start, False
        while number < len(self._batches) and not stopped:
            number = self._advance(number, layer, compute, commit)
            stopped = may_stop and self._processes.asked(bool(self._stop))
        until = self._meet(number, stopped)
        while until is not None and number < len(self._batches) and self.places[number] < until:
            number = self._advance(number, layer, compute, commit)
        if until is not None:
            raise Stopped
        self._states.synchronize()

    def first_sequence(self) -> tuple[MicroBatch, BatchState]:
        """This process's first sequence, and its state, which must not be changed. In rank 0 it is the first of all."""
        batch, state = self._batches[0], self._states.load(0, self._device)
        return replace(batch, ids=batch.ids[:1]), first_of(state, batch.ids.shape)

    def sequences_among(self, among: Among) -> int:
        """How many sequences of this process `among` selects."""
        return sum(len(batch.ids) for batch in self._batches if among(batch))

    def tokens_among(self, among: Among) -> int:
        """How many tokens of this process `among` selects."""
        return sum(batch.ids.numel() for batch in self._batches if among(batch))

    def all_shrinks(self) -> list[Shrink]:
        """The shrinks of all ranks, by layer."""
        shrinks = chain.from_iterable(self._processes.collect(self.shrinks))
        return sorted(shrinks, key=lambda shrink: shrink.block)

    def save(self, work: WorkFolder | None, done: int, facts: Mapping[str, Any]) -> None:
        """Save the states of all ranks in rank 0's work folder, with `facts` and what `restore` needs.

        They are saved in the order of a single process, so that any number of processes can resume. `done` of this
        rank's micro-batches are through the current layer.
        """
        self._states.synchronize()
        pieces = self._processes.in_order(zip(self.places, (len(batch.ids) for batch in self._batches), strict=True))
        saved = {
            "sizes": [piece.size for piece in pieces],
            "done": sum(self._processes.collect(done)),
            "batch_tokens": min(self._processes.collect(self.batch_tokens)),
            **facts,
        }
        states = self._processes.gather(pieces, lambda number: self._states.load(number, CPU))
        if work is not None:
            work.states.save(len(pieces), lambda place: next(states), saved)
        # (In the other ranks, this sends theirs.)
        deque(states, maxlen=0)

    def restore(self, saved: SavedStates) -> int:
        """Restore saved states, which rank 0 alone can load; returns how many of this rank's are through the layer."""
        facts = saved.facts
        self._share_out(self._calibration.micro_batches_of(facts["sizes"]))
        self.batch_tokens = max(1, min(self.batch_tokens, facts["batch_tokens"]))
        self._states.resize(len(self._batches))
        try:
            for number, state in enumerate(self._processes.scatter(len(facts["sizes"]), saved.load)):
                self._states.store(number, state)
        except Exception:
            # Older states may be restored instead, or none.
            self._states.resize(len(self._batches))
            raise
        self._states.synchronize()
        return self.own(facts["done"])

    def own(self, places: int) -> int:
        """How many of the first `places` micro-batches of all ranks are this rank's."""
        return sum(place < places for place in self.places)

    def leave_out(self, side: str) -> None:
        """Free the states of a side."""
        self._states.change(lambda state: without_side(state, side) if isinstance(state.output, dict) else state)

    def offload_states(self, why: str) -> bool:
        """Move the states from the GPU to RAM, if that is allowed and they fit. False if nothing was moved."""
        host = self._plan.room.host
        movable = self.place == "device" and self._settings.states == "auto" and host is not None
        if not movable or host is None or self._plan.needs.states_here(self.batch_tokens) > host.nbytes:
            return False
        self._states.move(CPU)
        self.place = "ram"
        free_after_failure(self._device)
        self._progress.say(f"note: {why}; the hidden states move from {self._device} to RAM.")
        return True

    def advice(self) -> str:
        """Settings that the user may change if memory runs out, as the end of a sentence."""
        advice = ["fewer --samples"] if self.place != "disk" else []
        if self.place == "device":
            advice.append("--states ram")
        elif self.place == "ram" and self._plan.room.host is None:
            advice.append("--states disk")
        if self._settings.vram_gib is not None:
            advice.append("a larger --vram-gib")
        if self._settings.ram_gib is not None:
            advice.append("a larger --ram-gib")
        if is_gpu(self._device):
            advice.append("--device cpu")
        return ", ".join([*advice, "or a machine with more memory"])

    def _advance(self, number: int, layer: int, compute: Compute, commit: Commit) -> int:
        """Compute a micro-batch, or as much of it as memory allows; returns how many are done."""
        if not self._among(self._batches[number]):
            return number + 1
        while True:
            self._split(number)
            batch = self._batches[number]
            problem = lack_of_memory(lambda: self._compute(number, compute))
            if problem is None:
                break
            self._states.drop_prefetch()
            free_after_failure(self._device)
            self._after_failure(layer, batch, problem)
        commit(number + 1, batch)
        self._check_cap(layer, batch.ids.shape[1])
        self._progress.step(len(batch.ids))
        return number + 1

    def _meet(self, done: int, stopped: bool) -> int | None:
        """Agree with the other ranks on the smallest micro-batch size, and on whether to stop.

        Returns the micro-batch up to which each rank computes before all stop; None if none stops.
        """
        reached = self.places[done - 1] + 1 if done else 0
        answers = self._processes.collect((stopped, reached, self.batch_tokens))
        self.batch_tokens = min(tokens for *_, tokens in answers)
        return max(reached for _, reached, _ in answers) if any(stopped for stopped, *_ in answers) else None

    def _compute(self, number: int, compute: Compute) -> None:
        before = self._states.load(number, self._device)
        self._prefetch(number + 1)
        with self._runtime.busy.on_device("compute", self._device):
            after = compute(number, self._batches[number], before)
        if after is not None:
            self._states.store(number, after)
        if is_gpu(self._device):
            self._submitted.append(record_event(torch.accelerator.current_stream(self._device)))
            while len(self._submitted) > MOST_SUBMITTED:
                self._submitted.popleft().synchronize()

    def _prefetch(self, number: int) -> None:
        """Prefetch the state of a micro-batch while the one before computes, if there is memory for both."""
        if number >= len(self._batches) or not self._among(self._batches[number]):
            return
        if self._batches[number].ids.numel() > self.batch_tokens:
            return
        if lack_of_memory(lambda: self._states.prefetch(number, self._device)) is not None:
            self._states.drop_prefetch()

    def _share_out(self, batches: list[MicroBatch]) -> None:
        # Token ids are small: all of them are on the device, so nothing waits for copies of them.
        self._batches = [replace(batch, ids=batch.ids.to(self._device)) for batch in self._processes.mine(batches)]
        #: For each of them, its number among the micro-batches of all ranks; the parts of a split one share a number.
        self.places = self._processes.mine(range(len(batches)))

    def _split(self, number: int) -> None:
        """Split a micro-batch that exceeds the current limit, with its states."""
        batch = self._batches[number]
        size = max(1, self.batch_tokens // batch.ids.shape[1])
        if size < len(batch.ids):
            parts = [replace(batch, ids=ids) for ids in torch.split(batch.ids, size)]
            self._states.split(number, batch.ids.shape, [len(part.ids) for part in parts])
            self._batches[number : number + 1] = parts
            self.places[number : number + 1] = [self.places[number]] * len(parts)

    def _after_failure(self, layer: int, batch: MicroBatch, problem: str) -> None:
        sequences, length = batch.ids.shape
        if sequences > 1:
            self._shrink(layer, sequences, length, "out of memory")
            return
        why = f"out of memory in layer {layer} with a single sequence"
        if not self._drop_prefetch() and not self.offload_states(why):
            raise ResourceError(
                f"Out of memory on {self._device} in layer {layer}, with a single sequence of {length:,} tokens at a "
                f"time ({problem}). Use a shorter --seq-len, {self.advice()}.{self.watch.holders()}"
            )

    def _check_cap(self, layer: int, length: int) -> None:
        excess = self.watch.excess()
        if excess is None:
            return
        sequences = min(self.batch_tokens, max(batch.ids.numel() for batch in self._batches)) // length
        if sequences > 1:
            self._shrink(layer, sequences, length, excess)
        elif not self._drop_prefetch():
            needs = self._plan.needs
            raise ResourceError(
                f"{excess}, in layer {layer} with a single sequence of {length:,} tokens at a time. The largest layer "
                f"has {format_bytes(needs.layer)} ({format_bytes(needs.loading)} while it is loaded), the hidden "
                f"states have {format_bytes(needs.states_here(self.batch_tokens))} ({self.place}). "
                f"Use a shorter --seq-len, {self.advice()}."
            )

    def _shrink(self, layer: int, sequences: int, length: int, reason: str) -> None:
        """Limit micro-batches to half as many sequences from now on."""
        shrink = Shrink(layer, sequences, length, (sequences + 1) // 2, reason)
        self.batch_tokens = shrink.to * length
        self.shrinks.append(shrink)
        self._progress.log("shrink", asdict(shrink))
        self._progress.say(
            f"note: {reason} in layer {layer} with {sequences} sequences at a time; continuing with {shrink.to}."
            f"{self.watch.holders()}"
        )
