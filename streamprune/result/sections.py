"""Sections that are put into a model card after it was written, between markers. All else in the card stays as it is.

A section begins and ends with a line of its own that no reader sees:

    <!-- streamprune evaluation: made by `streamprune report`, replaced with it -->
    ...
    <!-- streamprune evaluation end -->

The card may be edited in between, moved markers included: what stands between them is replaced, whatever is outside
stays byte for byte. A card without the markers of a section gets it at its end.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamprune.errors import ReportError

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
