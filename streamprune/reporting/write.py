"""`streamprune report`: an output's report.html, its pictures, and the report's sections in the model card.

The page is self-contained: no script, no font, no other file, no network. A section of the card begins and ends with an
HTML comment on a line of its own:

    <!-- streamprune evaluation: made by `streamprune report`, replaced with it -->
    ...
    <!-- streamprune evaluation end -->

Everything outside these markers stays byte-identical, and a section may be moved with its markers. A card without a
section's markers gets the section at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec.structs import asdict

from streamprune import __version__
from streamprune.errors import ReportError
from streamprune.files.durable import reading, write_atomically, writing
from streamprune.formats.pick import storage_text
from streamprune.models.per_layer_experts import engines_note, has_per_layer_experts
from streamprune.progress import describe
from streamprune.reporting import charts, maps, tables
from streamprune.reporting.evaluations import NOT_THE_SOURCE
from streamprune.reporting.facts import GPU_SIZES, Course, Facts, Memory, read_facts
from streamprune.reporting.search import search_tables
from streamprune.reporting.search_page import draw_search
from streamprune.reporting.summary import as_served, serving_programs, summary_sentences
from streamprune.reporting.templates import render
from streamprune.selection.schedules import SCHEDULES
from streamprune.tables import Table
from streamprune.targets import ServingSpec

CARD_NAME, PAGE_NAME, PICTURES_FOLDER = "README.md", "report.html", "pictures"
#: The sections of the card that the report writes, in the order in which they are added to a card without them.
SECTIONS = ("evaluation", "generation", "pictures")
#: Every picture that a report may have.
ALL_PICTURES = {
    "experts", "map", "memory", "search", "retention", "energy", "channels", "refit", "loss", "depth", "tokens",
    "course",
}  # fmt: skip


def write_report(output: Path) -> Path:
    """Make the report of the model in `output`, replacing an earlier one; returns its path.

    It only depends on the folder's files and the log next to it. Nothing is written before everything is made, and no
    file is ever incomplete; in the card only the report's own sections change. Raises ReportError, ScoresError or
    CheckpointError for damaged parts, OutputError or ResourceError if it cannot be written.
    """
    facts = read_facts(output)
    sections = {section.name: section for section in sections_of(facts)}
    pictures = {
        name: charts.draw_picture(name, section.draw) for name, section in sections.items() if section.draw is not None
    }
    page, card = page_of(facts, sections, pictures), _card(output / CARD_NAME, facts, pictures)
    folder = output / PICTURES_FOLDER
    with writing(f"Writing the report to {output}", output):
        folder.mkdir(exist_ok=True)
        for name, each in pictures.items():
            write_atomically(folder / f"{name}.png", each.png)
        # Remove pictures of an earlier report that this one does not have.
        for name in ALL_PICTURES - pictures.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)
        write_atomically(output / PAGE_NAME, page.encode())
        if card is not None:
            write_atomically(output / CARD_NAME, card)
    return output / PAGE_NAME


@dataclass(frozen=True)
class Section:
    """A section of the report with figures: its tables, and how to draw its picture. (The template has the texts.)"""

    name: str
    tables: Sequence[Table]
    draw: Callable[[], charts.Drawing] | None = None


def sections_of(facts: Facts) -> Iterator[Section]:
    """Every section for which there is data. Draws nothing yet."""
    record, memory, text, course = facts.record, facts.memory, facts.text, facts.course
    yield Section("experts", [tables.layers_table(record)], partial(charts.draw_experts, record))
    yield Section("map", [tables.scores_table(record)], partial(maps.draw_map, record))
    if isinstance(memory, Memory):
        budget = record.use.budget_bytes if record.use else None
        yield Section("memory", [tables.memory_table(memory, budget)], partial(charts.draw_memory, memory, budget))
    if facts.search is not None:
        yield Section("search", [*search_tables(facts.search)], partial(draw_search, facts.search))
    # Where all experts stay, all of their saliency does.
    if facts.retained and record.removes_experts:
        shown = [*tables.retention_tables(record, facts.retained)]
        yield Section("retention", shown, partial(charts.draw_retention, facts.retained))
    yield from _sections_of_narrower(facts)
    if text is not None:
        others = [table for other in facts.other_texts for table in tables.other_loss_tables(other)]
        yield Section("loss", [*tables.loss_tables(text), *others], partial(charts.draw_losses, text))
        if any(each.hidden_error for each in text.rows):
            yield Section("depth", [tables.depth_table(text)], partial(charts.draw_depth, text))
    if facts.generation is not None:
        yield Section("generation", [*tables.generation_tables(facts.generation)])
    if facts.tasks is not None or facts.other_tasks:
        own = [tables.tasks_table(facts.tasks)] if facts.tasks is not None else []
        yield Section("tasks", [*own, *map(tables.other_tasks_table, facts.other_tasks)])
    if record.calibration is not None:
        yield Section("calibration", [tables.calibration_table(record.calibration, record.settings.mix)])
    if all(layer.counts for layer in record.layers):
        yield Section("tokens", [tables.tokens_table(record)], partial(charts.draw_tokens, record))
    if isinstance(course, Course) and course.layers:
        yield Section("course", [tables.course_table(course)], partial(charts.draw_course, course))


def _sections_of_narrower(facts: Facts) -> Iterator[Section]:
    """Those of narrower, refitted and rounded experts."""
    record, width = facts.record, facts.record.settings.width
    if facts.energy:
        shown = [*tables.retention_tables(record, facts.energy, "Energy")]
        drawn = partial(charts.draw_retention, facts.energy, "energy of all channels", "experts and channels")
        yield Section("energy", shown, drawn)
    if facts.channels is not None and width is not None:
        drawn = partial(maps.draw_channels, list(record.counts), facts.channels, width)
        yield Section("channels", [tables.channels_table(record, facts.channels)], drawn)
    if record.refit and record.refit.layers:
        shown = [tables.refit_table(record.refit), tables.refit_by_layer_table(record.refit)]
        yield Section("refit", shown, partial(charts.draw_refit, record.refit))
    if record.rounding and record.rounding.layers:
        yield Section("rounding", [tables.rounding_table(record.rounding)])


def page_of(facts: Facts, sections: Mapping[str, Section], pictures: Mapping[str, charts.Picture]) -> str:
    """The page, as HTML, with these sections and pictures by their names."""
    record = facts.record
    schedule = SCHEDULES.get(record.settings.schedule or "")
    use = record.use.spec if record.use else ServingSpec()
    return render(
        "report.html.j2",
        facts=facts,
        storage_text=storage_text,
        use=use,
        summary=list(summary_sentences(facts)),
        programs=serving_programs(as_served(record, facts.config), use),
        engines=engines_note(True) if has_per_layer_experts(record.counts) else None,
        gpu_sizes=GPU_SIZES,
        describe_busy=lambda busy: describe(asdict(busy)).removeprefix("busy: "),
        schedule_meaning=schedule.meaning if schedule else "a file says how many each layer keeps",
        unseen=sum(layer.counts.count(0) for layer in record.layers),
        sections=sections,
        pictures=pictures,
        version=__version__,
    )


def _card(path: Path, facts: Facts, pictures: Mapping[str, charts.Picture]) -> bytes | None:
    """The card with the report's sections; None where there is none, or nothing would change in it."""
    if not path.is_file():
        return None
    with reading(path):
        old = path.read_bytes()
    values = {
        "texts": [facts.text, *facts.other_texts] if facts.text is not None else [],
        "tasks": [*([facts.tasks] if facts.tasks is not None else []), *facts.other_tasks],
        "other_tasks": facts.other_tasks,
        "not_the_source": NOT_THE_SOURCE,
        "tasks_table": tables.tasks_table,
        "generation": facts.generation,
        "generation_tables": tables.generation_tables,
        # The figures of the run's course differ from run to run: they are of no use to readers of the model card.
        "pictures": [each for each in pictures.values() if each.name != "course"],
        "folder": PICTURES_FOLDER,
    }
    new = with_sections(old, {name: render("card_sections.md.j2", section=name, **values) for name in SECTIONS})
    return new if new != old else None


