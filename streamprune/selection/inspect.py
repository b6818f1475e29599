"""The output of `streamprune inspect`: the objects of `--json`, and the same as tables for the terminal.

It shows each layer's scores, a selection's boundary, and how much it keeps of each source. (`compare` shows how two
selections differ.) One line per layer, so that 48 layers of 128 experts stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from streamprune.saliency.scores import FIELDS, Scores
from streamprune.selection.energy import energies_kept, energy_by_width, energy_retentions
from streamprune.selection.retention import Retention, retention_warnings, retentions
from streamprune.selection.select import Selection, routed_tokens, score_layer, super_experts
from streamprune.selection.settings import SelectionSettings, mix_weights, token_shares
from streamprune.selection.widths import MULTIPLES
from streamprune.tables import Table, count, percent

#: Bars of a layer's histogram, from its lowest to its highest score.
BARS = 10
_QUARTILES = ("min", "q1", "median", "q3", "max")
_HEIGHTS = " ▁▂▃▄▅▆▇█"


def inspect_scores(
    scores: Scores,
    settings: SelectionSettings,
    selection: Selection | None = None,
    widths: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What `--json` prints: `scores` as `settings` rank them and, if there is a selection, what it keeps and loses.

    Without a selection, how much energy each of `widths` would keep. `notes` are remarks on the selection's width.
    """
    weights = mix_weights(settings.mix, scores.sources, scores.source_tokens)
    shares = token_shares(settings.mix, scores.sources, scores.source_tokens)
    ranked = {layer.index: score_layer(layer, settings, weights) for layer in scores.layers}
    unseen = {
        layer.index: [expert for expert, tokens in enumerate(routed_tokens(layer)) if not tokens]
        for layer in scores.layers
    }
    outliers = super_experts(scores.layers, weights)
    retained = retentions(scores, selection) if selection else ()
    energy = energy_retentions(scores, selection) if selection else ()
    warnings = list(retention_warnings(energy or retained, shares, bool(energy)))
    if selection:
        warnings += _choice_warnings(selection.kept, outliers, unseen)
    layers = [_layer_object(index, values, scores, selection, unseen[index]) for index, values in ranked.items()]
    narrower = _narrower_object(scores, weights, selection, energy, layers, widths)
    if selection and energy:
        narrower["notes"] = list(notes)
    channels = scores.layers[0].channels
    return {
        "model": scores.provenance.get("model"),
        "moe_layers": len(scores.layers),
        "experts_per_layer": scores.spec.count,
        "top_k": scores.spec.top_k,
        **({"channels_per_expert": channels.shape[2]} if channels is not None else {}),
        "selection": asdict(settings),
        "sources": [
            {"name": name, "tokens": tokens, "share": shares[name]}
            for name, tokens in zip(scores.sources, scores.source_tokens, strict=True)
        ],
        "kept": sum(selection.counts) if selection else None,
        "layers": layers,
        "super_experts": outliers,
        "retention": [_retention_object(each) for each in retained],
        **narrower,
        "warnings": warnings,
    }


def _narrower_object(
    scores: Scores,
    weights: Sequence[float],
    selection: Selection | None,
    energy: Sequence[Retention],
    layers: Sequence[dict[str, Any]],
    widths: Sequence[int],
) -> dict[str, Any]:
    """What `--json` prints of narrower experts: of the selection's, whose `layers` get their energy, or of `widths`."""
    if selection and energy:
        for layer, shares_kept in zip(layers, _energy_by_expert(scores, weights, selection), strict=True):
            layer |= shares_kept
        mask = selection.layers[0].channels
        return {
            "width": mask.kept_width if mask else None,
            "energy": [_retention_object(each) for each in energy],
        }
    if not widths:
        return {}
    by_width = zip(widths, energy_by_width(scores, weights, widths), strict=True)
    return {
        "widths": [
            {"width": width, "energy": dict(zip(scores.sources, found, strict=True))} for width, found in by_width
        ]
    }


def _layer_object(
    index: int, values: Sequence[float], scores: Scores, selection: Selection | None, unseen: Sequence[int]
) -> dict[str, Any]:
    """What `--json` prints of a layer with these scores: how they are spread, and where the selection ends."""
    kept = selection.kept[index] if selection else None
    quartiles = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    return {
        "index": index,
        "keep": None if kept is None else len(kept),
        "kept": kept,
        "scores": values,
        "quartiles": dict(zip(_QUARTILES, quartiles, strict=True)),
        "histogram": _histogram(values, quartiles[0], quartiles[-1]),
        "never_seen": unseen,
        "boundary": _boundary(values, index, selection, scores.spec.groups) if selection else None,
    }


