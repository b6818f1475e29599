"""The parts of the report, in their order: for each a title, sentences, perhaps a figure, and its numbers as tables.

The report as one page of HTML that needs nothing else: no script, no font, no file, nothing from the net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from streamprune.hardware.memory import format_bytes
from streamprune.progress import describe
from streamprune.reporting.facts import Facts, card_lines
from streamprune.reporting.read_record import Record
from streamprune.reporting.tables import (
    Table,
    calibration_table,
    course_table,
    depth_table,
    divergence_table,
    generation_source_table,
    generation_table,
    layer_retention_table,
    layers_table,
    loss_table,
    memory_table,
    percent,
    retention_table,
    scores_table,
    tasks_table,
    tokens_table,
)
from streamprune.selection.schedules import SCHEDULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
import html
import re
from collections.abc import Mapping, Sequence

from streamprune import __version__
from streamprune.reporting.charts import Picture
from streamprune.reporting.tables import table_html

#: What the summary says of generation, by the verdict.
GENERATION_WORDS = {
    "loops": "runs into loops: see below",
    "healthy": "no more loops than may be",
    "unknown": "too short to show loops",
}


@dataclass(frozen=True)
class Part:
    """A part of the report. `name` is its short name, also of its picture; `alt` says in words what the figure shows.

    The first `open` tables are shown at once, the others when they are asked for. `points` are sentences of a list.
    """

    name: str
    title: str
    text: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    draw: Callable[[], Figure] | None = None
    alt: str = ""
    open: int = 0
    points: tuple[str, ...] = ()


def parts_of_report(facts: Facts) -> Iterator[Part]:
    """Every part for which something is known, and for the others why it is not. Draws nothing yet."""
    yield _experts(facts.record)
    yield _map(facts.record)
    yield _memory(facts)
    yield from _retention(facts)
    yield from _evaluation(facts)
    yield from _generation(facts)
    yield from _tasks(facts)
    yield from _calibration(facts.record)
    yield from _tokens(facts.record)
    yield _course(facts)


def schedule_text(record: Record) -> str:
    """How the number of experts was divided among the layers, in a sentence."""
    schedule = record.settings.get("schedule")
    if schedule is None:
        return "Which experts stay was chosen by hand."
    known = SCHEDULES.get(str(schedule))
    meaning = known.meaning if known else "a file says how many each layer keeps"
    extra = [f"{name} {record.settings[name]:g}" for name in ("spread", "floor") if name in record.settings]
    return f"Schedule {schedule}: {meaning}{', ' if extra else ''}{', '.join(extra)}."


def _experts(record: Record) -> Part:
    from streamprune.reporting.charts import draw_experts

    counts = list(record.counts.values())
    spread = f"{counts[0]} of {record.experts} in every layer"
    if len(set(counts)) > 1:
        spread = f"{min(counts)} to {max(counts)} of {record.experts} per layer"
    text = (f"{sum(counts):,} of {record.all_experts:,} experts stay: {spread}.", schedule_text(record))
    return Part("experts", "Experts kept per layer", text, (layers_table(record),), partial(draw_experts, record),
                f"Bars by layer: {spread} are kept.")  # fmt: skip


def _map(record: Record) -> Part:
    from streamprune.reporting.charts import draw_map

    if record.scored:
        text = (
            "Each row is a layer, each cell an expert. The colour is its score, relative to the mean of its layer. An "
            "expert that stays fills its cell; of one that was removed there is only a square within it.",
        )
    else:
        text = (
            "Each row is a layer, each cell an expert. Scores are not on record, so that all have one colour. An "
            "expert that stays fills its cell; of one that was removed there is only a square within it.",
        )
    alt = f"Map of {len(record.counts)} layers by {record.experts} experts: the score of each, and whether it stays."
    return Part("map", "Saliency of every expert", text, (scores_table(record),), partial(draw_map, record), alt)


def _memory(facts: Facts) -> Part:
    from streamprune.reporting.charts import draw_memory

    memory, record = facts.memory, facts.record
    title = "Memory before and after"
    if isinstance(memory, str):
        return Part("memory", title, (memory,))
    use = record.use
    text = [
        f"To serve {use.batch} x {use.context:,} tokens on one card, cache {use.kv_dtype}, as `streamprune fit` tells "
        "it: weights and cache are counted, the rest is modelled, with the bounds that the thin lines show.",
    ]
    if not record.use_known:
        text.append("What use was planned for is not on record; this is the usual one.")
    if memory.before is None:
        text.append("What the source takes cannot be told from the experts that are left.")
    lines = card_lines()
    usable = ", ".join(f"of a {line.label} CUDA can use {format_bytes(line.usable)}" for line in lines)
    text.append(f"Cards are drawn with their full size; {usable}.")
    before = f"{format_bytes(memory.before.total)} before, " if memory.before else ""
    alt = f"Stacked bars of the memory: {before}{format_bytes(memory.after.total)} after."
    return Part("memory", title, tuple(text), (memory_table(memory, record.budget),),
                partial(draw_memory, memory, lines, record.budget), alt)  # fmt: skip


def _retention(facts: Facts) -> Iterator[Part]:
    from streamprune.reporting.charts import draw_retention

    retained = facts.retained
    if not retained:
        yield Part("retention", "What is kept of each source",
                   ("The scores are not with the model, so that it cannot be told.",))  # fmt: skip
        return
    text = (
        "Saliency is what the experts add to the residual stream on a source's own tokens (the sum of gate weight "
        "times norm). At best means: as many experts in each layer, chosen for this source alone.",
    )
    worst = min(retained, key=lambda each: each.kept)
    alt = f"Bars by source: {worst.source} keeps least of its saliency, {worst.kept:.1%}."
    yield Part("retention", "What is kept of each source", text,
               (retention_table(retained), layer_retention_table(facts.record, retained)),
               partial(draw_retention, retained), alt)  # fmt: skip


def _evaluation(facts: Facts) -> Iterator[Part]:
    text = facts.text
    if text is None:
        yield Part("loss", "Loss on held-out text",
                   ("Not measured. `streamprune eval` does it, and makes this report again.",))  # fmt: skip
        return
    from streamprune.reporting.charts import draw_depth, draw_losses

    tables = (loss_table(text), divergence_table(text)) if text.compared else (loss_table(text),)
    told = [f"On {text.text_words}. Thin lines are intervals of 95 %."]
    if text.compared:
        told.append(f"KL divergence is of this model's predictions from those of {text.original_words}.")
    yield Part("loss", "Loss and divergence" if text.compared else "Loss", tuple(told),
               tables, partial(draw_losses, text), "Loss of every source, with its interval.")  # fmt: skip
    if any(each.hidden_error for each in text.rows):
        yield Part(
            "depth", "Error along the depth",
            ("How far the hidden states are from the original's after each block, relative to their size.",),
            (depth_table(text),), partial(draw_depth, text),
            "Lines by source: the relative error of the hidden states after each block.",
        )  # fmt: skip


def _generation(facts: Facts) -> Iterator[Part]:
    generation = facts.generation
    if generation is None:
        return
    words = [{
        "healthy": "Its continuations loop seldom or never, or no more than the original's.",
        "loops": "Its continuations run into loops.",
        "unknown": "Its continuations were too short to show loops.",
    }[generation.verdict], *generation.notes]  # fmt: skip
    if generation.advice:
        words.append("What helps:" if generation.loops else "Remarks:")
    tables = [generation_table(generation)]
    if any(mode.sources for mode in generation.modes):
        tables.append(generation_source_table(generation))
    yield Part("generation", "Generation health", tuple(words), tuple(tables), open=1, points=generation.advice)


def _tasks(facts: Facts) -> Iterator[Part]:
    if facts.tasks:
        yield Part("tasks", "Tasks", ("Measured by lm-evaluation-harness.",), (tasks_table(facts.tasks),), open=1)


def _calibration(record: Record) -> Iterator[Part]:
    table = calibration_table(record)
    if table is None or record.calibration is None:
        yield Part("calibration", "Calibration", ("There was none: the experts were chosen by hand.",))
        return
    calibration = record.calibration
    text = (
        f"{calibration.sequences:,} sequences, {calibration.tokens:,} tokens. What this text does not contain, the "
        "model may have lost.",
    )
    yield Part("calibration", "Calibration", text, (table,), open=1)


def _tokens(record: Record) -> Iterator[Part]:
    if not all(layer.tokens for layer in record.choice.layers):
        return
    from streamprune.reporting.charts import draw_tokens

    unseen = sum(layer.tokens.count(0) for layer in record.choice.layers)
    text = (
        "How many tokens of the calibration each expert was given: the more, the better it is known. "
        + (f"{unseen:,} experts were given none." if unseen else "Every expert was given some."),
    )
    yield Part("tokens", "Tokens per expert", text, (tokens_table(record),), partial(draw_tokens, record),
               "Bands by layer: the least, the middle half and the most tokens that an expert was given.")  # fmt: skip


def _course(facts: Facts) -> Part:
    course, title = facts.course, "The run's time and memory"
    if isinstance(course, str):
        return Part("course", title, (course,))
    from streamprune.reporting.charts import draw_course

    text = [f"{course.seconds:,.1f} s, at most {format_bytes(course.peak_bytes)} resident in RAM."]
    if course.busy:
        text.append(f"At work: {describe(dict(course.busy)).removeprefix('busy: ')}.")
    if course.processes > 1:
        text.append(f"{course.processes} processes shared the work; these are the figures of the first.")
    if len(course.blocks) < len(facts.record.counts):
        text.append("The run was interrupted; these are the blocks of its last sitting.")
    if not course.blocks:
        return Part("course", title, tuple(text))
    longest = max(course.blocks, key=lambda each: each.seconds)
    alt = f"Time and peak memory by block; block {longest.block} took longest, {longest.seconds:.1f} s."
    return Part("course", title, tuple(text), (course_table(course),), partial(draw_course, course), alt)


def summary_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """What the report says at its top, as pairs of a word and a text."""
    record, counts = facts.record, list(facts.record.counts.values())
    revision = f", revision {record.revision}" if record.revision else ""
    yield "made from", f"{record.model}{revision}"
    per_layer = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    removed = percent(1 - sum(counts) / record.all_experts)
    yield (
        "experts",
        f"{per_layer} of {record.experts} in each of {len(counts)} layers, {sum(counts):,} of {record.all_experts:,} "
        f"in all ({removed} removed); {record.top_k} are used per token",
    )
    yield "weights", f"{format_bytes(record.source_bytes)} → {format_bytes(facts.output_bytes)}"
    if not isinstance(facts.memory, str):
        after = facts.memory.after
        yield "memory in use", f"{format_bytes(after.total)} for {record.use.batch} x {record.use.context:,} tokens"
        if record.budget is not None:
            left = record.budget - after.total
            word = f"{format_bytes(abs(left))} {'left' if left >= 0 else 'missing'}"
            yield "budget", f"{format_bytes(record.budget)}, {word}"
    yield "chosen by", _chosen_by(record)
    text = facts.text
    if text is not None and text.whole is not None and "kl" in text.whole.values:
        yield "damage", f"KL divergence {text.whole.values['kl']:.4g} nats per token on {text.text_words}"
    if facts.generation is not None:
        yield "generation", GENERATION_WORDS[facts.generation.verdict]
    verified = None if isinstance(facts.course, str) else facts.course.verified
    yield (
        "verified",
        {
            True: "yes: every byte was compared with the source's",
            False: "no: it was not compared with the source",
            None: "not on record; `streamprune verify` compares it with the source",
        }[verified],
    )


def _chosen_by(record: Record) -> str:
    method = record.settings.get("method")
    if method is None:
        return "hand"
    text = f"{method}, schedule {record.settings.get('schedule')}"
    return text + (", super experts protected" if any(record.choice.protected.values()) else "")


#: Forbids the browser whatever would leave the page, should something in it ever ask for that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid #ccc; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
code { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
.warning { border-left: .3rem solid #D55E00; padding: .3rem .8rem; background: #fdf1ea; }
figure { margin: .8rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 20rem; height: auto; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
.wide { overflow-x: auto; max-height: 32rem; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
thead th { vertical-align: bottom; border-bottom: 1px solid #888; color: #444; position: sticky; top: 0;
  background: #fff; }
tr > :first-child { text-align: left; max-width: 24rem; overflow: hidden; text-overflow: ellipsis; }
tbody th { font-weight: normal; }
s { color: #666; }
footer { margin-top: 2.5rem; color: #555; font-size: .85rem; }
@media (max-width: 36rem) {
  body { padding: .7rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .together, .wide, tr, dl { break-inside: avoid; }
  figure svg { min-width: 0; max-height: 20cm; }
  .wide { overflow: visible; max-height: none; }
  details:not([open]) { display: none; }
}
""".strip()


