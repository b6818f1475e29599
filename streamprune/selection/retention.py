"""Domain retention: how much of each source's saliency a selection keeps; and the comparison of two selections.

Saliency here is Σ g·‖f‖ over a source's own tokens, whatever method and mix chose: what an expert adds to the residual
stream, on which the outputs of all layers add up. So the sums of all layers are taken together, choices of any two
methods and schedules can be compared, and a layer counts by what it adds. (Of the definitions tried on two trained
models with `tools/mixes`, this one predicted the order of the damage best; the mean over layers of each layer's share
was no better than chance where layers keep different numbers.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from streamprune.errors import SettingsError
from streamprune.files.json_text import show
from streamprune.saliency.scores import FIELDS, Scores
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.select import Selection, keep_highest
from streamprune.selection.settings import SelectionSettings

#: A source that keeps less of its saliency than this is warned of: it loses most of its own.
LEAST_RETENTION = 0.5
#: Also warned of: a source that loses UNEQUAL times the share of the source that loses least, and LEAST_WARNED_LOSS.
UNEQUAL, LEAST_WARNED_LOSS = 2.0, 0.1


@dataclass(frozen=True)
class Retention:
    """What a choice keeps of one source's saliency: of all layers together, and each layer's own share.

    `best` is the most that as many experts per layer can keep: those chosen for this source alone. Layers where none of
    the source's tokens met an expert have no share.
    """

    source: str
    kept: float
    best: float
    worst_layer: int
    worst: float
    layers: tuple[float | None, ...] = field(repr=False)


def retentions(scores: Scores, selection: Selection) -> tuple[Retention, ...]:
    """The retention of every source of the scores, in their order."""
    every, kept, best = (np.zeros((len(scores.layers), len(scores.sources))) for _ in range(3))
    for row, (layer, selected) in enumerate(zip(scores.layers, selection.layers, strict=True)):
        saliency = np.abs(layer.values[list(FIELDS).index("gated_norms")])
        for column, values in enumerate(saliency):
            ideal = keep_highest(values.tolist(), len(selected.kept), scores.spec)
            every[row, column] = values.sum()
            kept[row, column] = values[list(selected.kept)].sum()
            best[row, column] = values[list(ideal)].sum()
    return tuple(
        _retention(source, every[:, column], kept[:, column], best[:, column], scores.layer_indices)
        for column, source in enumerate(scores.sources)
    )


def _retention(
    source: str, every: np.ndarray, kept: np.ndarray, best: np.ndarray, layer_indices: Sequence[int]
) -> Retention:
    """The retention of a source from its saliency by layer: of all experts, those that stay, and at best."""
    met = np.flatnonzero(every > 0)
    if not len(met):
        # Nothing of nothing is lost.
        return Retention(source, 1.0, 1.0, layer_indices[0], 1.0, (None,) * len(layer_indices))
    shares = tuple(float(part / total) if total > 0 else None for part, total in zip(kept, every, strict=True))
    worst = met[np.argmin(kept[met] / every[met])]
    return Retention(
        source,
        float(kept.sum() / every.sum()),
        float(best.sum() / every.sum()),
        layer_indices[worst],
        float(kept[worst] / every[worst]),
        shares,
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
            reference = f", where {least.source} keeps {least.kept:.1%}" if each is not least else ""
            yield (
                f"{each.source} loses most of its own: it keeps {each.kept:.1%} of its saliency{reference} ({alone}). "
                f"What may help: {mix}another --method, more experts."
            )
        elif 1 - each.kept >= max(LEAST_WARNED_LOSS, UNEQUAL * (1 - least.kept)):
            yield (
                f"{each.source} loses {1 - each.kept:.1%} of its saliency, {least.source} only {1 - least.kept:.1%} "
                f"({alone}). If it matters, what may help: {mix}another --method, more experts."
            )


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


@dataclass(frozen=True)
class LayerDifference:
    """One layer of two choices: the experts that only one of them keeps, and their Jaccard index.

    (That is the number of experts that both keep, divided by that of experts which either keeps.)
    """

    index: int
    first_only: tuple[int, ...]
    second_only: tuple[int, ...]
    jaccard: float


@dataclass(frozen=True)
class Comparison:
    """A second choice, called `label`, compared with the first: by layer, and by source what each of the two keeps."""

    label: str
    selection: SelectionSettings
    layers: tuple[LayerDifference, ...]
    before: tuple[Retention, ...]
    after: tuple[Retention, ...]

    @property
    def jaccard(self) -> float:
        """The mean over the layers."""
        return sum(layer.jaccard for layer in self.layers) / len(self.layers)

    @property
    def changed(self) -> int:
        """How many experts one of the two keeps and the other does not, counted for the second."""
        return sum(len(layer.second_only) for layer in self.layers)


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
                f"--compare {show(text)} is no change of the choice. Write for example --compare mix=code=1, --compare "
                f'method=frequency or --compare "mix=code=1;method=ean"; it can change {", ".join(_KEYS)}.'
            )
        try:
            changes[name] = _KEYS[key.strip()](value.strip())  # type: ignore[operator]
        except (ValueError, KeyError):
            raise SettingsError(f"--compare {show(text)}: {show(value)} is no value of {key.strip()}.") from None
    if changes.get("mix") == "":
        # No mix: every token counts once.
        changes["mix"] = None
    schedule = SCHEDULES.get(changes.get("schedule", base.schedule))
    if schedule is None or not schedule.has_spread:
        changes.setdefault("spread", None)
    return replace(base, **changes)


def compare_selections(
    label: str,
    selection: SelectionSettings,
    choices: tuple[Selection, Selection],
    before: Sequence[Retention],
    after: Sequence[Retention],
) -> Comparison:
    """Compare the second of two choices, made by `selection`, with the first. They keep `before` and `after`."""
    differences = []
    for one, other in zip(choices[0].layers, choices[1].layers, strict=True):
        first, second = set(one.kept), set(other.kept)
        differences.append(
            LayerDifference(
                one.index,
                tuple(sorted(first - second)),
                tuple(sorted(second - first)),
                len(first & second) / len(first | second),
            )
        )
    return Comparison(label, selection, tuple(differences), tuple(before), tuple(after))


def comparison_object(comparison: Comparison) -> dict[str, Any]:
    """What `--json` prints of a comparison."""
    return {
        "compare": comparison.label,
        "selection": asdict(comparison.selection),
        "jaccard": comparison.jaccard,
        "changed": comparison.changed,
        "layers": [
            {
                "index": each.index,
                "jaccard": each.jaccard,
                "first_only": each.first_only,
                "second_only": each.second_only,
            }
            for each in comparison.layers
        ],
        "retention": [
            {"source": before.source, "first": before.kept, "second": after.kept, "gain": after.kept - before.kept}
            for before, after in zip(comparison.before, comparison.after, strict=True)
        ],
    }
