"""Sending micro-batches through a block, with states kept between blocks, in whatever memory there turns out to be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration, MicroBatch
from streamprune.config import ComputeSettings
from streamprune.distributed.processes import ALONE, Processes
from streamprune.errors import ResourceError
from streamprune.hardware.device import current_stream, free_after_failure, is_gpu, is_out_of_memory, record_event
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.memory_plan import MOST_HANDED_OUT, MemoryPlan
from streamprune.hardware.memory_watch import MemoryWatch
from streamprune.progress import Busy, Progress
from streamprune.streaming.saved import Saved, save_all, share_of
from streamprune.streaming.states import HiddenStates
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder
from streamprune.work.saved_states import BatchState

_HOST = torch.device("cpu")
#: What is done with the number, the tokens and the state of a micro-batch: its new state, or None to keep the old one.
Compute = Callable[[int, MicroBatch, BatchState], BatchState | None]


class Stopped(Exception):
    """The user has asked to stop, and a micro-batch has just been finished."""


@dataclass(frozen=True)
class Shrink:
    """Memory ran short in a block with so many sequences of so many tokens at a time; the run went on with `to`."""

    block: int
    sequences: int
    tokens: int
    to: int
    reason: str


class MicroBatches:
    """The calibration tokens in micro-batches, and their states. Where memory runs out they shrink for good.

    `batch_tokens` are the tokens at a time that are allowed now; `shrinks` is every time that they had to be lowered.
    `spare` frees memory that is only a convenience, and says whether there was any.

    Of several `processes` each has a share of the micro-batches that one alone would have, so that each of them gives
    the same to the bit.
    """

    def __init__(
        self,
        settings: ComputeSettings,
        calibration: Calibration,
        plan: MemoryPlan,
        device: torch.device,
        progress: Progress,
        folder: Path,
        stop: StopRequest | None = None,
        busy: Busy | None = None,
        spare: Callable[[], bool] = lambda: False,
        processes: Processes = ALONE,
    ) -> None:
        self._busy, self._spare = busy or Busy(), spare
        self._handed_out: deque[torch.Event] = deque()
        self._among: Callable[[MicroBatch], bool] = lambda batch: True
        self._settings, self._plan, self._device, self._progress = settings, plan, device, progress
        # (A request that has not been made is false, so that `or` would take another one.)
        self._calibration, self._stop = calibration, StopRequest() if stop is None else stop
        self.batch_tokens = plan.batch_tokens
        self.shrinks: list[Shrink] = []
        self.place = plan.place
        self.watch = MemoryWatch(settings, device, progress.say)
        self._processes = processes
        self._share_out(calibration.micro_batches(plan.batch_tokens))
        home, on_disk = device if plan.place == "device" else _HOST, folder if plan.place == "disk" else None
        self._states = HiddenStates(len(self._batches), home, on_disk, computing=device, busy=self._busy)

    def close(self) -> None:
        """Free the states."""
        self._states.close()

    def run(
        self,
        block: int,
        compute: Compute,
        commit: Callable[[int, MicroBatch], None],
        start: int = 0,
        among: Callable[[MicroBatch], bool] = lambda batch: True,
    ) -> None:
        """Call `compute` with number, tokens and state of every micro-batch `among` all; what it returns is kept.

        Where that is None, the old state is. `commit` follows, with the number of micro-batches that are done and the
        last one, when it has succeeded and nothing of it can fail any more. One that runs out of memory is computed
        again in halves. The first `start` are done already. Raises ResourceError when a single sequence is too much,
        and Stopped between two micro-batches when the user asks for it: once all processes have done the same ones of
        all.
        """
        self._among = among
        number, stopped = start, False
        while number < len(self._batches) and not stopped:
            number = self._advance(number, block, compute, commit)
            stopped = self._processes.asked(bool(self._stop))
        until = self._meet(number, stopped)
        while until is not None and number < len(self._batches) and self._places[number] < until:
            number = self._advance(number, block, compute, commit)
        if until is not None:
            raise Stopped
        self._states.settle()

    def sequences_among(self, among: Callable[[MicroBatch], bool]) -> int:
        """How many sequences of this process are among some."""
        return sum(len(batch.ids) for batch in self._batches if among(batch))

    def place_of(self, number: int) -> int:
        """Where among the micro-batches of all processes one of this process's is; parts of one share its place."""
        return self._places[number]

    def _advance(self, number: int, block: int, compute: Compute, commit: Callable[[int, MicroBatch], None]) -> int:
        """Do a micro-batch, or as much of it as memory allows; returns how many are done."""
        if not self._among(self._batches[number]):
            return number + 1
        while True:
            self._split(number)
            batch = self._batches[number]
            problem = self._attempt(number, compute)
            if problem is None:
                break
            self._after_failure(block, batch, problem)
        commit(number + 1, batch)
        self._check_cap(block, batch.ids.shape[1])
        self._progress.step(len(batch.ids))
        return number + 1

    def _meet(self, done: int, stopped: bool) -> int | None:
        """Up to which of all micro-batches each process goes before all stop; None if none of them wants to."""
        reached = self._places[done - 1] + 1 if done else 0
        told = self._processes.collect((stopped, reached))
        return max(reached for _, reached in told) if any(stopped for stopped, _ in told) else None

    def save(self, work: WorkFolder | None, done: int, facts: dict[str, Any]) -> None:
        """Save all states in the work folder, with these facts and what `restore` needs beside them.

        `done` micro-batches of this process are past the block in work; those of all come first in the common order.
        Only the first of several processes has a work folder. What it saves is in the order of one process alone.
        """
        self._states.settle()
        told = {
            "done": sum(self._processes.collect(done)),
            "batch_tokens": min(self._processes.collect(self.batch_tokens)),
            **facts,
        }
        own = zip(self._places, (len(batch.ids) for batch in self._batches), strict=True)
        save_all(self._processes, work, own, lambda number: self._states.load(number, _HOST), told)

    def restore(self, saved: Saved) -> None:
        """Go on with saved states and the micro-batches in which they were saved, whoever saved them."""
        self._share_out(self._calibration.micro_batches_of(saved.facts["sizes"]))
        self.batch_tokens = max(1, min(self.batch_tokens, saved.facts["batch_tokens"]))
        self._states.resize(len(self._batches))
        for number, state in enumerate(share_of(self._processes, saved)):
            self._states.store(number, state)
        self._states.settle()

    def check(self, sizes: list[int]) -> None:
        """Raise ValueError unless the calibration can be divided into micro-batches of these numbers of sequences."""
        self._calibration.micro_batches_of(sizes)

    def own(self, places: int) -> int:
        """How many of the first so many micro-batches of all are this process's."""
        return sum(place < places for place in self._places)

    def retreat(self, why: str) -> bool:
        """Move the states off the card, if their place was left to us and RAM has room. False if nothing was moved."""
        host = self._plan.room.host
        movable = self.place == "device" and self._settings.states == "auto" and host is not None
        if not movable or host is None or self._plan.needs.states_here(self.batch_tokens) > host.nbytes:
            return False
        self._states.move(_HOST)
        self.place = "ram"
        free_after_failure(self._device)
        self._progress.say(f"note: {why}; the hidden states move from {self._device} to RAM.")
        return True

    def advice(self) -> str:
        """What else the user may lower or raise when memory runs out, as the end of a sentence."""
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

    def _attempt(self, number: int, compute: Compute) -> str | None:
        """None if a micro-batch succeeded; what the library said if memory ran out, and then nothing of it remains."""
        try:
            self._compute(number, compute)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        # Only here, behind the clause, is the traceback gone that held the tensors of the failed attempt.
        self._states.expect_none()
        free_after_failure(self._device)
        return problem

    def _compute(self, number: int, compute: Compute) -> None:
        before = self._states.load(number, self._device)
        self._expect(number + 1)
        with self._busy.on_card("compute", self._device):
            after = compute(number, self._batches[number], before)
        if after is not None:
            self._states.store(number, after)
        if is_gpu(self._device):
            self._handed_out.append(record_event(current_stream(self._device)))
            while len(self._handed_out) > MOST_HANDED_OUT:
                self._handed_out.popleft().synchronize()

    def _expect(self, number: int) -> None:
        """Let the states of a micro-batch come while the one before is in work, where memory has room for both."""
        if number >= len(self._batches) or self._batches[number].ids.numel() > self.batch_tokens:
            return
        if not self._among(self._batches[number]):
            return
        try:
            self._states.expect(number, self._device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._states.expect_none()

    def _share_out(self, batches: list[MicroBatch]) -> None:
        self._batches = self._processes.mine(batches)
        #: The number of each among those of all processes; the parts of one that was split share it.
        self._places = self._processes.mine(range(len(batches)))

    def _split(self, number: int) -> None:
        """Cut a micro-batch that is larger than what is allowed by now, with its states."""
        batch = self._batches[number]
        size = max(1, self.batch_tokens // batch.ids.shape[1])
        if size < len(batch.ids):
            parts = [replace(batch, ids=ids) for ids in torch.split(batch.ids, size)]
            self._states.split(number, batch.ids.shape, [len(part.ids) for part in parts])
            self._batches[number : number + 1] = parts
            self._places[number : number + 1] = [self._places[number]] * len(parts)

    def _after_failure(self, block: int, batch: MicroBatch, problem: str) -> None:
        sequences, length = batch.ids.shape
        if sequences > 1:
            self._shrink(block, sequences, length, "out of memory")
        elif not self._spare() and not self.retreat(f"out of memory in block {block} with a single sequence"):
            raise ResourceError(
                f"Out of memory on {self._device} in block {block}, with a single sequence of {length:,} tokens at a "
                f"time ({problem}). Use a shorter --seq-len, {self.advice()}.{self.watch.holders()}"
            )

    def _check_cap(self, block: int, length: int) -> None:
        excess = self.watch.excess()
        if excess is None:
            return
        sequences = min(self.batch_tokens, max(batch.ids.numel() for batch in self._batches)) // length
        if sequences > 1:
            self._shrink(block, sequences, length, excess)
            return
        if self._spare():
            return
        needs = self._plan.needs
        raise ResourceError(
            f"{excess}, in block {block} with a single sequence of {length:,} tokens at a time. The largest block has "
            f"{format_bytes(needs.block)} ({format_bytes(needs.loading)} while it is loaded), the hidden states have "
            f"{format_bytes(needs.states_here(self.batch_tokens))} ({self.place}). "
            f"Use a shorter --seq-len, {self.advice()}."
        )

    def _shrink(self, block: int, sequences: int, length: int, reason: str) -> None:
        """From now on at most half as many sequences at a time as these."""
        shrink = Shrink(block, sequences, length, (sequences + 1) // 2, reason)
        self.batch_tokens = shrink.to * length
        self.shrinks.append(shrink)
        self._progress.log("shrink", asdict(shrink))
        self._progress.say(
            f"note: {reason} in block {block} with {sequences} sequences at a time; going on with {shrink.to}."
            f"{self.watch.holders()}"
        )
