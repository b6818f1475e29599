"""Every method against a plain loop over tokens, and what the statistics allow: any mix afterwards, exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from streamprune.errors import ScoresError
from streamprune.saliency.methods import METHODS, MixedStatistics, random_scores, score_experts
from streamprune.saliency.scores import FIELDS, FIELDS_BEFORE, LayerStatistics
from tests.made_scores import Token, make_tokens, record

EXPERTS, TOP_K, PER_SOURCE = 12, 3, (70, 50, 30)


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return float(np.average(values, weights=weights)) if values else 0.0


#: From the tokens that chose an expert (with how often each counts) straight to its score, as the formula is written.
REFERENCE: dict[str, Callable[[list[tuple[float, Token, float, np.ndarray]]], float]] = {
    "reap": lambda met: mean([g * np.linalg.norm(f) for _, _, g, f in met], [w for w, *_ in met]),
    "frequency": lambda met: sum(w for w, *_ in met),
    "weighted-frequency": lambda met: sum(w * g for w, _, g, _ in met),
    "ean": lambda met: sum(w * np.linalg.norm(f) for w, _, _, f in met),
    "man": lambda met: mean([np.linalg.norm(f) for *_, f in met], [w for w, *_ in met]),
    "ean-mean": lambda met: mean([np.linalg.norm(f) for *_, f in met], [w for w, *_ in met]),
    "msan": lambda met: mean([f @ f for *_, f in met], [w for w, *_ in met]),
    "weighted-ean": lambda met: sum(w * g * np.linalg.norm(f) for w, _, g, f in met),
    "max-activation": lambda met: max((np.abs(f).max() for *_, f in met), default=0.0),
    "relative-energy": lambda met: sum(
        w * (g * np.linalg.norm(f)) ** 2 / np.linalg.norm(token.x) ** 2 for w, token, g, f in met
    ),
    "composite": lambda met: (
        sum(w for w, *_ in met)
        * mean([g for _, _, g, _ in met], [w for w, *_ in met])
        * mean(
            [g * f @ t.routed / np.linalg.norm(g * f) / np.linalg.norm(t.routed) for _, t, g, f in met],
            [w for w, *_ in met],
        )
    ),
}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 2.5, 0.4), (3.0, 0.0, 0.0)])
@pytest.mark.parametrize("method", sorted(REFERENCE))
def test_a_method_equals_a_loop_over_tokens(method: str, weights: tuple[float, ...]) -> None:
    tokens = make_tokens(7, EXPERTS, TOP_K, PER_SOURCE)
    layer = record(0, tokens, len(PER_SOURCE), EXPERTS)
    counted = [(weights[token.source], token) for token in tokens if weights[token.source]]
    expected = [
        REFERENCE[method]([(w, t, *t.chosen[expert]) for w, t in counted if expert in t.chosen])
        for expert in range(EXPERTS)
    ]
    scores = score_experts(method, MixedStatistics(0, layer.mixed(weights)))
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
    # Expert 11 is never chosen.
    assert scores[-1] == 0
    assert len(set(scores.tolist())) > EXPERTS // 2


@pytest.mark.parametrize("method", METHODS)
def test_weights_equal_having_seen_the_tokens_so_often(method: str) -> None:
    tokens = make_tokens(3, EXPERTS, TOP_K, PER_SOURCE)
    often = (2, 0, 5)
    repeated = [token for token in tokens for _ in range(often[token.source])]
    mixed = score_experts(method, MixedStatistics(4, record(0, tokens, 3, EXPERTS).mixed(often)))
    real = score_experts(method, MixedStatistics(4, record(0, repeated, 3, EXPERTS).mixed((1, 1, 1))))
    np.testing.assert_allclose(mixed, real, rtol=1e-9)


def test_sources_are_mixed_to_the_same_bit_on_any_machine() -> None:
    values = np.random.default_rng(0).lognormal(size=(len(FIELDS), 5, 50))
    weights = (0.3, 1.0, 0.0, 2.7, 0.1)
    for name, mixed in LayerStatistics(0, values).mixed(weights).items():
        rows = values[list(FIELDS).index(name)].tolist()
        for expert, value in enumerate(mixed.tolist()):
            column = [row[expert] for row in rows]
            if name == "peaks":
                assert value == max(column[source] for source in (0, 1, 3, 4))
                continue
            total = 0.0
            for weight, each in zip(weights, column, strict=True):
                total += weight * each
            assert value == total


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_met_no_token_have_a_number(method: str) -> None:
    nothing = LayerStatistics(0, np.zeros((len(FIELDS), 2, 4)))
    with np.errstate(all="raise"):
        scores = score_experts(method, MixedStatistics(0, nothing.mixed((1, 1))))
    assert np.isfinite(scores).all()
    assert method == "random" or not scores.any()


def test_every_method_but_chance_has_a_reference() -> None:
    assert {name for name, method in METHODS.items() if not method.is_random} == REFERENCE.keys()


def drawn(count: int, index: int, seed: int) -> np.ndarray:
    return random_scores(MixedStatistics(index, {"tokens": np.zeros(count)}, seed))


def test_random_is_the_same_everywhere_and_for_any_number_of_layers() -> None:
    scores = drawn(64, 3, 5)
    first = int.from_bytes(hashlib.sha256(b"5:3:0").digest()[:8], "big") >> 11
    assert scores[0] == first / 2**53
    assert scores[:4].tolist() == drawn(4, 3, 5).tolist()
    assert len({scores.tobytes(), drawn(64, 4, 5).tobytes(), drawn(64, 3, 6).tobytes()}) == 3
    assert (scores >= 0).all()
    assert (scores < 1).all()
    assert 0.4 < drawn(2000, 0, 0).mean() < 0.6


def test_channels_are_mixed_as_the_fields_are() -> None:
    channels = np.random.default_rng(0).lognormal(size=(3, 4, 5)).astype(np.float32)
    mixed = LayerStatistics(0, np.zeros((len(FIELDS), 3, 4)), channels).mixed_channels((2.5, 0.0, 0.3))
    assert mixed.dtype == np.float64
    assert mixed.tolist() == (2.5 * channels[0].astype(np.float64) + 0.3 * channels[2].astype(np.float64)).tolist()


def test_a_method_that_needs_more_than_earlier_versions_recorded_is_refused() -> None:
    layer = LayerStatistics(3, np.ones((FIELDS_BEFORE, 2, 4)))
    for method in METHODS:
        if method != "msan":
            assert np.isfinite(score_experts(method, MixedStatistics(3, layer.mixed((1, 1))))).all()
    message = r"^--method msan needs 'squared_norms' \(Σ ‖f‖₂²\), .* did not record\. Score the model again, or"
    with pytest.raises(ScoresError, match=message):
        score_experts("msan", MixedStatistics(3, layer.mixed((1, 1))))


def test_statistics_too_large_to_rank_are_refused() -> None:
    values = np.zeros((len(FIELDS), 1, 3))
    values[list(FIELDS).index("tokens")] = 1
    values[list(FIELDS).index("gates"), 0, 2] = 1e300
    values[list(FIELDS).index("cosines"), 0, 2] = 1e300
    with pytest.raises(ScoresError, match="Layer 9, expert 2: the composite score is inf"):
        score_experts("composite", MixedStatistics(9, LayerStatistics(9, values).mixed((1,))))
