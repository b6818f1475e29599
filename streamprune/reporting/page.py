"""report.html: its sections with their sentences, figures and tables, and the page they are rendered to.

The page needs nothing else: no script, no font, no other file, nothing from the net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from streamprune import __version__
from streamprune.config import ServingSpec
from streamprune.hardware.memory import format_bytes
from streamprune.progress import describe
from streamprune.reporting import charts, tables
from streamprune.reporting.facts import Facts, gpu_sizes
from streamprune.reporting.pictures import Picture
from streamprune.reporting.record import Record
from streamprune.reporting.templates import render
from streamprune.selection.schedules import SCHEDULES
from streamprune.tables import Table, percent


@dataclass(frozen=True)
class Section:
    """A section of the report. `name` is a short name, also of its picture; `alt` says in words what the figure shows.

    The first `open` tables are shown at once, the others on demand. `points` are sentences of a list.
    """

    name: str
    title: str
    text: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    draw: Callable[[], Figure] | None = None
    alt: str = ""
    open: int = 0
    points: tuple[str, ...] = ()


def page(facts: Facts, sections: Sequence[Section], pictures: Mapping[str, Picture]) -> str:
    """The page about a model, with the pictures of its sections by name."""
    loops = facts.generation is not None and facts.generation.loops
    return render(
        "report.html.j2", name=facts.name, loops=loops, summary=list(summary_rows(facts)), sections=sections,
        pictures=pictures, version=__version__,
    )  # fmt: skip


def sections_of(facts: Facts) -> Iterator[Section]:
    """Every section for which something is known, and for the others why it is not. Draws nothing yet."""
    yield _experts(facts.record)
    yield _map(facts.record)
    yield _memory(facts)
    yield _retention(facts)
    yield from _evaluation(facts)
    yield from _generation(facts)
    if facts.tasks:
        text = ("Measured by lm-evaluation-harness.",)
        yield Section("tasks", "Tasks", text, (tables.tasks_table(facts.tasks),), open=1)
    yield _calibration(facts.record)
    yield from _tokens(facts.record)
    yield _course(facts)


def schedule_text(record: Record) -> str:
    """How the number of experts was divided among the layers, in a sentence."""
    settings = record.settings
    if settings.schedule is None:
        return "Which experts stay was chosen by hand."
    known = SCHEDULES.get(settings.schedule)
    meaning = known.meaning if known else "a file says how many each layer keeps"
    numbers = {"spread": settings.spread, "floor": settings.floor}
    extra = "".join(f", {name} {value:g}" for name, value in numbers.items() if value is not None)
    return f"Schedule {settings.schedule}: {meaning}{extra}."


def _experts(record: Record) -> Section:
    counts = list(record.counts.values())
    spread = f"{counts[0]} of {record.experts} in every layer"
    if len(set(counts)) > 1:
        spread = f"{min(counts)} to {max(counts)} of {record.experts} per layer"
    text = (f"{sum(counts):,} of {record.all_experts:,} experts stay: {spread}.", schedule_text(record))
    return Section(
        "experts", "Experts kept per layer", text, (tables.layers_table(record),), partial(charts.draw_experts, record),
        f"Bars by layer: {spread} are kept.",
    )  # fmt: skip


def _map(record: Record) -> Section:
    colour = "The colour is its score, relative to the mean of its layer."
    if not record.is_scored:
        colour = "Scores are not on record, so that all have one colour."
    text = (
        f"Each row is a layer, each cell an expert. {colour} An expert that stays fills its cell; an expert that was "
        "removed is only a square within it.",
    )
    alt = f"Map of {len(record.layers)} layers by {record.experts} experts: the score of each, and whether it stays."
    return Section(
        "map", "Saliency of every expert", text, (tables.scores_table(record),), partial(charts.draw_map, record), alt
    )


def _memory(facts: Facts) -> Section:
    memory, record, title = facts.memory, facts.record, "Memory before and after"
    if isinstance(memory, str):
        return Section("memory", title, (memory,))
    use, budget = memory.after.use, record.use.budget_bytes if record.use else None
    text = [
        f"To serve {use.batch} x {use.context:,} tokens on one GPU, cache {use.kv_dtype}, as `streamprune fit` "
        "estimates it: weights and cache are counted, the rest is modelled, with the bounds that the thin lines show.",
    ]
    if record.use is None:
        text.append("What use was planned for is not on record; this is the usual one.")
    if memory.before is None:
        text.append("What the source takes does not follow from the experts that are left.")
    usable = ", ".join(f"of a {gpu.label} CUDA can use {format_bytes(gpu.usable)}" for gpu in gpu_sizes())
    text.append(f"GPUs are drawn with their full size; {usable}.")
    before = f"{format_bytes(memory.before.total)} before, " if memory.before else ""
    return Section(
        "memory", title, tuple(text), (tables.memory_table(memory, budget),),
        partial(charts.draw_memory, memory, gpu_sizes(), budget),
        f"Stacked bars of the memory: {before}{format_bytes(memory.after.total)} after.",
    )  # fmt: skip


def _retention(facts: Facts) -> Section:
    retained, title = facts.retained, "What is kept of each source"
    if not retained:
        return Section("retention", title, ("The scores are not with the model, so that it is not known.",))
    text = (
        "Saliency is what the experts add to the residual stream on a source's own tokens (the sum of gate weight "
        "times norm). At best means: as many experts in each layer, chosen for this source alone.",
    )
    worst = min(retained, key=lambda each: each.kept)
    return Section(
        "retention", title, text,
        (tables.retention_table(retained), tables.layer_retention_table(facts.record, retained)),
        partial(charts.draw_retention, retained),
        f"Bars by source: {worst.source} keeps least of its saliency, {worst.kept:.1%}.",
    )  # fmt: skip


def _evaluation(facts: Facts) -> Iterator[Section]:
    text = facts.text
    if text is None:
        advice = "Not measured. `streamprune eval` does it, and makes this report again."
        yield Section("loss", "Loss on held-out text", (advice,))
        return
    shown = [tables.loss_table(text)]
    sentences = [f"On {text.text_words}. Thin lines are intervals of 95 %."]
    if text.compared:
        shown.append(tables.divergence_table(text))
        sentences.append(f"KL divergence is of this model's predictions from those of {text.original_words}.")
    yield Section(
        "loss", "Loss and divergence" if text.compared else "Loss", tuple(sentences), tuple(shown),
        partial(charts.draw_losses, text), "Loss of every source, with its interval.",
    )  # fmt: skip
    if any(each.hidden_error for each in text.rows):
        yield Section(
            "depth", "Error along the depth",
            ("How far the hidden states are from the original's after each layer, relative to their size.",),
            (tables.depth_table(text),), partial(charts.draw_depth, text),
            "Lines by source: the relative error of the hidden states after each layer.",
        )  # fmt: skip


def _generation(facts: Facts) -> Iterator[Section]:
    generation = facts.generation
    if generation is None:
        return
    verdict = {
        "healthy": "Its continuations loop seldom or never, or no more than the original's.",
        "loops": "Its continuations run into loops.",
        "unknown": "Its continuations were too short to show loops.",
    }[generation.verdict]
    text = [verdict, *generation.notes]
    if generation.advice:
        text.append("What helps:" if generation.loops else "Remarks:")
    shown = [tables.generation_table(generation)]
    if any(mode.sources for mode in generation.modes):
        shown.append(tables.generation_source_table(generation))
    yield Section("generation", "Generation health", tuple(text), tuple(shown), open=1, points=tuple(generation.advice))


def _calibration(record: Record) -> Section:
    table, calibration = tables.calibration_table(record), record.calibration
    if table is None or calibration is None:
        return Section("calibration", "Calibration", ("There was none: the experts were chosen by hand.",))
    text = (
        f"{calibration.sequences:,} sequences, {calibration.tokens:,} tokens. What this text does not contain, the "
        "model may have lost.",
    )
    return Section("calibration", "Calibration", text, (table,), open=1)


def _tokens(record: Record) -> Iterator[Section]:
    if not all(layer.counts for layer in record.layers):
        return
    unseen = sum(layer.counts.count(0) for layer in record.layers)
    text = (
        "How many tokens of the calibration each expert was given: the more, the better it is known. "
        + (f"{unseen:,} experts were given none." if unseen else "Every expert was given some."),
    )
    yield Section(
        "tokens", "Tokens per expert", text, (tables.tokens_table(record),), partial(charts.draw_tokens, record),
        "Bands by layer: the least, the middle half and the most tokens that an expert was given.",
    )  # fmt: skip


def _course(facts: Facts) -> Section:
    course, title = facts.course, "The run's time and memory"
    if isinstance(course, str):
        return Section("course", title, (course,))
    summary = course.summary
    text = [f"{summary.seconds:,.1f} s, at most {format_bytes(summary.peak_resident_bytes)} resident in RAM."]
    if summary.busy:
        shares = {name: getattr(summary.busy, name) for name in summary.busy.__struct_fields__}
        text.append(f"At work: {describe(shares).removeprefix('busy: ')}.")
    if (summary.processes or 1) > 1:
        text.append(f"{summary.processes} processes shared the work; these are the figures of the first.")
    if len(course.layers) < len(facts.record.layers):
        text.append("The run was interrupted; these are the layers that were done after it was resumed last.")
    if not course.layers:
        return Section("course", title, tuple(text))
    longest = max(course.layers, key=lambda each: each.seconds)
    return Section(
        "course", title, tuple(text), (tables.course_table(course),), partial(charts.draw_course, course),
        f"Time and peak memory by layer; layer {longest.layer} took longest, {longest.seconds:.1f} s.",
    )  # fmt: skip


def summary_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """The top of the report: pairs of a word and a text."""
    record, counts = facts.record, list(facts.record.counts.values())
    revision = f", revision {record.settings.revision}" if record.settings.revision else ""
    yield "made from", f"{record.settings.model}{revision}"
    per_layer = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    removed = percent(1 - sum(counts) / record.all_experts)
    yield (
        "experts",
        f"{per_layer} of {record.experts} in each of {len(counts)} layers, {sum(counts):,} of {record.all_experts:,} "
        f"in all ({removed} removed); {record.source.top_k} are used per token",
    )
    yield "weights", f"{format_bytes(record.source.bytes)} → {format_bytes(facts.output_bytes)}"
    if not isinstance(facts.memory, str):
        total, use = facts.memory.after.total, record.use.spec if record.use else ServingSpec()
        yield "memory in use", f"{format_bytes(total)} for {use.batch} x {use.context:,} tokens"
        budget = record.use.budget_bytes if record.use else None
        if budget is not None:
            left = f"{format_bytes(abs(budget - total))} {'left' if budget >= total else 'missing'}"
            yield "budget", f"{format_bytes(budget)}, {left}"
    yield "chosen by", _chosen_by(record)
    text = facts.text
    if text is not None and text.all is not None and text.all.kl is not None:
        yield "damage", f"KL divergence {text.all.kl:.4g} nats per token on {text.text_words}"
    if facts.generation is not None:
        verdicts = {
            "loops": "runs into loops: see below",
            "healthy": "no more loops than may be",
            "unknown": "too short to show loops",
        }
        yield "generation", verdicts[facts.generation.verdict]
    verified = None if isinstance(facts.course, str) else facts.course.summary.verified
    states = {
        True: "yes: every byte was compared with the source's",
        False: "no: it was not compared with the source",
        None: "not on record; `streamprune verify` compares it with the source",
    }
    yield "verified", states[verified]


def _chosen_by(record: Record) -> str:
    method = record.settings.method
    if method is None:
        return "hand"
    text = f"{method}, schedule {record.settings.schedule}"
    return text + (", super experts protected" if record.protected_layers else "")
