"""The source's config.json, rewritten for fewer experts. Plain JSON; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streamprune.source.config_facts import COUNT_NAME, ExpertSpec, single_number

_MTP_NAME = re.compile(r"mtp|nextn")
_MTP_COUNT = re.compile(r"^num_|^n_|layer|modules")


def rewrite_config(raw: Mapping[str, Any], spec: ExpertSpec, names: Iterable[str], count: int) -> dict[str, Any]:
    """The source's `config.json` with `count` experts, which `names` may state, and without MTP layers.

    Only those keys change, wherever the file keeps them: the name itself, its aliases, and copies of the same number
    under another usual name, at the top and in the text part. Key order and everything else stay.
    """
    stating = set(names)

    def rewrite(node: Mapping[str, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.items():
            named = key in stating or bool(COUNT_NAME.match(key))
            if named and single_number(value) == spec.count:
                result[key] = [count] * len(value) if isinstance(value, list) else count
            elif _MTP_NAME.search(key):
                result[key] = _without_mtp(key, value)
            elif isinstance(value, dict) and depth < len(spec.path) and key == spec.path[depth]:
                result[key] = rewrite(value, depth + 1)
            else:
                result[key] = value
        return result

    return rewrite(raw, 0)


def _without_mtp(key: str, value: Any) -> Any:
    """The value that says "no MTP layers": 0 for a number of them, [] for a list over them, False for `use_mtp`."""
    if key.startswith("use_") and isinstance(value, bool):
        return False
    if _MTP_COUNT.search(key) and isinstance(value, int) and not isinstance(value, bool):
        return 0
    return [] if _MTP_COUNT.search(key) and isinstance(value, list) else value


def mtp_layers(raw: Mapping[str, Any]) -> int:
    """How many MTP layers a `config.json` names, at its top or in a part of it."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, Mapping))]
    counts = [
        value
        for part in parts
        for key, value in part.items()
        if _MTP_NAME.search(key) and _MTP_COUNT.search(key) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return max(counts, default=0)


def drop_missing_code(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` without its `auto_map` if that names Python files which `folder` lacks.

    Models that transformers knows often name code that it no longer needs; without the files, the output could not be
    loaded by anyone who trusts remote code.
    """
    auto_map = raw.get("auto_map")
    references = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    # "repo--module.Class" names a module of another repository.
    local = [name for name in references if isinstance(name, str) and "--" not in name]
    if all((folder / f"{name.partition('.')[0]}.py").is_file() for name in local):
        return dict(raw)
    return {key: value for key, value in raw.items() if key != "auto_map"}
