"""The pruned forward of a run that also makes an importance matrix: sums of what enters the weights on the way."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from streamprune.calibration.sequences import MicroBatch
from streamprune.distributed.processes import Processes
from streamprune.streaming.input_squares import LayerInputSquares
from streamprune.streaming.stages import LayerTask, PrunedForwardStage
from streamprune.work.saved_states import BatchState


class ImatrixForwardStage(PrunedForwardStage):
    """Sends micro-batches through the pruned layers, and sums the squares of what enters their weights.

    The sums are over the text that goes through the pruned model for them (`MicroBatch.refit`), and over the layer as
    it is written: each layer gets what the written ones before it give. They are put into the side's version.
    """

    _sums: LayerInputSquares | None = None

    def applies(self, task: LayerTask) -> bool:
        return task.index < self.weights.decoder.layer_count

    def may_stop(self, task: LayerTask) -> bool:
        # The sums are not saved before the layer is finished.
        return task.replayed and super().may_stop(task)

    def begin(self, task: LayerTask, layer: nn.Module, processes: Processes) -> None:
        super().begin(task, layer, processes)
        if not task.replayed:
            self._sums = LayerInputSquares(layer, self._layers.get(task.index), self.weights.device)

    def compute(
        self, task: LayerTask, layer: nn.Module, number: int, batch: MicroBatch, state: BatchState
    ) -> BatchState | None:
        summed = self._sums is not None and bool(batch.refit)
        with self._sums.listening(len(batch.ids)) if self._sums is not None and summed else nullcontext():
            return super().compute(task, layer, number, batch, state)

    def commit(self, batch: MicroBatch) -> None:
        super().commit(batch)
        if self._sums is not None and batch.refit:
            self._sums.commit(len(batch.ids))

    def conclude(self, task: LayerTask, module: nn.Module, processes: Processes) -> None:
        super().conclude(task, module, processes)
        if self._sums is not None:
            task.versions[self.side].inputs = self._sums.take(processes)

    def reset(self) -> None:
        super().reset()
        self._sums = None