def markers(name: str) -> tuple[str, str]:
    """The lines that begin and end a section."""
    return (
        f"<!-- streamprune {name}: made by `streamprune report`, replaced with it -->",
        f"<!-- streamprune {name} end -->",
    )


def with_sections(card: bytes, bodies: Mapping[str, str]) -> bytes:
    """The card with these bodies (Markdown) in its sections, which are some of SECTIONS; done twice it gives the same.

    An empty body empties its section if there is one, and adds none. Raises ReportError for a card in which a marker is
    missing or occurs twice: then it is unclear what may be replaced.
    """
    for name in SECTIONS:
        if name in bodies:
            card = _with_section(card, name, bodies[name].strip("\n"))
    return card


def _with_section(card: bytes, name: str, body: str) -> bytes:
    begin, end = (marker.encode() for marker in markers(name))
    inner = f"\n{body}\n".encode() if body.strip() else b"\n"
    found = card.count(begin), card.count(end)
    if found == (0, 0):
        if not body.strip():
            return card
        gap = b"" if not card else b"\n" if card.endswith(b"\n") else b"\n\n"
        return card + gap + begin + inner + end + b"\n"
    before, _, rest = card.partition(begin)
    _, ended, after = rest.partition(end)
    if found != (1, 1) or not ended:
        raise ReportError(
            f"README.md has {found[0]} lines that begin its section {name!r} and {found[1]} that end it, so it is not "
            "clear which lines belong to it. Remove them, and the section with them: it is made again."
        )
    return before + begin + inner + end + after
