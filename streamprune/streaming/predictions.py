"""Computing next-token predictions from hidden states, a slice of the vocabulary at a time, for one or more models.

The logits are never all in memory: sums over them are computed slice by slice. Per token, with logits x
over the vocabulary, P of the original and Q of a pruned model:

    log Z  = m + log Σ e^(x-m)                                   (m the largest so far; online as in arXiv:1805.02867)
    loss   = log Z - x[next token]                               in nats, and perplexity = e^loss
    KL     = Σ p (x_P - x_Q) - (log Z_P - log Z_Q)               in nats: Kullback and Leibler (1951), p = e^(x_P) / Z_P

Any number of models are compared with the original, whose logits are computed once. All sums are float64. Shapes: B
sequences, L tokens each, v tokens of the vocabulary, K numbers per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from streamprune.calibration.sequences import MicroBatch
from streamprune.errors import UnsupportedModelError
from streamprune.streaming.batches import Among, MicroBatches, Runtime, every
from streamprune.streaming.forward import ORIGINAL, side_of
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState


def find_head(model: PreTrainedModel) -> tuple[nn.Linear, str]:
    """A model's output head and its dotted path. Raises UnsupportedModelError if it is not a linear layer."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or path is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output head ({type(head).__name__}), so that its predictions cannot "
            "be computed slice by slice. Please report this model."
        )
    return head, path


@contextmanager
def head_rows(weights: LayerWeights, begin: int, end: int) -> Iterator[None]:
    """Inside the context, the output head has only the rows of the tokens from `begin` to `end` of the vocabulary.

    Peak memory: the weights of these rows. What the model's forward does with logits after the head (scaling,
    soft-capping) is then applied to a slice, with the same result, since it treats each logit separately.
    """
    head, path = find_head(weights.model)
    names = [name for name, value in head._parameters.items() if value is not None]
    rows = weights.rows([f"{path}.{name}" for name in names], begin, end)
    # Only now: where rows cannot be read alone, `rows` has loaded the complete parameters, which stay for later slices.
    complete = {name: head._parameters[name] for name in names}
    try:
        head._parameters.update(
            {name: nn.Parameter(values, requires_grad=False) for name, values in zip(complete, rows, strict=True)}
        )
        del rows
        yield
    finally:
        head._parameters.update(complete)


#: The key of a micro-batch's sums, (B, L, K) float64, in its state, next to the outputs of all sides.
_SUMS = "sums"
#: Of each model, the original last: the largest logit, the sum of exponentials relative to it, the next token's logit,
#: the top token. With an original then follows for each of the others: Σ e^(x_P-m) (x_P - x_Q).
_LARGEST, _TOTAL, _TARGET, _TOP, _PER_SIDE = range(5)
#: Least and most tokens of the vocabulary in a slice: fewer make matrix products slow, more gain nothing.
_LEAST_SLICE, _LARGEST_SLICE = 64, 16384
#: Values that are converted to float64 at a time.
_PORTION = 2**19


@dataclass(frozen=True)
class TokenFigures:
    """Metrics of every token that has a next one, each (B, L-1) float64; the last three None without an original."""

    loss: torch.Tensor
    original_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    agrees: torch.Tensor | None = None


def sums_width(compared: int) -> int:
    """Float64 values per token for the sums of so many models that are compared with an original."""
    return (compared + 1) * _PER_SIDE + compared


def no_sums(ids: torch.Tensor, sides: int) -> torch.Tensor:
    """Initial sums, (B, L, K), before any slice, for token ids (B, L) and one model, or several with the original."""
    width = sums_width(sides - 1) if sides > 1 else _PER_SIDE
    sums = torch.zeros((*ids.shape, width), dtype=torch.float64, device=ids.device)
    for first in range(0, sides * _PER_SIDE, _PER_SIDE):
        sums[..., first + _LARGEST] = -torch.inf
    return sums


