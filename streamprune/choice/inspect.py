"""What scores show: how they are spread in each layer, where a choice draws the line, and what it would lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streamprune.choice.choose import Choice, routed_tokens, score_layer
from streamprune.choice.mix import mix_weights, token_shares
from streamprune.choice.retention import Retention, retention_warnings, retentions
from streamprune.choice.selection import Selection
from streamprune.choice.super_experts import super_experts
from streamprune.scores.scores import Scores
from streamprune.scores.statistics import LayerStatistics

#: Bars of a layer's histogram, from its lowest to its highest score.
BARS = 10
_QUARTILES = ("min", "q1", "median", "q3", "max")


@dataclass(frozen=True)
class Boundary:
    """Where the line is drawn in a layer: the kept expert with the lowest score, the removed one with the highest.

    Experts that stay because they are protected do not count. With groups of experts it is the line of the group in
    which the two are closest.
    """

    last_kept: int
    last_kept_score: float
    first_removed: int
    first_removed_score: float

    @property
    def margin(self) -> float:
        """By what share of the larger of the two scores they differ; negative where a lower score was kept."""
        widest = max(abs(self.last_kept_score), abs(self.first_removed_score))
        return (self.last_kept_score - self.first_removed_score) / widest if widest else 0.0


@dataclass(frozen=True)
class LayerView:
    """One layer: scores (E,), their five quartiles and histogram (BARS,), experts never seen, and the choice if any."""

    block: int
    scores: tuple[float, ...] = field(repr=False)
    quartiles: tuple[float, ...]
    histogram: tuple[int, ...]
    unseen: tuple[int, ...]
    kept: tuple[int, ...] | None = None
    boundary: Boundary | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything that `streamprune inspect` tells of scores; without a choice there is nothing to retain.

    `shares` are the sources' shares of the tokens in the mix.
    """

    scores: Scores = field(repr=False)
    selection: Selection
    shares: tuple[float, ...]
    layers: tuple[LayerView, ...]
    super_experts: Mapping[int, tuple[int, ...]]
    choice: Choice | None = field(default=None, repr=False)
    retention: tuple[Retention, ...] = ()
    warnings: tuple[str, ...] = ()


def inspect_scores(scores: Scores, selection: Selection, choice: Choice | None = None) -> Inspection:
    """Look at `scores` as `selection` ranks them and, if there is a choice, at what it keeps and loses."""
    weights = mix_weights(selection.mix, scores.sources, scores.source_tokens)
    shares = token_shares(selection.mix, scores.sources, scores.source_tokens)
    outliers = super_experts(scores.layers, weights)
    views = []
    for number, layer in enumerate(scores.layers):
        kept = choice.layers[number].kept if choice else None
        shielded = choice.protected.get(layer.block, ()) if choice else ()
        views.append(_view(layer, score_layer(layer, selection, weights), kept, shielded, scores.spec.groups))
    found = retentions(scores.layers, scores.sources, choice, scores.spec.groups) if choice else ()
    warnings = (*retention_warnings(found, shares), *_choice_warnings(views, outliers)) if choice else ()
    return Inspection(scores, selection, tuple(shares.values()), tuple(views), outliers, choice, found, warnings)


def _view(
    layer: LayerStatistics,
    scores: tuple[float, ...],
    kept: tuple[int, ...] | None,
    protected: Sequence[int],
    groups: int,
) -> LayerView:
    unseen = tuple(expert for expert, tokens in enumerate(routed_tokens(layer)) if not tokens)
    quartiles = tuple(float(value) for value in np.percentile(scores, (0, 25, 50, 75, 100)))
    bars = [0] * BARS
    low, width = quartiles[0], quartiles[-1] - quartiles[0]
    for score in scores:
        bars[min(BARS - 1, int((score - low) / width * BARS)) if width > 0 else 0] += 1
    line = _boundary(scores, kept, protected, groups) if kept is not None else None
    return LayerView(layer.block, scores, quartiles, tuple(bars), unseen, kept, line)


def _boundary(scores: Sequence[float], kept: Sequence[int], protected: Sequence[int], groups: int) -> Boundary | None:
    lines = []
    stays, size = set(kept), len(scores) // groups
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        inside = [expert for expert in members if expert in stays and expert not in protected]
        outside = [expert for expert in members if expert not in stays]
        if inside and outside:
            last = min(inside, key=lambda expert: (scores[expert], -expert))
            first = max(outside, key=lambda expert: (scores[expert], -expert))
            lines.append(Boundary(last, scores[last], first, scores[first]))
    return min(lines, key=lambda line: line.margin, default=None)


def _choice_warnings(views: Sequence[LayerView], outliers: Mapping[int, tuple[int, ...]]) -> Iterator[str]:
    lost = {
        view.block: tuple(expert for expert in outliers.get(view.block, ()) if expert not in (view.kept or ()))
        for view in views
    }
    if any(lost.values()):
        yield f"super experts would be removed ({by_layer(lost)}): --protect-super-experts keeps them."
    unseen = {view.block: tuple(set(view.unseen) & set(view.kept or ())) for view in views}
    if any(unseen.values()):
        number, layers = sum(map(len, unseen.values())), sum(map(bool, unseen.values()))
        yield (
            f"{number:,} experts in {layers} layers would stay that no token was routed to: nothing is known of them. "
            "More or other calibration text would tell, or keep fewer."
        )


def by_layer(experts: Mapping[int, Sequence[int]]) -> str:
    """Numbers of experts by layer, in words; of many only the first."""
    parts = [f"layer {block}: {', '.join(map(str, numbers[:10]))}" for block, numbers in experts.items() if numbers]
    number = sum(map(len, experts.values()))
    return "; ".join(parts[:5]) + (f"; …, {number} in {len(parts)} layers" if len(parts) > 5 else "")


def inspection_object(inspection: Inspection) -> dict[str, Any]:
    """What `--json` prints."""
    scores, selection, choice = inspection.scores, inspection.selection, inspection.choice
    return {
        "model": scores.provenance.get("model"),
        "moe_layers": len(scores.layers),
        "experts_per_layer": scores.spec.count,
        "top_k": scores.spec.top_k,
        "selection": asdict(selection),
        "sources": [
            {"name": name, "tokens": tokens, "share": share}
            for name, tokens, share in zip(scores.sources, scores.source_tokens, inspection.shares, strict=True)
        ],
        "kept": sum(choice.counts) if choice else None,
        "layers": [_layer_object(view) for view in inspection.layers],
        "super_experts": {str(block): list(experts) for block, experts in inspection.super_experts.items()},
        "retention": [retention_object(each) for each in inspection.retention],
        "warnings": list(inspection.warnings),
    }


def retention_object(retention: Retention) -> dict[str, Any]:
    """The retention of one source as JSON."""
    return {**asdict(retention), "layers": list(retention.layers)}


def _layer_object(view: LayerView) -> dict[str, Any]:
    line = view.boundary
    return {
        "index": view.block,
        "keep": None if view.kept is None else len(view.kept),
        "kept": None if view.kept is None else list(view.kept),
        "scores": list(view.scores),
        "quartiles": dict(zip(_QUARTILES, view.quartiles, strict=True)),
        "histogram": list(view.histogram),
        "never_seen": list(view.unseen),
        "boundary": None if line is None else {**asdict(line), "margin": line.margin},
    }
