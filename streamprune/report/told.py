"""Values of a JSON file that may come from a stranger: looked at one by one, and refused with their place in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.errors import ReportError
from streamprune.source.shard import show

#: Names of sources and tasks, and texts that are shown as they are.
LONGEST_NAME, LONGEST_TEXT = 1000, 10_000
#: What is listed: blocks, experts of a block, sources.
MOST_LISTED = 100_000
MOST_NUMBER = 2**53


@dataclass(frozen=True)
class Told:
    """A value, the file that it is from, where in it, and what helps if it is not what it should be."""

    value: Any = field(repr=False)
    file: Path
    advice: str
    where: str = ""

    def wrong(self, wanted: str) -> ReportError:
        """The error to raise for this value."""
        what = f"{self.where} is {show(self.value)}" if self.where else "it"
        return ReportError(f"{self.file}: {what}, but should be {wanted}. {self.advice}")

    def at(self, key: str) -> Told:
        """The entry of an object. Raises ReportError where there is none."""
        if not isinstance(self.value, dict) or key not in self.value:
            raise ReportError(f"{self.file}: {self.where or 'it'} has no {key!r} where one has to be. {self.advice}")
        return Told(self.value[key], self.file, self.advice, f"{self.where}.{key}" if self.where else key)

    def maybe(self, key: str) -> Told | None:
        """The entry of an object; None where it is missing or null."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.at(key) if self.value.get(key) is not None else None

    def each(self) -> Iterator[Told]:
        """The entries of a list."""
        if not isinstance(self.value, list) or len(self.value) > MOST_LISTED:
            raise self.wrong("a list")
        for number, entry in enumerate(self.value):
            yield Told(entry, self.file, self.advice, f"{self.where}[{number}]")

    def pairs(self) -> Iterator[tuple[str, Told]]:
        """The entries of an object, by name."""
        if not isinstance(self.value, dict) or len(self.value) > MOST_LISTED:
            raise self.wrong("an object")
        for key, entry in self.value.items():
            Told(key, self.file, self.advice, f"a name in {self.where or 'it'}").name()
            yield key, Told(entry, self.file, self.advice, f"{self.where}.{key}" if self.where else key)

    def name(self) -> str:
        """A short text that can be printed."""
        if not isinstance(self.value, str) or not self.value.isprintable() or not 0 < len(self.value) <= LONGEST_NAME:
            raise self.wrong("a name")
        return self.value

    def text(self) -> str:
        """A text of one line or more."""
        if not isinstance(self.value, str) or len(self.value) > LONGEST_TEXT:
            raise self.wrong("a text")
        if not all(character.isprintable() or character in "\n\t" for character in self.value):
            raise self.wrong("a text that can be printed")
        return self.value

    def whole(self, least: int = 0, most: int = MOST_NUMBER) -> int:
        """A whole number."""
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.wrong(f"a whole number from {least:,} to {most:,}")
        return self.value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number."""
        if type(self.value) not in (int, float) or not abs(self.value) <= 1e300 or not least <= self.value <= most:
            bounds = f" from {least:g} to {most:g}" if (least, most) != (-math.inf, math.inf) else ""
            raise self.wrong(f"a number{bounds}")
        return float(self.value)

    def flag(self) -> bool:
        """Yes or no."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value
