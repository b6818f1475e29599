"""From documents to sequences. Nothing is ever padded, so that no padding is ever counted."""

from __future__ import annotations

from collections.abc import Iterator

#: Lengths that a bucketed document may have between one power of two and the next.
BUCKETS = 16


class Packer:
    """Divides documents, laid end to end, into full sequences of `length` tokens, each beginning with `prefix`."""

    def __init__(self, prefix: list[int], length: int) -> None:
        self._prefix, self._length = prefix, length
        self._buffer: list[int] = []

    def add(self, document: list[int]) -> Iterator[list[int]]:
        """Lay a document behind the last one; the sequences that are full now."""
        self._buffer += document
        begin = 0
        while True:
            head = _missing(self._prefix, self._buffer, begin)
            end = begin + self._length - len(head)
            if end > len(self._buffer):
                break
            yield head + self._buffer[begin:end]
            begin = end
        del self._buffer[:begin]


class Cutter:
    """Makes every document a sequence by itself, cut at `length`, and `bucketed` at the bucket below its own length."""

    def __init__(self, prefix: list[int], length: int, bucketed: bool) -> None:
        self._prefix, self._length, self._bucketed = prefix, length, bucketed

    def add(self, document: list[int]) -> Iterator[list[int]]:
        """The document's sequence; none for a document without tokens."""
        if document:
            sequence = (_missing(self._prefix, document, 0) + document)[: self._length]
            yield sequence[: bucket(len(sequence))] if self._bucketed else sequence


def bucket(length: int) -> int:
    """The largest bucket's length that is not above `length`: one of sixteen between two powers of two."""
    step = max(1, (1 << (length.bit_length() - 1)) // BUCKETS)
    return length // step * step


def _missing(prefix: list[int], tokens: list[int], begin: int) -> list[int]:
    """What has to stand before these tokens: chat templates write the beginning-of-text token themselves."""
    return [] if prefix and tokens[begin : begin + len(prefix)] == prefix else prefix
