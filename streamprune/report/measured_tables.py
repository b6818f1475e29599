"""The tables of what was measured: losses, divergence, hidden states, continuations, tasks, the run's course."""

from __future__ import annotations

from collections.abc import Sequence

from streamprune.machine import format_bytes
from streamprune.report.course import Course
from streamprune.report.measured import Continuations, GenerationResult, OfSource, TaskResult, TextResult
from streamprune.report.tables import Table, interval, number, percent


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
