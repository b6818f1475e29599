"""The detector of loops alone, on sequences made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.evaluation.generation_figures import LEAST_TOKENS, LONGEST_PERIOD, loop_period, repeated_grams


@pytest.mark.parametrize("period", [1, 2, 7, 60, LONGEST_PERIOD])
def test_loops_are_found_with_their_shortest_period(period: int) -> None:
    once = list(range(1000, 1000 + period))
    rounds = -(-LEAST_TOKENS // period) + 3
    assert loop_period(once * rounds) == period
    # In whatever place of the round it is cut off, and whatever came before.
    assert loop_period(list(range(500)) + once * rounds + once[: period // 2]) == period
    assert loop_period(tuple(once * rounds)) == period


def test_tails_that_are_too_short_are_none() -> None:
    assert loop_period([]) is None
    assert loop_period([5] * (LEAST_TOKENS - 1)) is None
    assert loop_period([9] + [5] * (LEAST_TOKENS - 1)) is None
    assert loop_period([9] + [5] * LEAST_TOKENS) == 1
    thirty = list(range(30))
    assert loop_period(thirty * 3) == 30
    assert loop_period(thirty[1:] + thirty * 2) is None
    assert loop_period(list(range(LONGEST_PERIOD + 1)) * 9) is None


def test_similar_lines_are_no_loop() -> None:
    newline, item, words = 10, 11, list(range(20, 30))
    numbered = [token for number in range(60) for token in (newline, 1000 + number, item, *words)]
    assert loop_period(numbered) is None
    code = [token for number in range(60) for token in (*words, 2000 + number % 7, newline)]
    # The seven lines are the loop.
    assert loop_period(code) == 7 * 12
    assert loop_period(code[:100]) is None
    # A loop that was left again is none.
    assert loop_period([5] * 400 + [6]) is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=70), st.integers(0, 300)
)
def test_a_loop_is_what_it_says(before: list[int], once: list[int], length: int) -> None:
    tokens = before + (once * (length // len(once) + 1))[:length]
    period = loop_period(tokens)
    fitting = [
        p
        for p in range(1, LONGEST_PERIOD + 1)
        if len(tokens) >= (tail := max(LEAST_TOKENS, 3 * p))
        and all(tokens[-i] == tokens[-i - p] for i in range(1, tail - p + 1))
    ]
    assert period == (fitting[0] if fitting else None)
    if length >= max(LEAST_TOKENS, 3 * len(once)):
        assert period is not None


def test_repeated_grams() -> None:
    assert repeated_grams([1, 2, 3]) is None
    assert repeated_grams([1, 2, 3, 4]) == 0
    # 1234, 2341, 3412, 4123, 1234: four of five are different.
    assert repeated_grams([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repeated_grams([7] * 103) == pytest.approx(0.99)
    assert repeated_grams(range(9)) == 0
