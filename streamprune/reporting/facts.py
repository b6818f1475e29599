"""The facts for the report: read from an output and the log next to it, and checked against each other.

Neither the source model nor the calibration text is needed. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from streamprune.checkpoint.index import Checkpoint, open_checkpoint
from streamprune.checkpoint.safetensors_file import MAX_JSON_BYTES
from streamprune.errors import ReportError, UnsupportedModelError
from streamprune.files.json_text import parse_json
from streamprune.files.names import sibling_path
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.weights import WeightFact, Weights
from streamprune.hardware.gpus import known_gpu
from streamprune.output.search_folder import SEARCH_NAME
from streamprune.planning.facts import facts_from_json
from streamprune.progress import LOG_SUFFIX
from streamprune.reporting.evaluations import (
    GENERATION_NAME,
    TASKS_NAME,
    TEXT_NAME,
    GenerationResult,
    TasksResult,
    TextResult,
    others_of,
    read_checked_result,
)
from streamprune.reporting.record import Kind, Record, checked, read_record
from streamprune.reporting.record_text import Count, Positive, Share
from streamprune.reporting.search import SearchResult
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, read_scores
from streamprune.selection.energy import energy_by_rank, energy_retentions
from streamprune.selection.retention import Retention, retentions
from streamprune.targets import ServingSpec

_ADVICE = "Remove the log: the report works without it."
#: The GPUs that models are pruned for, as (label, bytes of memory, bytes of these that CUDA can use).
GPU_SIZES = tuple(
    (f"{size} GiB GPU", size * 2**30, known_gpu(name).usable_bytes)
    for size, name in ((24, "rtx-3090"), (32, "rtx-5090"))
)

Seconds = Annotated[float, Meta(ge=0, le=1e12)]


class LayerTiming(Struct, frozen=True, kw_only=True):
    """A line of the log about one layer: when it was done (from the start), its time, and the peak memory so far."""

    layer: Count = msgspec.field(name="block")
    at_seconds: Seconds
    seconds: Seconds
    peak_bytes: Count


class BusyShares(Struct, frozen=True):
    """The `seconds` of a run, and the share of them in which each resource was busy."""

    compute: Share
    read: Share
    write: Share
    states: Share
    seconds: Seconds


class RunSummary(Struct, frozen=True):
    """The fields of the log's last line that the report needs.

    `verified` is None if the log does not have it; `command` is "prune" for a log of `streamprune prune`.
    """

    seconds: Seconds
    peak_resident_bytes: Count
    busy: BusyShares | None = None
    processes: Positive = 1
    verified: bool | None = None
    command: str | None = None


@dataclass(frozen=True)
class Course:
    """The last invocation of a run: the layers that it did, and its summary."""

    layers: tuple[LayerTiming, ...]
    summary: RunSummary


def read_course(output: Path, record: Record, output_bytes: int) -> Course | str:
    """The course of the run that made `output`, with `output_bytes` of tensors; or a sentence why it is unknown.

    Raises ReportError for an invalid log.
    """
    path = sibling_path(output, LOG_SUFFIX)
    if not path.is_file():
        return f"There is no log ({path.name}) next to the model."
    events = _events(path)
    number = max((line for line, event in events.items() if event.get("event") == "summary"), default=0)
    summary = events.get(number, {})
    if "output_bytes" not in summary:
        return f"The log next to the model ({path.name}) is not of a run that made a model."
    # The log may be that of an earlier output at this path: a command may be killed before it has written its own.
    counts = list(record.counts.values())
    experts = counts[0] if len(set(counts)) == 1 else counts
    here = {"output_bytes": output_bytes, "source_bytes": record.source.bytes, "experts_per_layer": experts}
    if json.dumps({name: summary.get(name) for name in here}) != json.dumps(here):
        return f"The log next to the model ({path.name}) belongs to another run: its numbers do not match this model."
    layers = (
        checked(event, LayerTiming, f"{path}, line {line}", _ADVICE)
        for line, event in events.items()
        if event.get("event") == "block"
    )
    return Course(tuple(layers), checked(summary, RunSummary, f"{path}, line {number}", _ADVICE))


def _events(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a log that are not empty, by their numbers."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES:,} bytes")
        lines = enumerate(path.read_bytes().splitlines(), 1)
        events = {number: parse_json(line) for number, line in lines if line.strip()}
        if not all(isinstance(event, dict) for event in events.values()):
            raise ValueError("a line is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not a log of a run: {error}. {_ADVICE}") from None
    return events


@dataclass(frozen=True)
class Memory:
    """The memory of the model, and of its source in the same use; None for the latter if it is unknown."""

    after: Estimate
    before: Estimate | None


def read_memory(output: Path, record: Record, scores: Scores | None, checkpoint: Checkpoint) -> Memory | str:
    """The memory of the model in `output`; or a sentence why it is unknown.

    Raises CheckpointError if scores and tensors do not match.
    """
    unknown = "The memory of the model is unknown: "
    footprint: Footprint | None
    if scores is not None and scores.layout is not None and not record.settings.weights:
        width = record.settings.width
        facts = facts_from_json(scores.layout, scores.spec, str(output), checkpoint, record.counts, width)
        footprint = facts.footprint
        if footprint is None:
            return f"{unknown}its KV cache size is unknown."
    else:
        try:
            # By the tensors' names, or, if these are ambiguous, by building the model on the meta device.
            footprint = read_footprint(str(output))
        except UnsupportedModelError as error:
            return f"{unknown}{error}"
    use = record.use.spec if record.use else ServingSpec()
    if record.settings.width is not None:
        # With scores, the shape is the source's.
        shape = replace(footprint.shape, expert=record.settings.width)
        footprint = replace(footprint, shape=shape, width=record.settings.width)
    weights = source_weights(footprint.weights, record)
    if weights is None:
        return Memory(Estimate(footprint, use), None)
    shape = footprint.shape
    if record.source.width is not None:
        shape = replace(shape, expert=record.source.width)
    before = replace(footprint, model=record.settings.model, weights=weights, shape=shape)
    return Memory(Estimate(footprint, use), Estimate(before, use))


def source_weights(weights: Weights, record: Record) -> Weights | None:
    """The weights of the source of an output with these weights; None if they do not match its bytes on record.

    All experts of a layer have the same size, so the kept ones show the sizes of the removed ones, and so do channels.
    What the model ignores is none of its weights. Bytes that are still missing are those of multi-token prediction, if
    the output dropped it.
    """
    if record.settings.weights:
        # Stored otherwise, they show no size of the source's.
        return None
    width, full_width = record.settings.width, record.source.width
    if width is not None and not any(fact.channel_axis is not None for fact in weights.facts):
        return None
    facts: list[WeightFact] = []
    layers = dict.fromkeys(record.counts, record.experts)
    for fact in weights.facts:
        nbytes = fact.nbytes
        if width is not None and full_width is not None and fact.channel_axis is not None:
            nbytes = nbytes // width * full_width
        if fact.layer in layers and fact.rows is not None:
            extent = fact.shape[fact.rows.axis]
            nbytes = nbytes // extent * (fact.rows.stride * record.experts + fact.rows.tail)
        elif fact.layer in layers and fact.expert is not None:
            # The first expert counts for all.
            nbytes *= record.experts if fact.expert == 0 else 0
        facts.append(replace(fact, nbytes=nbytes))
    left_out = record.source.bytes - (record.source.ignored or 0) - sum(fact.nbytes for fact in facts)
    if left_out and not (record.dropped and left_out > 0):
        return None
    if left_out:
        facts.append(WeightFact("multi-token prediction", "U8", (left_out,), left_out, "MTP"))
    return Weights(tuple(facts), record.experts, weights.measured, layers)


def read_scores_of(output: Path, record: Record) -> Scores | None:
    """The scores in `output`, whose record is given; None if there are none.

    Raises ReportError if they belong to another model.
    """
    path = output / SCORES_FOLDER / SCORES_NAME
    if not path.is_file():
        return None
    scores = read_scores(path)
    layers = tuple(layer.index for layer in record.layers)
    if scores.layer_indices != layers or scores.spec.count != record.experts:
        raise ReportError(
            f"{path} has scores of {len(scores.layers)} layers with {scores.spec.count} experts, but the model was "
            f"made from {len(layers)} layers with {record.experts}. They belong to another model: remove them, or "
            "prune again."
        )
    channels = scores.layers[0].channels
    if channels is not None and record.source.width not in (None, channels.shape[2]):
        raise ReportError(
            f"{path} has scores of {channels.shape[2]} channels per expert, but the model was made from experts with "
            f"{record.source.width}. They belong to another model: remove them, or prune again."
        )
    return scores


def _energies(scores: Scores, record: Record) -> NDArray[np.float64] | None:
    """The mean energy (layers, W) of the experts' channels by rank, by the mix; None unless experts became narrower."""
    if record.settings.width is None or not scores.channel_bytes:
        return None
    mix, weights = record.settings.mix, [1.0] * len(scores.sources)
    if mix is not None:
        # (The scale does not matter.)
        named = zip(scores.sources, scores.source_tokens, strict=True)
        weights = [mix.get(name, 0.0) / tokens if tokens else 0.0 for name, tokens in named]
    return np.stack([energy_by_rank(layer, weights) for layer in scores.layers])


