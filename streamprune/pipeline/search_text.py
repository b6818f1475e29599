"""The text of a search: what is scored and measured on, and what each candidate's weights are computed from.

A refit, and rounding by GPTQ, take as much text as the candidate's size needs. So that it is the same text here as in a
run of the candidate's own, a sequence notes what it is for in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamprune.calibration.sequences import Calibration, MicroBatch, fingerprint_of
from streamprune.config import RunSettings, SearchSettings
from streamprune.evaluation.held_out import split_held_out
from streamprune.models.skeleton import Skeleton
from streamprune.planning.candidates import Candidate
from streamprune.planning.refit import with_anchor
from streamprune.planning.text_uses import with_uses

#: Between the uses of a sequence in the refits, in `Calibration.refit`.
_BETWEEN = "/"

#: What decides the text that a candidate's weights are computed from: experts, channels, refitted, rounded by text.
Kind = tuple[int, int | None, bool, bool]


@dataclass(frozen=True)
class SearchText:
    """`calibration` with its held-out text; its `refit` and that of its anchor have the uses in all candidates.

    `kinds` says of the candidates whose weights are computed from text which of the `parts` they use, as runs of their
    own would have it.
    """

    calibration: Calibration
    kinds: Mapping[Candidate, Kind] = field(default_factory=dict, repr=False)
    parts: Mapping[Kind, Calibration] = field(default_factory=dict, repr=False)

    def use_of(self, candidate: Candidate) -> Callable[[MicroBatch], str]:
        """What a micro-batch is for in computing a candidate's weights: FIT, JUDGE or nothing."""
        if candidate not in self.kinds:
            return lambda batch: ""
        place = list(self.parts).index(self.kinds[candidate])
        return lambda batch: batch.refit.split(_BETWEEN)[place] if batch.refit else ""

    def part_of(self, candidate: Candidate) -> Calibration | None:
        """The text that a candidate's weights are computed from; None if they are not."""
        return self.parts[self.kinds[candidate]] if candidate in self.kinds else None


def search_text(
    settings: SearchSettings,
    whole: Calibration,
    runs: Mapping[Candidate, RunSettings],
    skeleton: Skeleton,
    folder: Path,
) -> SearchText:
    """Divide the text among candidates, given with the settings of runs of their own. `folder` has the tokenizer.

    Raises CalibrationError if it does not suffice.
    """
    kinds: dict[Candidate, Kind] = {}
    parts: dict[Kind, Calibration] = {}
    for candidate, own in runs.items():
        if not own.sends_text:
            continue
        kinds[candidate] = kind = (*candidate.shape, own.refit, own.needs_text)
        if kind not in parts:
            counts = candidate.counts(tuple(skeleton.experts), 0)
            text = with_anchor(settings, whole, skeleton, counts, folder) if own.refit else whole
            parts[kind] = with_uses(own, split_held_out(text), skeleton, counts)
    scored = split_held_out(whole)
    if not parts:
        return SearchText(scored)
    uses = joined_uses([part.refit for part in parts.values()])
    anchors = [part.anchor for part in parts.values()]
    return SearchText(replace(scored, refit=uses, anchor=_union(anchors)), kinds, parts)


def joined_uses(uses: Sequence[Sequence[str]]) -> tuple[str, ...]:
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
