"""The parts of tools/gpu_check one after the other, within one time for all, and what is saved of them."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measuring.check import Check
from measuring.parts import PARTS
from measuring.processes import ProcessError
from measuring.summaries import summary

#: The file stays below this, so that it can be read wherever it ends up.
MOST_BYTES = 100_000
#: Characters of a text and items of a list that are saved, at first; halved until the whole is small enough.
MOST_CHARACTERS, MOST_ITEMS = 2000, 64
#: Of the settings these say nothing about the figures.
LEFT_OUT = ("folder", "deadline")


def measure_all(
    names: Sequence[str], check: Check, head: Mapping[str, Any], parts: dict[str, Any], path: Path | None
) -> list[str]:
    """Measure parts in this order, until the deadline of `check`; figures go to `parts`, and to the file `path`.

    Where `smoke` fails, `profile` comes next: it says most of what is wrong. Prints a line for each part as soon as it
    is done. Returns the parts that failed; nothing that goes wrong in one is raised.
    """
    waiting, failed = list(names), []
    while waiting:
        name = waiting.pop(0)
        found = measure(name, check)
        if "error" in found:
            failed.append(name)
            waiting = after_failure(name, waiting)
        # What an earlier command measured is worth more than that there was no time now.
        if "skipped" not in found or "skipped" in parts.get(name, {"skipped": ""}) or "error" in parts[name]:
            parts[name] = found
        # After each part: the machine may be gone before the next one is done.
        if path is not None:
            save(path, {**head, **check.built(), "parts": parts})
        print(summary(name, found), flush=True)
    return failed


def measure(name: str, check: Check) -> dict[str, Any]:
    """The figures of one part, with its settings; its error if it failed, and the reason if it was skipped."""
    begun, part = time.monotonic(), PARTS[name]
    left = check.deadline - begun
    least = part.least if check.on_gpu else 1.0
    own = replace(check, deadline=min(check.deadline, begun + part.most))
    if part.needs_gpu and not check.on_gpu:
        figures: dict[str, Any] = {"skipped": "needs a GPU"}
    elif part.needs is not None and find_spec(part.needs) is None:
        figures = {"skipped": f"this Python has no {part.needs}"}
    elif left < least:
        figures = {"skipped": f"{max(0.0, left):.0f} s are left of --total-seconds, and this takes {least:.0f} or more"}
    else:
        figures = _figures(name, own)
    settings = {key: value for key, value in asdict(check).items() if key not in LEFT_OUT}
    spent = round(time.monotonic() - begun, 1)
    return {"date": time.strftime("%Y-%m-%d"), "part_seconds": spent, "settings": settings, **figures}


def _figures(name: str, check: Check) -> dict[str, Any]:
    try:
        return PARTS[name].measure(check)
    except ProcessError as error:
        return {"error": str(error)}
    # Whatever else goes wrong must not cost the other parts: a GPU is not lent twice.
    except Exception:
        return {"error": traceback.format_exc()}


def after_failure(name: str, waiting: Sequence[str]) -> list[str]:
    """What comes next where a part failed, of those that are still to come."""
    if name == "smoke" and "profile" in waiting:
        return ["profile", *(each for each in waiting if each != "profile")]
    return list(waiting)


def save(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, completely or not at all, and cut as short as they have to be."""
    part = path.with_name(path.name + ".part")
    part.write_text(as_text(figures))
    part.replace(path)


def as_text(figures: Mapping[str, Any]) -> str:
    """Figures as JSON below `MOST_BYTES`."""
    characters, items = MOST_CHARACTERS, MOST_ITEMS
    while len((text := json.dumps(_cut(figures, characters, items), indent=1) + "\n").encode()) >= MOST_BYTES:
        characters, items = max(8, characters // 2), max(1, items // 2)
        if (characters, items) == (8, 1):
            return json.dumps({"error": "the figures are too large to be saved", "parts": {}}) + os.linesep
    return text


def _cut(value: Any, characters: int, items: int) -> Any:
    if isinstance(value, str) and len(value) > characters:
        # The end of an error says most.
        return "..." + value[-characters:]
    if isinstance(value, Mapping):
        return {key: _cut(each, characters, items) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(each, characters, items) for each in value[:items]]
    return value
