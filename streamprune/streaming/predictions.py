"""Reading next-token predictions off hidden states, a slice of the vocabulary at a time, for one or two models.

All logits are never there at once: what is asked of them is summed up slice by slice. Per token, with logits x over the
vocabulary, P of the original and Q of the pruned model:

    log Z  = m + log Σ e^(x-m)                                   (m the largest so far; online as in arXiv:1805.02867)
    loss   = log Z - x[next token]                               in nats, and perplexity = e^loss
    KL     = Σ p (x_P - x_Q) - (log Z_P - log Z_Q)               in nats: Kullback and Leibler (1951), p = e^(x_P) / Z_P

All sums are float64. Shapes: B sequences, L tokens each, v tokens of the vocabulary, K numbers per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from streamprune.calibration.sequences import MicroBatch
from streamprune.errors import UnsupportedModelError
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.streaming.batches import Among, MicroBatches, Runtime
from streamprune.streaming.forward import ORIGINAL, PRUNED, side_of, sums_of, with_sums
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState


class SlicedHead:
    """The output head of a model, of which only a slice of the vocabulary is there at a time.

    Peak memory: the weights of a slice. What the model's forward does with logits after the head (scaling,
    soft-capping) it does with those of a slice, which is the same for whatever treats each logit by itself. Raises
    UnsupportedModelError for a head that is no linear layer.
    """

    def __init__(self, weights: LayerWeights) -> None:
        self._weights, self._model = weights, weights.model
        self._head, self._path = find_head(self._model)

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return int(self._head.weight.shape[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of the weights for one token of the vocabulary."""
        return self._head.weight[0].nbytes

    @contextmanager
    def rows(self, begin: int, end: int) -> Iterator[None]:
        """Within, `logits` gives those of the tokens from `begin` to `end` of the vocabulary."""
        names = [name for name in ("weight", "bias") if getattr(self._head, name) is not None]
        weights = self._weights.rows([f"{self._path}.{name}" for name in names], begin, end)
        owner = self._model.get_submodule(self._path.rpartition(".")[0])
        attribute = self._path.rpartition(".")[2]
        setattr(owner, attribute, _Slice(*weights))
        try:
            yield
        finally:
            setattr(owner, attribute, self._head)

    def logits(self, ids: torch.Tensor, state: BatchState) -> torch.Tensor:
        """The logits (B, L, v) of the present slice from token ids (B, L) and the state after a layer."""
        return self._weights.forward.logits(ids, state)


def find_head(model: PreTrainedModel) -> tuple[nn.Linear, str]:
    """A model's output head and its dotted path. Raises UnsupportedModelError for one that is no linear layer."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or path is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output head ({type(head).__name__}), so that its predictions cannot "
            "be computed slice by slice. Please report this model."
        )
    return head, path


class _Slice(nn.Module):
    """A linear layer with some of the rows of another."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight, self.bias)


#: Of each model: the largest logit, the sum of exponentials relative to it, the next token's logit, the top token.
_LARGEST, _TOTAL, _TARGET, _TOP, _PER_SIDE = range(5)
#: With two models, after the columns of both: Σ e^(x_P-m) (x_P - x_Q).
_CROSS = 2 * _PER_SIDE
#: Numbers per token of a pair: what its sums take, in float64.
WIDTH = _CROSS + 1
#: Values that are looked at in float64 at a time.
_PORTION = 2**19


@dataclass(frozen=True)
class TokenFigures:
    """Figures of every token that has a next one, each (B, L-1) float64; the last three None without an original."""

    loss: torch.Tensor
    original_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    agrees: torch.Tensor | None = None


def no_sums(ids: torch.Tensor, sides: int) -> torch.Tensor:
    """The sums over none of the vocabulary, (B, L, K), for token ids (B, L) and one or two models."""
    sums = torch.zeros((*ids.shape, WIDTH if sides == 2 else _PER_SIDE), dtype=torch.float64, device=ids.device)
    for first in range(0, sides * _PER_SIDE, _PER_SIDE):
        sums[..., first + _LARGEST] = -torch.inf
    return sums


