"""Measuring on text that nothing was scored on: the predictions of one model, or of two side by side.

States are those of `streaming.pairs`, with the sums of `streaming.vocabulary` in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from streamprune.memory.plan import MemoryPlan
from streamprune.progress import Progress
from streamprune.streaming.head import SlicedHead
from streamprune.streaming.pairs import PRUNED, side_of, sums_of, with_sums
from streamprune.streaming.stream import BatchState
from streamprune.streaming.vocabulary import TokenFigures, add_slice, figures_of, no_sums
from streamprune.streaming.weights import Weights
from streamprune.text.calibration import MicroBatch

#: Tokens of the vocabulary in a slice at least and at most: fewer make poor matrix products, more gain nothing.
_LEAST_SLICE, _LARGEST_SLICE = 64, 16384


@dataclass(frozen=True)
class SequenceFigures:
    """What came of one sequence: the index of its source, and its tokens' figures, each (1, L-1).

    `order` is where it stands among all sequences, whoever measured it.
    """

    order: tuple[int, int, int]
    source: int
    figures: TokenFigures


@dataclass(frozen=True)
class Examiner:
    """Reads the predictions off the states of all micro-batches that are `among` those to be measured on.

    Peak memory: a slice of each of the `heads` (by side), and its logits for a micro-batch.
    """

    weights: Weights
    heads: Mapping[str, SlicedHead]
    plan: MemoryPlan
    device: torch.device
    progress: Progress
    among: Callable[[MicroBatch], bool] = lambda batch: True

    def read_off(self, block: int) -> list[SequenceFigures]:
        """What is predicted from the states before block `block` (behind the last one: by the model), by sequence.

        Raises Stopped between two micro-batches; it begins anew then.
        """
        # (Two sides may share one.)
        heads = set(self.heads.values())
        vocabulary = self.heads[PRUNED].vocabulary
        size = slice_size(self.plan, vocabulary, sum(head.row_bytes for head in heads), len(self.heads))
        begins = range(0, vocabulary, size)
        # (The last time to gather what came of it.)
        self.progress.start("predictions", (len(begins) + 1) * self.weights.batches.sequences_among(self.among))
        for begin in begins:
            self._take_slice(block, begin, min(begin + size, vocabulary))
        found = self._gather(block)
        self.progress.end()
        return found

    def _take_slice(self, block: int, begin: int, end: int) -> None:
        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            return self._add(batch, state, begin)

        with ExitStack() as stack:
            self.weights.enter(stack, lambda: self._open(begin, end), "a slice of the output head")
            self.weights.batches.run(block, compute, lambda done, batch: None, among=self.among)

    def _open(self, begin: int, end: int) -> ExitStack:
        with ExitStack() as stack:
            for head in set(self.heads.values()):
                stack.enter_context(head.rows(begin, end))
            return stack.pop_all()

    def _add(self, batch: MicroBatch, state: BatchState, begin: int) -> BatchState:
        ids = batch.ids.to(self.device, non_blocking=True)
        # What may be there from an earlier block, or an attempt that was stopped, is of no use.
        sums = sums_of(state) if begin else None
        if sums is None:
            sums = no_sums(ids, len(self.heads))
        logits = {side: head.logits(ids, side_of(state, side)) for side, head in self.heads.items()}
        return with_sums(state, add_slice(sums, ids, logits, begin))

    def _gather(self, block: int) -> list[SequenceFigures]:
        found: list[SequenceFigures] = []
        sums: list[torch.Tensor] = []

        def look(number: int, batch: MicroBatch, state: BatchState) -> None:
            summed = sums_of(state)
            assert summed is not None
            sums[:] = [summed]

        def keep(done: int, batch: MicroBatch) -> None:
            number = done - 1
            for row in range(len(batch.ids)):
                order = (self.weights.batches.place_of(number), number, row)
                found.append(SequenceFigures(order, batch.source, figures_of(sums[0][row : row + 1])))

        self.weights.batches.run(block, look, keep, among=self.among)
        return found


def slice_size(plan: MemoryPlan, vocabulary: int, row_bytes: int, sides: int) -> int:
    """Tokens of the vocabulary at a time, of which the heads' weights take `row_bytes` each.

    No block is in memory then: a slice may have its room, and the logits that of its intermediate results.
    """
    # Logits as they are computed, and as the model's own scaling leaves them.
    logits = 2 * sides * plan.tokens_at_a_time * plan.needs.itemsize
    size = min(plan.needs.block // max(1, row_bytes), plan.workspace // max(1, logits))
    return max(1, min(max(size, _LEAST_SLICE), _LARGEST_SLICE, vocabulary))
