"""Next-token distributions without ever having all logits: what is asked of them is summed up slice by slice.

Per token, with logits x over the vocabulary, P of the original and Q of the pruned model:

    log Z  = m + log Σ e^(x-m)                                   (m the largest so far; online as in arXiv:1805.02867)
    loss   = log Z - x[next token]                               in nats, and perplexity = e^loss
    KL     = Σ p (x_P - x_Q) - (log Z_P - log Z_Q)               in nats: Kullback and Leibler (1951), p = e^(x_P) / Z_P

All sums are float64. Shapes: B sequences, L tokens each, v tokens of the vocabulary, K numbers per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamprune.streaming.pairs import ORIGINAL, PRUNED

#: Of each model: the largest logit, the sum of exponentials beside it, the next token's logit, the likeliest token.
_LARGEST, _TOTAL, _TARGET, _TOP, _PER_SIDE = range(5)
#: With two models, behind the two: Σ e^(x_P-m) (x_P - x_Q).
_CROSS = 2 * _PER_SIDE
#: Numbers per token of a pair: what its sums take, in float64.
WIDTH = _CROSS + 1
#: Values that are looked at in float64 at a time.
_PORTION = 2**19


@dataclass(frozen=True)
class TokenFigures:
    """What came of every token that has a next one, each (B, L-1) float64; the last three None without an original."""

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
    # The token behind each; none behind the last.
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
    # Rounding may leave a hair below zero where both are the same.
    return TokenFigures(loss, original_loss, kl.clamp(min=0.0), agrees)


def _loss(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    normal = own[..., _LARGEST] + own[..., _TOTAL].log()
    return normal - own[..., _TARGET], normal
