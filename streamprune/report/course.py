"""The course of a run, from the log beside its output: what each block took, and the memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.busy import RESOURCES
from streamprune.errors import ReportError
from streamprune.progress import LOG_SUFFIX
from streamprune.report.record import Record
from streamprune.report.told import Told
from streamprune.settings import beside
from streamprune.source.shard import MAX_JSON_BYTES, parse_json

_ADVICE = "Remove the log: the report does without it."


@dataclass(frozen=True)
class BlockCourse:
    """One block: its number, when it was done (seconds from the start), what it took, and the peak memory by then."""

    block: int
    at: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Course:
    """The last sitting of a run: its blocks, the whole time in seconds, and the share of it that resources worked.

    `busy` are the shares of its `seconds` in which each resource was at work. `verified` says whether the result was
    compared with the source; None where the log does not tell.
    """

    blocks: tuple[BlockCourse, ...]
    seconds: float
    peak_bytes: int
    busy: Mapping[str, float]
    processes: int
    verified: bool | None


def read_course(output: Path, record: Record, output_bytes: int) -> Course | str:
    """The course of the run that made `output`, whose tensors have so many bytes; or a sentence why it is not known.

    Raises ReportError for a log that is none.
    """
    path = beside(output, LOG_SUFFIX)
    if not path.is_file():
        return f"There is no log ({path.name}) beside the model: `streamprune prune` leaves none."
    events = _events(path)
    summary = next((event for event in reversed(events) if event.value.get("event") == "summary"), None)
    if summary is None or "output_bytes" not in summary.value:
        return f"The log beside the model ({path.name}) is not of a run that made a model."
    if _differs(summary.value, record, output_bytes):
        return f"The log beside the model ({path.name}) is of another run: its numbers are not this model's."
    blocks = tuple(_block(event) for event in events if event.value.get("event") == "block")
    busy, verified = summary.maybe("busy"), summary.maybe("verified")
    processes = summary.maybe("processes")
    return Course(
        blocks,
        summary.at("seconds").number(0),
        summary.at("peak_resident_bytes").whole(),
        {name: busy.at(name).number(0, math.inf if name == "seconds" else 1) for name in (*RESOURCES, "seconds")}
        if busy
        else {},
        processes.whole(1) if processes else 1,
        verified.flag() if verified else None,
    )


def _events(path: Path) -> list[Told]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is too large")
        values = [parse_json(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} is no log of a run: {error}. {_ADVICE}") from None
    events = [Told(value, path, _ADVICE, f"line {number}") for number, value in enumerate(values, 1)]
    for event in events:
        if not isinstance(event.value, dict):
            raise event.wrong("an object")
    return events


def _differs(summary: Mapping[str, Any], record: Record, output_bytes: int) -> bool:
    """Whether the log is of another run: an earlier output of this name, which `prune` replaced, had its own."""
    counts = list(record.counts.values())
    experts = counts[0] if len(set(counts)) == 1 else counts
    here = {"output_bytes": output_bytes, "source_bytes": record.source_bytes, "experts_per_layer": experts}
    return json.dumps({name: summary.get(name) for name in here}) != json.dumps(here)


def _block(told: Told) -> BlockCourse:
    return BlockCourse(
        told.at("block").whole(),
        told.at("at_seconds").number(0),
        told.at("seconds").number(0),
        told.at("peak_bytes").whole(),
    )
