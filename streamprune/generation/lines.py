"""Generation health for the terminal. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamprune.generation.summary import HEALTHY, LOOPS, UNKNOWN, manner


def generation_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of a `generation.json`: a row for each mode, below it its sources where any loop; verdict, advice."""
    known = any("original" in mode for mode in result["modes"])
    rows = [["", "prompts", "ended", "looped", "repeated 4-grams"]]
    if known:
        rows[0] += ["original: ended", "looped", "repeated 4-grams"]
    for mode in result["modes"]:
        rows.append([manner(mode), *_cells(mode), *(_shares(mode["original"]) if "original" in mode else ())])
        if mode["looped"] and len(mode["sources"]) > 1:
            rows += [[f"  {source['name']}", *_cells(source)] for source in mode["sources"]]
    longest = result["settings"]["max_new_tokens"]
    title = f"Generation health of {result['model']}, up to {longest:,} new tokens (ended: by itself, before that)"
    as_before = known and any(mode["looped"] for mode in result["modes"])
    healthy = "It does not loop clearly more than the original." if as_before else "Few loops, or none."
    verdict = {LOOPS: "It loops.", HEALTHY: healthy, UNKNOWN: "Too short to show loops."}[result["verdict"]]
    notes = [f"note: {note}" for note in result["notes"]]
    return [title, *_table(rows), verdict, *(f"- {sentence}" for sentence in result["advice"]), *notes]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [str(figures["prompts"]), *_shares(figures)]


def _shares(figures: Mapping[str, Any]) -> list[str]:
    repeated = figures["repeated_4grams"]
    return [f"{figures['ended']:.1%}", f"{figures['looped']:.1%}", "-" if repeated is None else f"{repeated:.3f}"]


def _table(rows: list[list[str]]) -> list[str]:
    count = max(map(len, rows))
    full = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in full) for column in range(count)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in full
    ]
