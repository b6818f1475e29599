"""JSON files in which the user says how many experts each layer keeps (--schedule), or which (--keep-file)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from streamprune.errors import SettingsError
from streamprune.files.json_text import read_json_file, show
from streamprune.models.config_json import ExpertSpec, minimum_keep
from streamprune.selection.schedules import SCHEDULES

_LONGEST_LAYER_NAME = 9
#: float64 represents every integer up to here.
_MOST = 2**53
_Number = Annotated[int, Meta(ge=-_MOST, le=_MOST)] | float


def least_per_layer(spec: ExpertSpec, floor: int | None) -> int:
    """The fewest experts that a layer keeps: what the router needs or `floor`, rounded up to equal groups."""
    least = max(minimum_keep(spec), floor or 0)
    least = math.ceil(least / spec.groups) * spec.groups
    if least > spec.count:
        raise SettingsError(f"--floor {floor} is more than the {spec.count} experts that every layer has.")
    return least


def read_schedule_file(path: Path, spec: ExpertSpec, layers: int, floor: int | None = None) -> tuple[int, ...]:
    """How many experts each of `layers` layers keeps, by the JSON list of numbers in a file.

    Integers are experts to keep; numbers from 0 to below 1 are shares to remove, rounded down like --ratio. Raises
    SettingsError, naming the file and the impossible entry.
    """
    body = read_json_file(path, "--schedule", f"is one of {', '.join(SCHEDULES)}, or a JSON file with a list")
    what = f"--schedule {show(str(path))}"
    try:
        values = msgspec.convert(body, list[_Number])
    except msgspec.ValidationError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise SettingsError(f"{what} has to be a JSON list of numbers, one for each layer with experts.")
    if len(values) != layers:
        raise SettingsError(f"{what} lists {len(values)} numbers, but the model has {layers} layers with experts.")
    shares = all(0 <= value < 1 for value in values)
    least = least_per_layer(spec, floor)
    counts = []
    for entry, value in enumerate(values, start=1):
        if not shares and (value != math.floor(value) or abs(value) >= _MOST):
            raise SettingsError(
                f"{what}, entry {entry}: {show(value)} is not a number of experts. List only numbers of experts to "
                "keep, or only shares to remove (from 0 to below 1)."
            )
        # As in `resolve_keep`, where the tolerance keeps 0.7 of 10 experts from becoming 6.999…
        count = spec.count - math.floor(value * spec.count + 1e-9) if shares else int(value)
        count = math.ceil(count / spec.groups) * spec.groups if shares else count
        if not least <= count <= spec.count or count % spec.groups:
            multiple = f", in multiples of {spec.groups}" if spec.groups > 1 else ""
            raise SettingsError(
                f"{what}, entry {entry}: {show(value)} would keep {count} of {spec.count} experts. Every layer "
                f"keeps between {least} and {spec.count}{multiple}."
            )
        counts.append(count)
    _check_removes(what, counts, spec)
    return tuple(counts)


def read_keep_file(path: Path, spec: ExpertSpec, layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The experts that stay, ascending, by the index of the layer: the user's own selection.

    The file is JSON: an object of lists by layer (`{"0": [1, 5], …}`), a list of lists (one for each layer with
    experts, in order), or the `streamprune.json` of a pruned model. Raises SettingsError, naming file and layer, for
    lists with which the model cannot work.
    """
    what = f"--keep-file {show(str(path))}"
    body = read_json_file(
        path, "--keep-file", 'is a JSON file with the experts of each layer, such as {"0": [1, 5], "1": [0, 2]}'
    )
    stated = body.get("settings") if isinstance(body, dict) else None
    if isinstance(stated, dict) and stated.get("width") is not None:
        raise SettingsError(
            f"{what} is the record of a model whose experts keep {show(stated['width'])} channels each, which a list "
            "of experts cannot say. Prune from its scores with --scores, and the same --width."
        )
    lists = _by_layer(body, what, layers)
    known = f"{layers[0]} to {layers[-1]}"
    if list(layers) != list(range(layers[0], layers[-1] + 1)):
        known = ", ".join(map(str, layers[:50]))
    missing = [index for index in layers if index not in lists]
    if missing:
        raise SettingsError(f"{what} lists no experts for layer {missing[0]}. It needs layers {known}.")
    unknown = [index for index in lists if index not in set(layers)]
    if unknown:
        raise SettingsError(f"{what} lists experts for layer {unknown[0]}, but the model has them in {known}.")
    kept = {index: _checked(lists[index], f"{what}, layer {index}", spec) for index in layers}
    _check_removes(what, list(map(len, kept.values())), spec)
    return kept


def _by_layer(body: Any, what: str, layers: Sequence[int]) -> dict[int, Any]:
    """The lists in a file by layer; their entries are not checked yet."""
    if isinstance(body, list):
        if len(body) != len(layers):
            raise SettingsError(f"{what} has {len(body)} lists, but the model has {len(layers)} layers with experts.")
        return dict(zip(layers, body, strict=True))
    if not isinstance(body, dict):
        raise SettingsError(f'{what} has to have lists of experts by layer, such as {{"0": [1, 5], "1": [0, 2]}}.')
    pairs = list(body.items())
    if isinstance(body.get("layers"), list):
        recorded = [layer if isinstance(layer, dict) else {} for layer in body["layers"]]
        pairs = [(str(layer.get("index")), layer.get("kept")) for layer in recorded]
    result: dict[int, Any] = {}
    for name, experts in pairs:
        if not (name.isascii() and name.isdigit() and len(name) <= _LONGEST_LAYER_NAME):
            raise SettingsError(f"{what}: {show(name)} is not a layer number.")
        if int(name) in result:
            raise SettingsError(f"{what} lists the experts of layer {int(name)} twice.")
        result[int(name)] = experts
    return result


def _checked(listed: Any, what: str, spec: ExpertSpec) -> tuple[int, ...]:
    try:
        experts = sorted(msgspec.convert(listed, list[int]))
    except msgspec.ValidationError:
        raise SettingsError(f"{what}: {show(listed)} is not a list of experts.") from None
    outside = [expert for expert in experts if not 0 <= expert < spec.count]
    if outside:
        raise SettingsError(f"{what}: there is no expert {show(outside[0])}; they are numbered 0 to {spec.count - 1}.")
    expert, times = Counter(experts).most_common(1)[0] if experts else (0, 0)
    if times > 1:
        raise SettingsError(f"{what} lists expert {expert} twice.")
    if len(experts) < spec.top_k:
        raise SettingsError(f"{what} keeps {len(experts)} experts, but the router picks {spec.top_k} per token.")
    per_group = [0] * spec.groups
    for expert in experts:
        per_group[expert * spec.groups // spec.count] += 1
    if len(set(per_group)) > 1:
        raise SettingsError(
            f"{what} keeps {', '.join(map(str, per_group))} experts of the {spec.groups} groups that the router "
            "chooses among. They must stay equal in size."
        )
    if len(experts) < minimum_keep(spec):
        raise SettingsError(
            f"{what} keeps {len(experts)} experts in {spec.groups} groups; the router needs at least "
            f"{minimum_keep(spec)}."
        )
    return tuple(experts)


def _check_removes(what: str, counts: Sequence[int], spec: ExpertSpec) -> None:
    if all(count == spec.count for count in counts):
        raise SettingsError(f"{what} keeps all {spec.count} experts of every layer, so nothing would be removed.")
