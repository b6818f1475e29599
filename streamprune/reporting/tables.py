"""The numbers of the report as tables, in HTML and in Markdown. Every figure has one, for those who cannot see it.

The tables of what was chosen: experts by layer, scores, tokens, retention, memory, calibration.

The tables of what was measured: losses, divergence, hidden states, continuations, tasks, the run's course.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streamprune.fit.estimate import Estimate
from streamprune.hardware.memory import format_bytes
from streamprune.reporting.facts import Course, Memory, card_lines
from streamprune.reporting.measured import Continuations, GenerationResult, OfSource, TaskResult, TextResult
from streamprune.reporting.read_record import Record
from streamprune.selection.retention import Retention

#: What Markdown, or HTML within it, would take for more than a character.
_SPECIAL = re.compile(r"[\\`*_{}\[\]#!|~$<>&@]|:(?=//)")


class Struck(str):
    """A cell that is struck out: of an expert that was removed."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Rows of text under the names of their columns. The first column names the row, the others are numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)


def table_html(table: Table) -> Iterator[str]:
    """The table as lines of HTML, all text in it escaped. Closing tags that HTML does without are left out: a large
    model's map has a hundred thousand cells."""
    yield f'<div class="wide"><table><caption>{html.escape(table.caption)}</caption>'
    yield "<thead><tr>" + "".join(f'<th scope="col">{html.escape(name)}' for name in table.columns) + "<tbody>"
    for row in table.rows:
        yield f'<tr><th scope="row">{html.escape(row[0])}' + "".join(map(_cell, row[1:]))
    yield "</table></div>"


def _cell(text: str) -> str:
    inner = html.escape(text)
    return f"<td><s>{inner}</s>" if isinstance(text, Struck) else f"<td>{inner}"


def table_markdown(table: Table) -> Iterator[str]:
    """The table as lines of Markdown, without its caption, all text in it escaped."""
    yield "| " + " | ".join(map(markdown, table.columns)) + " |"
    yield "|---" + "|---:" * (len(table.columns) - 1) + "|"
    for row in table.rows:
        yield "| " + " | ".join(map(markdown, row)) + " |"


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    # (A backslash before them would do in most places, but not before a bar in every table.)
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


