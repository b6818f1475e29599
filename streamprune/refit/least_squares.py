"""Refitting the down projections of the experts that stay, by regularised least squares in closed form.

Removing experts leaves an error in a layer's output. What stays can mend much of it: the output is linear in the down
projections, so the change D_e of each expert's (transposed) down projection minimises

    Σ_t ‖error_t - Σ_e D_eᵀ a_te‖² + Σ_e ridge_e ‖D_e‖²,    a_te = gate weight x activation of expert e for token t

over the tokens that were routed to the experts that stay. All experts at once would be one linear system of K x I
unknowns, too large for a real layer; three rounds of exact steps in one expert at a time (block Gauss-Seidel) come
within 8 % of it. The ridge pulls towards the weights as they are; relative to the mean diagonal of the expert's Gram
matrix it is 0.3 divided by its tokens per intermediate unit, so it hardly matters where there is much text.

Each change is then scaled by a share from 0 to 1: the least-squares fit to tokens that the changes were not fitted on.

Tokens are summed in a fixed order without atomic operations, so a repeated fit gives the same bits on the same device.
The features and residuals of several processes stay where they are; only sums over tokens are exchanged.

Shapes: N tokens, k experts chosen per token, K experts that stay, I intermediate size, H hidden size, n tokens of one
expert (or a part of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streamprune.distributed.processes import ALONE, Processes

SWEEPS = 3
#: Times intermediate units / tokens of an expert: the ridge relative to the mean diagonal of its Gram matrix.
PRIOR = 0.3
#: Experts with fewer tokens per intermediate unit stay as they are.
LEAST_TOKENS_PER_UNIT = 2
#: A smaller share of a change is no more than noise: then the expert stays as it is. (A target of pure noise gets
#: shares of about 1/√(tokens x H x change²/noise²); real ones are mostly above 0.5.)
LEAST_SHARE = 0.1
#: Rounds of coordinate descent for the shares, which converges within a few.
_SHARE_ROUNDS = 100
#: Tokens of an expert that are converted to float32 at a time.
PART_TOKENS = 8192
#: Values of the experts' effects on judging tokens at a time.
EFFECT_VALUES = 1 << 24

#: Returns an expert's activation (n, I), the input of its down projection before the gate weight, for inputs (n, H).
Activation = Callable[[int, torch.Tensor], torch.Tensor]
#: A part of an expert's tokens: their numbers (n,) where the tokens are, and their features (n, I) on the device.
_Part = tuple[torch.Tensor, torch.Tensor]
_Parts = Sequence[_Part]


@dataclass
class RoutedTokens:
    """What the experts that stay got, and what the layer's output lacks, for N tokens.

    `hidden` (N, H) is the input of the experts (which may have another size than H), `index` (N, k) the chosen experts
    (K or more: none), none of them twice, and `gates` (N, k) their weights. `error` (N, H), float32, is what should be
    added to the experts' output. All on one device, which may be another than the one that computes.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    error: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """The four tensors, in the order of the fields."""
        return self.hidden, self.index, self.gates, self.error

    def names_twice(self, experts: int) -> bool:
        """Whether a token was routed to one of the `experts` that stay more than once."""
        index = self.index.sort(dim=1).values
        return bool(((index[:, 1:] == index[:, :-1]) & (index[:, 1:] < experts)).any())

    def part(self, begin: int, end: int) -> RoutedTokens:
        """The tokens from `begin` to `end`, as views."""
        return RoutedTokens(*(each[begin:end] for each in self.values))


@dataclass(frozen=True)
class Changes:
    """The fitted change (K, I, H), float32, of each expert's transposed down projection, and the tokens of each."""

    values: torch.Tensor
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Shares:
    """The share (K,) of each expert's change that the judging tokens support, float64, on the CPU.

    `before` and `after` are the sums of squares of the judging tokens' errors without and with these shares.
    """

    values: torch.Tensor
    before: float
    after: float


