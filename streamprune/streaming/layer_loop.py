"""The layer loop: every layer is loaded once, goes through its stages, and is freed again.

It streams a model for scoring, pruning and evaluation. Its progress, the `ResumePoint`, is saved and restored with the
hidden states, by any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn

from streamprune.calibration.sequences import Calibration, MicroBatch
from streamprune.errors import ResourceError
from streamprune.hardware.device import free_after_failure, is_gpu, lack_of_memory
from streamprune.progress import name_of_layer
from streamprune.streaming.batches import Among, MicroBatches, Runtime, every
from streamprune.streaming.predictions import SequenceFigures, read_predictions
from streamprune.streaming.stages import ForwardStage, LayerTask
from streamprune.work.folder import WorkFolder
from streamprune.work.records import is_count
from streamprune.work.saved_states import BatchState, SavedStates


@dataclass
class ResumePoint:
    """The progress of the loop: the current layer, the index of its stage, and how many micro-batches it has done."""

    layer: int = 0
    stage: int = 0
    done: int = 0


class LayerLoop:
    """Sends a calibration through the `stages` of one layer after the other.

    Peak memory: a layer's weights (see `LayerWeights`), those of the next one if the plan allows that, the embeddings,
    one micro-batch's workspace, and the hidden states of all tokens where the plan puts them. Use as a
    context manager: entering loads the embeddings, leaving frees everything.
    """

    def __init__(self, runtime: Runtime, stages: Sequence[ForwardStage], calibration: Calibration) -> None:
        self._runtime, self._stages, self._calibration = runtime, stages, calibration
        self._weights = list(dict.fromkeys(stage.weights for stage in stages))
        self.batches = MicroBatches(runtime, calibration, self._drop_prefetch)
        for weights in self._weights:
            weights.batches = self.batches
        self.point = ResumePoint()
        #: Sides whose stages are left out from now on.
        self.given_up: set[str] = set()

    def __enter__(self) -> LayerLoop:
        try:
            for weights in self._weights:
                weights.load_non_layer_weights()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def layer_count(self) -> int:
        """The number of layers; of two models, the larger number."""
        return max(weights.decoder.layer_count for weights in self._weights)

    def run_layer(self, task: LayerTask, following: int | None) -> None:
        """Send all micro-batches through a layer, and put the results into the task.

        Resumes within the layer if states were restored there. `following` is the layer to run next, which is
        prefetched. Raises Stopped between two micro-batches, NonFiniteError if a state has NaN or infinity.
        """
        if self.point.layer != task.index:
            self._go_to(task.index)
        stages = [
            (number, stage)
            for number, stage in enumerate(self._stages)
            if stage.side not in self.given_up and stage.applies(task)
        ]
        sequences = sum(self.batches.sequences_among(partial(stage.takes, task)) for _, stage in stages)
        self._runtime.progress.start(name_of_layer(task.index, self.layer_count), sequences)
        groups = [(weights, list(group)) for weights, group in groupby(stages, key=lambda item: item[1].weights)]
        for position, (weights, group) in enumerate(groups):
            with weights.loaded(task.index) as layer:
                if position + 1 < len(groups):
                    groups[position + 1][0].prefetch(task.index)
                elif following is not None:
                    self._prefetch(following)
                for number, stage in group:
                    self._run_stage(number, stage, task, layer)
        # (A layer for multi-token prediction, a further one, leaves the states as they are behind the last layer.)
        self._go_to(min(task.index + 1, self.layer_count))

    def read_predictions(self, layer: int, among: Among = every) -> dict[str, list[SequenceFigures]]:
        """The predictions of all stages' models but the original, by side, from the states that enter `layer`."""
        weights = {stage.side: stage.weights for stage in self._stages if stage.side not in self.given_up}
        return read_predictions(self._runtime, weights, self.batches, layer, among)

    def give_up(self, side: str) -> None:
        """Leave out the stages of a side from now on, and free its states."""
        self.given_up.add(side)
        self.batches.leave_out(side)

    def drop_cached_pages(self, index: int) -> None:
        """Drop the pages from the system's page cache that reading layer `index` added."""
        for weights in self._weights:
            weights.drop_cached_pages(index)

    def save(self, work: WorkFolder | None) -> None:
        """Save the hidden states and the resume point in rank 0's work folder.

        Raises NonFiniteError if a state has NaN or infinity: saved states are not checked again.
        """
        for stage in self._stages:
            stage.check_finite()
        point = self.point
        facts: dict[str, Any] = {"layer": point.layer, "stage": self._stages[point.stage].name}
        for number, stage in enumerate(self._stages):
            facts |= stage.saved(number == point.stage, self._runtime.processes)
        if self.given_up:
            facts["given_up"] = sorted(self.given_up)
        done = 0 if self._stages[point.stage].restarts else point.done
        self.batches.save(work, done, facts)

    def check(self, saved: SavedStates) -> None:
        """Raise ValueError, KeyError or TypeError for saved states that are not of this run."""
        facts = saved.facts
        numbers = (facts["layer"], facts["done"], facts["batch_tokens"], *facts["sizes"])
        if not all(map(is_count, numbers)) or not facts["done"] <= len(facts["sizes"]) == len(saved):
            raise ValueError("its record is not valid")
        self._position_of(facts["stage"])
        self._calibration.micro_batches_of(facts["sizes"])
        for stage in self._stages:
            stage.check(facts, facts["layer"])

    def restore(self, saved: SavedStates) -> None:
        """Resume from saved states, which rank 0 has checked and alone can load."""
        facts = saved.facts
        layer, position = facts["layer"], self._position_of(facts["stage"])
        # First what may fail, while the stages are still unchanged.
        done = self.batches.restore(saved)
        for number, stage in enumerate(self._stages):
            stage.restore(facts, layer, number == position, self._runtime.processes)
        self.point = ResumePoint(layer, position, done)

    def begins_layer(self, facts: Mapping[str, Any]) -> bool:
        """Whether states were saved before anything went through their layer."""
        return not facts["done"] and self._position_of(facts["stage"]) == 0

    def _position_of(self, name: Any) -> int:
        return [stage.name for stage in self._stages].index(name)

    def _go_to(self, layer: int) -> None:
        self.point = ResumePoint(layer)
        for stage in self._stages:
            stage.reset()

    def _run_stage(self, position: int, stage: ForwardStage, task: LayerTask, layer: nn.Module) -> None:
        processes = self._runtime.processes
        if position < self.point.stage:
            stage.finish(task, processes, restored=True)
            return
        if position > self.point.stage:
            self.point = ResumePoint(task.index, position)
        while not self._run_pass(stage, task, layer):
            self.point.done = 0
        self._runtime.busy.synchronize()
        stage.finish(task, processes)

    def _run_pass(self, stage: ForwardStage, task: LayerTask, layer: nn.Module) -> bool:
        """One pass of the micro-batches; False if it has to be made again, since there is more memory now."""
        processes, on_cpu = self._runtime.processes, not is_gpu(self._runtime.device)
        with stage.module(task, layer) as module:
            stage.begin(task, module, processes)

            def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState | None:
                after = stage.compute(task, module, number, batch, state)
                if on_cpu:
                    # On a GPU this would wait for the computation; there, the check comes after all of them.
                    stage.check_finite()
                return after

            def commit(done: int, batch: MicroBatch) -> None:
                stage.commit(batch)
                self.point.done = done

            takes, may_stop = partial(stage.takes, task), stage.may_stop(task)
            self.batches.run(task.index, compute, commit, self.point.done, takes, may_stop)
            stage.check_finite()
            return self._conclude(stage, task, module)

    def _conclude(self, stage: ForwardStage, task: LayerTask, module: nn.Module) -> bool:
        """Conclude a pass. False if memory ran out, but hidden states were moved, and the pass can be made again."""
        processes, device = self._runtime.processes, self._runtime.device
        problem = lack_of_memory(lambda: stage.conclude(task, module, processes))
        if problem is None:
            return True
        free_after_failure(device)
        what = f"in the {stage.name} of layer {task.index}, behind its last micro-batch"
        # (Other processes are in the middle of what this one left.)
        alone = processes.count == 1 and stage.restarts
        if alone and (self._drop_prefetch() or self.batches.offload_states(f"out of memory {what}")):
            return False
        raise ResourceError(
            f"Out of memory on {device} {what} ({problem}). Use {self.batches.advice()}.{self.batches.watch.holders()}"
        )

    def _prefetch(self, index: int) -> None:
        task = LayerTask(index)
        first = next((stage for stage in self._stages if stage.applies(task)), None)
        if first is not None:
            first.weights.prefetch(index)

    def _drop_prefetch(self) -> bool:
        freed = [weights.drop_prefetch() for weights in self._weights]
        return any(freed)

    def _close(self) -> None:
        for weights in self._weights:
            weights.close()
        self.batches.close()
