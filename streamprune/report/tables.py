"""The numbers of the report as tables, in HTML and in Markdown. Every figure has one, for those who cannot see it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
