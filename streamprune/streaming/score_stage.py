"""The stage that scores the experts of a layer: micro-batches through the layer as it is, with hooks on its experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from streamprune.calibration.sequences import MicroBatch
from streamprune.distributed.processes import Processes
from streamprune.errors import CalibrationError, UnsupportedModelError
from streamprune.formats.base import KeptExperts
from streamprune.saliency.hooks import ExpertsTap, tap_experts
from streamprune.saliency.scores import LayerStatistics, pack, read_statistics
from streamprune.saliency.statistics import ExpertStatistics
from streamprune.streaming.forward import ORIGINAL, non_finite_tokens, side_of
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.stages import ForwardStage, LayerTask, experts_of, is_two_sided
from streamprune.work.saved_states import BatchState


class ScoreStage(ForwardStage):
    """Sends micro-batches through the original layers, and records what each of their `experts` experts contributes.

    Each source of the calibration has `source_tokens`. `choose` selects what stays of a layer's experts, by side, from
    its statistics; None if that is selected later. With `pruned_stream` layers with experts do not change the states of
    the calibration: the pruned forward continues from them. A replayed layer is not scored again. If `width` is not
    None, the energies of the experts' channels, so many each, are recorded too.

    If the weights have a layer for multi-token prediction (MTP), it is scored as a further layer: its input is made
    from the states behind the last layer, which stay as they are.
    """

    name = "score"

    def __init__(
        self,
        weights: LayerWeights,
        experts: int,
        source_tokens: Sequence[int],
        choose: Callable[[LayerStatistics], Mapping[str, KeptExperts]] | None,
        pruned_stream: bool,
        width: int | None = None,
    ) -> None:
        super().__init__(weights, ORIGINAL, is_two_sided)
        layers = weights.decoder.layers
        modules = {index: layers[index].get_submodule(path) for index, path in experts_of(weights).items()}
        self._taps, self._mtp = tap_experts(modules), weights.mtp
        if self._mtp is not None:
            self._taps[self._mtp.index] = self._taps[self._mtp.source]
        self._experts, self._source_tokens, self._width = experts, source_tokens, width
        self._choose, self._pruned_stream = choose, pruned_stream
        #: The sums over the micro-batches that are done, while a layer is scored; and those of the last micro-batch.
        self._total: ExpertStatistics | None = None
        self._last: ExpertStatistics | None = None

    def applies(self, task: LayerTask) -> bool:
        return super().applies(task) or self._is_mtp(task)

    def takes(self, task: LayerTask, batch: MicroBatch) -> bool:
        if self._is_mtp(task):
            # (Of a single token there is no next one.)
            return batch.scored and batch.ids.shape[1] > 1
        return self._two_sided(batch) or not self._stays(task) or self._tap(task) is not None

    def begin(self, task: LayerTask, layer: nn.Module, processes: Processes) -> None:
        if not self._is_mtp(task):
            super().begin(task, layer, processes)

    @contextmanager
    def module(self, task: LayerTask, layer: nn.Module) -> Iterator[nn.Module]:
        tap = self._tap(task)
        if tap is None:
            self._total = None
            yield layer
            return
        self._total = self._total or self._no_statistics(len(self._source_tokens))
        with tap.listening(layer):
            yield layer

    def compute(
        self, task: LayerTask, layer: nn.Module, number: int, batch: MicroBatch, state: BatchState
    ) -> BatchState | None:
        tap, self._last = self._tap(task), None
        if tap is not None:
            # Collected separately for every attempt: one that runs out of memory later must not count.
            tap.statistics = self._last = self._no_statistics() if batch.scored else None
        if self._mtp is not None and self._is_mtp(task):
            before = side_of(state, self.side) if self._two_sided(batch) else state
            ids, entering = self._mtp.entering(batch.ids, before)
            output = self.weights.forward.run_layer(self._mtp.source, layer, ids, entering)
            self._unchecked.append((task.index, number, ids.numel(), non_finite_tokens(output)))
            return None
        after = super().compute(task, layer, number, batch, state)
        return None if self._stays(task) and not self._two_sided(batch) else after

    def commit(self, batch: MicroBatch) -> None:
        if self._last is not None and self._total is not None:
            self._total.merge(self._last, batch.source)

    def finish(self, task: LayerTask, processes: Processes, restored: bool = False) -> None:
        """Set the task's statistics and experts.

        Raises UnsupportedModelError if no token reached the hooks, CalibrationError if none can enter the MTP layer.
        """
        super().finish(task, processes, restored)
        if self._total is None or self._tap(task) is None:
            return
        if not restored:
            self._total.add_up(processes)
        task.statistics = self._total.of_layer(task.index)
        if not task.statistics.fields["tokens"].any() and self._is_mtp(task):
            raise CalibrationError(
                "No token of the calibration reached the experts of the MTP layer, which takes tokens that another one "
                "follows. Calibrate on text with longer sequences, or leave the layer out with --mtp drop."
            )
        if not task.statistics.fields["tokens"].any():
            raise UnsupportedModelError(
                f"Layer {task.index} has experts, but its forward bypassed them, so they cannot be scored. "
                "Please report this model."
            )
        if self._choose is not None:
            # Rank 0 decides, since on another kind of processor the last digit of a score may differ.
            for side, kept in processes.broadcast(self._choose(task.statistics)).items():
                task.versions[side].kept = kept

    def reset(self) -> None:
        super().reset()
        self._total = None

    def saved(self, in_work: bool, processes: Processes) -> dict[str, Any]:
        facts, total = super().saved(in_work, processes), copy.deepcopy(self._total)
        if total is None:
            return facts | {"statistics": None}
        if in_work:
            total.add_up(processes)
        channels = {"channels": pack(total.channels.cpu().numpy())} if total.channels is not None else {}
        return {**facts, "statistics": pack(total.values.cpu().numpy()), **channels}

    def check(self, facts: Mapping[str, Any], layer: int) -> None:
        super().check(facts, layer)
        if facts["statistics"] is not None:
            self._restored(facts, layer)

    def restore(self, facts: Mapping[str, Any], layer: int, in_work: bool, processes: Processes) -> None:
        super().restore(facts, layer, in_work, processes)
        self._total = None
        if facts["statistics"] is not None:
            self._total = self._no_statistics(len(self._source_tokens))
            # Sums that are not added up yet are restored in one rank only; complete ones in all.
            if processes.is_first or not in_work:
                found = self._restored(facts, layer)
                self._total.values.copy_(torch.from_numpy(found.values))
                if self._total.channels is not None:
                    self._total.channels.copy_(torch.from_numpy(found.channels))

    def _restored(self, facts: Mapping[str, Any], layer: int) -> LayerStatistics:
        """The sums that were saved in a layer, with float64 `channels`. Raises as `check`."""
        return read_statistics(facts, layer, self._source_tokens, self._experts, self._width, "f8")

    def _tap(self, task: LayerTask) -> ExpertsTap | None:
        """The hooks on a layer's experts; None if it is not to be scored."""
        return None if task.replayed else self._taps.get(task.index)

    def _is_mtp(self, task: LayerTask) -> bool:
        return self._mtp is not None and task.index == self._mtp.index

    def _stays(self, task: LayerTask) -> bool:
        """Whether the calibration's states are left to the pruned forward."""
        return self._pruned_stream and task.index in self._taps

    def _no_statistics(self, sources: int = 1) -> ExpertStatistics:
        return ExpertStatistics(self._experts, self.weights.device, sources, self._width)
