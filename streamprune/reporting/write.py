"""Sections that are put into a model card after it was written, between markers. All else in the card stays as it is.

A section begins and ends with a line of its own that no reader sees:

    <!-- streamprune evaluation: made by `streamprune report`, replaced with it -->
    ...
    <!-- streamprune evaluation end -->

The card may be edited in between, moved markers included: what stands between them is replaced, whatever is outside
stays byte for byte. A card without the markers of a section gets it at its end.

What the report adds to the model card: what was measured, what helps if the model loops, and the pictures.

`streamprune report`: an output's report.html, its pictures, and their sections in the model card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from streamprune.errors import ReportError
from streamprune.files.durable import reading, write_whole, writing
from streamprune.reporting.charts import Picture, picture
from streamprune.reporting.facts import Facts, read_facts
from streamprune.reporting.page import page, parts_of_report, summary_rows
from streamprune.reporting.tables import card_table, generation_table, markdown, table_markdown, tasks_table

#: The sections that are known, in the order in which they come where a card has none of them.
SECTIONS = ("evaluation", "generation", "pictures")


def markers(name: str) -> tuple[str, str]:
    """The lines that begin and end a section."""
    return (
        f"<!-- streamprune {name}: made by `streamprune report`, replaced with it -->",
        f"<!-- streamprune {name} end -->",
    )


def with_sections(card: bytes, bodies: Mapping[str, str]) -> bytes:
    """The card with these bodies (Markdown) in its sections; doing it twice is doing it once.

    A body that is empty empties its section where there is one, and adds none. Raises ReportError for a card in which
    a marker is missing or stands twice: then nobody knows what may be replaced.
    """
    for name in (*SECTIONS, *(name for name in bodies if name not in SECTIONS)):
        if name in bodies:
            card = _with_section(card, name, bodies[name])
    return card


def _with_section(card: bytes, name: str, body: str) -> bytes:
    begin, end = (marker.encode() for marker in markers(name))
    inner = b"\n" + body.strip("\n").encode() + b"\n" if body.strip() else b"\n"
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
            f"README.md has {found[0]} lines that begin its section {name!r} and {found[1]} that end it, in no order "
            f"that tells what is between them. Remove them, and the section with them: it is made again."
        )
    return before + begin + inner + end + after


#: Its figures differ from run to run, and are of no use to whoever loads the model.
_NOT_ON_THE_CARD = ("course",)


def card_sections(facts: Facts, pictures: Sequence[Picture], folder: str) -> dict[str, str]:
    """The bodies of the card's sections in Markdown; `folder` is where the pictures lie, seen from the card."""
    return {
        "evaluation": "\n".join(_evaluation(facts)),
        "generation": "\n".join(_generation(facts)),
        "pictures": "\n".join(_pictures(pictures, folder)),
    }


def _evaluation(facts: Facts) -> Iterator[str]:
    if facts.text is None and not facts.tasks:
        return
    yield from ("## Evaluation", "")
    if facts.text is not None:
        text, told = facts.text, "; loss and KL divergence in nats per token, with intervals of 95 %:"
        against = f", against {markdown(text.original_words)}" if text.compared else ""
        yield f"On {text.text_words}{against}{told}"
        yield ""
        yield from table_markdown(card_table(facts.text))
        yield ""
    if facts.tasks:
        yield from ("Tasks, measured by lm-evaluation-harness:", "")
        yield from table_markdown(tasks_table(facts.tasks))


def _generation(facts: Facts) -> Iterator[str]:
    generation = facts.generation
    if generation is None:
        return
    yield from ("## Generation", "")
    if generation.loops:
        yield "**This model runs into loops.** Of the continuations that were tried:"
    elif generation.verdict == "unknown":
        yield "Continuations that were tried, too short to show loops:"
    else:
        yield "Continuations that were tried loop seldom or never, or no more than the original's:"
    yield ""
    yield from table_markdown(generation_table(generation))
    if generation.advice:
        yield from ("", "What helps:" if generation.loops else "Remarks:", "")
        yield from (f"- {markdown(sentence)}" for sentence in generation.advice)
    if generation.notes:
        yield ""
        yield from (markdown(sentence) for sentence in generation.notes)


def _pictures(pictures: Sequence[Picture], folder: str) -> Iterator[str]:
    shown = [each for each in pictures if each.name not in _NOT_ON_THE_CARD]
    if not shown:
        return
    yield from ("## Pictures", "", "`report.html` has them with all their numbers.", "")
    for each in shown:
        yield from (f"![{markdown(each.alt)}]({folder}/{each.name}.png)", "")


PAGE_NAME, PICTURES_FOLDER, CARD_NAME = "report.html", "pictures", "README.md"


def write_report(output: Path) -> Path:
    """Make the report of the model in `output`, in the place of an earlier one; returns where it lies.

    It is a function of what lies in the folder, and of the log beside it. Nothing is written before all of it is made,
    and every file whole or not at all; of the card only the report's own sections change. Raises ReportError,
    ScoresError or CheckpointError for parts that are damaged, OutputError or ResourceError where it cannot be written.
    """
    facts = read_facts(output)
    parts = list(parts_of_report(facts))
    pictures = [picture(part.name, part.alt, part.draw) for part in parts if part.draw is not None]
    loops = facts.generation is not None and facts.generation.loops
    text = page(facts.name, list(summary_rows(facts)), parts, {each.name: each for each in pictures}, loops)
    card = _card(output / CARD_NAME, card_sections(facts, pictures, PICTURES_FOLDER))
    with writing(f"Writing the report to {output}", output):
        _write_pictures(output / PICTURES_FOLDER, pictures)
        write_whole(output / PAGE_NAME, text.encode())
        if card is not None:
            write_whole(output / CARD_NAME, card)
    return output / PAGE_NAME


def _card(path: Path, sections: dict[str, str]) -> bytes | None:
    """The card with the sections; None where there is none, or nothing would change in it."""
    if not path.is_file():
        return None
    with reading(path):
        old = path.read_bytes()
    new = with_sections(old, sections)
    return new if new != old else None


def _write_pictures(folder: Path, pictures: list[Picture]) -> None:
    folder.mkdir(exist_ok=True)
    for each in pictures:
        write_whole(folder / f"{each.name}.png", each.png)
    # Those of an earlier report which this one has no more.
    for name in ALL_PICTURES - {each.name for each in pictures}:
        (folder / f"{name}.png").unlink(missing_ok=True)


#: Every picture that a report may have.
ALL_PICTURES = {"experts", "map", "memory", "retention", "loss", "depth", "tokens", "course"}
