"""What is left out of a source's text, or read otherwise than it looks, to be said in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class LeftOut:
    """What is left out of a source; it grows while the source is read.

    `files` are not text; `prose` are JSON files that are read as plain text, since they are no records, or such without
    a usual field.
    `parts` counts, by type, what is not text in `chats` chats, and `placeholders` tokens that stand for an image or the
    like. `empty` records have no text, `bad` ones cannot be used (`first_bad` says why of the first).
    """

    files: list[Path] = field(default_factory=list)
    prose: list[Path] = field(default_factory=list)
    parts: Counter[str] = field(default_factory=Counter)
    chats: int = 0
    placeholders: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str = ""

    def notes(self, seen: int) -> Iterator[str]:
        """What to tell the user of a source of which `seen` records were read."""
        if self.files:
            yield (
                f"files left out, since they are empty or not text in UTF-8: {len(self.files):,}, first "
                f"{self.files[0]}."
            )
        if self.prose:
            yield (
                "JSON files read as plain text, since they are no records, or such without 'text', 'messages' or "
                f"'input_ids': {len(self.prose):,}, first {self.prose[0]}. (With 'text' or 'messages' a recipe says "
                "what counts.)"
            )
        if self.parts:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in self.parts.most_common(5))
            yield (
                f"{self.parts.total():,} parts that are not text ({listed}) in {self.chats:,} chats are left out: only "
                "text is calibrated on."
            )
        if self.placeholders:
            yield (
                f"{self.placeholders:,} tokens that stand for images or the like are left out, since nothing goes with "
                "them."
            )
        if self.empty:
            yield f"{self.empty:,} of {seen:,} records have no text."
        if self.bad:
            yield (
                f"{self.bad:,} of {seen:,} records are bad and passed over ({self.bad / seen:.1%}), first: "
                f"{self.first_bad}"
            )
