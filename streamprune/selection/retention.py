"""Domain retention: how much of each source's saliency a selection keeps.

Saliency here is Σ g·‖f‖ over a source's own tokens, for any method and mix: what an expert adds to the residual stream,
in which the outputs of all layers are summed. So all layers are summed too, selections by any two methods and schedules
can be compared, and a layer counts by what it adds. (Of the definitions tried on two trained models with `tools/mixes`,
this one predicted the order of the KL divergences best; the mean over layers of each layer's share was no better than
chance if layers keep different numbers.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from streamprune.saliency.scores import FIELDS, Scores
from streamprune.selection.select import Selection, keep_highest

#: There is a warning for a source that keeps less of its saliency than this.
LEAST_RETENTION = 0.5
#: And for one that loses UNEQUAL times as much as the source that loses least, and at least LEAST_WARNED_LOSS.
UNEQUAL, LEAST_WARNED_LOSS = 2.0, 0.1
#: Where Σ g·‖f‖ lies among the statistics.
_SALIENCY = list(FIELDS).index("gated_norms")


@dataclass(frozen=True)
class Retention:
    """How much of one source's saliency a selection keeps: in all layers together, and in each layer.

    `best` is the most that as many experts per layer can keep, if selected for this source alone. Layers in which none
    of the source's tokens was routed to an expert have no share. The energy of channels is told in the same way: see
    `selection.energy`.
    """

    source: str
    kept: float
    best: float
    worst_layer: int
    worst: float
    layers: tuple[float | None, ...] = field(repr=False)


def retentions(scores: Scores, selection: Selection) -> tuple[Retention, ...]:
    """The retention of every source of the scores, in their order."""
    return tuple(_retention(number, scores, selection) for number in range(len(scores.sources)))


def _retention(source: int, scores: Scores, selection: Selection) -> Retention:
    sums = []
    for layer, selected in zip(scores.layers, selection.layers, strict=True):
        saliency = np.abs(layer.values[_SALIENCY, source])
        ideal = keep_highest(saliency.tolist(), len(selected.kept), scores.spec)
        sums.append((saliency.sum(), saliency[list(selected.kept)].sum(), saliency[list(ideal)].sum()))
    return retention_of(scores.sources[source], scores.layer_indices, sums)


def retention_of(source: str, layers: Sequence[int], sums: Sequence[tuple[float, float, float]]) -> Retention:
    """The retention of a source, from its sums in each of `layers`: of all, of what stays, and the best possible."""
    every, kept, best = np.array(sums, dtype=np.float64).T
    shares = [float(part / total) if total > 0 else None for part, total in zip(kept, every, strict=True)]
    # A source without routed tokens loses nothing.
    met = [(share, index) for share, index in zip(shares, layers, strict=True) if share is not None]
    worst, worst_layer = min(met, default=(1.0, layers[0]))
    total = every.sum()
    whole = [float(part.sum() / total) if met else 1.0 for part in (kept, best)]
    return Retention(source, whole[0], whole[1], worst_layer, worst, tuple(shares))


def retention_warnings(
    found: Sequence[Retention], shares: Mapping[str, float] | None = None, of_channels: bool = False
) -> Iterator[str]:
    """A warning for each source that loses most of its saliency, or far more than another source.

    `shares` are the sources' shares of the tokens, weighted by the mix; None without a mix. A source that has all of
    them cannot get more. `of_channels`: what was found is the energy of channels.
    """
    if not found:
        return
    shares = dict.fromkeys((each.source for each in found), 1.0) if shares is None else shares
    least = max(found, key=lambda retention: retention.kept)
    unit, what = ("channels", "channels' energy") if of_channels else ("experts", "saliency")
    more = "wider experts" if of_channels else "another --method, more experts"
    for each in found:
        alone = f"as many {unit} chosen for it alone would keep {each.best:.1%}"
        mix = "a larger share of --mix, " if shares.get(each.source, 0.0) < 1 else ""
        if each.kept < LEAST_RETENTION:
            reference = f", where {least.source} keeps {least.kept:.1%}" if each is not least else ""
            yield (
                f"{each.source} loses most of its own: it keeps {each.kept:.1%} of its {what}{reference} ({alone}). "
                f"What may help: {mix}{more}."
            )
        elif 1 - each.kept >= max(LEAST_WARNED_LOSS, UNEQUAL * (1 - least.kept)):
            yield (
                f"{each.source} loses {1 - each.kept:.1%} of its {what}, {least.source} only {1 - least.kept:.1%} "
                f"({alone}). If it matters, what may help: {mix}{more}."
            )
