"""The text of a search: what is scored and measured on, and what each candidate's refit takes of it.

A refit takes as much text as its size needs. So that a candidate is refitted to the same text here as in a run of its
own, a sequence notes what it is for in each refit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamprune.calibration.refit_text import with_refit
from streamprune.calibration.sequences import Calibration, MicroBatch, fingerprint_of
from streamprune.config import SearchSettings
from streamprune.evaluation.held_out import split_held_out
from streamprune.models.skeleton import Skeleton
from streamprune.planning.candidates import Candidate
from streamprune.planning.refit import refit_demand, with_anchor

#: Between the uses of a sequence in the refits, in `Calibration.refit`.
_BETWEEN = "/"

#: Experts and channels of a candidate.
Shape = tuple[int, int | None]


@dataclass(frozen=True)
class SearchText:
    """`calibration` with its held-out text; its `refit` and that of its anchor have the uses in all refits.

    `parts` is the text that each refit takes, by the candidates' shape, as a run of its own would have it.
    """

    calibration: Calibration
    parts: Mapping[Shape, Calibration] = field(default_factory=dict, repr=False)

    def use_of(self, candidate: Candidate) -> Callable[[MicroBatch], str]:
        """What a micro-batch is for in a candidate's refit: FIT, JUDGE or nothing; nothing in that of none."""
        if not candidate.refit:
            return lambda batch: ""
        place = list(self.parts).index(candidate.shape)
        return lambda batch: batch.refit.split(_BETWEEN)[place] if batch.refit else ""


def search_text(
    settings: SearchSettings, whole: Calibration, candidates: Sequence[Candidate], skeleton: Skeleton, folder: Path
) -> SearchText:
    """Divide the text. `folder` has the tokenizer. Raises CalibrationError if it does not suffice."""
    parts: dict[Shape, Calibration] = {}
    for candidate in candidates:
        if not candidate.refit or candidate.shape in parts:
            continue
        counts = candidate.counts(tuple(skeleton.experts), 0)
        anchored = with_anchor(settings, whole, skeleton, counts, folder)
        parts[candidate.shape] = with_refit(split_held_out(anchored), refit_demand(skeleton, counts))
    scored = split_held_out(whole)
    if not parts:
        return SearchText(scored)
    uses = _joined([part.refit for part in parts.values()])
    anchors = [part.anchor for part in parts.values()]
    return SearchText(replace(scored, refit=uses, anchor=_union(anchors)), parts)


def _joined(uses: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The uses in all refits of each sequence; empty for one without any."""
    return tuple(_BETWEEN.join(each) if any(each) else "" for each in zip(*uses, strict=True))


def _union(anchors: Sequence[Calibration | None]) -> Calibration | None:
    """All sequences of some anchors, which have many in common, each with its uses in all refits."""
    present = [anchor for anchor in anchors if anchor is not None]
    if not present:
        return None
    # The one with the most sources first, so that they keep their order.
    largest = max(present, key=lambda anchor: (len(anchor.sources), len(anchor.sequences)))
    sources = tuple(dict.fromkeys(name for anchor in (largest, *present) for name in anchor.sources))
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    sequences = {}
    for place, anchor in enumerate(anchors):
        if anchor is None:
            continue
        for ids, source, use in zip(anchor.sequences, anchor.source_of, anchor.refit, strict=True):
            key = anchor.sources[source], tuple(ids.tolist())
            sequences[key] = ids
            found.setdefault(key, [""] * len(anchors))[place] = use
    ordered = sorted(found, key=lambda key: sources.index(key[0]))
    texts = tuple(sequences[key] for key in ordered)
    source_of = tuple(sources.index(name) for name, _ in ordered)
    return replace(
        largest,
        sequences=texts,
        sources=sources,
        source_of=source_of,
        fingerprint=fingerprint_of(texts, source_of),
        refit=tuple(_BETWEEN.join(found[key]) if any(found[key]) else "" for key in ordered),
    )