def _energy_by_expert(scores: Scores, weights: Sequence[float], selection: Selection) -> Iterator[dict[str, Any]]:
    """For each layer the share of its energy that stays, and that each kept expert keeps; by the mix. JSON."""
    for layer, selected in zip(scores.layers, selection.layers, strict=True):
        energies = layer.mixed_channels(weights)
        every, kept = energies.sum(axis=1), energies_kept(energies, selected)
        own = every[list(selected.kept)]
        shares = np.divide(kept, own, out=np.ones_like(kept), where=own > 0).tolist()
        whole = float(kept.sum() / every.sum()) if every.sum() > 0 else None
        yield {"energy_kept": whole, "energy_kept_by_expert": dict(zip(selected.kept, shares, strict=True))}


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
            "to, so their scores and those of their channels mean nothing. Use more or other calibration text, or keep "
            "fewer experts."
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
    experts = inspection["experts_per_layer"] * inspection["moe_layers"]
    # Where all experts stay, all of their saliency does.
    if inspection["retention"] and inspection["kept"] < experts:
        yield ""
        yield from _retention_table(inspection, "retention", only).text()
    if "energy" in inspection:
        yield ""
        yield from _retention_table(inspection, "energy", only).text()
        yield from (f"note: {note}" for note in inspection["notes"])
    if "widths" in inspection:
        yield ""
        yield from _widths_table(inspection).text()
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
        ways = "--keep, --ratio, --total or --width" if "widths" in inspection else "--keep, --ratio or --total"
        yield f"method {settings['method']}; say {ways} to see a selection"
    else:
        counts = [layer["keep"] for layer in layers]
        least, most = min(counts), max(counts)
        each = f"{least} of {experts} in every layer" if least == most else f"{least} to {most} of {experts} by layer"
        yield (
            f"method {settings['method']}, schedule {settings['schedule']}: keeps {total:,} of {every:,} experts, "
            f"{each}; {1 - total / every:.1%} removed"
        )
    if "width" in inspection:
        width, full = inspection["width"], inspection["channels_per_expert"]
        multiple = next((f", a multiple of {size}" for size in MULTIPLES if width % size == 0), "")
        yield (
            f"width: each keeps {width:,} of its {full:,} channels{multiple}; {total * width / (every * full):.1%} of "
            "the experts' parameters stay"
        )
    yield f"never seen: {sum(len(layer['never_seen']) for layer in layers):,} of {every:,} experts"


def _layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["layer", "keep", "unseen", *_QUARTILES, "min..max"]
    columns += ["energy"] if "energy_kept" in layers[0] else []
    # None of the layers has a boundary if all experts stay.
    columns += ["last kept", "first removed", "margin"] if any(layer["boundary"] for layer in layers) else []
    rows = []
    for layer in layers:
        highest = max(layer["histogram"])
        # Rounded up, so that a single expert far from all others can be seen.
        bars = "".join(_HEIGHTS[-(-bar * (len(_HEIGHTS) - 1) // highest)] for bar in layer["histogram"])
        keep = "" if layer["keep"] is None else str(layer["keep"])
        row = [str(layer["index"]), keep, str(len(layer["never_seen"]))]
        row += [*map(_number, layer["quartiles"].values()), bars]
        row += [percent(layer["energy_kept"])] if "energy_kept" in layer else []
        edge = layer["boundary"]
        if edge is not None:
            row += [f"{_number(edge[f'{which}_score'])} #{edge[which]:<4}" for which in ("last_kept", "first_removed")]
            row.append(percent(edge["margin"]))
        rows.append(row)
    if layers[0]["keep"] is None:
        columns[1] = ""
    return Table("", columns, rows, align="r")


def _experts_table(inspection: Mapping[str, Any], scores: Scores, selection: Selection | None, place: int) -> Table:
    """Every expert of one layer, the best first."""
    layer, values = scores.layers[place], inspection["layers"][place]["scores"]
    kept = selection.kept[layer.index] if selection else None
    shielded = selection.protected.get(layer.index, ()) if selection else ()
    saliency = layer.values[list(FIELDS).index("gated_norms")]
    tokens, energy = routed_tokens(layer), inspection["layers"][place].get("energy_kept_by_expert")
    rows = []
    order = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))
    for rank, expert in enumerate(order, start=1):
        state = ""
        if kept is not None:
            state = "protected" if expert in shielded else "kept" if expert in kept else "removed"
        shares = [f"{own[expert] / own.sum():.2%}" if own.sum() else "-" for own in saliency]
        # Of a removed expert nothing stays.
        channels = [percent(energy[expert]) if expert in energy else "-"] if energy is not None else []
        rows.append((str(rank), str(expert), _number(values[expert]), count(tokens[expert]), state, *channels, *shares))
    title = f"Experts of layer {layer.index}, best first; by source, the share of its saliency that the expert has here"
    more = ["energy"] if energy is not None else []
    columns = ("rank", "expert", "score", "tokens", "", *more, *(name[:16] for name in scores.sources))
    return Table(title, columns, rows, align="rrrrl")


#: The title of a table of retentions, and what its column "at best" means.
_TITLES = {
    "retention": (
        "Domain retention: the share of each source's own saliency (sum of gate weight x output norm) that stays",
        "(at best: as many experts per layer, chosen for this source alone by that sum)",
    ),
    "energy": (
        "Energy kept: the share of each source's own energy of all channels that stays",
        "(at best: as many experts and channels per layer, chosen for this source alone by their energy)",
    ),
}


def _retention_table(inspection: Mapping[str, Any], key: str, only: int | None) -> Table:
    places = [place for place, layer in enumerate(inspection["layers"]) if layer["index"] == only]
    columns = ["source", "kept", "at best", "worst layer", *(f"layer {only}" for _ in places)]
    rows = []
    for each in inspection[key]:
        worst = f"{percent(each['worst'])} ({each['worst_block']})"
        shares = [percent(each["layers"][place]) for place in places]
        rows.append([each["source"], percent(each["kept"]), percent(each["best"]), worst, *shares])
    title, note = _TITLES[key]
    return Table(title, columns, rows, [note])


def _widths_table(inspection: Mapping[str, Any]) -> Table:
    full = inspection["channels_per_expert"]
    rows = [
        (f"{each['width']:,}", f"{each['width'] / full:.0%}", *map(percent, each["energy"].values()))
        for each in inspection["widths"]
    ]
    sources = (each["name"][:16] for each in inspection["sources"])
    title = f"Energy kept with narrower experts (--width; now {full:,} channels each), by source"
    return Table(title, ("width", "of all", *sources), rows, align="r")


def _number(value: float) -> str:
    return f"{value:.3g}"
