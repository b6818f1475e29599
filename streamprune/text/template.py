"""Text templates over the fields of a record: `{instruction}`, `{meta.language}`, `{choices[0]}`; `{{` is a brace.

They name fields and nothing else: Python's own format strings could reach into objects and ask for endless padding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PATH = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[\d{1,9}\])*")
_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")

#: Characters of a path, which has to be shown where it leads nowhere.
MOST_PATH = 200

Path = tuple[str | int, ...]


class MissingFieldError(LookupError):
    """A record has no such field; the argument is the field as it was written."""


@dataclass(frozen=True)
class Template:
    """Literal pieces of text, each followed by the path of a field (None behind the last)."""

    pieces: tuple[tuple[str, Path | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises ValueError, saying what is wrong, where the text is no template."""
        pieces: list[tuple[str, Path | None]] = []
        literal, position = "", 0
        for match in _PIECE.finditer(text):
            literal += text[position : match.start()]
            position = match.end()
            if match.group() in ("{{", "}}"):
                literal += match.group()[0]
            elif match.group(1) is None:
                raise ValueError(f"a single {match.group()!r} (for a brace in the text, write it twice)")
            else:
                pieces.append((literal, parse_path(match.group(1))))
                literal = ""
        pieces.append((literal + text[position:], None))
        return cls(tuple(pieces))

    @property
    def fields(self) -> tuple[Path, ...]:
        """The paths of the fields, in order."""
        return tuple(path for _, path in self.pieces if path is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with the record's fields in it. Raises MissingFieldError for one that it does not have."""
        return "".join(
            literal + ("" if path is None else text_of(value_at(values, path))) for literal, path in self.pieces
        )


def parse_path(text: str) -> Path:
    """The steps to a field: names, and numbers for items of a list. ValueError if it is no such path."""
    if len(text) > MOST_PATH or not _PATH.fullmatch(text):
        what = text if len(text) <= MOST_PATH else f"{text[:MOST_PATH]}…"
        raise ValueError(
            f"{{{what}}} names no field; write for example {{question}}, {{meta.language}}, {{choices[0]}}"
        )
    return tuple(int(number) if number else name for number, name in _STEP.findall(text))


def path_text(path: Path) -> str:
    """A path as it is written in a template."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def value_at(values: Mapping[str, Any], path: Path) -> Any:
    """The field of a record that a path leads to; a missing value on the way (null) is one itself.

    Raises MissingFieldError for a field that the record does not have.
    """
    value: Any = values
    for step in path:
        if value is None:
            return None
        is_name = isinstance(step, str) and isinstance(value, Mapping) and step in value
        if is_name or (isinstance(step, int) and isinstance(value, list) and step < len(value)):
            value = value[step]
        else:
            raise MissingFieldError(path_text(path))
    return value


def text_of(value: Any) -> str:
    """A field as text: strings as they are, nothing for null, and JSON for all else."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
