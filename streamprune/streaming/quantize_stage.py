"""The stage that rounds a layer's matrices by GPTQ: what it collects, and the order in which it rounds.

Everything is collected in one pass of the text through the pruned layer with its weights as they are, refitted ones
included. Linear modules are rounded by the sums over their inputs. Experts come in two steps: gate and up projections
by the tokens that are routed to the expert; then these are loaded into the layer, and the down projections are rounded
by what the rounded ones give.

Shapes: T tokens of a micro-batch, N of all, k experts chosen per token, H hidden size, C columns of a matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from streamprune.calibration.sequences import MicroBatch
from streamprune.distributed.processes import Processes
from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import KeptExperts
from streamprune.refit.activations import DOWN, listening
from streamprune.streaming.collected import CollectedTokens
from streamprune.streaming.forward import PRUNED, non_finite_tokens, of_side, side_of
from streamprune.streaming.layer_inputs import InputSums, LinearInputs, RoutedInputs
from streamprune.streaming.layer_rounding import GPTQ, LEAST_TOKENS, Group, LayerRounding, encode_refitted
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.stages import ForwardStage, LayerTask, experts_of, is_two_sided, pruned_module
from streamprune.streaming.written_tensors import WrittenTensor, WrittenTensors
from streamprune.work.layer_records import RoundedLayer
from streamprune.work.saved_states import BatchState


def own_text(batch: MicroBatch) -> bool:
    """Whether a micro-batch is of the text that weights are fitted to, or rounded by."""
    return bool(batch.refit)


class QuantizeStage(ForwardStage):
    """Rounds the matrices of each layer by the text of a side's stream, without changing any state.

    `make_pruned` returns a layer of the pruned model on meta, for its index and what stays of its experts. The experts'
    tokens are collected in the memory of `home`, and `chunk` experts are rounded at a time. `among` selects the text.
    What it computes is in the side's version of the layer.
    """

    restarts = True

    def __init__(
        self,
        weights: LayerWeights,
        make_pruned: Callable[[int, KeptExperts], nn.Module],
        written: WrittenTensors,
        home: torch.device,
        chunk: int,
        side: str = PRUNED,
        among: Callable[[MicroBatch], bool] = own_text,
    ) -> None:
        super().__init__(weights, side, is_two_sided)
        self.name, self._among = of_side(GPTQ, side), among
        self._layers, self._make_pruned, self._written = experts_of(weights), make_pruned, written
        self._home, self._chunk = home, chunk
        self._inputs: LinearInputs | None = None
        self._collected: CollectedTokens | None = None
        self._last: tuple[torch.Tensor, ...] | None = None

    def applies(self, task: LayerTask) -> bool:
        return not task.replayed and any(each.scheme is not None for each in self._written.of_layer(task.index))

    def takes(self, task: LayerTask, batch: MicroBatch) -> bool:
        return self._among(batch)

    def may_stop(self, task: LayerTask) -> bool:
        # What a refit has computed is not saved before the layer is finished.
        version = task.versions[self.side]
        return version.refit is None and not version.computed

    @contextmanager
    def module(self, task: LayerTask, layer: nn.Module) -> Iterator[nn.Module]:
        batches, version = self.weights.batches, task.versions[self.side]
        assert batches is not None
        self._inputs = LinearInputs(self._linears(task), self.weights.device, products=True)
        self._collected = CollectedTokens(batches.tokens_among(self._among)) if self._experts(task) else None
        pruned = self._make_pruned(task.index, version.kept)
        fill = partial(self._written.load_plain, task.index, version.kept, version.computed)
        try:
            with pruned_module(self.weights, task.index, layer, pruned, version.kept, fill) as module:
                yield module
        finally:
            self._inputs = self._collected = self._last = None

    def compute(
        self, task: LayerTask, layer: nn.Module, number: int, batch: MicroBatch, state: BatchState
    ) -> BatchState | None:
        """Sum up a micro-batch's inputs, and collect the experts' tokens; the state stays."""
        assert self._inputs is not None
        with ExitStack() as stack:
            calls = []
            if self._collected is not None:
                calls = stack.enter_context(listening(layer.get_submodule(self._layers[task.index])))
            stack.enter_context(self._inputs.listening(layer, len(batch.ids)))
            after = self.weights.forward.run_layer(task.index, layer, batch.ids, side_of(state, self.side))
        self._unchecked.append((task.index, number, batch.ids.numel(), non_finite_tokens(after)))
        if self._collected is None:
            return None
        if len(calls) != 1 or len(calls[0].hidden) != batch.ids.numel():
            raise UnsupportedModelError(
                f"The experts of layer {task.index} are called {len(calls)} times in a forward, so what enters them is "
                "not known. Run with --rounding rtn."
            )
        self._last = (calls[0].hidden, calls[0].index.int())
        self._collected.make_room(self._last, self._home)
        return None

    def commit(self, batch: MicroBatch) -> None:
        assert self._inputs is not None
        self._inputs.commit(len(batch.ids))
        if self._collected is not None:
            assert self._last is not None
            self._collected.add(self._last)
        self._last = None

    @torch.no_grad()
    def conclude(self, task: LayerTask, module: nn.Module, processes: Processes) -> None:
        """Round, and put the new tensors into the side's version. Rank 0 rounds, and all ranks get the result."""
        assert self._inputs is not None
        version = task.versions[self.side]
        rounding = LayerRounding(self._written, task.index, version.kept, version.computed, processes)
        linears = self._round_linears(task, rounding, self._inputs.sums(processes))
        tokens, nearest = [], set[int]()
        if self._collected is not None:
            experts = module.get_submodule(self._layers[task.index])
            inputs = RoutedInputs(experts, self._collected.take(), self.weights.device)
            tokens = inputs.count(len(version.kept.experts), processes)
            nearest = self._round_experts(task, rounding, inputs, tokens, processes)
        before, after = (_mean([pair[which] for pair in rounding.outcome.errors]) for which in (0, 1))
        computed = rounding.computed
        version.computed = processes.on_first(lambda: encode_refitted(self._written, task.index, computed))
        version.rounded = RoundedLayer(tokens, sorted(nearest), linears, before, after)

    def _round_linears(self, task: LayerTask, rounding: LayerRounding, sums: Mapping[str, InputSums]) -> list[str]:
        """Round the weights of Linear modules; returns the names of those that were rounded to nearest instead."""
        groups: dict[int, list[WrittenTensor]] = defaultdict(list)
        nearest = []
        for path, each in sorted(self._linears(task).items()):
            if path in sums and sums[path].tokens >= LEAST_TOKENS:
                groups[id(sums[path])].append(each)
            else:
                nearest.append(each.name)
        products = {id(each): each.products for each in sums.values()}
        for key, group in groups.items():
            hessian = products[key]
            assert hessian is not None
            if rounding.add([group], hessian.float().unsqueeze(0)):
                nearest += [each.name for each in group]
        return sorted(nearest)

    def _round_experts(
        self,
        task: LayerTask,
        rounding: LayerRounding,
        inputs: RoutedInputs,
        tokens: Sequence[int],
        processes: Processes,
    ) -> set[int]:
        """Round the experts' matrices; returns which experts, by their places, have one that was rounded to nearest."""
        kept, chunk = task.versions[self.side].kept, min(processes.collect(self._chunk))
        enough = [place for place, count in enumerate(tokens) if count >= LEAST_TOKENS]
        nearest = set(range(len(tokens))) - set(enough)
        first, down = self._expert_groups(task)
        for groups, of_down in ((first, False), (down, True)):
            if of_down:
                parameters = {each.parameter for group in first.values() for each in group}
                self._written.load(task.index, kept, rounding.computed, parameters)

            chosen = [groups[place] for place in enough]
            hessian = partial(self._hessian, inputs, enough, chosen, of_down)
            failed = rounding.add_experts(chosen, hessian, chunk)
            nearest |= {enough[number] for number in failed}
        return nearest

    @staticmethod
    def _hessian(
        inputs: RoutedInputs, experts: Sequence[int], groups: Sequence[Group], of_down: bool, number: int
    ) -> torch.Tensor:
        """XᵀX of what enters a group, the number-th, in this process."""
        return inputs.products(experts[number], groups[number][0].plain.shape[1], of_down)

    def _experts(self, task: LayerTask) -> list[WrittenTensor]:
        """The experts' matrices that are rounded."""
        if task.index not in self._layers:
            return []
        prefix = f"{self._prefix(task)}{self._layers[task.index]}."
        return [each for each in self._rounded(task) if each.parameter.startswith(prefix)]

    def _expert_groups(self, task: LayerTask) -> tuple[dict[int, Group], dict[int, Group]]:
        """By the places of the experts: the matrices that get the experts' input, and the down projections."""
        first: dict[int, list[WrittenTensor]] = defaultdict(list)
        down: dict[int, list[WrittenTensor]] = defaultdict(list)
        for each in self._experts(task):
            assert each.plain.slot is not None
            (down if each.parameter.endswith(f".{DOWN}") else first)[each.plain.slot].append(each)
        return dict(first), dict(down)

    def _linears(self, task: LayerTask) -> dict[str, WrittenTensor]:
        """The weights of Linear modules that are rounded, by the modules' paths in the layer."""
        prefix, of_experts = self._prefix(task), {each.name for each in self._experts(task)}
        return {
            each.parameter.removeprefix(prefix).removesuffix(".weight"): each
            for each in self._rounded(task)
            if each.name not in of_experts
        }

    def _rounded(self, task: LayerTask) -> list[WrittenTensor]:
        return [each for each in self._written.of_layer(task.index) if each.scheme is not None]

    def _prefix(self, task: LayerTask) -> str:
        return f"{self.weights.decoder.layers_path}.{task.index}."


def _mean(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 6) if values else 0.0


class EncodeStage(ForwardStage):
    """Rounds to nearest what a refit has computed for a side, as the output has it. No text goes through it."""

    def __init__(self, weights: LayerWeights, written: WrittenTensors, side: str = PRUNED) -> None:
        super().__init__(weights, side, is_two_sided)
        self.name, self._written = of_side("encode", side), written

    def applies(self, task: LayerTask) -> bool:
        return task.index in experts_of(self.weights) and not task.replayed

    def takes(self, task: LayerTask, batch: MicroBatch) -> bool:
        return False

    def may_stop(self, task: LayerTask) -> bool:
        # What a refit has computed is not saved before the layer is finished.
        return False

    def conclude(self, task: LayerTask, module: nn.Module, processes: Processes) -> None:
        """Put the encoded tensors in the place of the plain ones. Rank 0 encodes them, and all ranks get them."""
        version = task.versions[self.side]
        plain = version.computed
        version.computed = processes.on_first(lambda: encode_refitted(self._written, task.index, plain))
