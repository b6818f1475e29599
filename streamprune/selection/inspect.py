"""What scores show: how they are spread in each layer, where a choice draws the line, and what it would lose.

What `streamprune inspect` prints for people: one line per layer, so that 48 layers of 128 experts stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streamprune.saliency.scores import FIELDS, LayerStatistics, Scores
from streamprune.selection.retention import Comparison, LayerDifference, Retention, retention_warnings, retentions
from streamprune.selection.select import Choice, routed_tokens, score_layer, super_experts
from streamprune.selection.settings import Selection, mix_weights, token_shares

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


_BARS = " ▁▂▃▄▅▆▇█"
#: So many experts that differ are named in a line of a comparison; `--layer` names all.
_NAMED = 8


def inspection_lines(inspection: Inspection, title: str) -> Iterator[str]:
    """The whole answer for all layers."""
    yield from _head(inspection, title)
    yield ""
    yield from _layer_table(inspection.layers)
    yield from _retention_table(inspection)
    yield from _notes(inspection)


def layer_lines(inspection: Inspection, title: str, view: LayerView) -> Iterator[str]:
    """The answer for one layer: every expert of it, the best first."""
    yield from _head(inspection, title)
    yield ""
    yield from _layer_table((view,))
    yield ""
    scores = inspection.scores
    layer = next(layer for layer in scores.layers if layer.block == view.block)
    statistics = dict(zip(FIELDS, layer.values, strict=True))
    saliency = statistics["gated_norms"]
    wholes = saliency.sum(axis=1)
    names = [name[:16] for name in scores.sources]
    yield f"Experts of layer {view.block}, best first; by source, the share of its saliency that the expert has here"
    yield f"{'rank':>6}  {'expert':>6}  {'score':>10}  {'tokens':>11}  {'':<9}" + "".join(
        f"  {name:>9}" for name in names
    )
    shielded = inspection.choice.protected.get(view.block, ()) if inspection.choice else ()
    order = sorted(range(len(view.scores)), key=lambda expert: (-view.scores[expert], expert))
    for rank, expert in enumerate(order, start=1):
        state = ""
        if view.kept is not None:
            state = "protected" if expert in shielded else "kept" if expert in view.kept else "removed"
        shares = (
            f"{values[expert] / whole:.2%}" if whole else "-" for values, whole in zip(saliency, wholes, strict=True)
        )
        tokens = int(statistics["tokens"][:, expert].sum())
        yield (
            f"{rank:>6}  {expert:>6}  {_number(view.scores[expert]):>10}  {tokens:>11,}  {state:<9}"
            + "".join(f"  {share:>{max(9, len(name))}}" for share, name in zip(shares, names, strict=True))
        ).rstrip()
    yield from _retention_table(inspection, view.block)
    yield from _notes(inspection)


def comparison_lines(comparison: Comparison, block: int | None = None) -> Iterator[str]:
    """A comparison: what each source gains or loses, and by layer which experts differ; of one layer, all of them."""
    yield ""
    far = f"{comparison.changed:,} experts differ, mean Jaccard {comparison.jaccard:.3f}"
    yield f"Compared with {comparison.label}: {far}"
    width = max(6, *(len(each.source) for each in comparison.before))
    yield f"  {'source':<{width}}  {'this':>7}  {'other':>7}  {'change':>8}"
    for before, after in zip(comparison.before, comparison.after, strict=True):
        yield f"  {before.source:<{width}}  {before.kept:>7.1%}  {after.kept:>7.1%}  {after.kept - before.kept:>+8.1%}"
    differing = [each for each in comparison.layers if each.jaccard < 1 and block in (None, each.block)]
    if not differing:
        where = "every layer" if block is None else f"layer {block}"
        yield f"  Both keep the same experts in {where}."
        return
    named = _NAMED if block is None else None
    columns = [_numbers(each.first_only, named) for each in differing]
    width = max(len("only this"), *map(len, columns))
    yield f"  layer  jaccard  {'only this':<{width}}  only {comparison.label}"
    for each, column in zip(differing, columns, strict=True):
        yield _difference(each, column, width, named)
    same = len(comparison.layers) - len(differing)
    if same and block is None:
        yield f"  ({same} layers have no difference)"


def _difference(each: LayerDifference, column: str, width: int, named: int | None) -> str:
    return f"  {each.block:>5}  {each.jaccard:>7.3f}  {column:<{width}}  {_numbers(each.second_only, named)}".rstrip()


def _numbers(experts: Sequence[int], named: int | None) -> str:
    shown = experts[:named]
    more = f" +{len(experts) - len(shown)}" if len(experts) > len(shown) else ""
    return " ".join(map(str, shown)) + more


def _head(inspection: Inspection, title: str) -> Iterator[str]:
    scores, selection, choice = inspection.scores, inspection.selection, inspection.choice
    layers, count = len(scores.layers), scores.spec.count
    yield f"{title}: {layers} layers of {count} experts (top-{scores.spec.top_k}); {scores.tokens:,} calibration tokens"
    width = max(map(len, scores.sources))
    for name, tokens, share in zip(scores.sources, scores.source_tokens, inspection.shares, strict=True):
        yield f"  {name:<{width}}  {tokens:>13,} tokens, {share:>6.1%} of the mix"
    if choice is None:
        yield f"method {selection.method}; say --keep, --ratio or --total to see a choice"
    else:
        total, least, most = sum(choice.counts), min(choice.counts), max(choice.counts)
        each = f"{least} of {count} in every layer" if choice.is_uniform else f"{least} to {most} of {count} by layer"
        yield (
            f"method {selection.method}, schedule {selection.schedule}: keeps {total:,} of {count * layers:,} experts, "
            f"{each}; {1 - total / (count * layers):.1%} removed"
        )
    never = sum(len(view.unseen) for view in inspection.layers)
    yield f"never seen: {never:,} of {count * layers:,} experts"


def _layer_table(views: Sequence[LayerView]) -> Iterator[str]:
    chosen = views[0].kept is not None
    heads = ("min", "q1", "median", "q3", "max")
    yield (
        f"{'layer':>5} {'keep' if chosen else '':>5} {'unseen':>6}" + "".join(f" {head:>8}" for head in heads)
        + "  min..max  " + (f"  {'last kept':>15} {'first removed':>15} {'margin':>7}" if chosen else "")
    ).rstrip()  # fmt: skip
    for view in views:
        keep = str(len(view.kept)) if view.kept is not None else ""
        line = f"{view.block:>5} {keep:>5} {len(view.unseen):>6}"
        line += "".join(f" {_number(value):>8}" for value in view.quartiles) + f"  {_histogram(view.histogram)}"
        edge = view.boundary
        if edge is not None:
            last = f"{_number(edge.last_kept_score)} #{edge.last_kept:<4}"
            first = f"{_number(edge.first_removed_score)} #{edge.first_removed:<4}"
            line += f"  {last:>15} {first:>15} {edge.margin:>7.1%}"
        yield line.rstrip()


def _retention_table(inspection: Inspection, block: int | None = None) -> Iterator[str]:
    if not inspection.retention:
        return
    yield ""
    yield "Domain retention: the share of each source's own saliency (sum of gate weight x output norm) that stays"
    width = max(6, *(len(each.source) for each in inspection.retention))
    yield f"  {'source':<{width}}  {'kept':>6}  {'at best':>7}  {'worst layer':>15}" + (
        "" if block is None else f"  {f'layer {block}':>10}"
    )
    for each in inspection.retention:
        worst = f"{each.worst:.1%} ({each.worst_block})"
        yield f"  {each.source:<{width}}  {each.kept:>6.1%}  {each.best:>7.1%}  {worst:>15}" + (
            "" if block is None else f"  {_here(inspection, each, block):>10}"
        )
    yield "  (at best: as many experts per layer, chosen for this source alone by that sum)"


def _here(inspection: Inspection, retention: Retention, block: int) -> str:
    share = retention.layers[inspection.scores.blocks.index(block)]
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
