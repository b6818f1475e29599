"""The output of `streamprune inspect`: the objects of `--json`, and the same as tables for the terminal.

It shows each layer's scores, a selection's boundary, how much it keeps of each source, and how two selections differ.
One line per layer, so that 48 layers of 128 experts stay readable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.saliency.scores import FIELDS, Scores
from streamprune.selection.retention import Retention, retention_warnings, retentions
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.select import Selection, routed_tokens, score_layer, super_experts
from streamprune.selection.settings import SelectionSettings, mix_weights, token_shares
from streamprune.tables import Table, count, percent

#: Bars of a layer's histogram, from its lowest to its highest score.
BARS = 10
_QUARTILES = ("min", "q1", "median", "q3", "max")
_HEIGHTS = " ▁▂▃▄▅▆▇█"
#: Differing experts that one line of a comparison names at most; `--layer` names all.
_NAMED = 8


def inspect_scores(scores: Scores, settings: SelectionSettings, selection: Selection | None = None) -> dict[str, Any]:
    """What `--json` prints: `scores` as `settings` rank them and, if there is a selection, what it keeps and loses."""
    weights = mix_weights(settings.mix, scores.sources, scores.source_tokens)
    shares = token_shares(settings.mix, scores.sources, scores.source_tokens)
    ranked = {layer.index: score_layer(layer, settings, weights) for layer in scores.layers}
    unseen = {
        layer.index: [expert for expert, tokens in enumerate(routed_tokens(layer)) if not tokens]
        for layer in scores.layers
    }
    outliers = super_experts(scores.layers, weights)
    warnings: list[str] = []
    retained = retentions(scores, selection) if selection else ()
    if selection:
        warnings = [*retention_warnings(retained, shares), *_choice_warnings(selection.kept, outliers, unseen)]
    layers = []
    for index, values in ranked.items():
        kept = selection.kept[index] if selection else None
        quartiles = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
        layers.append({
            "index": index,
            "keep": None if kept is None else len(kept),
            "kept": kept,
            "scores": values,
            "quartiles": dict(zip(_QUARTILES, quartiles, strict=True)),
            "histogram": _histogram(values, quartiles[0], quartiles[-1]),
            "never_seen": unseen[index],
            "boundary": _boundary(values, index, selection, scores.spec.groups) if selection else None,
        })  # fmt: skip
    return {
        "model": scores.provenance.get("model"),
        "moe_layers": len(scores.layers),
        "experts_per_layer": scores.spec.count,
        "top_k": scores.spec.top_k,
        "selection": asdict(settings),
        "sources": [
            {"name": name, "tokens": tokens, "share": shares[name]}
            for name, tokens in zip(scores.sources, scores.source_tokens, strict=True)
        ],
        "kept": sum(selection.counts) if selection else None,
        "layers": layers,
        "super_experts": outliers,
        "retention": [_retention_object(each) for each in retained],
        "warnings": warnings,
    }


def _retention_object(retention: Retention) -> dict[str, Any]:
    body = asdict(retention)
    # Layers were called blocks when this key was introduced.
    body["worst_block"] = body.pop("worst_layer")
    return body


def _histogram(scores: Sequence[float], low: float, high: float) -> list[int]:
    bars = [0] * BARS
    for score in scores:
        bars[min(BARS - 1, int((score - low) / (high - low) * BARS)) if high > low else 0] += 1
    return bars


def _boundary(scores: Sequence[float], index: int, selection: Selection, groups: int) -> dict[str, Any] | None:
    """The kept expert with the lowest score in a layer and the removed one with the highest; None where all stay.

    `margin` is the difference of the two scores, divided by the larger; negative where a lower score was kept.
    Protected experts do not count. With groups of experts, it is the group in which the two are closest.
    """
    lines = []
    kept, protected = set(selection.kept[index]), selection.protected.get(index, ())
    size = len(scores) // groups
    for group in range(groups):
        # The ones with the lowest scores first; of equal scores the higher number is removed first.
        members = sorted(range(group * size, (group + 1) * size), key=lambda expert: (scores[expert], -expert))
        inside = [expert for expert in members if expert in kept and expert not in protected]
        outside = [expert for expert in members if expert not in kept]
        if inside and outside:
            above, below = scores[inside[0]], scores[outside[-1]]
            widest = max(abs(above), abs(below))
            lines.append({
                "last_kept": inside[0],
                "last_kept_score": above,
                "first_removed": outside[-1],
                "first_removed_score": below,
                "margin": (above - below) / widest if widest else 0.0,
            })  # fmt: skip
    return min(lines, key=lambda line: line["margin"], default=None)


def _choice_warnings(
    kept: Mapping[int, Sequence[int]], outliers: Mapping[int, Sequence[int]], unseen: Mapping[int, Sequence[int]]
) -> Iterator[str]:
    lost = {index: [expert for expert in experts if expert not in kept[index]] for index, experts in outliers.items()}
    if any(lost.values()):
        yield f"super experts would be removed ({_by_layer(lost)}): --protect-super-experts keeps them."
    kept_unseen = [len(set(experts) & set(kept[index])) for index, experts in unseen.items()]
    if any(kept_unseen):
        yield (
            f"{sum(kept_unseen):,} experts in {sum(map(bool, kept_unseen))} layers would stay that no token was routed "
            "to, so their scores mean nothing. Use more or other calibration text, or keep fewer experts."
        )


def _by_layer(experts: Mapping[int, Sequence[int]]) -> str:
    """The experts by layer as text: at most 10 of each layer, and 5 layers."""
    parts = [f"layer {index}: {', '.join(map(str, numbers[:10]))}" for index, numbers in experts.items() if numbers]
    number = sum(map(len, experts.values()))
    return "; ".join(parts[:5]) + (f"; …, {number} in {len(parts)} layers" if len(parts) > 5 else "")


def inspection_lines(
    inspection: Mapping[str, Any], title: str, scores: Scores, selection: Selection | None, only: int | None = None
) -> Iterator[str]:
    """What `inspect_scores` gave, as text: of all layers, or of the layer `only` with every expert."""
    yield from _head(inspection, title)
    yield ""
    yield from _layers_table([layer for layer in inspection["layers"] if only in (None, layer["index"])]).text("")
    if only is not None:
        yield ""
        yield from _experts_table(inspection, scores, selection, scores.layer_indices.index(only)).text()
    if inspection["retention"]:
        yield ""
        yield from _retention_table(inspection, only).text()
    if inspection["super_experts"]:
        yield f"super experts: {_by_layer(inspection['super_experts'])}"
    yield from (f"warning: {warning}" for warning in inspection["warnings"])


def _head(inspection: Mapping[str, Any], title: str) -> Iterator[str]:
    settings, layers, experts = inspection["selection"], inspection["layers"], inspection["experts_per_layer"]
    every, sources = experts * len(layers), inspection["sources"]
    rows = [(each["name"], count(each["tokens"]), percent(each["share"])) for each in sources]
    first = (
        f"{title}: {len(layers)} layers of {experts} experts (top-{inspection['top_k']}); "
        f"{sum(each['tokens'] for each in sources):,} calibration tokens"
    )
    yield from Table(first, ("source", "tokens", "share of the mix"), rows).text()
    total = inspection["kept"]
    if total is None:
        yield f"method {settings['method']}; say --keep, --ratio or --total to see a selection"
    else:
        counts = [layer["keep"] for layer in layers]
        least, most = min(counts), max(counts)
        each = f"{least} of {experts} in every layer" if least == most else f"{least} to {most} of {experts} by layer"
        yield (
            f"method {settings['method']}, schedule {settings['schedule']}: keeps {total:,} of {every:,} experts, "
            f"{each}; {1 - total / every:.1%} removed"
        )
    yield f"never seen: {sum(len(layer['never_seen']) for layer in layers):,} of {every:,} experts"


def _layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["layer", "keep", "unseen", *_QUARTILES, "min..max", "last kept", "first removed", "margin"]
    rows = []
    for layer in layers:
        highest = max(layer["histogram"])
        # Rounded up, so that a single expert far from all others can be seen.
        bars = "".join(_HEIGHTS[-(-bar * (len(_HEIGHTS) - 1) // highest)] for bar in layer["histogram"])
        keep = "" if layer["keep"] is None else str(layer["keep"])
        row = [str(layer["index"]), keep, str(len(layer["never_seen"]))]
        row += [*map(_number, layer["quartiles"].values()), bars]
        edge = layer["boundary"]
        if edge is not None:
            row += [f"{_number(edge[f'{which}_score'])} #{edge[which]:<4}" for which in ("last_kept", "first_removed")]
            row.append(percent(edge["margin"]))
        rows.append(row)
    if layers[0]["keep"] is None:
        columns[1], columns[-3:] = "", []
    return Table("", columns, rows, align="r")


def _experts_table(inspection: Mapping[str, Any], scores: Scores, selection: Selection | None, place: int) -> Table:
    """Every expert of one layer, the best first."""
    layer, values = scores.layers[place], inspection["layers"][place]["scores"]
    kept = selection.kept[layer.index] if selection else None
    shielded = selection.protected.get(layer.index, ()) if selection else ()
    saliency = layer.values[list(FIELDS).index("gated_norms")]
    tokens = routed_tokens(layer)
    rows = []
    order = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))
    for rank, expert in enumerate(order, start=1):
        state = ""
        if kept is not None:
            state = "protected" if expert in shielded else "kept" if expert in kept else "removed"
        shares = [f"{own[expert] / own.sum():.2%}" if own.sum() else "-" for own in saliency]
        rows.append((str(rank), str(expert), _number(values[expert]), count(tokens[expert]), state, *shares))
    title = f"Experts of layer {layer.index}, best first; by source, the share of its saliency that the expert has here"
    columns = ("rank", "expert", "score", "tokens", "", *(name[:16] for name in scores.sources))
    return Table(title, columns, rows, align="rrrrl")


def _retention_table(inspection: Mapping[str, Any], only: int | None) -> Table:
    places = [place for place, layer in enumerate(inspection["layers"]) if layer["index"] == only]
    columns = ["source", "kept", "at best", "worst layer", *(f"layer {only}" for _ in places)]
    rows = []
    for each in inspection["retention"]:
        worst = f"{percent(each['worst'])} ({each['worst_block']})"
        shares = [percent(each["layers"][place]) for place in places]
        rows.append([each["source"], percent(each["kept"]), percent(each["best"]), worst, *shares])
    return Table(
        "Domain retention: the share of each source's own saliency (sum of gate weight x output norm) that stays",
        columns,
        rows,
        ["(at best: as many experts per layer, chosen for this source alone by that sum)"],
    )


def _number(value: float) -> str:
    return f"{value:.3g}"


#: What `--compare` may change, and how its value is read.
_KEYS = {
    "method": str,
    "mix": str,
    "schedule": str,
    "spread": float,
    "floor": int,
    "seed": int,
    "protect-super-experts": {"yes": True, "no": False}.__getitem__,
}
_BETWEEN = re.compile(rf";\s*(?=(?:{'|'.join(_KEYS)})=)")


def changed_settings(base: SelectionSettings, text: str) -> SelectionSettings:
    """`base` with the changes that `--compare` states: `mix=code=1`, `method=frequency`, or several with `;` between.

    Raises SettingsError for anything else, and for impossible values.
    """
    changes: dict[str, Any] = {}
    for part in _BETWEEN.split(text):
        key, equals, value = part.strip().partition("=")
        name = key.strip().replace("-", "_")
        if not equals or key.strip() not in _KEYS or name in changes:
            raise SettingsError(
                f"--compare {show(text)} is not a change of the selection. Write for example --compare mix=code=1, "
                f'--compare method=frequency or --compare "mix=code=1;method=ean"; it can change {", ".join(_KEYS)}.'
            )
        try:
            changes[name] = _KEYS[key.strip()](value.strip())  # type: ignore[operator]
        except (ValueError, KeyError):
            raise SettingsError(f"--compare {show(text)}: {show(value)} is not a value of {key.strip()}.") from None
    if changes.get("mix") == "":
        # Without a mix every token counts once.
        changes["mix"] = None
    schedule = SCHEDULES.get(changes.get("schedule", base.schedule))
    if schedule is None or not schedule.has_spread:
        changes.setdefault("spread", None)
    return replace(base, **changes)


def compare_selections(
    label: str, settings: SelectionSettings, scores: Scores, selection: Selection, other: Selection
) -> dict[str, Any]:
    """What `--json` prints of a comparison: how the selection `other`, made by `settings`, differs from the first.

    By layer: the experts that only one of the two keeps, and the Jaccard index, the number of experts that both keep
    divided by the number that at least one keeps. By source: how much each of the two keeps.
    """
    layers: list[dict[str, Any]] = []
    for one, another in zip(selection.layers, other.layers, strict=True):
        first, second = set(one.kept), set(another.kept)
        layers.append({
            "index": one.index,
            "jaccard": len(first & second) / len(first | second),
            "first_only": sorted(first - second),
            "second_only": sorted(second - first),
        })  # fmt: skip
    return {
        "compare": label,
        "selection": asdict(settings),
        "jaccard": sum(layer["jaccard"] for layer in layers) / len(layers),
        "changed": sum(len(layer["second_only"]) for layer in layers),
        "layers": layers,
        "retention": [
            {"source": before.source, "first": before.kept, "second": after.kept, "gain": after.kept - before.kept}
            for before, after in zip(retentions(scores, selection), retentions(scores, other), strict=True)
        ],
    }


def comparison_lines(comparison: Mapping[str, Any], only: int | None = None) -> Iterator[str]:
    """A comparison: what each source gains or loses, and by layer which experts differ; of one layer, all of them."""
    yield ""
    label = comparison["compare"]
    far = f"{comparison['changed']:,} experts differ, mean Jaccard {comparison['jaccard']:.3f}"
    shares = [
        (each["source"], percent(each["first"]), percent(each["second"]), f"{each['gain']:+.1%}")
        for each in comparison["retention"]
    ]
    yield from Table(f"Compared with {label}: {far}", ("source", "this", "other", "change"), shares).text()
    layers = comparison["layers"]
    differing = [layer for layer in layers if layer["jaccard"] < 1 and only in (None, layer["index"])]
    if not differing:
        yield f"  Both keep the same experts in {'every layer' if only is None else f'layer {only}'}."
        return
    rows = [
        (str(layer["index"]), f"{layer['jaccard']:.3f}", *(
            _numbers(layer[which], _NAMED if only is None else None) for which in ("first_only", "second_only")
        ))
        for layer in differing
    ]  # fmt: skip
    same = len(layers) - len(differing)
    notes = [f"({same} layers have no difference)"] if same and only is None else []
    yield from Table("", ("layer", "jaccard", "only this", f"only {label}"), rows, notes, align="rrll").text()


def _numbers(experts: Sequence[int], most: int | None) -> str:
    shown = experts[:most]
    return " ".join(map(str, shown)) + (f" +{len(experts) - len(shown)}" if len(experts) > len(shown) else "")
