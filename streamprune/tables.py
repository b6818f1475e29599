"""`Table`: the same rows as terminal text, Markdown and HTML; and how numbers are written in it. No torch."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Characters with a meaning in Markdown, or in HTML within it.
_SPECIAL = re.compile(r"[\\`*_{}\[\]#!|~$<>&@]|:(?=//)")
#: Those of them that keep their meaning in HTML or a table even after a backslash.
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;"}
#: Untrusted names are cut at this length in Markdown code; no real name is longer.
_LONGEST_NAME = 300


class Struck(str):
    """A cell that is struck out."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Cells of text below the names of their columns. All text is escaped where it is rendered.

    `align` has a letter for each column, `l` or `r`; columns without one are right-aligned, and without any the first
    column is left-aligned. Rows may be shorter than `columns`: the missing cells are empty. `notes` are lines that
    the terminal and HTML show below the table. Cells may be `Struck`.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    align: str = "l"

    def __post_init__(self) -> None:
        width = len(self.columns)
        assert all(len(row) <= width for row in self.rows)
        object.__setattr__(self, "rows", tuple((*row, *[""] * (width - len(row))) for row in self.rows))

    def text(self, indent: str = "  ") -> list[str]:
        """The table as lines for a terminal: the title, then aligned columns and the notes, indented."""
        lines = [row for row in (self.columns, *self.rows) if any(row)]
        widths = [max(len(row[column]) for row in lines) for column in range(len(self.columns))] if lines else []
        pads = [str.ljust if self._is_left(column) else str.rjust for column in range(len(self.columns))]
        body = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in lines
        ]
        title = [self.title] if self.title else []
        return title + [f"{indent}{line}".rstrip() for line in (*body, *self.notes)]

    def markdown(self) -> list[str]:
        """The table as lines of Markdown, without its title and notes."""
        rules = ["---" if self._is_left(column) else "---:" for column in range(len(self.columns))]
        rows = [[_markdown_cell(cell) for cell in row] for row in (self.columns, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return [lines[0], f"|{'|'.join(rules)}|", *lines[1:]]

    def html(self) -> str:
        """The table as an HTML element. The first cell of a row is its heading.

        Closing tags that HTML does without are left out: the map of a large model has a hundred thousand cells.
        """
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        heads = [
            f'<th scope="col"{self._class(number)}>{html.escape(name)}' for number, name in enumerate(self.columns)
        ]
        lines = [f"<table>{caption}", f"<thead><tr>{''.join(heads)}<tbody>"]
        classes = [self._class(number) for number in range(len(self.columns))]
        for row in self.rows:
            cells = [f"<td{kind}>{_html_cell(cell)}" for kind, cell in zip(classes[1:], row[1:], strict=True)]
            lines.append(f'<tr><th scope="row"{classes[0]}>{_html_cell(row[0])}{"".join(cells)}')
        lines.append("</table>")
        return "\n".join([*lines, *(f"<p>{html.escape(note)}</p>" for note in self.notes)])

    def _is_left(self, column: int) -> bool:
        return self.align[column : column + 1] == "l"

    def _class(self, column: int) -> str:
        return ' class="l"' if self._is_left(column) else ""


def markdown(text: str) -> str:
    """Text escaped for Markdown, on one line."""
    return _SPECIAL.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), plain(text, None))


def plain(text: object, longest: int | None = _LONGEST_NAME) -> str:
    """Untrusted text on one line, without unprintable characters."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else "?" for char in line)[:longest]


def code(text: object) -> str:
    """Untrusted text as Markdown's inline code, also within a table."""
    line = plain(text).replace("|", "\\|") or " "
    # A fence longer than any within it. (CommonMark takes off one space at either side.)
    fence = "`" * (longest_fence(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def longest_fence(text: str) -> int:
    """The length of the longest run of backticks in a text."""
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


def _markdown_cell(cell: str) -> str:
    return f"~~{markdown(cell)}~~" if isinstance(cell, Struck) else markdown(cell)


def _html_cell(cell: str) -> str:
    return f"<s>{html.escape(cell)}</s>" if isinstance(cell, Struck) else html.escape(cell)


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 10**9 else f"{value:#.{digits}g}".rstrip(".")


def percent(share: float | None) -> str:
    """A share of 1 as a percentage; a dash for None."""
    return "–" if share is None else f"{share:.1%}"


def count(value: int | None) -> str:
    """A whole number with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,}"


def interval(ends: Sequence[float] | None, show: Callable[[float], str] = number) -> str:
    """An interval [low, high] as `low to high`; a dash for None."""
    return "–" if ends is None else f"{show(ends[0])} to {show(ends[1])}"
