"""Names from strangers in Markdown: whatever is in them, they stay a piece of text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

#: No real name is longer.
_LONGEST = 300


def plain(text: object) -> str:
    """A stranger's text on one line, without characters that cannot be seen."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else "?" for char in line)[:_LONGEST]


def code(text: object) -> str:
    """A stranger's text as inline code, also within a table."""
    line = plain(text).replace("|", "\\|") or " "
    # A fence longer than any within it. (CommonMark takes off one space at either side.)
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def words(text: object) -> str:
    """A stranger's text as words, with nothing in it that Markdown or HTML takes for more."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", plain(text))


def block(text: str, language: str = "") -> Iterator[str]:
    """Lines with a block of code, whatever is in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    yield from (f"{fence}{language}", text, fence, "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with a table; the cells are Markdown already."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
