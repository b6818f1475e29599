"""`streamprune report`: an output's report.html, its pictures, and their sections in the model card."""

from __future__ import annotations

from pathlib import Path

from streamprune.disk.disk_errors import reading, writing
from streamprune.disk.durable import write_whole
from streamprune.report.card import card_sections
from streamprune.report.facts import read_facts
from streamprune.report.page import page
from streamprune.report.parts import parts_of_report, summary_rows
from streamprune.report.style import Picture, picture
from streamprune.result.sections import with_sections

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
