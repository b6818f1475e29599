"""The stage that refits a layer's down projections: what it collects, what it aims at, and the tensors that it makes.

For each of its tokens the pruned layer's output should be that of the original layer, which got the original states.
So the target of the refit is what is missing in the pruned layer's output: the error that removing experts made in this
layer, and that which earlier layers left in the residual stream. Where a layer does not simply add its experts' output
to that stream (`refit_target`), the target is what is missing in the experts' output.

Shapes: T tokens of a micro-batch, N of all, k experts chosen per token, K experts that stay, I intermediate size, H
hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from streamprune.calibration.sequences import FIT, JUDGE, MicroBatch
from streamprune.distributed.processes import Processes
from streamprune.errors import NonFiniteError, UnsupportedModelError
from streamprune.files.json_text import show
from streamprune.formats.base import KeptExperts
from streamprune.output.tensors import ComputedTensors
from streamprune.refit.activations import activation, down_sizes, listening
from streamprune.refit.least_squares import Changes, Fit, RoutedTokens, Shares
from streamprune.streaming.collected import CollectedTokens
from streamprune.streaming.down_tensors import REFIT, DownTensors
from streamprune.streaming.forward import ORIGINAL, PRUNED, hidden_states_of, non_finite_tokens, of_side, side_of
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.refit_target import EXPERTS
from streamprune.streaming.stages import ForwardStage, LayerTask, experts_of, is_two_sided, pruned_module
from streamprune.work.layer_records import RefittedLayer
from streamprune.work.saved_states import BatchState

#: The share of the error that earlier layers left in the residual stream that a layer is to mend.
CATCH_UP = 1.0


def own_use(batch: MicroBatch) -> str:
    """What a micro-batch is for in the only refit of a run."""
    return batch.refit


class _Collected:
    """The tokens of one use, `size` in all."""

    def __init__(self, size: int) -> None:
        self.tokens = CollectedTokens(size)
        #: Σ ‖output of the original layer‖² of the tokens of each micro-batch.
        self.energies: list[torch.Tensor] = []

    def take(self) -> tuple[RoutedTokens, float]:
        """All tokens, and their energy."""
        none = torch.zeros(0, 1)
        return RoutedTokens(*(self.tokens.take() or (none, none.long(), none, none))), float(sum(self.energies))


class RefitStage(ForwardStage):
    """Refits the down projections of each layer's kept experts on a side's stream, without changing any state.

    `make_pruned` returns a layer of the pruned model on meta, for its index and what stays of its experts. The tokens
    are collected in the memory of `home`. `use_of` says what a micro-batch is for in this refit: FIT, JUDGE or nothing.
    What it computes is in the side's version of the layer.
    """

    restarts = True

    def __init__(
        self,
        weights: LayerWeights,
        make_pruned: Callable[[int, KeptExperts], nn.Module],
        tensors: DownTensors,
        home: torch.device,
        side: str = PRUNED,
        use_of: Callable[[MicroBatch], str] = own_use,
    ) -> None:
        super().__init__(weights, side, is_two_sided)
        self.name, self._use_of = of_side(REFIT, side), use_of
        self._layers, self._make_pruned, self._tensors, self._home = experts_of(weights), make_pruned, tensors, home
        self._collected: dict[str, _Collected] = {}
        self._last: tuple[RoutedTokens, torch.Tensor] | None = None

    def applies(self, task: LayerTask) -> bool:
        return task.index in self._layers and not task.replayed

    def takes(self, task: LayerTask, batch: MicroBatch) -> bool:
        return bool(self._use_of(batch))

    @contextmanager
    def module(self, task: LayerTask, layer: nn.Module) -> Iterator[nn.Module]:
        batches = self.weights.batches
        assert batches is not None
        self._collected = {use: _Collected(batches.tokens_among(partial(self._is_for, use))) for use in (FIT, JUDGE)}
        kept = task.versions[self.side].kept
        pruned = self._make_pruned(task.index, kept)
        try:
            with pruned_module(self.weights, task.index, layer, pruned, kept) as module:
                yield module
        finally:
            self._collected.clear()

    def compute(
        self, task: LayerTask, layer: nn.Module, number: int, batch: MicroBatch, state: BatchState
    ) -> BatchState | None:
        """Collect a micro-batch's tokens; the state stays. (The layer's experts run as in any forward.)"""
        experts, factor, hidden = self._experts(task, layer), task.factor, down_sizes(self._experts(task, layer))[1]
        own: Any = side_of(state, EXPERTS).output if factor is None else None
        with listening(experts) as calls:
            after = self.weights.forward.run_layer(task.index, layer, batch.ids, side_of(state, self.side))
        self._unchecked.append((task.index, number, batch.ids.numel(), non_finite_tokens(after)))
        if len(calls) != 1 or len(calls[0].hidden) != batch.ids.numel() or (own is None and factor is None):
            raise UnsupportedModelError(
                f"--refit cannot refit the experts of layer {task.index}: how their output is used is not known. Run "
                "without --refit."
            )
        call, wanted, found = calls[0], own, calls[0].output
        if factor is not None:
            wanted, found = hidden_states_of(side_of(state, ORIGINAL)), hidden_states_of(after)
        wanted, found = (states.reshape(-1, hidden).float() for states in (wanted, found))
        error = wanted - found if factor is None else (wanted - found) / factor
        routed = RoutedTokens(call.hidden, call.index.int(), call.gates.float(), error)
        self._collected[self._use_of(batch)].tokens.make_room(routed.values, self._home)
        self._last = routed, wanted.square().sum(dtype=torch.float64)
        return None

    def commit(self, batch: MicroBatch) -> None:
        assert self._last is not None
        routed, energy = self._last
        collected = self._collected[self._use_of(batch)]
        collected.tokens.add(routed.values)
        collected.energies.append(energy)
        self._last = None

    def conclude(self, task: LayerTask, module: nn.Module, processes: Processes) -> None:
        """Fit, and put the new tensors into the task. Rank 0 encodes them, and all ranks get them."""
        experts = self._experts(task, module)
        inner, hidden = down_sizes(experts)
        version = task.versions[self.side]
        fit = Fit(
            lambda *given: activation(experts, *given), len(version.kept.experts), inner, hidden, self.weights.device,
            processes,
        )  # fmt: skip
        fitted, (judging, energy) = self._collected[FIT].take()[0], self._collected[JUDGE].take()
        if any(tokens.names_twice(fit.experts) for tokens in (fitted, judging)):
            raise UnsupportedModelError(
                f"--refit cannot refit the experts of layer {task.index}: its router sends a token to the same expert "
                "more than once. Run without --refit."
            )
        try:
            changes = fit.changes(fitted)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteError(
                f"Layer {task.index} cannot be refitted: its experts' activations in {self.weights.dtype} are not "
                f"finite, or too large or too small to be summed ({show(str(error))}). Try --dtype float32, or run "
                "without --refit."
            ) from error
        shares = fit.shares(judging, changes)
        energies = torch.tensor([energy], dtype=torch.float64)
        processes.add_up(energies)
        self._collected.clear()
        version.computed, sizes = processes.on_first(lambda: self._encode(task, experts, changes, shares))
        scale = abs(task.factor or 1.0) / math.sqrt(float(energies) or 1.0)
        version.refit = RefittedLayer(
            shares=[round(share, 6) for share in shares.values.tolist()],
            tokens=list(changes.tokens),
            changes=[round(size, 6) for size in sizes],
            before=round(scale * math.sqrt(shares.before), 6),
            after=round(scale * math.sqrt(shares.after), 6),
            # Without a factor the aim was the output of the experts alone.
            catch_up=CATCH_UP if task.factor is not None else 0.0,
        )

    def _is_for(self, use: str, batch: MicroBatch) -> bool:
        return self._use_of(batch) == use

    def _experts(self, task: LayerTask, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self._layers[task.index])

    def _encode(
        self, task: LayerTask, experts: Any, changes: Changes, shares: Shares
    ) -> tuple[ComputedTensors, list[float]]:
        """The refitted tensors as they are written, and ‖change‖ / ‖weights‖ of every expert. Rank 0."""
        kept = task.versions[self.side].kept
        weights = self._tensors.original(task.index, kept, experts)
        sizes, changed = [0.0] * len(weights), set()
        for place, share in enumerate(shares.values.tolist()):
            if share == 0:
                continue
            change = changes.values[place] if experts.is_transposed else changes.values[place].T
            old = weights[place].to(change.device).float()
            new = (old + share * change).to(weights.dtype)
            length = float(old.norm())
            # (A projection of zeros has no relative change, and JSON no infinity.)
            sizes[place] = float((new.float() - old).norm()) / length if length else 0.0
            weights[place] = new.cpu()
            changed.add(place)
        return ComputedTensors(self._tensors.encode(task.index, kept, experts, weights, changed)), sizes
