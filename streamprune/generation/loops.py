"""What can be seen of a continuation's tokens alone: whether it ends in a loop, and how much it repeats. No torch."""

from __future__ import annotations

from collections.abc import Sequence

#: Tokens that a repetition must last to be called a loop. Text has shorter ones of its own: a rule of dashes, the
#: columns of a table, a row of zeros; and models say something a few times without being caught in it.
LEAST_TOKENS = 64
#: A loop is seen three times over: what is said twice, such as a refrain or a quoted question, may still go on.
LEAST_ROUNDS = 3
#: The longest period, in tokens: a paragraph of about a hundred words.
LONGEST_PERIOD = 160
#: The n of "repeated 4-grams".
GRAM = 4


def loop_period(tokens: Sequence[int]) -> int | None:
    """The shortest period p of the loop in which the tokens end; None if they end in none.

    They end in a loop of period p, of at most LONGEST_PERIOD tokens, if the last n = max(LEAST_TOKENS, LEAST_ROUNDS p)
    of them repeat with it: each of the last n - p equals the one p places before. They have to be equal exactly, so
    that a numbered list, or code with similar lines, is none. Fewer than n tokens never make a loop of period p.
    """
    length = len(tokens)
    for period in range(1, min(LONGEST_PERIOD, length // LEAST_ROUNDS) + 1):
        start = length - max(LEAST_TOKENS, LEAST_ROUNDS * period)
        if start >= 0 and tokens[start + period :] == tokens[start : length - period]:
            return period
    return None


def repeated_grams(tokens: Sequence[int], size: int = GRAM) -> float | None:
    """seq-rep-n of Welleck et al. 2019 (arXiv:1908.04319, section 5): 1 - distinct n-grams / all n-grams, 0 to 1.

    None for fewer than n tokens, which have no n-gram.
    """
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
