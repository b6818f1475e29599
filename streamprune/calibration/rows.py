"""Records of JSON files, of one per line or in one array, however long the file is. Nothing in them is trusted."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, BinaryIO

from streamprune.errors import BadRecordError, CalibrationError, CommentedJsonError
from streamprune.files.json_text import json_fault, parse_json
from streamprune.hardware.memory import format_bytes

#: The longest line, or record of an array, that is read. Parsed, it can take twenty times as much memory.
MOST_LINE_BYTES = 1 << 28
#: Characters of an array that are read at a time. A longer record takes twice as many each time.
_CHUNK = 1 << 16
#: How many bytes at the start of a file decide what it is, if they hold a whole line.
_SNIFFED_BYTES = 1 << 10
_NO_SPACE = re.compile(r"\S")
#: Comments, which some programs allow in their JSON, with the space around them.
_COMMENTS = re.compile(rb"(\s|//[^\n]*(\n|$)|/\*.*?(\*/|$))*", re.DOTALL)
#: Where a parser of JSON ends at a comment, or behind a trailing comma.
_COMMENTED = re.compile(r"/[/*]|,?\s*[}\]]")
#: Programs of Windows begin their files with it.
BYTE_ORDER_MARK = "\ufeff"
#: The kinds of a JSON file: a record per line, one array of records, or something else.
LINES, ARRAY, OTHER = "lines", "array", "other"


@dataclass
class Row:
    """One record: its fields by name, its file and line (`place`, for messages), and its approximate size.

    `error` says why a bad record cannot be read: it has no fields then.
    """

    place: str
    values: dict[str, Any] = field(repr=False)
    nbytes: int
    error: BadRecordError | None = None


def json_kind(stream: BinaryIO) -> tuple[str, dict[str, Any]]:
    """What the JSON file in a stream is, by its beginning: LINES, ARRAY or OTHER; and its first record, if it has one.

    An array of text is one of records too, each with a `text`; an array of numbers or of arrays is not. Comments are
    passed over.
    """
    begin = stream.read(_SNIFFED_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    array = _COMMENTS.sub(b"", begin, count=1)
    if array.startswith(b"["):
        item = _COMMENTS.sub(b"", array[1:], count=1)
        return (ARRAY if item[:1] in (b"{", b'"', b"]") else OTHER), {}
    if not begin.startswith(b"{"):
        return OTHER, {}
    line, end, _ = begin.partition(b"\n")
    try:
        # (Not a whole file without line ends.)
        record = parse_json(line if end else line + stream.readline(MOST_LINE_BYTES))
    except (ValueError, RecursionError):
        return OTHER, {}
    return LINES, record


def _bare(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).strip()


def read_lines(name: str, stream: BinaryIO) -> Iterator[Row]:
    """The records of a file with one per line; a bad one is a row with an error.

    Raises CalibrationError, naming the line, if it is too long.
    """
    position = 0
    for number in count(1):
        place = f"{name} line {number}"
        line = read_line(stream, place)
        if not line:
            return
        if _bare(line):
            yield _row(line.removeprefix(codecs.BOM_UTF8), place, position, "Fix or remove the line.")
        position += len(line)


def read_line(stream: BinaryIO, place: str) -> bytes:
    """The next line of a stream. Raises CalibrationError if it is too long."""
    data = stream.readline(MOST_LINE_BYTES + 1)
    if len(data) > MOST_LINE_BYTES:
        raise _too_long(place)
    return data


def read_array(name: str, stream: BinaryIO) -> Iterator[Row]:
    """The records of a JSON array, of which only the current one and a chunk of the file are held.

    A text in the array is a record with this `text`. An item of another kind is a row with an error. Raises
    CalibrationError, naming the record, where the file is no JSON or a record is too long; CommentedJsonError where
    that is for a comment or a trailing comma.
    """
    text = _Text(stream, name)
    text.skip("[")
    for number in count(1):
        if text.begins_with("]"):
            break
        place = f"{name} record {number}"
        data = text.value(place).encode()
        yield _text_row(data, place) if data.startswith(b'"') else _row(data, place, 0, "Fix or remove it.")
        if not text.begins_with("]"):
            text.skip(",")
    text.skip("]")
    if not text.is_over():
        raise CalibrationError(f"{name} has more after the end of its array. Give one array, or one record per line.")


class _Text:
    """The text of a JSON file, read as far as it is parsed. `name` is for error messages."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._ended, self._read = "", False, 0
        # Where the rest begins. (Cutting off what was parsed would copy all that was read, for each record.)
        self._at = 0

    def begins_with(self, mark: str) -> bool:
        """Whether the next character, without white space, is this one."""
        return not self.is_over() and self._text.startswith(mark, self._at)

    def is_over(self) -> bool:
        """Whether nothing but white space is left."""
        while True:
            if found := _NO_SPACE.search(self._text, self._at):
                self._at = found.start()
                return False
            if self._ended:
                return True
            self._at = len(self._text)
            self._more(_CHUNK)

    def skip(self, mark: str) -> None:
        """Go on behind this character. Raises CalibrationError if another one is here."""
        if not self.begins_with(mark):
            if self.begins_with("/"):
                raise _commented(self._name, f"'/' where {mark!r} belongs")
            found = "the end of the file" if self.is_over() else f"{self._text[self._at]!r}"
            raise CalibrationError(
                f"{self._name} is not a valid JSON array: {found} where {mark!r} belongs, in the {self._read:,} bytes "
                "that were read. Was the file cut? Download it again."
            )
        self._at += 1

    def value(self, place: str) -> str:
        """The JSON text of the value that begins here. Raises CalibrationError, naming it, if there is none."""
        while True:
            reason = "the file ends within it"
            if not self.is_over():
                try:
                    end = self._scan(self._text, self._at)[1]
                except (ValueError, RecursionError) as error:
                    reason = str(error)[:300]
                    if isinstance(error, json.JSONDecodeError) and _COMMENTED.match(self._text, error.pos):
                        raise _commented(place, reason) from None
                else:
                    # (The rest of a number might not be read yet.)
                    if end < len(self._text) or self._ended:
                        found, self._at = self._text[self._at : end], end
                        return found
            if self._ended:
                raise CalibrationError(f"{place} is not valid JSON: {reason}. Was the file cut? Download it again.")
            if len(self._text) - self._at > MOST_LINE_BYTES:
                raise _too_long(place)
            # Doubled, so that a long record is not parsed from its start for each chunk.
            self._more(max(_CHUNK, len(self._text) - self._at))

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_text(self._name, self._read + error.start) from None
        self._at = 0
        self._read += len(data)
        self._ended = not data


