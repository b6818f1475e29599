"""Two choices side by side: which experts differ, and what each source gains or loses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from streamprune.choice.choose import Choice
from streamprune.choice.retention import Retention
from streamprune.choice.selection import LINEAR, Selection
from streamprune.errors import SettingsError
from streamprune.source.shard import show

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

    block: int
    first_only: tuple[int, ...]
    second_only: tuple[int, ...]
    jaccard: float


@dataclass(frozen=True)
class Comparison:
    """A second choice, called `label`, held against the first: by layer, and by source what each of the two keeps."""

    label: str
    selection: Selection
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


def changed_selection(base: Selection, text: str) -> Selection:
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
    if changes.get("schedule", base.schedule) not in LINEAR:
        changes.setdefault("spread", None)
    return replace(base, **changes)


def compare_choices(
    label: str,
    selection: Selection,
    choices: tuple[Choice, Choice],
    before: Sequence[Retention],
    after: Sequence[Retention],
) -> Comparison:
    """Compare the second of two choices, made by `selection`, with the first. They keep `before` and `after`."""
    differences = []
    for one, other in zip(choices[0].layers, choices[1].layers, strict=True):
        first, second = set(one.kept), set(other.kept)
        differences.append(
            LayerDifference(
                one.block,
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
                "index": each.block,
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
