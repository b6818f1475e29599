"""Domain retention: how much of what the experts do for each source of the text a choice keeps.

Saliency here is Σ g·‖f‖ over a source's own tokens, whatever method and mix chose: what an expert adds to the residual
stream, on which the outputs of all layers add up. So the sums of all layers are taken together, choices of any two
methods and schedules can be compared, and a layer counts by what it adds. (Of the definitions that were tried on two
trained models with `tools/mixes`, this one told the order of the damage best; the mean over layers of each layer's
share was no better than chance where layers keep different numbers.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from streamprune.choice.allocation import keep_highest
from streamprune.choice.choose import Choice
from streamprune.scores.statistics import FIELDS, LayerStatistics

#: A source that keeps less of its saliency than this is warned of: it loses most of its own.
LEAST_RETENTION = 0.5
#: So is one that loses so many times the share that the source loses which loses least, if it is worth speaking of.
UNEQUAL, WORTH_TELLING = 2.0, 0.1


@dataclass(frozen=True)
class Retention:
    """What a choice keeps of one source's saliency: of all layers together, and each layer's own share.

    `best` is the most that as many experts per layer can keep: those chosen for this source alone. Layers where none of
    the source's tokens met an expert have no share.
    """

    source: str
    kept: float
    best: float
    worst_block: int
    worst: float
    layers: tuple[float | None, ...] = field(repr=False)


def retentions(
    layers: Sequence[LayerStatistics], sources: Sequence[str], choice: Choice, groups: int = 1
) -> tuple[Retention, ...]:
    """The retention of every source, in their order; `groups` are those of the router."""
    whole, kept, best = (np.zeros((len(layers), len(sources))) for _ in range(3))
    for row, (layer, chosen) in enumerate(zip(layers, choice.layers, strict=True)):
        saliency = np.abs(layer.values[list(FIELDS).index("gated_norms")])
        for column, values in enumerate(saliency):
            ideal = keep_highest(values.tolist(), len(chosen.kept), groups)
            whole[row, column] = values.sum()
            kept[row, column] = values[list(chosen.kept)].sum()
            best[row, column] = values[list(ideal)].sum()
    return tuple(
        _retention(source, whole[:, column], kept[:, column], best[:, column], layers)
        for column, source in enumerate(sources)
    )


def _retention(
    source: str, whole: np.ndarray, kept: np.ndarray, best: np.ndarray, layers: Sequence[LayerStatistics]
) -> Retention:
    met = np.flatnonzero(whole > 0)
    if not len(met):
        # Nothing of nothing is lost.
        return Retention(source, 1.0, 1.0, layers[0].block, 1.0, (None,) * len(layers))
    shares = [float(kept[row] / whole[row]) if whole[row] > 0 else None for row in range(len(layers))]
    worst = met[np.argmin(kept[met] / whole[met])]
    return Retention(
        source,
        float(kept.sum() / whole.sum()),
        float(best.sum() / whole.sum()),
        layers[worst].block,
        float(kept[worst] / whole[worst]),
        tuple(shares),
    )


def retention_warnings(found: Sequence[Retention], shares: Mapping[str, float] | None = None) -> Iterator[str]:
    """A sentence for each source that would lose most of its own saliency, or far more than another source does.

    `shares` are the sources' shares of the tokens that decided; None where no mix did. A source that has all of them
    cannot be given more.
    """
    if not found:
        return
    shares = dict.fromkeys((each.source for each in found), 1.0) if shares is None else shares
    least = max(found, key=lambda retention: retention.kept)
    for each in found:
        alone = f"as many experts chosen for it alone would keep {each.best:.1%}"
        mix = "a larger share of --mix, " if shares.get(each.source, 0.0) < 1 else ""
        if each.kept < LEAST_RETENTION:
            beside = f", where {least.source} keeps {least.kept:.1%}" if each is not least else ""
            yield (
                f"{each.source} loses most of its own: it keeps {each.kept:.1%} of its saliency{beside} ({alone}). "
                f"What may help: {mix}another --method, more experts."
            )
        elif 1 - each.kept >= max(WORTH_TELLING, UNEQUAL * (1 - least.kept)):
            yield (
                f"{each.source} loses {1 - each.kept:.1%} of its saliency, {least.source} only {1 - least.kept:.1%} "
                f"({alone}). If it matters, what may help: {mix}another --method, more experts."
            )
