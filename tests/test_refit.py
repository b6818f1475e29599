"""The mathematics of the refit: against plain float64 solutions of the same equations, and what shares are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamprune.refit import least_squares
from streamprune.refit.least_squares import LEAST_SHARE, PRIOR, SWEEPS, Fit, RoutedTokens, supported_shares

EXPERTS, CHOSEN, INNER, HIDDEN = 6, 2, 24, 40
CPU = torch.device("cpu")


class Problem:
    """Random experts, of whose tokens number 5 gets none and number 4 fewer than two per unit; and random tokens."""

    def __init__(self, tokens: int = 2000, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(EXPERTS, INNER, HIDDEN, generator=make) / HIDDEN**0.5
        self.down = torch.randn(EXPERTS, INNER, HIDDEN, generator=make) / INNER**0.5
        hidden = torch.randn(tokens, HIDDEN, generator=make) * torch.linspace(0.3, 2, HIDDEN)
        scores = torch.randn(tokens, EXPERTS, generator=make)
        scores[:, 5] = -9
        scores[2 * INNER - 5 :, 4] = -8
        gates, index = scores.softmax(-1).topk(CHOSEN)
        self.noise = torch.randn(tokens, HIDDEN, generator=make)
        self.tokens = RoutedTokens(hidden, index, gates, torch.zeros(tokens, HIDDEN))

    def activation(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(hidden @ self.weights[expert].to(hidden.dtype).T)

    @property
    def fit(self) -> Fit:
        return Fit(self.activation, EXPERTS, INNER, HIDDEN, CPU)

    def effects(self, changes: torch.Tensor) -> torch.Tensor:
        """What changes (K, I, H) add to the output of every token, (N, H), float64, written as plainly as possible."""
        tokens = self.tokens
        output = torch.zeros(len(tokens), HIDDEN, dtype=torch.float64)
        for expert in range(EXPERTS):
            for slot in range(CHOSEN):
                own = (tokens.index[:, slot] == expert).double() * tokens.gates[:, slot].double()
                output += own[:, None] * (self.activation(expert, tokens.hidden.double()) @ changes[expert].double())
        return output


def plain_changes(problem: Problem, sweeps: int, error: torch.Tensor) -> torch.Tensor:
    """The same block steps in float64, by solving each expert's normal equations from scratch."""
    tokens, changes = problem.tokens, torch.zeros(EXPERTS, INNER, HIDDEN, dtype=torch.float64)
    for _ in range(sweeps):
        for expert in range(EXPERTS):
            chosen = tokens.index == expert
            rows = chosen.any(1)
            if int(rows.sum()) < 2 * INNER:
                continue
            gates = (tokens.gates.double() * chosen).sum(1)[rows, None]
            a = problem.activation(expert, tokens.hidden.double())[rows] * gates
            gram = a.T @ a
            ridge = PRIOR * INNER / len(a) * gram.trace() / INNER
            own = changes.clone()
            own[expert] = 0
            rest = (error.double() - problem.effects(own))[rows]
            changes[expert] = torch.linalg.solve(gram + ridge * torch.eye(INNER, dtype=torch.float64), a.T @ rest)
    return changes


def with_error(tokens: RoutedTokens, error: torch.Tensor) -> RoutedTokens:
    return replace(tokens, error=error.float().clone())


@pytest.mark.parametrize("part", [64, 8192])
def test_the_changes_are_those_of_a_plain_float64_solution(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "PART_TOKENS", part)
    problem = Problem()
    error = problem.effects(problem.down) + 0.5 * problem.noise
    tokens = with_error(problem.tokens, error)
    found = problem.fit.changes(tokens)
    wanted = plain_changes(problem, SWEEPS, error)
    assert (found.values.double() - wanted).norm() <= 1e-5 * wanted.norm()
    # What is left of the error is the error without the changes' effect.
    left = error - problem.effects(wanted)
    assert (tokens.error.double() - left).norm() <= 1e-5 * left.norm()
    # The experts with too few tokens are left alone.
    assert found.tokens[5] == 0
    assert 0 < found.tokens[4] < 2 * INNER
    assert not found.values[4:].any()
    assert sum(found.tokens) == problem.tokens.index.numel()