@dataclass(frozen=True)
class Facts:
    """An output as the report shows it; a string in place of a value says why it is unknown. `config` is its
    config.json."""

    name: str
    config: Mapping[str, Any] = field(repr=False)
    record: Record
    output_bytes: int
    retained: tuple[Retention, ...] = field(repr=False)
    energy: tuple[Retention, ...] = field(repr=False)
    #: The mean energy (layers, W) of the experts' channels by rank; None unless they became narrower.
    channels: NDArray[np.float64] | None = field(repr=False)
    memory: Memory | str
    course: Course | str
    text: TextResult | None
    #: Further ones, compared with models that this one was not made from.
    other_texts: tuple[TextResult, ...]
    generation: GenerationResult | None
    tasks: TasksResult | None
    #: Those with comparisons with other models than the source.
    other_tasks: tuple[TasksResult, ...]
    #: The search that this model is the best candidate of.
    search: SearchResult | None


def _others(output: Path, name: str, kind: type[Kind]) -> tuple[Kind, ...]:
    """The results that compare with other models than the source, in order. Raises ReportError."""
    found = (read_checked_result(output, other, kind) for other in others_of(output, name))
    return tuple(each for each in found if each is not None)


def read_facts(output: Path) -> Facts:
    """Everything that is known of the model in `output`.

    Raises ReportError, ScoresError or CheckpointError for a part that is damaged or belongs to another model.
    """
    # Absolute, since `.` has no name.
    output = output.absolute()
    output = output if output.name not in ("", "..") else output.resolve()
    record = read_record(output)
    scores = read_scores_of(output, record)
    selection = record.selection
    checkpoint = open_checkpoint(output)
    own = read_checked_result(output, TEXT_NAME, TextResult)
    found = [*([own] if own is not None else []), *_others(output, TEXT_NAME, TextResult)]
    # What it was made from comes first, also where an earlier version has put another in its place; then held-out text.
    texts = sorted(found, key=lambda text: (text.against_source is False, not (text.data and text.data.held_back)))
    return Facts(
        output.name,
        checkpoint.config,
        record,
        checkpoint.nbytes,
        retentions(scores, selection) if scores else (),
        energy_retentions(scores, selection) if scores else (),
        _energies(scores, record) if scores else None,
        read_memory(output, record, scores, checkpoint),
        read_course(output, record, checkpoint.nbytes),
        texts[0] if texts else None,
        tuple(texts[1:]),
        read_checked_result(output, GENERATION_NAME, GenerationResult),
        read_checked_result(output, TASKS_NAME, TasksResult),
        _others(output, TASKS_NAME, TasksResult),
        read_checked_result(output, SEARCH_NAME, SearchResult),
    )
