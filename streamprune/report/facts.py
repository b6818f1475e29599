"""All that the report is made of, read from an output, from the log beside it, and checked against one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from streamprune.choice.retention import Retention, retentions
from streamprune.errors import ReportError
from streamprune.report.course import Course, read_course
from streamprune.report.measured import (
    GenerationResult,
    TaskResult,
    TextResult,
    read_generation,
    read_tasks,
    read_text,
)
from streamprune.report.memory import Memory, read_memory
from streamprune.report.record import Record, read_record
from streamprune.scores.file import SCORES_FOLDER, SCORES_NAME, read_scores
from streamprune.scores.scores import Scores
from streamprune.source.checkpoint import open_checkpoint


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
        retentions(scores.layers, scores.sources, record.choice, scores.spec.groups) if scores else (),
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
    blocks = tuple(layer.block for layer in record.choice.layers)
    if scores.blocks != blocks or scores.spec.count != record.experts:
        raise ReportError(
            f"{path} holds scores of {len(scores.blocks)} layers with {scores.spec.count} experts, but the model was "
            f"made from {len(blocks)} layers with {record.experts}. They belong to another model: remove them, or "
            "prune again."
        )
    return scores
