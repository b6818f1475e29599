"""The user's own list of the experts that stay. Nothing in it is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError
from streamprune.files.json_text import read_json_file, show
from streamprune.models.config_json import ExpertSpec, minimum_keep

_LONGEST_LAYER_NAME = 9


def read_keep_file(path: Path, spec: ExpertSpec, blocks: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The experts that stay, ascending, by block: the user's own choice.

    The file is JSON: an object of lists by number of the layer (`{"0": [1, 5], …}`), a list of lists (one for each
    layer with experts, in order), or the `streamprune.json` of a pruned model. Raises SettingsError naming the file and
    the layer for lists with which the model could not work.
    """
    what = f"--keep-file {show(str(path))}"
    body = read_json_file(
        path, "--keep-file", 'is a JSON file with the experts of each layer, such as {"0": [1, 5], "1": [0, 2]}'
    )
    lists = _by_block(body, what, blocks)
    for block in blocks:
        if block not in lists:
            raise SettingsError(f"{what} lists no experts for layer {block}. It needs layers {_range(blocks)}.")
    unknown = [block for block in lists if block not in set(blocks)]
    if unknown:
        raise SettingsError(f"{what} lists experts for layer {unknown[0]}, but the model has them in {_range(blocks)}.")
    kept = {block: _checked(lists[block], f"{what}, layer {block}", spec) for block in blocks}
    if all(len(experts) == spec.count for experts in kept.values()):
        raise SettingsError(f"{what} keeps all {spec.count} experts of every layer, so nothing would be removed.")
    return kept


def _by_block(body: Any, what: str, blocks: Sequence[int]) -> dict[int, Any]:
    if isinstance(body, list):
        if len(body) != len(blocks):
            raise SettingsError(f"{what} has {len(body)} lists, but the model has {len(blocks)} layers with experts.")
        return dict(zip(blocks, body, strict=True))
    if isinstance(body, Mapping) and isinstance(body.get("layers"), list):
        entries = [entry if isinstance(entry, Mapping) else {} for entry in body["layers"]]
        pairs = [(str(entry.get("index")), entry.get("kept")) for entry in entries]
    elif isinstance(body, Mapping):
        pairs = list(body.items())
    else:
        raise SettingsError(f'{what} has to hold lists of experts by layer, such as {{"0": [1, 5], "1": [0, 2]}}.')
    result: dict[int, Any] = {}
    for name, experts in pairs:
        if not (name.isascii() and name.isdigit() and len(name) <= _LONGEST_LAYER_NAME):
            raise SettingsError(f"{what}: {show(name)} is no number of a layer.")
        if int(name) in result:
            raise SettingsError(f"{what} lists the experts of layer {int(name)} twice.")
        result[int(name)] = experts
    return result


def _checked(experts: Any, what: str, spec: ExpertSpec) -> tuple[int, ...]:
    if not isinstance(experts, list) or not all(type(expert) is int for expert in experts):
        raise SettingsError(f"{what}: {show(experts)} is no list of experts.")
    outside = [expert for expert in experts if not 0 <= expert < spec.count]
    if outside:
        raise SettingsError(f"{what}: there is no expert {show(outside[0])}; they are numbered 0 to {spec.count - 1}.")
    if len(set(experts)) < len(experts):
        twice = next(expert for expert in experts if experts.count(expert) > 1)
        raise SettingsError(f"{what} lists expert {twice} twice.")
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
    return tuple(sorted(experts))


def _range(blocks: Sequence[int]) -> str:
    if list(blocks) == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]} to {blocks[-1]}"
    return ", ".join(map(str, blocks[:50]))