def number(value: float | None, digits: int = 4) -> str:
    """A number for people, with so many significant digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 10**9 else f"{value:#.{digits}g}".rstrip(".")


def interval(ends: Sequence[float] | None, digits: int = 4) -> str:
    """An interval for people; a dash where there is none."""
    return "–" if ends is None else f"{number(ends[0], digits)} to {number(ends[1], digits)}"


def percent(share: float | None) -> str:
    """A share for people."""
    return "–" if share is None else f"{share:.1%}"


def layers_table(record: Record) -> Table:
    """How many experts each layer keeps, and where the line is drawn between scores."""
    rows = []
    for layer in record.choice.layers:
        stay = set(layer.kept)
        kept = [layer.scores[expert] for expert in layer.kept] if layer.scores else []
        gone = [score for expert, score in enumerate(layer.scores) if expert not in stay]
        rows.append(
            (
                str(layer.index),
                str(len(layer.kept)),
                str(record.experts - len(layer.kept)),
                percent(1 - len(layer.kept) / record.experts),
                number(min(kept, default=None)),
                number(max(gone, default=None)),
                str(len(record.choice.protected.get(layer.index, ()))),
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
        rows.append((str(layer.index), *cells))
    columns = ("layer", *(str(expert) for expert in range(record.experts)))
    return Table("Scores by layer and expert; struck out: removed", columns, tuple(rows))


def tokens_table(record: Record) -> Table:
    """How the tokens of the calibration were divided among the experts of each layer."""
    rows = []
    for layer in record.choice.layers:
        ends = [f"{value:,.10g}" for value in np.percentile(layer.tokens, (0, 25, 50, 75, 100))]
        fewest = min(layer.tokens[expert] for expert in layer.kept)
        rows.append((str(layer.index), *ends, f"{fewest:,}", str(layer.tokens.count(0))))
    return Table(
        "Tokens per expert by layer",
        ("layer", "least", "first quarter", "median", "third quarter", "most", "fewest of a kept one", "never routed"),
        tuple(rows),
    )


def retention_table(retained: Sequence[Retention]) -> Table:
    """What is kept of each source's saliency."""
    rows = [(each.source, percent(each.kept), percent(each.best), str(each.worst_layer), percent(each.worst))
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


def loss_table(text: TextResult) -> Table:
    """Loss and perplexity by source, the original's too if it was measured."""
    columns = ["source", "tokens", "loss", "95 % interval", "perplexity", "95 % interval"]
    if text.compared:
        columns += ["original loss", "original perplexity", "loss increase", "95 % interval"]
    rows = []
    for each in text.rows:
        row = [each.name, f"{each.tokens:,}", *_with_interval(each, "loss"), *_with_interval(each, "perplexity")]
        if text.compared:
            row += [number(each.values.get(key)) for key in ("original_loss", "original_perplexity")]
            row += _with_interval(each, "loss_increase")
        rows.append(tuple(row))
    return Table("Loss, nats per token", tuple(columns), tuple(rows))


def divergence_table(text: TextResult) -> Table:
    """KL divergence from the original and agreement with it, by source."""
    rows = [
        (
            each.name,
            *_with_interval(each, "kl"),
            number(each.values.get("kl_p99")),
            percent(each.values.get("top1_agreement")),
            "–" if "top1_agreement" not in each.intervals
            else " to ".join(map(percent, each.intervals["top1_agreement"])),
        )
        for each in text.rows
    ]  # fmt: skip
    columns = ("source", "KL", "95 % interval", "99th percentile", "top-1 agreement", "95 % interval")
    return Table("Divergence from the original, nats per token", columns, tuple(rows))


def _with_interval(each: OfSource, key: str) -> list[str]:
    return [number(each.values.get(key)), interval(each.intervals.get(key))]


def card_table(text: TextResult) -> Table:
    """The same in short, for the model card."""
    if not text.compared:
        rows = [(each.name, f"{each.tokens:,}", *_with_interval(each, "loss"), number(each.values.get("perplexity")))
                for each in text.rows]  # fmt: skip
        return Table("", ("source", "tokens", "loss", "95 % interval", "perplexity"), tuple(rows))
    compared = tuple(
        (
            each.name,
            f"{each.tokens:,}",
            number(each.values.get("original_loss")),
            number(each.values.get("loss")),
            number(each.values.get("perplexity")),
            *_with_interval(each, "kl"),
            number(each.values.get("kl_p99")),
            percent(each.values.get("top1_agreement")),
        )
        for each in text.rows
    )
    columns = (
        "source", "tokens", "loss before", "loss", "perplexity", "KL", "95 % interval", "99th percentile",
        "top-1 agreement",
    )  # fmt: skip
    return Table("", columns, compared)


def depth_table(text: TextResult) -> Table:
    """The error of the hidden states after every block, by source."""
    shown = [each for each in text.rows if each.hidden_error]
    depth = max(len(each.hidden_error) for each in shown)
    rows = [
        (str(block), *(number(each.hidden_error[block]) if block < len(each.hidden_error) else "–" for each in shown))
        for block in range(depth)
    ]
    columns = ("block", *(each.name for each in shown))
    return Table("Relative error of the hidden states after each block", columns, tuple(rows))


_WENT = ("prompts", "ended by themselves", "looped", "repeated 4-grams")


def generation_table(generation: GenerationResult) -> Table:
    """How continuations went, by the way of generating; with the original's figures where they were taken."""
    rows = []
    for mode in generation.modes:
        rows.append(_went(mode.label, mode.pruned))
        if mode.original is not None:
            rows.append(_went(f"{mode.label}, the original", mode.original))
    return Table("Continuations", ("decoding", *_WENT), tuple(rows))


def generation_source_table(generation: GenerationResult) -> Table:
    """The same by the source of the prompts."""
    rows = [_went(f"{mode.label}, {each.name}", each) for mode in generation.modes for each in mode.sources]
    return Table("Continuations by source", ("decoding and source", *_WENT), tuple(rows))


def _went(label: str, each: Continuations) -> tuple[str, ...]:
    repeated = "–" if each.repeated is None else percent(each.repeated)
    return (label, f"{each.prompts:,}", percent(each.ended), percent(each.looped), repeated)


def tasks_table(tasks: Sequence[TaskResult]) -> Table:
    """What lm-evaluation-harness measured."""
    rows = [
        (each.task, each.metric, *("–" if count is None else f"{count:,}" for count in (each.shots, each.examples)),
         number(each.value), number(each.error, 2))
        for each in tasks
    ]  # fmt: skip
    return Table("Tasks", ("task", "metric", "shots", "examples", "value", "standard error"), tuple(rows))


def course_table(course: Course) -> Table:
    """What every block of the run took."""
    rows = [(str(each.block), f"{each.at:.1f}", f"{each.seconds:.2f}", format_bytes(each.peak_bytes))
            for each in course.blocks]  # fmt: skip
    return Table("The run by block", ("block", "done after (s)", "seconds", "peak memory by then"), tuple(rows))
