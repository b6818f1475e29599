"""The course of a run, from the log beside its output: what each block took, and the memory.

The memory that the model takes, and that its source took, as `fit` tells it. The source itself is not needed.

All that the report is made of, read from an output, from the log beside it, and checked against one another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import open_checkpoint
from streamprune.checkpoint.safetensors_file import MAX_JSON_BYTES, TensorEntry
from streamprune.config import beside
from streamprune.errors import ReportError, UnsupportedModelError
from streamprune.files.json_text import parse_json
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.weights import WeightFact, Weights
from streamprune.hardware.known_gpus import known_gpu
from streamprune.planning.model_facts import facts_from_json
from streamprune.progress import LOG_SUFFIX, RESOURCES
from streamprune.reporting.measured import (
    GenerationResult,
    TaskResult,
    TextResult,
    read_generation,
    read_tasks,
    read_text,
)
from streamprune.reporting.read_record import Record, Told, read_record
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, read_scores
from streamprune.selection.retention import Retention, retentions

_ADVICE = "Remove the log: the report does without it."


@dataclass(frozen=True)
class LayerTiming:
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

    blocks: tuple[LayerTiming, ...]
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


def _block(told: Told) -> LayerTiming:
    return LayerTiming(
        told.at("block").whole(),
        told.at("at_seconds").number(0),
        told.at("seconds").number(0),
        told.at("peak_bytes").whole(),
    )


GIB = 1024**3


@dataclass(frozen=True)
class Line:
    """A card's memory in bytes, and what CUDA can use of it."""

    label: str
    nbytes: int
    usable: int


def card_lines() -> tuple[Line, ...]:
    """The sizes of cards that models are pruned for: 24 and 32 GiB."""
    known = ((24, known_gpu("rtx-3090")), (32, known_gpu("rtx-5090")))
    return tuple(Line(f"{size} GiB card", size * GIB, card.usable_bytes) for size, card in known)


@dataclass(frozen=True)
class Memory:
    """What the model takes, and what its source took in the same use; the latter is None where it cannot be told."""

    after: Estimate
    before: Estimate | None


def read_memory(
    output: Path, record: Record, scores: Scores | None, tensors: Mapping[str, TensorEntry]
) -> Memory | str:
    """The memory of the model in `output`, which has these tensors; or a sentence why it cannot be told.

    Raises CheckpointError where scores and tensors do not go together.
    """
    footprint = _footprint(output, record, scores, tensors)
    if isinstance(footprint, str):
        return footprint
    after = Estimate(footprint, record.use)
    weights = source_weights(footprint.weights, record)
    if weights is None:
        return Memory(after, None)
    return Memory(after, Estimate(replace(footprint, model=record.model, weights=weights), record.use))


def _footprint(
    output: Path, record: Record, scores: Scores | None, tensors: Mapping[str, TensorEntry]
) -> Footprint | str:
    if scores is not None and scores.layout is not None:
        facts = facts_from_json(scores.layout, scores.spec, str(output), tensors, record.counts)
        return facts.footprint or "The memory that the model takes cannot be told: its cache cannot be worked out."
    try:
        # By the tensors' names, or, where they leave doubts, by building the model on the meta device.
        return read_footprint(str(output))
    except UnsupportedModelError as error:
        return f"The memory that the model takes cannot be told: {error}"


def source_weights(weights: Weights, record: Record) -> Weights | None:
    """The weights of the source of an output with these weights; None where they do not come to its bytes on record.

    All experts of a block are alike, so that those that stay tell the sizes of those that went. Multi-token prediction,
    which is left out of every output, is what is missing then.
    """
    facts: list[WeightFact] = []
    for fact in weights.facts:
        kept = record.counts.get(fact.block) if fact.block is not None else None
        if kept is not None and fact.rows is not None:
            extent = fact.shape[fact.rows.axis]
            wanted = fact.rows.stride * record.experts + fact.rows.tail
            shape = tuple(wanted if axis == fact.rows.axis else size for axis, size in enumerate(fact.shape))
            facts.append(replace(fact, shape=shape, nbytes=fact.nbytes // extent * wanted))
        elif kept is not None and fact.expert is not None:
            if fact.expert == 0:
                facts.extend(replace(fact, expert=number) for number in range(record.experts))
        else:
            facts.append(fact)
    left_out = record.source_bytes - sum(fact.nbytes for fact in facts)
    if left_out and not (record.dropped and left_out > 0):
        return None
    if left_out:
        facts.append(WeightFact("multi-token prediction", "U8", (left_out,), left_out, "MTP"))
    return Weights(tuple(facts), record.experts, weights.measured)


@dataclass(frozen=True)
class Facts:
    """An output as the report shows it. What is a text instead is a sentence why it is not known."""

    name: str
    record: Record
    output_bytes: int
    retained: tuple[Retention, ...] = field(repr=False)
    memory: Memory | str
    course: Course | str
    text: TextResult | None
    generation: GenerationResult | None
    tasks: tuple[TaskResult, ...]


def read_facts(output: Path) -> Facts:
    """Everything that is known of the model in `output`.

    Raises ReportError, ScoresError or CheckpointError for a part that is damaged or belongs to another model.
    """
    # Its own name, wherever it is called from: of `.` there would be none.
    output = output.absolute()
    output = output if output.name not in ("", "..") else output.resolve()
    record = read_record(output)
    scores = _scores(output, record)
    checkpoint = open_checkpoint(output)
    return Facts(
        output.name,
        record,
        checkpoint.nbytes,
        retentions(scores, record.choice) if scores else (),
        read_memory(output, record, scores, checkpoint.tensors),
        read_course(output, record, checkpoint.nbytes),
        read_text(output),
        read_generation(output),
        read_tasks(output),
    )


def _scores(output: Path, record: Record) -> Scores | None:
    path = output / SCORES_FOLDER / SCORES_NAME
    if not path.is_file():
        return None
    scores = read_scores(path)
    blocks = tuple(layer.index for layer in record.choice.layers)
    if scores.layer_indices != blocks or scores.spec.count != record.experts:
        raise ReportError(
            f"{path} holds scores of {len(scores.layers)} layers with {scores.spec.count} experts, but the model was "
            f"made from {len(blocks)} layers with {record.experts}. They belong to another model: remove them, or "
            "prune again."
        )
    return scores
