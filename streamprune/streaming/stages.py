"""The stages of a layer: each is one pass of micro-batches through it.

| stage | what goes through the layer | result |
|---|---|---|
| `ForwardStage` | micro-batches, through the layer of a checkpoint | states; with `errors`, their relative errors |
| `ScoreStage` (`score_stage.py`) | the same, with hooks on the layer's experts | statistics, and which experts stay |
| `RefitStage` (`refit_stage.py`) | text to refit to, through the pruned layer | refitted down projections |
| `QuantizeStage` (`quantize_stage.py`) | text to round by, through the pruned layer | rounded matrices |
| `PrunedForwardStage` | text for the pruned model, through the pruned layer | states of the pruned model |

The stages after scoring belong to a side: `PRUNED` in a run, and one for each candidate in a search. What the layer
becomes for a side is its `LayerVersion`. A stage that computes weights (a refit, an encoding) belongs before the
side's pruned forward: it puts its tensors into the version, where the pruned forward and the writer find them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from streamprune.calibration.sequences import MicroBatch
from streamprune.distributed.processes import Processes
from streamprune.errors import NonFiniteError
from streamprune.formats.base import KeptExperts
from streamprune.models.skeleton import Skeleton
from streamprune.output.tensors import ComputedTensors
from streamprune.saliency.scores import LayerStatistics
from streamprune.streaming.batches import Among, every
from streamprune.streaming.forward import (
    PRUNED,
    non_finite_tokens,
    of_side,
    relative_errors,
    side_of,
    with_side,
)
from streamprune.streaming.layer_errors import LayerErrors
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.refit_target import RefitTarget
from streamprune.streaming.written_tensors import WrittenTensors
from streamprune.work.layer_records import RefittedLayer, RoundedLayer, WeightInputs
from streamprune.work.saved_states import BatchState


def is_held_out(batch: MicroBatch) -> bool:
    """Whether a micro-batch of a run is held out."""
    return batch.held_out


def is_two_sided(batch: MicroBatch) -> bool:
    """Whether a micro-batch of a run goes through the original and through the pruned model."""
    return batch.two_sided


@dataclass
class LayerVersion:
    """What a layer becomes for a side that is not the original.

    `kept` is what stays of the experts, nothing if none are selected. `computed` are the tensors that stages
    have computed for it; `refit` and `rounded` say how. `inputs` are sums of what enters its weights, by
    module or parameter, if an importance matrix is made.
    """

    kept: KeptExperts = field(default_factory=KeptExperts)
    computed: ComputedTensors = field(default_factory=ComputedTensors)
    refit: RefittedLayer | None = None
    rounded: RoundedLayer | None = None
    inputs: Mapping[str, WeightInputs] = field(default_factory=dict)


@dataclass
class LayerTask:
    """A layer on its way through the stages: its results so far.

    `replayed`: it was finished before, and only the states have to go through it. `statistics` are None without
    experts, and before it is scored. `versions` are what it becomes, by side; one that is asked for before anything is
    selected keeps nothing. `factor` is what the original layer multiplies its experts' output by, as `refit_target`
    measures it for the refit.
    """

    index: int
    replayed: bool = False
    statistics: LayerStatistics | None = None
    versions: defaultdict[str, LayerVersion] = field(default_factory=lambda: defaultdict(LayerVersion))
    factor: float | None = None

    @classmethod
    def of(
        cls, index: int, version: LayerVersion, statistics: LayerStatistics | None = None, replayed: bool = False
    ) -> LayerTask:
        """A task of a layer that is pruned in one way only, the side `PRUNED`."""
        task = cls(index, replayed, statistics)
        task.versions[PRUNED] = version
        return task


class ForwardStage:
    """Sends micro-batches through the layers of one model (`side`), as they are in its checkpoint.

    Those that are `two_sided` have states of both sides, the others a single one. `errors` collects the relative errors
    of this side's states, but not of text that weights are refitted to.
    """

    name = "forward"
    #: Whether the stage starts at its first micro-batch again if it was interrupted. (Then it must not change states.)
    restarts = False

    def __init__(
        self, weights: LayerWeights, side: str, two_sided: Among = every, errors: LayerErrors | None = None
    ) -> None:
        self.weights, self.side, self.errors = weights, side, errors
        self._two_sided = two_sided
        #: Set if what goes through these layers is also what weights are refitted to.
        self.target: RefitTarget | None = None
        self._sum: torch.Tensor | None = None
        #: Layer, number, tokens, and tokens with NaN or infinity of the micro-batches that are not checked yet.
        self._unchecked: list[tuple[int, int, int, torch.Tensor]] = []

    def applies(self, task: LayerTask) -> bool:
        """Whether any micro-batch goes through this layer."""
        return task.index < self.weights.decoder.layer_count

    def takes(self, task: LayerTask, batch: MicroBatch) -> bool:
        """Whether a micro-batch goes through this layer."""
        return True

    def may_stop(self, task: LayerTask) -> bool:
        """Whether the run may stop between two micro-batches of this stage, to resume there."""
        return True

    @contextmanager
    def module(self, task: LayerTask, layer: nn.Module) -> Iterator[nn.Module]:
        """The module that runs, given the loaded layer; what it needs is freed on exit."""
        yield layer

    def begin(self, task: LayerTask, layer: nn.Module, processes: Processes) -> None:
        """Decide what the pass needs, with the module that runs; after a stop within the pass, it is known already."""
        if self.target is not None and not task.replayed:
            self.target.decide(task.index, layer, processes)

    def compute(
        self, task: LayerTask, layer: nn.Module, number: int, batch: MicroBatch, state: BatchState
    ) -> BatchState | None:
        """The new state of micro-batch `number` (None: it stays as it is). May fail, and be computed again in parts."""
        two_sided = self._two_sided(batch)
        before = side_of(state, self.side) if two_sided else state
        with self.target.listening(task.index, layer, batch) if self.target is not None else nullcontext([]) as calls:
            after = self.weights.forward.run_layer(task.index, layer, batch.ids, before)
        self._unchecked.append((task.index, number, batch.ids.numel(), non_finite_tokens(after)))
        if not two_sided:
            return after
        both = with_side(state, self.side, after)
        if self.target is not None:
            both = self.target.carried(both, calls)
        counts = self.errors is not None and not batch.refit
        self._sum = relative_errors(both, self.side, batch.ids.numel()).sum() if counts else None
        return both

    def commit(self, batch: MicroBatch) -> None:
        """Count the micro-batch that was computed last."""
        if self.errors is not None and self._sum is not None and self._two_sided(batch):
            self.errors.add(batch.source, self._sum)

    def conclude(self, task: LayerTask, module: nn.Module, processes: Processes) -> None:
        """Compute what needs all micro-batches and still the module; then `finish` follows."""

    def check_finite(self) -> None:
        """Raise NonFiniteError if a state computed since the last call has NaN or infinity. Waits for the GPU."""
        unchecked, self._unchecked = self._unchecked, []
        for layer, number, tokens, count in unchecked:
            bad = int(count)
            if bad:
                raise NonFiniteError(
                    f"Layer {layer} of the {self.side} model, micro-batch {number}: {bad} of {tokens} tokens have NaN "
                    f"or infinite hidden states, so no result can be trusted. Computed in {self.weights.dtype}; try "
                    "--dtype float32 or bfloat16, and check that the model itself works."
                )

    def finish(self, task: LayerTask, processes: Processes, restored: bool = False) -> None:
        """Add up the results of all ranks in this layer, and put them into the task.

        `restored`: the pass ended before the run was interrupted, so they are added up already.
        """
        if self.errors is not None and not restored:
            self.errors.end_layer(task.index, processes)
        if self.target is not None:
            task.factor = self.target.factor

    def reset(self) -> None:
        """Forget the data of the current layer, before the next one."""
        if self.target is not None:
            self.target.reset()

    def saved(self, in_work: bool, processes: Processes) -> dict[str, Any]:
        """The data to resume this stage, as JSON, over all ranks. `in_work`: its pass has not ended."""
        errors = {self._errors_key: self.errors.saved(processes)} if self.errors is not None else {}
        return errors | (self.target.saved() if self.target is not None else {})

    def check(self, facts: Mapping[str, Any], layer: int) -> None:
        """Raise ValueError, KeyError or TypeError unless `facts` may be the result of `saved` in layer `layer`."""
        if self.errors is not None:
            self.errors.check(facts[self._errors_key], layer)
        if self.target is not None:
            self.target.check(facts)

    def restore(self, facts: Mapping[str, Any], layer: int, in_work: bool, processes: Processes) -> None:
        """Restore what was saved in layer `layer`."""
        if self.errors is not None:
            self.errors.restore(facts[self._errors_key], layer, processes.is_first)
        if self.target is not None:
            self.target.restore(facts)

    @property
    def _errors_key(self) -> str:
        return of_side("errors", self.side)


class PrunedForwardStage(ForwardStage):
    """Sends micro-batches through the pruned layers of a side, with only the experts that stay.

    These are the `two_sided` ones, and with `pruned_stream` the calibration in layers with experts. `make_pruned`
    returns a layer of the pruned model on meta, for its index and what stays of its experts. `written` puts what is
    computed or rounded of a layer into it; it may be None if nothing is. In a run, without any text that needs it, it
    is left out; a `side` of a search always has some.
    """

    def __init__(
        self,
        weights: LayerWeights,
        make_pruned: Callable[[int, KeptExperts], nn.Module],
        pruned_stream: bool,
        two_sided: Among = is_two_sided,
        errors: LayerErrors | None = None,
        written: WrittenTensors | None = None,
        side: str = PRUNED,
    ) -> None:
        super().__init__(weights, side, two_sided, errors)
        self.name = of_side("pruned", side)
        self._layers, self._make_pruned, self._pruned_stream = experts_of(weights), make_pruned, pruned_stream
        self._written = written

    def applies(self, task: LayerTask) -> bool:
        has_text = self.errors is not None or self._written is not None or self.side != PRUNED
        return super().applies(task) and (has_text or self._streams(task))

    def takes(self, task: LayerTask, batch: MicroBatch) -> bool:
        return self._two_sided(batch) or self._streams(task)

    def may_stop(self, task: LayerTask) -> bool:
        # Computed tensors are not saved before the layer is finished, nor what is on record of them.
        version = task.versions[self.side]
        return version.refit is None and version.rounded is None and not version.computed

    def finish(self, task: LayerTask, processes: Processes, restored: bool = False) -> None:
        super().finish(task, processes, restored)
        if self.side != PRUNED:
            # Nothing of a search is written. (All candidates' tensors at once are more than the memory plan counts.)
            task.versions[self.side].computed = ComputedTensors()

    @contextmanager
    def module(self, task: LayerTask, layer: nn.Module) -> Iterator[nn.Module]:
        version, written = task.versions[self.side], self._written
        changed = written is not None and written.is_changed(task.index, version.computed)
        if task.index not in self._layers and not changed:
            yield layer
            return

        def fill() -> None:
            if written is not None and changed:
                written.load(task.index, version.kept, version.computed)

        pruned = self._make_pruned(task.index, version.kept)
        with pruned_module(self.weights, task.index, layer, pruned, version.kept, fill) as module:
            yield module

    def _streams(self, task: LayerTask) -> bool:
        return self._pruned_stream and task.index in self._layers


def experts_of(weights: LayerWeights) -> Mapping[int, str]:
    """The layers with experts, and the paths of their experts modules; the model must be opened as a MoE model."""
    assert isinstance(weights.decoder, Skeleton)
    return weights.decoder.experts


@contextmanager
def pruned_module(
    weights: LayerWeights,
    index: int,
    layer: nn.Module,
    pruned: nn.Module,
    kept: KeptExperts,
    fill: Callable[[], None] = lambda: None,
) -> Iterator[nn.Module]:
    """The loaded layer `index` with what stays of its experts, in `pruned`, to which `fill` gives other weights.

    Hidden states are offloaded if memory is short.
    """

    @contextmanager
    def filled() -> Iterator[nn.Module]:
        with weights.pruned_layer(index, layer, pruned, kept) as module:
            fill()
            yield module

    with weights.making_room(filled, f"a copy of layer {index} with the experts that stay") as module:
        yield module
