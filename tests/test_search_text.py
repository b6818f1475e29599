"""Each candidate of a search has the text of a run of its own, in that run's order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamprune.calibration.refit_text import with_text
from streamprune.calibration.sequences import FIT, JUDGE, Calibration, fingerprint_of
from streamprune.pipeline.search_text import SearchText, joined_uses
from streamprune.planning.candidates import Candidate

LENGTH = 8


def calibration(*sequences: int) -> Calibration:
    """So many different sequences of each source."""
    source_of = tuple(source for source, count in enumerate(sequences) for _ in range(count))
    texts = tuple(torch.full((LENGTH,), number) for number in range(len(source_of)))
    return Calibration(
        texts,
        tuple(f"source {number}" for number in range(len(sequences))),
        source_of,
        fingerprint_of(texts, source_of),
    )


@pytest.mark.parametrize("sizes", [(3, 8), (8, 3), (2, 5, 12), (4, 6), (12, 12)], ids=str)
def test_what_is_fitted_and_what_judges_have_the_order_of_an_own_run(sizes: tuple[int, ...]) -> None:
    """With few sequences of a source the last one judges, which is fitted to where there are more."""
    whole = calibration(12, 12)
    candidates = [Candidate(keep, None, "source", True) for keep in range(1, len(sizes) + 1)]
    # (Both sources give equally many.)
    parts = {
        (*each.shape, True, False): with_text(whole, 2 * size * LENGTH)
        for each, size in zip(candidates, sizes, strict=True)
    }
    kinds = {each: (*each.shape, True, False) for each in candidates}
    uses = joined_uses([part.refit for part in parts.values()])
    text = SearchText(replace(whole, refit=uses), kinds, parts)
    for candidate in candidates:
        own, use_of = text.part_of(candidate), text.use_of(candidate)
        assert own is not None
        for use in (FIT, JUDGE):
            wanted = [row for batch in own.micro_batches(64) if batch.refit == use for row in batch.ids.tolist()]
            found = [
                row
                for batch in text.calibration.micro_batches(64)
                if use_of(batch) == use
                for row in batch.ids.tolist()
            ]
            assert found == wanted
            assert wanted
