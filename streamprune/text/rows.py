"""Rows: records as they are in their files, before anything is made of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: Rows that are held at most to be drawn from in a random order, and bytes of them as they are in their files. (Token
#: ids and other numbers take about eight times as much in memory.)
MOST_HELD_ROWS, MOST_HELD_BYTES = 10_000, 1 << 25


@dataclass
class Row:
    """One record: its fields by name, where it stands (for messages), and about how many bytes it takes."""

    place: str
    values: dict[str, Any] = field(repr=False)
    nbytes: int


def shuffled(rows: Iterator[Row], rng: random.Random, most_rows: int = MOST_HELD_ROWS) -> Iterator[tuple[int, Row]]:
    """Rows in a random order, each with its number in the original one.

    Of a long source only `most_rows` are held, from which the next one is drawn: it never has to be read to its end.
    """
    held: list[tuple[int, Row]] = []
    nbytes = 0
    for item in enumerate(rows):
        held.append(item)
        nbytes += item[1].nbytes
        while held and (len(held) > most_rows or nbytes > MOST_HELD_BYTES):
            place = rng.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            drawn = held.pop()
            nbytes -= drawn[1].nbytes
            yield drawn
    rng.shuffle(held)
    yield from held
