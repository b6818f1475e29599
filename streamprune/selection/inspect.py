"""What `streamprune inspect` prints: each layer's scores, a selection's boundary, and what it keeps by source.

One line per layer, so that 48 layers of 128 experts stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streamprune.saliency.scores import FIELDS, LayerStatistics, Scores
from streamprune.selection.retention import Comparison, Retention, retention_warnings, retentions
from streamprune.selection.select import Selection, routed_tokens, score_layer, super_experts
from streamprune.selection.settings import SelectionSettings, mix_weights, token_shares

#: Bars of a layer's histogram, from its lowest to its highest score.
BARS = 10
_QUARTILES = ("min", "q1", "median", "q3", "max")


@dataclass(frozen=True)
class Boundary:
    """The kept expert with the lowest score in a layer, and the removed one with the highest.

    Protected experts do not count. With groups of experts, it is the group in which the two are closest.
    """

    last_kept: int
    last_kept_score: float
    first_removed: int
    first_removed_score: float

    @property
    def margin(self) -> float:
        """The difference of the two scores, divided by the larger; negative where a lower score was kept."""
        widest = max(abs(self.last_kept_score), abs(self.first_removed_score))
        return (self.last_kept_score - self.first_removed_score) / widest if widest else 0.0


@dataclass(frozen=True)
class LayerView:
    """One layer: scores (E,), their five quartiles and histogram (BARS,), experts never seen, the selection if any."""

    index: int
    scores: tuple[float, ...] = field(repr=False)
    quartiles: tuple[float, ...]
    histogram: tuple[int, ...]
    unseen: tuple[int, ...]
    kept: tuple[int, ...] | None = None
    boundary: Boundary | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything that `streamprune inspect` prints. Without a selection `retention` and `warnings` are empty.

    `shares` are the sources' shares of the tokens in the mix.
    """

    scores: Scores = field(repr=False)
    settings: SelectionSettings
    shares: tuple[float, ...]
    layers: tuple[LayerView, ...]
    super_experts: Mapping[int, tuple[int, ...]]
    selection: Selection | None = field(default=None, repr=False)
    retention: tuple[Retention, ...] = ()
    warnings: tuple[str, ...] = ()


def inspect_scores(scores: Scores, settings: SelectionSettings, selection: Selection | None = None) -> Inspection:
    """Look at `scores` as `settings` ranks them and, if there is a selection, at what it keeps and loses."""
    weights = mix_weights(settings.mix, scores.sources, scores.source_tokens)
    shares = token_shares(settings.mix, scores.sources, scores.source_tokens)
    outliers = super_experts(scores.layers, weights)
    views = []
    for number, layer in enumerate(scores.layers):
        kept = selection.layers[number].kept if selection else None
        shielded = selection.protected.get(layer.index, ()) if selection else ()
        views.append(_view(layer, score_layer(layer, settings, weights), kept, shielded, scores.spec.groups))
    found = retentions(scores, selection) if selection else ()
    warnings = (*retention_warnings(found, shares), *_choice_warnings(views, outliers)) if selection else ()
    return Inspection(scores, settings, tuple(shares.values()), tuple(views), outliers, selection, found, warnings)


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
    return LayerView(layer.index, scores, quartiles, tuple(bars), unseen, kept, line)


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
        view.index: tuple(expert for expert in outliers.get(view.index, ()) if expert not in (view.kept or ()))
        for view in views
    }
    if any(lost.values()):
        yield f"super experts would be removed ({by_layer(lost)}): --protect-super-experts keeps them."
    unseen = {view.index: tuple(set(view.unseen) & set(view.kept or ())) for view in views}
    if any(unseen.values()):
        number, layers = sum(map(len, unseen.values())), sum(map(bool, unseen.values()))
        yield (
            f"{number:,} experts in {layers} layers would stay that no token was routed to, so their scores mean "
            "nothing. Use more or other calibration text, or keep fewer experts."
        )


def by_layer(experts: Mapping[int, Sequence[int]]) -> str:
    """The experts by layer as text: at most 10 of each layer, and 5 layers."""
    parts = [f"layer {index}: {', '.join(map(str, numbers[:10]))}" for index, numbers in experts.items() if numbers]
    number = sum(map(len, experts.values()))
    return "; ".join(parts[:5]) + (f"; …, {number} in {len(parts)} layers" if len(parts) > 5 else "")