def test_more_sweeps_come_to_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    error = problem.effects(problem.down)
    distances = []
    for sweeps in (1, 3, 30):
        monkeypatch.setattr(least_squares, "SWEEPS", sweeps)
        tokens = with_error(problem.tokens, error)
        problem.fit.changes(tokens)
        distances.append(float(tokens.error.norm() / error.norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[1] < 0.5 * distances[0]


def test_the_ridge_fades_with_the_tokens() -> None:
    # The target is what other down projections would give: with much text they are found.
    misses = []
    for number in (300, 1000, 8000):
        problem = Problem(number)
        found = problem.fit.changes(with_error(problem.tokens, problem.effects(problem.down)))
        misses.append(float((found.values[:4] - problem.down[:4]).norm() / problem.down[:4].norm()))
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < 0.1


def test_shares_are_the_least_squares_in_the_box() -> None:
    problem, judging = Problem(), Problem(500, seed=1)
    judging.weights = problem.weights
    changes = problem.fit.changes(with_error(problem.tokens, problem.effects(problem.down)))
    # On the judging tokens expert 0 needs half of its change, 1 the opposite, 2 twice the change, 3 all of it.
    right = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0, 0.0])
    error = judging.effects(changes.values * right[:, None, None])
    found = judging.fit.shares(with_error(judging.tokens, error), changes)
    assert found.before == pytest.approx(float(error.square().sum()), rel=1e-5)
    left = error - judging.effects(changes.values * found.values[:, None, None])
    assert found.after == pytest.approx(float(left.square().sum()), rel=1e-4)
    assert found.after < found.before
    assert found.values[1] == 0
    assert found.values[2] == 1
    assert not found.values[4:].any()
    best = float(left.square().sum())
    for expert in range(4):
        for step in (-0.02, 0.02):
            moved = found.values.clone()
            moved[expert] = (moved[expert] + step).clamp(0, 1)
            other = error - judging.effects(changes.values * moved[:, None, None])
            assert float(other.square().sum()) >= best - 1e-4 * best, (expert, step)


def test_small_shares_are_dropped_and_the_others_adapted() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    # Unconstrained: (0.6, 0.05). Without the second, the first is 1.25 / 2.
    aim = gram @ torch.tensor([0.6, 0.05], dtype=torch.float64)
    assert LEAST_SHARE > 0.05
    assert supported_shares(gram, aim).tolist() == pytest.approx([0.625, 0.0])
    assert supported_shares(torch.zeros(2, 2, dtype=torch.float64), aim).tolist() == [0, 0]


def test_no_share_is_small_after_the_others_were_adapted() -> None:
    found = []
    for seed in range(300):
        make = torch.Generator().manual_seed(seed)
        effects = torch.randn(12, 8, generator=make, dtype=torch.float64) + torch.rand(12, 1, generator=make)
        shares = supported_shares(effects.T @ effects, effects.T @ torch.randn(12, generator=make).double())
        found += shares.tolist()
    assert all(share == 0 or share >= LEAST_SHARE for share in found)
    assert sum(share > 0 for share in found) > 100


def test_features_that_float16_cannot_hold_are_fitted() -> None:
    problem = Problem()
    tokens = with_error(problem.tokens, problem.effects(problem.down))
    # Activations of up to some thousands, which the layer's output scales down again.
    tokens.hidden, tokens.gates = (100 * tokens.hidden).half(), 1000 * tokens.gates
    assert float(problem.activation(0, tokens.hidden.float()).abs().amax() * tokens.gates.amax()) > 65504
    before = tokens.error.norm()
    changes = problem.fit.changes(tokens)
    assert bool(changes.values.isfinite().all())
    assert tokens.error.norm() < 0.8 * before


def test_a_token_that_names_an_expert_twice_is_noticed() -> None:
    tokens = Problem(20).tokens
    assert not tokens.names_twice(EXPERTS)
    tokens.index[3] = EXPERTS
    assert not tokens.names_twice(EXPERTS), "removed experts may be there several times"
    tokens.index[3] = 2
    assert tokens.names_twice(EXPERTS)


def test_a_target_of_noise_changes_nothing() -> None:
    for seed in range(3):
        problem, judging = Problem(3000, seed), Problem(750, seed + 10)
        judging.weights = problem.weights
        changes = problem.fit.changes(with_error(problem.tokens, problem.noise))
        assert changes.values[:4].norm() > 0, "a fit alone follows the noise"
        shares = judging.fit.shares(with_error(judging.tokens, judging.noise), changes)
        assert shares.values.tolist() == [0] * EXPERTS
        assert shares.after == shares.before


def test_fits_are_reproducible_to_the_bit() -> None:
    problem = Problem()
    error = problem.effects(problem.down) + problem.noise
    once, again = (problem.fit.changes(with_error(problem.tokens, error)).values for _ in range(2))
    assert torch.equal(once, again)


def test_features_in_half_precision_cost_little() -> None:
    problem = Problem()
    error = problem.effects(problem.down) + problem.noise
    exact, rounded = with_error(problem.tokens, error), with_error(problem.tokens, error)
    rounded.hidden = rounded.hidden.bfloat16()
    problem.fit.changes(exact)
    problem.fit.changes(rounded)
    assert rounded.error.norm() <= 1.01 * exact.error.norm()
