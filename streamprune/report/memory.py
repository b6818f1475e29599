"""The memory that the model takes, and that its source took, as `fit` tells it. The source itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamprune.cards.known import known_gpu
from streamprune.errors import UnsupportedModelError
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.weights import WeightFact, Weights
from streamprune.model_facts import facts_from_json
from streamprune.report.record import Record
from streamprune.scores.scores import Scores
from streamprune.source.checkpoint import TensorEntry

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