def add_slice(sums: torch.Tensor, ids: torch.Tensor, logits: Mapping[str, torch.Tensor], begin: int) -> torch.Tensor:
    """New sums with the logits (B, L, v) of the tokens from `begin` on added, by model."""
    flat = sums.flatten(0, 1).clone()
    # The token after each; none after the last.
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()
    sides = [logits[side].flatten(0, 1) for side in (PRUNED, ORIGINAL) if side in logits]
    rows = max(1, _PORTION // sides[0].shape[-1])
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        portions = [side[part].double() for side in sides]
        for number, values in enumerate(portions):
            own = flat[part, number * _PER_SIDE : (number + 1) * _PER_SIDE]
            largest = torch.maximum(own[:, _LARGEST], values.amax(-1))
            # Where all logits so far are -inf (tokens that a model rules out), any number will do in its place.
            base = torch.where(largest == -torch.inf, 0.0, largest)
            weights = (values - base[:, None]).exp()
            shrunk = (own[:, _LARGEST] - base).exp()
            if number == 1:
                differences = torch.where(weights > 0, values - portions[0], 0.0)
                flat[part, _CROSS] = flat[part, _CROSS] * shrunk + (weights * differences).sum(-1)
            _add(own, values, largest, weights.sum(-1), shrunk, following[part], begin)
    return flat.view(sums.shape)


def _add(
    own: torch.Tensor,
    values: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    shrunk: torch.Tensor,
    following: torch.Tensor,
    begin: int,
) -> None:
    """Add a slice to one model's sums, in place."""
    top = values.argmax(-1)
    own[:, _TOP] = torch.where(values.amax(-1) > own[:, _LARGEST], (top + begin).double(), own[:, _TOP])
    own[:, _TOTAL] = own[:, _TOTAL] * shrunk + total
    here = (following >= begin) & (following < begin + values.shape[-1])
    place = (following - begin).clamp(0, values.shape[-1] - 1)
    own[:, _TARGET] = torch.where(here, values.gather(-1, place[:, None])[:, 0], own[:, _TARGET])
    own[:, _LARGEST] = largest


def figures_of(sums: torch.Tensor) -> TokenFigures:
    """What follows from sums over the whole vocabulary, on the host."""
    sums = sums[:, :-1].cpu()
    pruned, original = sums[..., :_PER_SIDE], sums[..., _PER_SIDE:_CROSS]
    loss, normal = _loss(pruned)
    if sums.shape[-1] == _PER_SIDE:
        return TokenFigures(loss)
    original_loss, original_normal = _loss(original)
    kl = sums[..., _CROSS] / original[..., _TOTAL] - (original_normal - normal)
    agrees = (pruned[..., _TOP] == original[..., _TOP]).double()
    # Rounding may give slightly less than zero where both are equal.
    return TokenFigures(loss, original_loss, kl.clamp(min=0.0), agrees)


def _loss(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    normal = own[..., _LARGEST] + own[..., _TOTAL].log()
    return normal - own[..., _TARGET], normal


#: Tokens of the vocabulary in a slice at least and at most: fewer make poor matrix products, more gain nothing.
_LEAST_SLICE, _LARGEST_SLICE = 64, 16384


@dataclass(frozen=True)
class SequenceFigures:
    """Figures of one sequence: the index of its source, and those of its tokens, each (1, L-1).

    `order` is where it stands among all sequences, whichever rank measured it.
    """

    order: tuple[int, int, int]
    source: int
    figures: TokenFigures


class PredictionReader:
    """Reads predictions off the states of all micro-batches that are `among` those to be measured on.

    `weights` are the models' by side. Peak memory: a slice of each head, and its logits for a micro-batch.
    """

    def __init__(
        self,
        runtime: Runtime,
        weights: Mapping[str, LayerWeights],
        batches: MicroBatches,
        among: Among = lambda batch: True,
    ) -> None:
        self._runtime, self._batches, self._among = runtime, batches, among
        # (Two sides may share one.)
        shared = {id(each): SlicedHead(each) for each in weights.values()}
        self._heads = {side: shared[id(each)] for side, each in weights.items()}
        self._distinct = list(shared.values())
        self._weights = weights[PRUNED]

    def read(self, layer: int) -> list[SequenceFigures]:
        """What is predicted from the states before layer `layer` (after the last one: by the model), by sequence.

        Of all ranks, in the order of one process. Raises Stopped between two micro-batches; it begins anew then.
        """
        vocabulary = self._heads[PRUNED].vocabulary
        row_bytes = sum(head.row_bytes for head in self._distinct)
        size = slice_size(self._runtime.plan, vocabulary, row_bytes, len(self._heads))
        begins = range(0, vocabulary, size)
        # (Once more in the end, to gather what came of it.)
        progress = self._runtime.progress
        progress.start("predictions", (len(begins) + 1) * self._batches.sequences_among(self._among))
        for begin in begins:
            self._sum_slice(layer, begin, min(begin + size, vocabulary))
        found = self._gather(layer)
        progress.end()
        found = [each for part in self._runtime.processes.collect(found) for each in part]
        return sorted(found, key=lambda each: each.order)

    def _sum_slice(self, layer: int, begin: int, end: int) -> None:
        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            # What may be there from an earlier layer, or an attempt that was stopped, does not count.
            sums = sums_of(state) if begin else None
            if sums is None:
                sums = no_sums(batch.ids, len(self._heads))
            logits = {side: head.logits(batch.ids, side_of(state, side)) for side, head in self._heads.items()}
            return with_sums(state, add_slice(sums, batch.ids, logits, begin))

        with ExitStack() as stack:
            self._weights.enter(stack, lambda: self._slice(begin, end), "a slice of the output head")
            self._batches.run(layer, compute, lambda done, batch: None, among=self._among)

    def _slice(self, begin: int, end: int) -> ExitStack:
        with ExitStack() as stack:
            for head in self._distinct:
                stack.enter_context(head.rows(begin, end))
            return stack.pop_all()

    def _gather(self, layer: int) -> list[SequenceFigures]:
        found: list[SequenceFigures] = []
        sums: list[torch.Tensor] = []

        def look(number: int, batch: MicroBatch, state: BatchState) -> None:
            summed = sums_of(state)
            assert summed is not None
            sums[:] = [summed]

        def keep(done: int, batch: MicroBatch) -> None:
            number = done - 1
            for row in range(len(batch.ids)):
                order = (self._batches.place_of(number), number, row)
                found.append(SequenceFigures(order, batch.source, figures_of(sums[0][row : row + 1])))

        self._batches.run(layer, look, keep, among=self._among)
        return found


def slice_size(plan: MemoryPlan, vocabulary: int, row_bytes: int, sides: int) -> int:
    """Tokens of the vocabulary at a time, of which the heads' weights take `row_bytes` each.

    No layer is in memory then: a slice may have its room, and the logits that of its intermediate results.
    """
    # Logits as they are computed, and as the model's own scaling leaves them.
    logits = 2 * sides * plan.tokens_at_a_time * plan.needs.itemsize
    size = min(plan.needs.layer // max(1, row_bytes), plan.workspace // max(1, logits))
    return max(1, min(max(size, _LEAST_SLICE), _LARGEST_SLICE, vocabulary))
