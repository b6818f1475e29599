"""`streamprune inspect --compare`: how two selections from the same scores differ. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.saliency.methods import METHODS
from streamprune.saliency.scores import Scores
from streamprune.selection.energy import energy_shares
from streamprune.selection.retention import Retention, retentions
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.select import LayerSelection, Selection
from streamprune.selection.settings import SelectionSettings
from streamprune.tables import Table, percent

#: Differing experts that one line of a comparison names at most; `--layer` names all.
_NAMED = 8
_WHOLE = "a whole number"
#: What `--compare` may change, how its value is read, and what it takes.
_KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "method": ({name: name for name in METHODS}.__getitem__, ", ".join(METHODS)),
    "mix": (str, "sources with their shares"),
    "schedule": (str, f"{', '.join(SCHEDULES)}, or a JSON file"),
    "spread": (float, "a number"),
    "floor": (int, _WHOLE),
    "seed": (int, _WHOLE),
    "protect-super-experts": ({"yes": True, "no": False}.__getitem__, "yes or no"),
    "width": (int, _WHOLE),
}
_BETWEEN = re.compile(rf";\s*(?=(?:{'|'.join(_KEYS)})=)")


def changed_settings(base: SelectionSettings, text: str) -> tuple[SelectionSettings, int | None]:
    """`base` with the changes that `--compare` states: `mix=code=1`, `method=frequency`, or several with `;` between.

    And the width that it states, None for none. Raises SettingsError for anything else, and for impossible values.
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
        read, takes = _KEYS[key.strip()]
        try:
            changes[name] = read(value.strip())
        except (ValueError, KeyError):
            raise SettingsError(
                f"--compare {show(text)}: {show(value)} is not a value of {key.strip()}. It takes: {takes}."
            ) from None
    if changes.get("mix") == "":
        # Without a mix every token counts once.
        changes["mix"] = None
    schedule = SCHEDULES.get(changes.get("schedule", base.schedule))
    if schedule is None or not schedule.has_spread:
        changes.setdefault("spread", None)
    width = changes.pop("width", None)
    with naming_compare(text):
        return replace(base, **changes), width


@contextmanager
def naming_compare(text: str) -> Iterator[None]:
    """Within this context a SettingsError says that it is about this --compare."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"--compare {show(text)}: {error}") from None


def compare_selections(
    label: str, settings: SelectionSettings, scores: Scores, selection: Selection, other: Selection
) -> dict[str, Any]:
    """What `--json` prints of a comparison: how the selection `other`, made by `settings`, differs from the first.

    By layer: the experts that only one of the two keeps, and the Jaccard index, the number of experts that both keep
    divided by the number that at least one keeps. By source: how much each of the two keeps. Where one of them makes
    experts narrower, the same of their channels and of the channels' energy.
    """
    narrower: dict[str, Any] = {}
    if selection.is_narrower or other.is_narrower:
        narrower["channels_jaccard"] = _channels_jaccard(selection, other, scores.spec.count)
        narrower["energy"] = _gains(energy_shares(scores, selection), energy_shares(scores, other))
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
        "retention": _gains(retentions(scores, selection), retentions(scores, other)),
        **narrower,
    }


def _gains(before: Sequence[Retention], after: Sequence[Retention]) -> list[dict[str, Any]]:
    return [
        {"source": one.source, "first": one.kept, "second": two.kept, "gain": two.kept - one.kept}
        for one, two in zip(before, after, strict=True)
    ]


def _channels_jaccard(selection: Selection, other: Selection, experts: int) -> float | None:
    """The channels that both selections keep, divided by those that at least one keeps; None unless both are narrower.

    The mean over the layers.
    """
    if not (selection.is_narrower and other.is_narrower):
        return None
    shares = []
    for one, two in zip(selection.layers, other.layers, strict=True):
        first, second = _channels(one, experts), _channels(two, experts)
        shares.append(float((first & second).sum() / (first | second).sum()))
    return sum(shares) / len(shares)


def _channels(layer: LayerSelection, experts: int) -> NDArray[np.bool_]:
    """Which channels (E, W) of all experts of a layer stay."""
    assert layer.channels is not None
    found = np.zeros((experts, layer.channels.width), dtype=bool)
    found[np.array(layer.kept)[:, None], layer.channels.indices] = True
    return found


def comparison_lines(comparison: Mapping[str, Any], only: int | None = None) -> Iterator[str]:
    """A comparison: what each source gains or loses, and by layer which experts differ; of one layer, all of them."""
    yield ""
    label = comparison["compare"]
    far = f"{comparison['changed']:,} experts differ, mean Jaccard {comparison['jaccard']:.3f}"
    if comparison.get("channels_jaccard") is not None:
        far += f"; of channels {comparison['channels_jaccard']:.3f}"
    shares = [
        (each["source"], percent(each["first"]), percent(each["second"]), f"{100 * each['gain']:+.1f}")
        for each in comparison.get("energy", comparison["retention"])
    ]
    source = "energy kept of" if "energy" in comparison else "source"
    yield from Table(f"Compared with {label}: {far}", (source, "this", "other", "change in points"), shares).text()
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
