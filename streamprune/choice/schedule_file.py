"""A schedule that the user wrote: how many experts each layer keeps, in a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from streamprune.choice.json_file import read_json_file
from streamprune.choice.schedule import least_per_layer
from streamprune.choice.selection import Selection
from streamprune.errors import SettingsError
from streamprune.settings import SCHEDULES
from streamprune.source.config_facts import ExpertSpec
from streamprune.source.shard import show


def read_schedule_file(selection: Selection, spec: ExpertSpec, layers: int) -> tuple[int, ...]:
    """How many experts each of `layers` layers keeps, by the JSON list of numbers in the file `selection.schedule`.

    Whole numbers are experts to keep; numbers from 0 up to below 1 are shares to remove, rounded like --ratio: so much
    is removed at most. Raises SettingsError naming the file, and the entry that is not possible.
    """
    path = Path(selection.schedule)
    values = read_json_file(path, "--schedule", f"is one of {', '.join(SCHEDULES)}, or a JSON file with a list")
    what = f"--schedule {show(str(path))}"
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise SettingsError(f"{what} has to be a JSON list of numbers, one for each layer with experts.")
    if len(values) != layers:
        raise SettingsError(f"{what} lists {len(values)} numbers, but the model has {layers} layers with experts.")
    shares = all(0 <= value < 1 for value in values)
    least = least_per_layer(spec, selection.floor)
    counts = []
    for entry, value in enumerate(values, start=1):
        if not shares and (value != math.floor(value) or abs(value) >= 2**53):
            raise SettingsError(
                f"{what}, entry {entry}: {show(value)} is no number of experts. List only numbers of experts to "
                "keep, or only shares to remove (from 0 to below 1)."
            )
        count = _kept(value, spec) if shares else int(value)
        if not least <= count <= spec.count or count % spec.groups:
            multiple = f", in multiples of {spec.groups}" if spec.groups > 1 else ""
            raise SettingsError(
                f"{what}, entry {entry}: {show(value)} would keep {count} of {spec.count} experts. Every layer "
                f"keeps between {least} and {spec.count}{multiple}."
            )
        counts.append(count)
    if all(count == spec.count for count in counts):
        raise SettingsError(f"{what} keeps all {spec.count} experts of every layer, so nothing would be removed.")
    return tuple(counts)


def _kept(ratio: float, spec: ExpertSpec) -> int:
    # As in plan.resolve_keep, where the tolerance keeps 0.7 of 10 experts from becoming 6.999…
    keep = spec.count - math.floor(ratio * spec.count + 1e-9)
    return math.ceil(keep / spec.groups) * spec.groups


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(_as_float(value))


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