@dataclass(frozen=True)
class _Factor:
    """The lower Cholesky factor (I, I), float64, of an expert's Gram matrix plus `ridge` on its diagonal."""

    lower: torch.Tensor
    ridge: float


@dataclass(frozen=True)
class Fit:
    """How to fit: `experts` experts that stay, of sizes `inner` (I) and `hidden` (H), computed on `device`."""

    activation: Activation
    experts: int
    inner: int
    hidden: int
    device: torch.device
    processes: Processes = ALONE

    def changes(self, tokens: RoutedTokens) -> Changes:
        """Fit the changes to `tokens`, whose `error` becomes what is left of it.

        Memory on the device: the changes, the features of one expert's tokens, its Gram matrix, and where the tokens
        are the Cholesky factor of every expert in float64. Raises torch's LinAlgError for infinite or NaN features.
        """
        changes = torch.zeros(self.experts, self.inner, self.hidden, device=self.device)
        counts = self._count(tokens)
        factors: dict[int, _Factor] = {}
        for _ in range(SWEEPS):
            for expert, count in enumerate(counts):
                if count < LEAST_TOKENS_PER_UNIT * self.inner:
                    continue
                parts = list(self._features(tokens, expert))
                if expert not in factors:
                    factors[expert] = self._factor(parts, count, tokens.error.device)
                self._step(tokens, parts, factors[expert], changes[expert])
        return Changes(changes, counts)

    def shares(self, tokens: RoutedTokens, changes: Changes) -> Shares:
        """Shares of the changes by least squares on other `tokens` than they were fitted on, none below LEAST_SHARE."""
        gram = torch.zeros(self.experts**2, dtype=torch.float64)
        aim = torch.zeros(self.experts, dtype=torch.float64)
        total = torch.zeros(1, dtype=torch.float64)
        size = max(1, EFFECT_VALUES // (tokens.index.shape[1] * self.hidden))
        for begin in range(0, len(tokens), size):
            part = tokens.part(begin, begin + size)
            effects = self._effects(part, changes.values)
            error = part.error.to(self.device)
            total += error.double().square().sum().cpu()
            products = torch.bmm(effects, effects.transpose(1, 2)).double().cpu()
            along = torch.bmm(effects, error.unsqueeze(2)).squeeze(2).double().cpu()
            index = part.index.long().cpu().clamp(max=self.experts)
            # bincount adds on the CPU in the order of the tokens. A row for "no expert" is cut off.
            width = self.experts + 1
            pairs = index.unsqueeze(2) * width + index.unsqueeze(1)
            sums = torch.bincount(pairs.reshape(-1), products.reshape(-1), width**2).view(width, width)
            gram += sums[:-1, :-1].reshape(-1)
            aim += torch.bincount(index.reshape(-1), along.reshape(-1), width)[:-1]
        for each in (gram, aim, total):
            self.processes.add_up(each)
        gram = gram.view(self.experts, self.experts)
        values = supported_shares(gram, aim)
        after = float(total) - 2 * float(aim @ values) + float(values @ gram @ values)
        return Shares(values, float(total), max(0.0, after))

    def _count(self, tokens: RoutedTokens) -> tuple[int, ...]:
        index = tokens.index.long().clamp(max=self.experts).reshape(-1).cpu()
        counts = torch.bincount(index, minlength=self.experts + 1)[:-1].double()
        self.processes.add_up(counts)
        return tuple(int(count) for count in counts)

    def _features(self, tokens: RoutedTokens, expert: int) -> Iterator[_Part]:
        """An expert's tokens, in parts. The features have the model's dtype, sums over them at least float32.

        In a float16 model they are bfloat16: it is as small, and a product with a large gate weight cannot overflow.
        """
        numbers, slots = (tokens.index == expert).nonzero(as_tuple=True)
        if not len(numbers):
            return
        for rows, places in zip(*(torch.split(each, PART_TOKENS) for each in (numbers, slots)), strict=True):
            hidden = tokens.hidden[rows].to(self.device)
            gates = tokens.gates[rows, places].to(self.device).float().unsqueeze(1)
            dtype = torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype
            yield rows, (self.activation(expert, hidden).float() * gates).to(dtype)

    def _factor(self, parts: _Parts, count: int, home: torch.device) -> _Factor:
        """An expert's Gram matrix plus ridge, factored; kept in the memory of `home`."""
        gram = torch.zeros(self.inner, self.inner, dtype=torch.float64, device=self.device)
        for _, features in parts:
            exact = features.float()
            gram += exact.T @ exact
        self.processes.add_up(gram)
        # (An expert whose features are all zero has no positive definite matrix without the second term.)
        ridge = float(gram.diagonal().mean()) * PRIOR * self.inner / count + torch.finfo(torch.float32).tiny
        gram.diagonal().add_(ridge)
        return _Factor(torch.linalg.cholesky(gram).to(home), ridge)

    def _step(self, tokens: RoutedTokens, parts: _Parts, factor: _Factor, change: torch.Tensor) -> None:
        """The exact step in one expert. Updates `change` (I, H) and the tokens' errors.

        The new change solves (G + ridge) D = Σ a (error + Dᵀ_old a)ᵀ, so (G + ridge) (D - D_old) = Σ a errorᵀ - ridge
        D_old.
        """
        right = -factor.ridge * change.double()
        if not self.processes.is_first:
            right.zero_()
        for rows, features in parts:
            right += features.float().T @ tokens.error[rows].to(self.device)
        self.processes.add_up(right)
        step = torch.cholesky_solve(right, factor.lower.to(self.device)).float()
        if not self.processes.is_first:
            step.zero_()
        # Rank 0's solution for all: on another kind of processor the last digits may differ.
        self.processes.add_up(step)
        change += step
        for rows, features in parts:
            # Each token is there once, so nothing depends on the order.
            tokens.error[rows] -= (features.float() @ step).to(tokens.error.device)

    def _effects(self, tokens: RoutedTokens, changes: torch.Tensor) -> torch.Tensor:
        """What each chosen expert's change adds to the output of each token, (N, k, H), float32, on the device."""
        effects = torch.zeros(*tokens.index.shape, self.hidden, device=self.device)
        index = tokens.index
        for expert in range(self.experts):
            rows, slots = (index == expert).nonzero(as_tuple=True)
            if len(rows):
                features = torch.cat([features for _, features in self._features(tokens, expert)])
                effects[rows.to(self.device), slots.to(self.device)] = features.float() @ changes[expert]
        return effects


def supported_shares(gram: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """The shares (K,) in [0, 1] that minimise shares·gram·shares - 2 aim·shares; those below LEAST_SHARE become 0.

    `gram` (K, K) and `aim` (K,) are the products of the experts' effects with each other and with the errors, float64
    on the CPU. By coordinate descent; once those that are too small have been dropped, the others are adapted, until
    none is too small.
    """
    allowed = gram.diagonal() > 0
    while True:
        shares = _shares_in_box(gram, aim, allowed)
        large = allowed & (shares >= LEAST_SHARE)
        if torch.equal(large, allowed):
            return shares
        allowed = large


def _shares_in_box(gram: torch.Tensor, aim: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    matrix, wanted = gram.numpy(), aim.numpy()
    shares = np.zeros(len(wanted))
    for _ in range(_SHARE_ROUNDS):
        before = shares.copy()
        for expert in np.flatnonzero(allowed.numpy()):
            own = matrix[expert, expert]
            rest = wanted[expert] - matrix[expert] @ shares + own * shares[expert]
            shares[expert] = min(1.0, max(0.0, rest / own))
        if np.array_equal(before, shares):
            break
    return torch.from_numpy(shares)
