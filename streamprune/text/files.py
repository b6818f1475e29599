"""From files and built-in text to records: documents, chats and token ids, with nothing in them trusted.

A file is read line by line or portion by portion: reading takes memory for what is kept of it, and for one line.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from streamprune import machine
from streamprune.errors import CalibrationError
from streamprune.machine import format_bytes
from streamprune.source.shard import parse_json, show
from streamprune.text import corpus

#: The calibration that needs no file: all domains of `corpus`, or some of them ("builtin:code,prose").
BUILTIN = "builtin"
#: Longer texts are cut at line ends into documents of about this many bytes, so that a few large files do not have to
#: be tokenized whole for a small sample.
DOCUMENT_BYTES = 1 << 16
#: The longest line that is read. Python needs up to twenty times as much for what stands in it.
MOST_LINE_BYTES = 1 << 28
#: A regular file is refused where several times its size exceeds what memory is available: all of it is kept.
_MEMORY_PER_BYTE, _SMALL_FILE_BYTES = 3, 1 << 26


@dataclass
class Record:
    """A document before tokenization: text, a chat, or ready token ids. `place` is for error messages."""

    place: str
    text: str | None = None
    messages: list[Any] | None = None
    input_ids: list[Any] | None = None


def read_source(source: str, seed: int, wanted_tokens: int) -> Iterator[Record]:
    """The records of one --calibration. Raises CalibrationError, naming the file and the line."""
    name, _, domains = source.partition(":")
    path = Path(source).expanduser()
    if name == BUILTIN and not path.exists():
        yield from _read_builtin(domains, seed, wanted_tokens)
    elif path.suffix.lower() in {".jsonl", ".ndjson"}:
        with _opened(path) as stream:
            yield from _read_jsonl(path, stream)
    else:
        with _opened(path) as stream:
            yield from _read_text(path, stream)


def _read_builtin(domains: str, seed: int, wanted_tokens: int) -> Iterator[Record]:
    names = domains.split(",") if domains else list(corpus.DOMAINS)
    unknown = [name for name in names if name not in corpus.DOMAINS]
    if unknown:
        raise CalibrationError(f"{BUILTIN}:{domains}: no domain {unknown[0]!r}. There are {', '.join(corpus.DOMAINS)}.")
    for name in names:
        # No tokenizer makes more than one token of a character; two endless domains must stop somewhere.
        budget = 6 * wanted_tokens // len(names) + corpus.DOCUMENT_CHARACTERS
        for number, text in enumerate(corpus.DOMAINS[name](seed)):
            if budget <= 0:
                break
            budget -= len(text)
            yield Record(f"{BUILTIN}:{name} document {number}", text=text)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.is_dir():
            raise CalibrationError(
                f"{path} is a folder. Give text or JSONL files, each with a --calibration of its own."
            )
        with path.open("rb") as stream:
            _check_size(path)
            yield stream
    except FileNotFoundError:
        raise CalibrationError(
            f"There is no calibration file {path}. Give a text or JSONL file, or {BUILTIN} for built-in text."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None


def _check_size(path: Path) -> None:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size < _SMALL_FILE_BYTES:
        return
    available = machine.available_memory_bytes()
    if _MEMORY_PER_BYTE * facts.st_size > available:
        raise CalibrationError(
            f"{path} has {format_bytes(facts.st_size)}, too much for the {format_bytes(available)} of memory that are "
            "available: calibration text is read whole. Give a part of it, such as its first 10,000 lines."
        )


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Record]:
    position, number = 0, 0
    while data := stream.read(DOCUMENT_BYTES):
        data += _line(stream, f"{path}, the line behind byte {position + len(data):,},")
        text = _decoded(data, str(path), position)
        position += len(data)
        if text.strip():
            number += 1
            yield Record(f"{path} (part {number})", text=text)


def _line(stream: BinaryIO, place: str) -> bytes:
    data = stream.readline(MOST_LINE_BYTES + 1)
    if len(data) > MOST_LINE_BYTES:
        raise CalibrationError(
            f"{place} is longer than {format_bytes(MOST_LINE_BYTES)}, which no document is. Divide it into lines."
        )
    return data


def _decoded(data: bytes, place: str, position: int) -> str:
    """Text with line ends as Python has them."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise _not_text(place, position + error.start) from None


def _not_text(place: str, position: int) -> CalibrationError:
    return CalibrationError(f"{place} is not UTF-8 text (byte {position:,}). Give plain text or JSONL.")


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Record]:
    position, number = 0, 0
    while True:
        number += 1
        place = f"{path} line {number}"
        line = _line(stream, place)
        if not line:
            return
        if line.strip():
            yield from _record_of(line, place, position)
        position += len(line)


def _record_of(line: bytes, place: str, position: int) -> Iterator[Record]:
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        raise _not_text(place, position + error.start) from None
    except (ValueError, RecursionError) as error:
        reason = str(error)[:300]
        raise CalibrationError(f"{place} is not valid JSON: {reason}. Mend or remove the line.") from None
    if not isinstance(record, dict):
        raise CalibrationError(f"{place} holds a JSON {type(record).__name__}, not an object with 'text'.")
    if isinstance(record.get("input_ids"), list):
        yield Record(place, input_ids=record["input_ids"])
    elif isinstance(record.get("messages"), list):
        yield Record(place, messages=record["messages"])
    elif isinstance(record.get("text"), str):
        if record["text"].strip():
            yield Record(place, text=record["text"])
    else:
        keys = ", ".join(show(key) for key in list(record)[:10]) or "nothing"
        raise CalibrationError(
            f"{place} has no 'text' (a string), 'messages' (a chat) or 'input_ids' (token numbers); it has {keys}."
        )
