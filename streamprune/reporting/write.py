"""`streamprune report`: an output's report.html, its pictures, and the report's sections in the model card.

A section of the card begins and ends with a line of its own that no reader sees:

    <!-- streamprune evaluation: made by `streamprune report`, replaced with it -->
    ...
    <!-- streamprune evaluation end -->

Everything outside these markers stays as it is, byte for byte, and a section may be moved with its markers. A card
without a section's markers gets the section at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from streamprune.errors import ReportError
from streamprune.files.durable import reading, write_atomically, writing
from streamprune.reporting.facts import Facts, read_facts
from streamprune.reporting.page import page, sections_of
from streamprune.reporting.pictures import Picture, picture
from streamprune.reporting.tables import generation_table, short_table, tasks_table
from streamprune.reporting.templates import render

CARD_NAME, PAGE_NAME, PICTURES_FOLDER = "README.md", "report.html", "pictures"
#: Every picture that a report may have.
ALL_PICTURES = {"experts", "map", "memory", "retention", "loss", "depth", "tokens", "course"}
#: Pictures whose figures differ from run to run: they are of no use to readers of the model card.
_NOT_ON_THE_CARD = {"course"}
#: The sections of the card that the report writes, in the order in which they are added to a card without them.
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


def card_sections(facts: Facts, pictures: Sequence[Picture]) -> dict[str, str]:
    """The bodies of the card's sections, in Markdown."""
    values = {
        "text": facts.text,
        "text_table": short_table(facts.text) if facts.text else None,
        "tasks_table": tasks_table(facts.tasks) if facts.tasks else None,
        "generation": facts.generation,
        "generation_table": generation_table(facts.generation) if facts.generation else None,
        "pictures": [each for each in pictures if each.name not in _NOT_ON_THE_CARD],
        "folder": PICTURES_FOLDER,
    }
    return {name: render("card_sections.md.j2", section=name, **values) for name in SECTIONS}


def write_report(output: Path) -> Path:
    """Make the report of the model in `output`, in the place of an earlier one; returns its path.

    It is a function of what is in the folder, and of the log beside it. Nothing is written before all of it is made,
    and no file is ever incomplete; of the card only the report's own sections change. Raises ReportError, ScoresError
    or CheckpointError for parts that are damaged, OutputError or ResourceError where it cannot be written.
    """
    facts = read_facts(output)
    sections = list(sections_of(facts))
    pictures = [picture(each.name, each.alt, each.draw) for each in sections if each.draw is not None]
    text = page(facts, sections, {each.name: each for each in pictures})
    card = _card(output / CARD_NAME, card_sections(facts, pictures))
    with writing(f"Writing the report to {output}", output):
        _write_pictures(output / PICTURES_FOLDER, pictures)
        write_atomically(output / PAGE_NAME, text.encode())
        if card is not None:
            write_atomically(output / CARD_NAME, card)
    return output / PAGE_NAME


def _card(path: Path, sections: Mapping[str, str]) -> bytes | None:
    """The card with the sections; None where there is none, or nothing would change in it."""
    if not path.is_file():
        return None
    with reading(path):
        old = path.read_bytes()
    new = with_sections(old, sections)
    return new if new != old else None


def _write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    folder.mkdir(exist_ok=True)
    for each in pictures:
        write_atomically(folder / f"{each.name}.png", each.png)
    # Those of an earlier report which this one does not have.
    for name in ALL_PICTURES - {each.name for each in pictures}:
        (folder / f"{name}.png").unlink(missing_ok=True)
