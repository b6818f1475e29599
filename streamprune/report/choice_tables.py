"""The tables of what was chosen: experts by layer, scores, tokens, retention, memory, calibration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamprune.choice.retention import Retention
from streamprune.fit.estimate import Estimate
from streamprune.machine import format_bytes
from streamprune.report.memory import Memory, card_lines
from streamprune.report.record import Record
from streamprune.report.tables import Struck, Table, number, percent


def layers_table(record: Record) -> Table:
    """How many experts each layer keeps, and where the line is drawn between scores."""
    rows = []
    for layer in record.choice.layers:
        stay = set(layer.kept)
        kept = [layer.scores[expert] for expert in layer.kept] if layer.scores else []
        gone = [score for expert, score in enumerate(layer.scores) if expert not in stay]
        rows.append(
            (
                str(layer.block),
                str(len(layer.kept)),
                str(record.experts - len(layer.kept)),
                percent(1 - len(layer.kept) / record.experts),
                number(min(kept, default=None)),
                number(max(gone, default=None)),
                str(len(record.choice.protected.get(layer.block, ()))),
            )
        )
    return Table(
        "Experts by layer",
        ("layer", "kept", "removed", "share removed", "lowest score kept", "highest score removed", "protected"),
        tuple(rows),
    )


def scores_table(record: Record) -> Table:
    """The score of every expert of every layer; removed ones are struck out."""
    rows = []
    for layer in record.choice.layers:
        stay = set(layer.kept)
        texts = [number(score) for score in layer.scores] or ["·"] * record.experts
        cells = (text if expert in stay else Struck(text) for expert, text in enumerate(texts))
        rows.append((str(layer.block), *cells))
    columns = ("layer", *(str(expert) for expert in range(record.experts)))
    return Table("Scores by layer and expert; struck out: removed", columns, tuple(rows))


def tokens_table(record: Record) -> Table:
    """How the tokens of the calibration were divided among the experts of each layer."""
    rows = []
    for layer in record.choice.layers:
        ends = [f"{value:,.10g}" for value in np.percentile(layer.tokens, (0, 25, 50, 75, 100))]
        fewest = min(layer.tokens[expert] for expert in layer.kept)
        rows.append((str(layer.block), *ends, f"{fewest:,}", str(layer.tokens.count(0))))
    return Table(
        "Tokens per expert by layer",
        ("layer", "least", "first quarter", "median", "third quarter", "most", "fewest of a kept one", "never routed"),
        tuple(rows),
    )


def retention_table(retained: Sequence[Retention]) -> Table:
    """What is kept of each source's saliency."""
    rows = [(each.source, percent(each.kept), percent(each.best), str(each.worst_block), percent(each.worst))
            for each in retained]  # fmt: skip
    return Table("Saliency kept by source", ("source", "kept", "at best", "worst layer", "kept there"), tuple(rows))


def layer_retention_table(record: Record, retained: Sequence[Retention]) -> Table:
    """What each layer keeps of each source's saliency."""
    rows = [
        (str(block), *(percent(each.layers[position]) for each in retained))
        for position, block in enumerate(record.counts)
    ]
    return Table("Saliency kept by layer and source", ("layer", *(each.source for each in retained)), tuple(rows))


def memory_table(memory: Memory, budget: int | None) -> Table:
    """Every part of the memory before and after, and what that leaves of each card and of the budget."""
    both = [estimate for estimate in (memory.before, memory.after) if estimate is not None]
    names = list(dict.fromkeys(term.name for estimate in both for term in estimate.terms))
    rows = [(name, *(_term(estimate, name) for estimate in both)) for name in names]
    rows.append(("total", *(format_bytes(estimate.total) for estimate in both)))
    rows.append(("at least, at most", *(" to ".join(map(format_bytes, estimate.interval)) for estimate in both)))
    for line in card_lines():
        label = f"left on a {line.label} (CUDA can use {format_bytes(line.usable)})"
        rows.append((label, *(_left(line.usable - estimate.total) for estimate in both)))
    if budget is not None:
        label = f"left of the budget of {format_bytes(budget)}"
        rows.append((label, *(_left(budget - estimate.total) for estimate in both)))
    columns = ("part", "source", "this model") if len(both) == 2 else ("part", "this model")
    return Table("Memory, one card", columns, tuple(rows))


def _term(estimate: Estimate, name: str) -> str:
    found = [term for term in estimate.terms if term.name == name]
    return format_bytes(found[0].bytes) if found else "–"


def _left(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes >= 0 else f"does not fit: {format_bytes(-nbytes)} missing"


def calibration_table(record: Record) -> Table | None:
    """The sources of the calibration: their shares in the recipe and of the tokens, and their weights in the choice."""
    calibration = record.calibration
    if calibration is None:
        return None
    mix = record.mix
    rows = [
        (
            each.name,
            "–" if each.share is None else f"{each.share:g}",
            "–" if each.records is None else f"{each.records:,}",
            f"{each.tokens:,}",
            percent(each.tokens / calibration.tokens if calibration.tokens else None),
            percent(mix.get(each.name, 0.0)) if mix else "as it is",
        )
        for each in calibration.sources
    ]
    return Table(
        "Calibration text by source",
        ("source", "share in the recipe", "records", "tokens", "share of the tokens", "weight in the choice"),
        tuple(rows),
    )
