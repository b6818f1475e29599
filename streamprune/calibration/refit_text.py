"""Which sequences weights are computed from: how many of the calibration, how many of other text, and which judge.

A refit to narrow text harms what that text does not contain, and text held back from it cannot show that. So text of
other sources, the anchor, is fitted too; experts are not scored on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamprune.calibration.pack import divided
from streamprune.calibration.sequences import FIT, JUDGE, Calibration, fingerprint_of
from streamprune.errors import CalibrationError

#: Routed tokens for each intermediate unit of an expert that stays, on average, that the experts are fitted to. (The
#: damage left is about a constant plus .24 / this number; below RECOMMENDED it is worth a warning.)
WANTED_PER_UNIT, RECOMMENDED_PER_UNIT = 48, 32
#: Routed tokens for each input column of an expert that stays, on average, that its matrices are rounded by. (On the
#: demo's model, GPTQ left .47 of the loss of rounding to nearest with 1 token a column, .39 with 16; fewer than
#: RECOMMENDED are worth a warning.)
WANTED_PER_COLUMN, RECOMMENDED_PER_COLUMN = 16, 1
#: Tokens for an importance matrix, if no more go through the pruned layers anyway: llama.cpp's users take 100 to 512
#: chunks of 512 tokens. Below the second it is worth a warning.
IMATRIX_TOKENS, LEAST_IMATRIX_TOKENS = 256 * 512, 100 * 512
#: Every so many sequences of a source one judges.
JUDGE_EVERY = 5
#: The share of the anchor in the tokens of a refit.
ANCHOR_SHARE = 0.25


@dataclass(frozen=True)
class RefitDemand:
    """What a refit needs text for: `kept` experts of `width` units in each layer, of which `top_k` get each token."""

    kept: int
    width: int
    top_k: int

    @property
    def units(self) -> float:
        """Tokens for one routed token per intermediate unit of every expert that stays."""
        return self.kept * self.width / self.top_k

    @property
    def tokens(self) -> int:
        """Tokens that take part, fitted or judging."""
        return round(WANTED_PER_UNIT * self.units * JUDGE_EVERY / (JUDGE_EVERY - 1))

    def anchor_tokens(self, calibration: int) -> int:
        """Tokens of the anchor for a calibration of so many tokens."""
        own = min(calibration, round(self.tokens * (1 - ANCHOR_SHARE)))
        return round(own * ANCHOR_SHARE / (1 - ANCHOR_SHARE))


@dataclass(frozen=True)
class RoundingDemand:
    """What GPTQ needs text for: `kept` experts in each layer, whose matrices have up to `columns` columns.

    `top_k` of them get each token.
    """

    kept: int
    columns: int
    top_k: int

    @property
    def per_column(self) -> float:
        """Tokens for one routed token per input column of every expert that stays."""
        return self.kept * self.columns / self.top_k

    @property
    def tokens(self) -> int:
        """Tokens that what enters the matrices is summed up over."""
        return round(WANTED_PER_COLUMN * self.per_column)


def with_text(calibration: Calibration, tokens: int) -> Calibration:
    """The calibration with so many tokens marked as text for the pruned layers, if nothing is refitted to them.

    (They have the order then in which a refit would have them: GPTQ gives the same result beside one.)
    """
    return replace(calibration, refit=_uses(calibration, tokens))


def with_refit(calibration: Calibration, demand: RefitDemand, least: int = 0) -> Calibration:
    """The calibration and its anchor with what each of their sequences is for in a refit.

    At least `least` tokens take part, if there are so many. Raises CalibrationError if there are too few to fit to some
    and to judge by others.
    """
    anchor = calibration.anchor
    own = max(demand.tokens, least)
    if anchor is not None:
        own -= min(anchor.tokens, demand.anchor_tokens(calibration.tokens))
        anchor = replace(anchor, refit=_uses(anchor, anchor.tokens))
    found = replace(calibration, refit=_uses(calibration, own), anchor=anchor)
    if not fitted_tokens(found, FIT) or not fitted_tokens(found, JUDGE):
        raise CalibrationError(
            "--refit fits to some sequences of a source and judges the fit by others, but no source has two. Give more "
            "text, --samples, or a shorter --seq-len."
        )
    return found


def only_refitted(calibration: Calibration) -> Calibration:
    """The calibration with only the sequences that take part in the refit, its anchor, and its held-out text."""
    used = [number for number, use in enumerate(calibration.refit) if use]
    sequences = tuple(calibration.sequences[number] for number in used)
    source_of = tuple(calibration.source_of[number] for number in used)
    return replace(
        calibration,
        sequences=sequences,
        source_of=source_of,
        fingerprint=fingerprint_of(sequences, source_of),
        refit=tuple(calibration.refit[number] for number in used),
    )


def fitted_tokens(calibration: Calibration, use: str = FIT) -> int:
    """Tokens that weights are fitted to (or that judge), those of the anchor included."""
    parts = [part for part in (calibration, calibration.anchor) if part is not None]
    return sum(
        len(sequence)
        for part in parts
        for sequence, found in zip(part.sequences, part.refit, strict=True)
        if found == use
    )


def _uses(text: Calibration, tokens: int) -> tuple[str, ...]:
    """For each sequence FIT, JUDGE or "": the first ones of each source, in equal shares, with `tokens` in all."""
    uses = [""] * len(text.sequences)
    budgets = _equal_shares(tokens, text.tokens_of)
    for source, budget in enumerate(budgets):
        numbers = [number for number, of in enumerate(text.source_of) if of == source]
        taken: list[int] = []
        for number in numbers:
            if budget <= 0:
                break
            taken.append(number)
            budget -= len(text.sequences[number])
        for place, number in enumerate(taken):
            # Of a source with few sequences the last one judges.
            last = len(taken) < JUDGE_EVERY and 0 < place == len(taken) - 1
            uses[number] = JUDGE if last or place % JUDGE_EVERY == JUDGE_EVERY - 1 else FIT
    return tuple(uses)


def _equal_shares(total: int, available: Sequence[int]) -> list[int]:
    """`total` in equal parts; what some cannot give is taken from the others, as far as they can."""
    shares, open_ = [0] * len(available), [index for index, size in enumerate(available) if size]
    left = min(total, sum(available))
    while left and open_:
        parts = divided(left, [1.0] * len(open_))
        for index, part in zip(open_, parts, strict=True):
            taken = min(part, available[index] - shares[index])
            shares[index] += taken
            left -= taken
        open_ = [index for index in open_ if shares[index] < available[index]]
    return shares