def inspection_object(inspection: Inspection) -> dict[str, Any]:
    """What `--json` prints."""
    scores, settings, selection = inspection.scores, inspection.settings, inspection.selection
    return {
        "model": scores.provenance.get("model"),
        "moe_layers": len(scores.layers),
        "experts_per_layer": scores.spec.count,
        "top_k": scores.spec.top_k,
        "selection": asdict(settings),
        "sources": [
            {"name": name, "tokens": tokens, "share": share}
            for name, tokens, share in zip(scores.sources, scores.source_tokens, inspection.shares, strict=True)
        ],
        "kept": sum(selection.counts) if selection else None,
        "layers": [_layer_object(view) for view in inspection.layers],
        "super_experts": {str(index): list(experts) for index, experts in inspection.super_experts.items()},
        "retention": [retention_object(each) for each in inspection.retention],
        "warnings": list(inspection.warnings),
    }


def retention_object(retention: Retention) -> dict[str, Any]:
    """The retention of one source as JSON."""
    body = asdict(retention)
    body["worst_block"] = body.pop("worst_layer")
    return {**body, "layers": list(retention.layers)}


def _layer_object(view: LayerView) -> dict[str, Any]:
    line = view.boundary
    return {
        "index": view.index,
        "keep": None if view.kept is None else len(view.kept),
        "kept": None if view.kept is None else list(view.kept),
        "scores": list(view.scores),
        "quartiles": dict(zip(_QUARTILES, view.quartiles, strict=True)),
        "histogram": list(view.histogram),
        "never_seen": list(view.unseen),
        "boundary": None if line is None else {**asdict(line), "margin": line.margin},
    }


_BARS = " ▁▂▃▄▅▆▇█"
#: Differing experts that one line of a comparison names at most; `--layer` names all.
_NAMED = 8


def inspection_lines(inspection: Inspection, title: str) -> Iterator[str]:
    """The text for all layers."""
    yield from _head(inspection, title)
    yield ""
    yield from _layer_table(inspection.layers)
    yield from _retention_table(inspection)
    yield from _notes(inspection)


def layer_lines(inspection: Inspection, title: str, view: LayerView) -> Iterator[str]:
    """The text for one layer: every expert, the best first."""
    yield from _head(inspection, title)
    yield ""
    yield from _layer_table((view,))
    yield ""
    scores = inspection.scores
    layer = next(layer for layer in scores.layers if layer.index == view.index)
    statistics = dict(zip(FIELDS, layer.values, strict=True))
    saliency = statistics["gated_norms"]
    totals = saliency.sum(axis=1)
    names = [name[:16] for name in scores.sources]
    yield f"Experts of layer {view.index}, best first; by source, the share of its saliency that the expert has here"
    yield f"{'rank':>6}  {'expert':>6}  {'score':>10}  {'tokens':>11}  {'':<9}" + "".join(
        f"  {name:>9}" for name in names
    )
    shielded = inspection.selection.protected.get(view.index, ()) if inspection.selection else ()
    order = sorted(range(len(view.scores)), key=lambda expert: (-view.scores[expert], expert))
    for rank, expert in enumerate(order, start=1):
        state = ""
        if view.kept is not None:
            state = "protected" if expert in shielded else "kept" if expert in view.kept else "removed"
        shares = (
            f"{values[expert] / total:.2%}" if total else "-" for values, total in zip(saliency, totals, strict=True)
        )
        tokens = int(statistics["tokens"][:, expert].sum())
        yield (
            f"{rank:>6}  {expert:>6}  {_number(view.scores[expert]):>10}  {tokens:>11,}  {state:<9}"
            + "".join(f"  {share:>{max(9, len(name))}}" for share, name in zip(shares, names, strict=True))
        ).rstrip()
    yield from _retention_table(inspection, view.index)
    yield from _notes(inspection)


def comparison_lines(comparison: Comparison, index: int | None = None) -> Iterator[str]:
    """A comparison: what each source gains or loses, and by layer which experts differ; of one layer, all of them."""
    yield ""
    far = f"{comparison.changed:,} experts differ, mean Jaccard {comparison.jaccard:.3f}"
    yield f"Compared with {comparison.label}: {far}"
    width = max(6, *(len(each.source) for each in comparison.before))
    yield f"  {'source':<{width}}  {'this':>7}  {'other':>7}  {'change':>8}"
    for before, after in zip(comparison.before, comparison.after, strict=True):
        yield f"  {before.source:<{width}}  {before.kept:>7.1%}  {after.kept:>7.1%}  {after.kept - before.kept:>+8.1%}"
    differing = [each for each in comparison.layers if each.jaccard < 1 and index in (None, each.index)]
    if not differing:
        where = "every layer" if index is None else f"layer {index}"
        yield f"  Both keep the same experts in {where}."
        return
    named = _NAMED if index is None else None
    columns = [_numbers(each.first_only, named) for each in differing]
    width = max(len("only this"), *map(len, columns))
    yield f"  layer  jaccard  {'only this':<{width}}  only {comparison.label}"
    for each, column in zip(differing, columns, strict=True):
        others = _numbers(each.second_only, named)
        yield f"  {each.index:>5}  {each.jaccard:>7.3f}  {column:<{width}}  {others}".rstrip()
    same = len(comparison.layers) - len(differing)
    if same and index is None:
        yield f"  ({same} layers have no difference)"


