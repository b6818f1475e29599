"""One model, or an original and its pruned one side by side, streamed over text that is only measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from streamprune.errors import NonFiniteError
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.block_errors import BlockErrors
from streamprune.streaming.pairs import ORIGINAL, PRUNED, relative_errors, side_of, with_side
from streamprune.streaming.states import non_finite_tokens
from streamprune.streaming.stream import BatchState, BlockStream
from streamprune.streaming.weights import Weights
from streamprune.text.calibration import MicroBatch
from streamprune.together.processes import ALONE

#: Gives, for the index of a block, the sides that have such a block: what runs it, and the loaded block.
Modules = Callable[[int], Iterator[tuple[str, BlockStream, nn.Module]]]


class ExaminedStream:
    """Sends all micro-batches through block after block of one or two models.

    Peak memory: a block of one of them at a time, and the hidden states of both. With `compare`, where the two are of
    one shape, `errors` are how far they are from each other behind every block.
    """

    def __init__(
        self, modules: Modules, batches: MicroBatches, device: torch.device, sources: int, compare: bool
    ) -> None:
        self._modules, self._batches, self._device, self._compare = modules, batches, device, compare
        self.errors = BlockErrors(sources)

    def run_block(self, index: int) -> None:
        """Send everything through block `index`. Raises NonFiniteError where a state is no number any more."""
        for side, stream, block in self._modules(index):
            self._pass(index, side, stream, block, self._compare and side == PRUNED)
        if self._compare:
            self.errors.end_block(index, ALONE)

    def _pass(self, index: int, side: str, stream: BlockStream, block: nn.Module, compare: bool) -> None:
        unchecked: list[tuple[int, int, torch.Tensor]] = []
        sums: list[torch.Tensor] = []

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            ids = batch.ids.to(self._device, non_blocking=True)
            after = stream.run_block(index, block, ids, side_of(state, side))
            both = with_side(state, side, after)
            unchecked.append((number, ids.numel(), non_finite_tokens(after)))
            sums[:] = [relative_errors(both, ids.numel()).sum()] if compare else []
            return both

        def commit(done: int, batch: MicroBatch) -> None:
            for each in sums:
                self.errors.add(batch.source, each)

        self._batches.run(index, compute, commit)
        for number, tokens, count in unchecked:
            if int(count):
                raise NonFiniteError(
                    f"Block {index} of the {side} model, batch {number}: {int(count)} of {tokens} tokens have NaN or "
                    "infinite states. Try --dtype float32 or bfloat16, and check that the model itself works."
                )


def of_checkpoints(sides: Mapping[str, Weights], blocks: Mapping[str, int]) -> Modules:
    """The blocks of models in checkpoints of their own, loaded one at a time; the following one is read meanwhile."""
    order = [(index, side) for index in range(max(blocks.values())) for side in sides if index < blocks[side]]

    def modules(index: int) -> Iterator[tuple[str, BlockStream, nn.Module]]:
        for place, (block, side) in enumerate(order):
            if block != index:
                continue
            with sides[side].block(index, None) as (_, module):
                for following, other in order[place + 1 : place + 2]:
                    sides[other].read_ahead(following)
                yield side, sides[side].stream, module
            sides[side].loader.leave_no_pages(index)

    return modules


def of_choice(weights: Weights, kept: Mapping[int, Sequence[int]], twin: Callable[[int, int], nn.Module]) -> Modules:
    """The blocks of a checkpoint as they are, and with only the experts `kept`; `twin` gives such a block on meta."""
    count = len(weights.loader.decoder.blocks)

    def modules(index: int) -> Iterator[tuple[str, BlockStream, nn.Module]]:
        with weights.block(index, index + 1 if index + 1 < count else None) as (stack, block):
            yield ORIGINAL, weights.stream, block
            experts = kept.get(index)
            if experts is not None:
                meta, whole = twin(index, len(experts)), block
                block = weights.enter(
                    stack,
                    lambda: weights.loader.pruned_block(index, whole, meta, experts),
                    f"a copy of block {index} with the experts that stay",
                )
            yield PRUNED, weights.stream, block
        weights.loader.leave_no_pages(index)

    return modules
