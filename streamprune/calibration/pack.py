"""From documents to sequences of tokens: how much of each source is wanted, and how documents are packed or cut.

Sequences are made as they are needed, so that of a long source only a part is read. Nothing is padded, so that no
padding is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import torch

from streamprune.calibration.chat import Chat
from streamprune.calibration.left_out import LeftOut
from streamprune.calibration.messages import is_empty
from streamprune.calibration.recipe import Recipe, Source
from streamprune.calibration.records import content_of
from streamprune.calibration.rows import Row
from streamprune.calibration.sources import rows_of
from streamprune.calibration.tokens import TokenMaker
from streamprune.common_settings import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN
from streamprune.errors import BadRecordError, CalibrationError

#: A source with fewer tokens is pointed out.
FEW_TOKENS = 1000
#: So many records are read before they are judged by the share of bad ones.
_LEAST_JUDGED = 1000
#: Lengths that a bucketed document may have between one power of two and the next.
BUCKETS = 16


class Packer:
    """Divides documents, laid end to end, into full sequences of `length` tokens, each beginning with `prefix`."""

    def __init__(self, prefix: list[int], length: int) -> None:
        self._prefix, self._length = prefix, length
        self._buffer: list[int] = []

    def add(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        """Append a document piece by piece, and yield each sequence that is now full."""
        for piece in pieces:
            self._buffer += piece
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

    def add(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        """The sequence of a document, of which no more pieces are used than it takes; none without tokens."""
        document: list[int] = []
        for piece in pieces:
            document += piece
            if len(document) >= self._length:
                break
        if document:
            sequence = (_missing(self._prefix, document, 0) + document)[: self._length]
            yield sequence[: bucket(len(sequence))] if self._bucketed else sequence


def bucket(length: int) -> int:
    """The largest bucket's length that is not above `length`: one of sixteen between two powers of two."""
    step = max(1, (1 << (length.bit_length() - 1)) // BUCKETS)
    return length // step * step


def _missing(prefix: list[int], tokens: list[int], begin: int) -> list[int]:
    """The prefix, or [] if the tokens already start with it, since chat templates add the BOS token themselves."""
    return [] if prefix and tokens[begin : begin + len(prefix)] == prefix else prefix


@dataclass(frozen=True)
class SourceTarget:
    """How much of a source is wanted: sequences, tokens or records; and its share of all tokens, if stated."""

    sequences: int | None = None
    tokens: int | None = None
    records: int | None = None
    share: float | None = None


def targets_of(recipe: Recipe, samples: int | None) -> list[SourceTarget]:
    """How much to take from each source.

    `samples` (--samples) replaces the recipe's number of sequences, or of records if the recipe is `by_count`.
    Raises CalibrationError if a source of a recipe would get nothing.
    """
    length = recipe.sequence_length or DEFAULT_SEQ_LEN
    if recipe.by_count:
        counts = [source.samples or 0 for source in recipe.sources]
        if samples is not None:
            counts = divided(samples, counts)
        _check_counts(recipe, counts, "records")
        return [SourceTarget(sequences=None if recipe.mode == "packed" else count, records=count) for count in counts]
    weights = [source.share or 1.0 for source in recipe.sources]
    if samples is None and recipe.tokens is not None:
        tokens = recipe.tokens
        samples = max(1, tokens // length)
    else:
        samples = samples or recipe.samples or DEFAULT_SAMPLES
        tokens = samples * length
    counts = divided(samples, weights)
    if not recipe.strict:
        return [SourceTarget(sequences=count) for count in counts]
    if recipe.mode == "packed":
        _check_counts(recipe, counts, f"sequences of {length} tokens")
        counts = [count * length for count in counts]
    else:
        counts = divided(tokens, weights)
        _check_counts(recipe, counts, "tokens")
    return [
        SourceTarget(tokens=count, records=source.samples, share=weight / sum(weights))
        for count, source, weight in zip(counts, recipe.sources, weights, strict=True)
    ]


def _check_counts(recipe: Recipe, counts: Sequence[int], what: str) -> None:
    if 0 in counts:
        raise CalibrationError(
            f"Source {recipe.sources[counts.index(0)].name!r} of recipe {recipe.name!r} would get 0 of "
            f"{sum(counts):,} {what}. Give more --samples."
        )


def divided(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided into integers in proportion to weights; those with the largest remainders are rounded up."""
    # Exact fractions, since totals may exceed the integers that floats represent.
    fractions = [Fraction(weight) for weight in weights]
    exact = [total * weight / sum(fractions) for weight in fractions]
    parts = [int(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


class _Made(NamedTuple):
    """A sequence and its sort key within the source: pretokenized sequences, which are never cut, come first."""

    is_cuttable: bool
    number: int
    ids: list[int]


class Supply:
    """The sequences taken from one source: int64 token ids (L,), with `tokens` in total.

    `records` is the number of records drawn for them, of `rows_seen`, and `left_out` says what was not used. `commit`
    is that of a Hub data set. A share `skip_bad` of the records may be bad. Opening the source raises CalibrationError
    if it cannot be read.
    """

    def __init__(
        self,
        source: Source,
        target: SourceTarget,
        recipe: Recipe,
        maker: TokenMaker,
        commit: str | None,
        skip_bad: float,
    ) -> None:
        self.source, self.target, self.commit = source, target, commit
        self.tokens = self.records = self.rows_seen = self._tokens_seen = self._number = 0
        self._taken: list[tuple[bool, int, torch.Tensor]] = []
        self._skip_bad = skip_bad
        self._recipe, self._maker, self._length = recipe, maker, recipe.sequence_length or DEFAULT_SEQ_LEN
        self.left_out = LeftOut()
        self._made = self._make(rows_of(source, recipe.seed, commit, self.left_out))

    @property
    def sequences(self) -> list[torch.Tensor]:
        """The sequences taken so far. Pretokenized ones are in the order of the source."""
        return [ids for _, _, ids in sorted(self._taken, key=lambda taken: taken[:2])]

    def take(self, count: int) -> int:
        """Take up to `count` more sequences, and return how many there were."""
        before = len(self._taken)
        for made in islice(self._made, count):
            self._keep(made)
        return len(self._taken) - before

    def take_target(self) -> None:
        """Take sequences until the target's tokens are reached, or its records are used up."""
        if self.target.tokens is None:
            for each in self._made:
                self._keep(each)
            return
        while (rest := self.target.tokens - self.tokens) > 0:
            made = next(self._made, None)
            if made is None or (not made.is_cuttable and self._taken and len(made.ids) > 2 * rest):
                # No sequence is left, or with it the excess is larger than the shortfall without it.
                return
            self._keep(made._replace(ids=made.ids[:rest]) if made.is_cuttable else made)

    def check(self) -> None:
        """Raise CalibrationError, naming the source, if it has nothing, or less than its recipe requires."""
        target, reason = self.target, None
        self._check_bad(self.rows_seen)
        if not self._taken and not self.records and self.source.filter and self.rows_seen > self.left_out.empty:
            reason = f": none of its {self.rows_seen:,} records passes its 'filter'."
        elif not self.records and not self._taken:
            reason = f": it contains no text, in {self.rows_seen:,} records."
        elif not self._taken:
            reason = (
                f": the text is shorter than one sequence of {self._length} tokens: it has {self._tokens_seen:,}, in "
                f"{self.records:,} records. Give more text or a smaller --seq-len."
            )
        elif target.share is None and self.records < (target.records or 0):
            reason = (
                f" is too short: it has {self.records:,} of the {target.records:,} required records. "
                "Reduce 'samples' of this source, or of all sources with --samples."
            )
        elif target.tokens is not None and self.tokens < target.tokens * 0.99:
            within = f" in the {target.records:,} records that may be drawn" if self.records == target.records else ""
            reason = (
                f" is too short: it has {self.tokens:,} tokens{within}, {self.tokens / target.tokens:.0%} of the "
                f"{target.tokens:,} required for its share of {target.share or 0:.1%}. Give fewer --samples, a "
                "smaller share, or more text."
            )
        if reason is not None:
            raise CalibrationError(self._name + reason)

    def notes(self) -> Iterator[str]:
        """What to tell the user of the source, in numbers."""
        wanted = self.target.tokens or (self.target.sequences or self.target.records or 0) * self._length
        # (Fewer sequences than were wanted are noted for all sources together.)
        if self.tokens < min(FEW_TOKENS, wanted) and len(self._taken) >= (self.target.sequences or 0):
            yield f"it gives only {self.tokens:,} tokens, from {self.records:,} records."
        yield from self.left_out.notes(self.rows_seen)

    @property
    def _name(self) -> str:
        if self._recipe.strict:
            return f"Source {self.source.name!r} of recipe {self._recipe.name!r}"
        return ", ".join(map(str, self.source.paths)) or self.source.name

    def _keep(self, made: _Made) -> None:
        self._taken.append((made.is_cuttable, made.number, torch.tensor(made.ids, dtype=torch.int64)))
        self.tokens += len(made.ids)

    def _make(self, rows: Iterator[tuple[int, Row]]) -> Iterator[_Made]:
        for index, row in rows:
            self.rows_seen += 1
            try:
                yield from self._sequences_of(index, row)
            except BadRecordError as error:
                self._pass_over(error)
            if self.records == self.target.records:
                return

    def _sequences_of(self, index: int, row: Row) -> Iterator[_Made]:
        """The sequences that are full with a record. Raises BadRecordError if it cannot be used."""
        content = content_of(row, self.source)
        if content is None:
            return
        if isinstance(content, list):
            ids = self._maker.ready(row.place, content)
            self.records += 1
            self._tokens_seen += len(ids)
            yield _Made(False, index, ids)
            return
        text = content if isinstance(content, str) else self._rendered(content)
        if not text.strip():
            self.left_out.empty += 1
            return
        pieces = self._without_placeholders(self._maker.pieces(row.place, text, ended=isinstance(content, str)))
        # (It counts as a record once the tokenizer takes it.)
        pieces = chain([next(pieces)], pieces)
        self.records += 1
        for ids in self._divider.add(pieces):
            self._number += 1
            yield _Made(True, self._number, ids)

    def _rendered(self, chat: Chat) -> str:
        self.left_out.parts.update(chat.left_out)
        self.left_out.chats += bool(chat.left_out)
        # Of a chat without any text a template would write only its own marks.
        return "" if is_empty(chat.messages) else self._maker.rendered(chat)

    def _without_placeholders(self, pieces: Iterator[list[int]]) -> Iterator[list[int]]:
        """Tokens without those that stand for an image or the like, as text in which their names are written has."""
        placeholders = self._maker.placeholders
        for ids in pieces:
            kept = [token for token in ids if token not in placeholders] if placeholders else ids
            self.left_out.placeholders += len(ids) - len(kept)
            self._tokens_seen += len(kept)
            yield kept

    def _pass_over(self, error: BadRecordError) -> None:
        """Count a bad record. Raises CalibrationError if too many are bad."""
        if not self._skip_bad:
            raise CalibrationError(f"{error} (To pass over a few bad records: --skip-bad 1%.)") from None
        self.left_out.bad += 1
        self.left_out.first_bad = self.left_out.first_bad or str(error)
        # (Judged by the share only once there are enough, and at the end.)
        self._check_bad(max(self.rows_seen, _LEAST_JUDGED))

    def _check_bad(self, records: int) -> None:
        bad = self.left_out.bad
        if bad > math.ceil(self._skip_bad * records):
            raise CalibrationError(
                f"{self._name}: {bad:,} of the first {self.rows_seen:,} records are bad, more than --skip-bad "
                f"{self._skip_bad * 100:.3g}% passes over. The first: {self.left_out.first_bad}"
            )

    @cached_property
    def _divider(self) -> Packer | Cutter:
        # (The prefix needs the tokenizer, which pretokenized records do not.)
        if self._recipe.mode == "packed":
            return Packer(self._maker.prefix, self._length)
        return Cutter(self._maker.prefix, self._length, self._recipe.mode == "bucketed")