def _commented(place: str, reason: str) -> CommentedJsonError:
    return CommentedJsonError(
        f"{place} is not valid JSON: {reason}. JSON has neither comments nor trailing commas: remove them."
    )


def _text_row(data: bytes, place: str) -> Row:
    return Row(place, {"text": json.loads(data)}, len(data))


def _row(data: bytes, place: str, position: int, advice: str) -> Row:
    try:
        return Row(place, _record_of(data, place, position, advice), len(data))
    except BadRecordError as error:
        return Row(place, {}, len(data), error)


def _record_of(data: bytes, place: str, position: int, advice: str) -> dict[str, Any]:
    try:
        record = parse_json(data)
    except UnicodeDecodeError as error:
        raise not_text(place, position + error.start, data) from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{place} is not valid JSON: {json_fault(error)}. {advice}") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"{place} holds a JSON {type(record).__name__}, not an object with 'text'.")
    return record


def not_text(place: str, position: int, begin: bytes = b"") -> BadRecordError:
    """The error for bytes that are not text; `begin` is how they begin."""
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return BadRecordError(f"{place} is not UTF-8 text but UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 FILE.")
    return BadRecordError(f"{place} is not UTF-8 text (byte {position:,}). Give plain text, JSONL or parquet.")


def _too_long(place: str) -> CalibrationError:
    return CalibrationError(
        f"{place} is longer than {format_bytes(MOST_LINE_BYTES)}, the limit. Split it into several records."
    )