def add_slice(
    sums: torch.Tensor, ids: torch.Tensor, begin: int, models: Iterable[torch.Tensor], original: torch.Tensor | None
) -> torch.Tensor:
    """New sums with the logits (B, L, v) of the tokens from `begin` on added: of `models`, and of the original.

    `models` may compute them one after the other, so that those of two models are in memory at a time.
    """
    before, compared = sums.flatten(0, 1), _compared(sums)
    flat = before.clone()
    # The token after each; -1 after the last.
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten() - begin
    for place, model in enumerate(models):
        rows = max(1, _PORTION // model.shape[-1])
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            own, values = _columns(place), model.flatten(0, 1)[part].double()
            flat[part, own], *_ = _added(before[part, own], values, following[part], begin)
            if original is None:
                continue
            # (The original's columns are the same with each model.)
            own, others, values = _columns(compared), values, original.flatten(0, 1)[part].double()
            flat[part, own], weights, shrunk = _added(before[part, own], values, following[part], begin)
            cross = (compared + 1) * _PER_SIDE + place
            differences = torch.where(weights > 0, values - others, 0.0)
            flat[part, cross] = before[part, cross] * shrunk + (weights * differences).sum(-1)
    return flat.view(sums.shape)


def _added(
    old: torch.Tensor, values: torch.Tensor, following: torch.Tensor, begin: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model's columns (T, 4) with the logits (T, v) added, e^(logits - m) (T, v), and e^(old m - m) (T,)."""
    width = values.shape[-1]
    highest = values.amax(-1)
    largest = torch.maximum(old[:, _LARGEST], highest)
    # If all logits so far are -inf (tokens that a model excludes), any number can be subtracted.
    base = torch.where(largest == -torch.inf, 0.0, largest)
    weights = (values - base[:, None]).exp()
    shrunk = (old[:, _LARGEST] - base).exp()
    here = (following >= 0) & (following < width)
    target = values.gather(-1, following.clamp(0, width - 1)[:, None])[:, 0]
    new = torch.empty_like(old)
    new[:, _TOP] = torch.where(highest > old[:, _LARGEST], (values.argmax(-1) + begin).double(), old[:, _TOP])
    new[:, _TOTAL] = old[:, _TOTAL] * shrunk + weights.sum(-1)
    new[:, _TARGET] = torch.where(here, target, old[:, _TARGET])
    new[:, _LARGEST] = largest
    return new, weights, shrunk


def _columns(place: int) -> slice:
    """The columns of a model in sums (..., K)."""
    return slice(place * _PER_SIDE, (place + 1) * _PER_SIDE)


def _compared(sums: torch.Tensor) -> int:
    """How many models are compared with the original in sums (..., K); 0 for a model alone."""
    return (sums.shape[-1] - _PER_SIDE) // (_PER_SIDE + 1)


def figures_of(sums: torch.Tensor, place: int = 0) -> TokenFigures:
    """Loss, KL and top-1 agreement of each token, from sums over the complete vocabulary, as CPU tensors.

    `place` is the model's among those that are compared with the original.
    """
    sums, compared = sums[:, :-1].cpu(), _compared(sums)
    pruned = sums[..., _columns(place)]
    loss, normal = _loss(pruned)
    if not compared:
        return TokenFigures(loss)
    original = sums[..., _columns(compared)]
    original_loss, original_normal = _loss(original)
    cross = sums[..., (compared + 1) * _PER_SIDE + place]
    kl = cross / original[..., _TOTAL] - (original_normal - normal)
    agrees = (pruned[..., _TOP] == original[..., _TOP]).double()
    # Rounding may make the KL of equal predictions slightly negative.
    return TokenFigures(loss, original_loss, kl.clamp(min=0.0), agrees)


def _loss(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    normal = own[..., _LARGEST] + own[..., _TOTAL].log()
    return normal - own[..., _TARGET], normal


@dataclass(frozen=True)
class SequenceFigures:
    """Metrics of one sequence: the index of its source, and those of its tokens, each (1, L-1).

    `order` is its position among all sequences of all ranks.
    """

    order: tuple[int, int, int]
    source: int
    figures: TokenFigures


def read_predictions(
    runtime: Runtime, weights: Mapping[str, LayerWeights], batches: MicroBatches, layer: int, among: Among = every
) -> dict[str, list[SequenceFigures]]:
    """Predictions from the states that enter `layer`, by sequence; from the number of layers on, the model's own.

    Those of all ranks, in the order of a single process, for the micro-batches that `among` selects, for every side but
    the original, with which it is compared. `weights` are the models' by side. Peak memory: a slice of each head, and
    its logits of two models for a micro-batch. Raises Stopped between two micro-batches; then call it again from the
    start.
    """
    # (Two sides may share one head.)
    heads = [find_head(each.model)[0].weight for each in dict.fromkeys(weights.values())]
    # Two models are only compared if both have the same vocabulary.
    vocabulary = len(heads[0])
    # No layer is in memory now: a slice of the heads may take its memory, and the logits that of its intermediate
    # results. There are two copies of the logits: before and after the model's own scaling. Of several models, those of
    # the original and of one other are in memory at a time.
    plan, row_bytes = runtime.plan, sum(head[0].nbytes for head in heads)
    logits = 2 * min(2, len(weights)) * plan.tokens_at_a_time * plan.needs.itemsize
    size = min(plan.needs.layer // max(1, row_bytes), plan.workspace // max(1, logits))
    size = max(1, min(max(size, _LEAST_SLICE), _LARGEST_SLICE, vocabulary))
    begins = range(0, vocabulary, size)
    # (One more pass gathers the results.)
    runtime.progress.start("predictions", (len(begins) + 1) * batches.sequences_among(among))
    for begin in begins:
        _sum_slice(weights, batches, layer, among, begin, min(begin + size, vocabulary))
    sides = _compared_sides(weights)
    gathered = runtime.processes.collect(_gather(sides, batches, layer, among))
    runtime.progress.end()
    return {
        side: sorted(chain.from_iterable(found[side] for found in gathered), key=lambda each: each.order)
        for side in sides
    }


def _compared_sides(weights: Mapping[str, LayerWeights]) -> list[str]:
    return [side for side in weights if side != ORIGINAL]


def _sum_slice(
    weights: Mapping[str, LayerWeights], batches: MicroBatches, layer: int, among: Among, begin: int, end: int
) -> None:
    """Add the logits of the tokens from `begin` to `end` of the vocabulary to every micro-batch's sums."""

    def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
        # The first slice starts from zero: older sums may be from an earlier layer, or a stopped attempt.
        sums = state.output[_SUMS] if begin else no_sums(batch.ids, len(weights))

        def logits(side: str) -> torch.Tensor:
            return weights[side].forward.logits(batch.ids, side_of(state, side))

        original = logits(ORIGINAL) if ORIGINAL in weights else None
        models = map(logits, _compared_sides(weights))
        sums = add_slice(sums, batch.ids, begin, models, original)
        return BatchState({**state.output, _SUMS: sums}, state.carried)

    def load() -> ExitStack:
        with ExitStack() as stack:
            for each in dict.fromkeys(weights.values()):
                stack.enter_context(head_rows(each, begin, end))
            return stack.pop_all()

    with next(iter(weights.values())).making_room(load, "a slice of the output head"):
        batches.run(layer, compute, among=among)


def _gather(sides: Sequence[str], batches: MicroBatches, layer: int, among: Among) -> dict[str, list[SequenceFigures]]:
    found: dict[str, list[SequenceFigures]] = {side: [] for side in sides}
    sums: list[torch.Tensor] = []

    def look(number: int, batch: MicroBatch, state: BatchState) -> None:
        sums[:] = [state.output[_SUMS]]

    def keep(done: int, batch: MicroBatch) -> None:
        number = done - 1
        for row in range(len(batch.ids)):
            order = (batches.places[number], number, row)
            for place, side in enumerate(sides):
                figures = figures_of(sums[0][row : row + 1], place)
                found[side].append(SequenceFigures(order, batch.source, figures))

    batches.run(layer, look, keep, among=among)
    return found