def _numbers(experts: Sequence[int], named: int | None) -> str:
    shown = experts[:named]
    more = f" +{len(experts) - len(shown)}" if len(experts) > len(shown) else ""
    return " ".join(map(str, shown)) + more


def _head(inspection: Inspection, title: str) -> Iterator[str]:
    scores, settings, selection = inspection.scores, inspection.settings, inspection.selection
    layers, count = len(scores.layers), scores.spec.count
    yield f"{title}: {layers} layers of {count} experts (top-{scores.spec.top_k}); {scores.tokens:,} calibration tokens"
    width = max(map(len, scores.sources))
    for name, tokens, share in zip(scores.sources, scores.source_tokens, inspection.shares, strict=True):
        yield f"  {name:<{width}}  {tokens:>13,} tokens, {share:>6.1%} of the mix"
    if selection is None:
        yield f"method {settings.method}; say --keep, --ratio or --total to see a selection"
    else:
        total, least, most = sum(selection.counts), min(selection.counts), max(selection.counts)
        each = (
            f"{least} of {count} in every layer" if selection.is_uniform else f"{least} to {most} of {count} by layer"
        )
        yield (
            f"method {settings.method}, schedule {settings.schedule}: keeps {total:,} of {count * layers:,} experts, "
            f"{each}; {1 - total / (count * layers):.1%} removed"
        )
    never = sum(len(view.unseen) for view in inspection.layers)
    yield f"never seen: {never:,} of {count * layers:,} experts"


def _layer_table(views: Sequence[LayerView]) -> Iterator[str]:
    chosen = views[0].kept is not None
    yield (
        f"{'layer':>5} {'keep' if chosen else '':>5} {'unseen':>6}" + "".join(f" {head:>8}" for head in _QUARTILES)
        + "  min..max  " + (f"  {'last kept':>15} {'first removed':>15} {'margin':>7}" if chosen else "")
    ).rstrip()  # fmt: skip
    for view in views:
        keep = str(len(view.kept)) if view.kept is not None else ""
        line = f"{view.index:>5} {keep:>5} {len(view.unseen):>6}"
        line += "".join(f" {_number(value):>8}" for value in view.quartiles) + f"  {_histogram(view.histogram)}"
        edge = view.boundary
        if edge is not None:
            last = f"{_number(edge.last_kept_score)} #{edge.last_kept:<4}"
            first = f"{_number(edge.first_removed_score)} #{edge.first_removed:<4}"
            line += f"  {last:>15} {first:>15} {edge.margin:>7.1%}"
        yield line.rstrip()


def _retention_table(inspection: Inspection, index: int | None = None) -> Iterator[str]:
    if not inspection.retention:
        return
    yield ""
    yield "Domain retention: the share of each source's own saliency (sum of gate weight x output norm) that stays"
    width = max(6, *(len(each.source) for each in inspection.retention))
    yield f"  {'source':<{width}}  {'kept':>6}  {'at best':>7}  {'worst layer':>15}" + (
        "" if index is None else f"  {f'layer {index}':>10}"
    )
    for each in inspection.retention:
        worst = f"{each.worst:.1%} ({each.worst_layer})"
        yield f"  {each.source:<{width}}  {each.kept:>6.1%}  {each.best:>7.1%}  {worst:>15}" + (
            "" if index is None else f"  {_here(inspection, each, index):>10}"
        )
    yield "  (at best: as many experts per layer, chosen for this source alone by that sum)"


def _here(inspection: Inspection, retention: Retention, index: int) -> str:
    share = retention.layers[inspection.scores.layer_indices.index(index)]
    return "-" if share is None else f"{share:.1%}"


def _notes(inspection: Inspection) -> Iterator[str]:
    if inspection.super_experts:
        yield f"super experts: {by_layer(inspection.super_experts)}"
    yield from (f"warning: {warning}" for warning in inspection.warnings)


def _histogram(bars: Sequence[int]) -> str:
    highest = max(bars)
    # Rounded up, so that a single expert far from all others can be seen.
    return "".join(_BARS[-(-bar * (len(_BARS) - 1) // highest)] for bar in bars)


def _number(value: float) -> str:
    return f"{value:.3g}"