def page(
    name: str, summary: Sequence[tuple[str, str]], parts: Sequence[Part], pictures: Mapping[str, Picture], loops: bool
) -> str:
    """The page about the model `name`, with the pictures of its parts. `loops` raises a warning at the top."""
    return "\n".join(_lines(name, summary, parts, pictures, loops)) + "\n"


def _lines(
    name: str, summary: Sequence[tuple[str, str]], parts: Sequence[Part], pictures: Mapping[str, Picture], loops: bool
) -> Iterator[str]:
    title = html.escape(f"{name}: what was pruned")
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>\n{_CSS}\n</style>\n</head>\n<body>\n<h1>{title}</h1>"
    if loops:
        yield '<p class="warning">This model runs into loops when it writes. <a href="#generation">What helps.</a></p>'
    yield "<dl>"
    yield from (f"<dt>{html.escape(word)}</dt><dd>{_prose(text)}</dd>" for word, text in summary)
    yield "</dl>"
    for part in parts:
        yield from _part(part, pictures.get(part.name))
    yield f"<footer>Made by streamprune {html.escape(__version__)} (`streamprune report`)</footer>".replace("`", "")
    yield "</body>\n</html>"


def _part(part: Part, picture: Picture | None) -> Iterator[str]:
    yield f'<section id="{part.name}">\n<div class="together">\n<h2>{html.escape(part.title)}</h2>'
    yield from (f"<p>{_prose(sentence)}</p>" for sentence in part.text)
    if picture is not None:
        yield f"<figure>{picture.svg}</figure>"
    yield "</div>"
    if part.points:
        yield "<ul>"
        yield from (f"<li>{_prose(sentence)}" for sentence in part.points)
        yield "</ul>"
    for number, table in enumerate(part.tables):
        if number < part.open:
            yield from table_html(table)
        else:
            yield f"<details><summary>Numbers: {html.escape(table.caption)}</summary>"
            yield from table_html(table)
            yield "</details>"
    yield "</section>"


def _prose(text: str) -> str:
    """A sentence with what stands between backticks as code, all of it escaped."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
