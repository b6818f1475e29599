"""From files, folders and built-in text to rows: records as they are in their files. Nothing in them is trusted.

A file is read line by line, or a few rows at a time, and only as far as rows are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from streamprune.calibration import builtin_text as corpus
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json
from streamprune.hardware.memory import format_bytes

#: The calibration that needs no file: all domains of `corpus`, or some of them ("builtin:code,prose").
BUILTIN = "builtin"
#: Rows that are held at most to be drawn from in a random order, and bytes of them as they are in their files. (Token
#: ids and other numbers take about eight times as much in memory.)
MOST_HELD_ROWS, MOST_HELD_BYTES = 10_000, 1 << 25
#: Longer texts are cut at line ends into documents of about this many bytes, so that a few large files do not have to
#: be tokenized as a whole for a small sample.
DOCUMENT_BYTES = 1 << 13
#: The longest line that is read. Python needs up to twenty times as much for what stands in it.
MOST_LINE_BYTES = 1 << 28
#: By its first so many bytes a file in a folder is taken for text, or for something else.
_SNIFFED_BYTES = 1 << 13
#: Rows of a parquet file that are decoded at a time. Few: in a small file one long text may stand for all of them.
BATCH_ROWS = 16
#: Bytes of text, and numbers of columns and row groups, that a parquet file's description may claim.
_MOST_THRIFT_STRING, _MOST_THRIFT_ITEMS = 1 << 26, 1 << 20


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


def named_path(text: str) -> tuple[Path, bool]:
    """The path that the user wrote, and whether there is something. CalibrationError for what can be no path here."""
    try:
        if "\0" in text:
            raise ValueError("it has a null character in it")
        path = Path(text).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # No permission, a name too long for the file system, or the home of a user who does not exist.
        reason = getattr(error, "strerror", None) or str(error)
        raise CalibrationError(f"{text[:300]!r} cannot be opened: {reason}.") from None


@contextmanager
def file_opened(path: Path) -> Iterator[BinaryIO]:
    """A file that the user named, for reading. Raises CalibrationError where that cannot be done."""
    try:
        if path.is_dir():
            raise CalibrationError(f"{path} is a folder, where a file is wanted.")
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise CalibrationError(
            f"There is no calibration file {path}. Give a recipe, a text, JSONL or parquet file, a folder of them, or "
            f"{BUILTIN} for built-in text."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None


def builtin_domains(source: str) -> list[str]:
    """The domains that `builtin` or `builtin:code,prose` names. Raises CalibrationError for unknown ones."""
    domains = source.partition(":")[2]
    names = domains.split(",") if domains else list(corpus.DOMAINS)
    if unknown := [name for name in names if name not in corpus.DOMAINS]:
        raise CalibrationError(f"{source}: no domain {unknown[0]!r}. There are {', '.join(corpus.DOMAINS)}.")
    return list(dict.fromkeys(names))


def read_builtin(domain: str, seed: int) -> Iterator[Row]:
    """The documents of a domain, in an order that the seed decides. Some never end."""
    for number, text in enumerate(corpus.DOMAINS[domain](seed)):
        yield Row(f"{BUILTIN}:{domain} document {number}", {"text": text}, len(text))


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that a path names: itself, or all of a folder in order of their names, and those of them left out.

    Left out are hidden files, and what seems to be no text. Raises CalibrationError where there is nothing to read.
    """
    try:
        if not path.is_dir():
            with file_opened(path):
                return [path], []
        inside = [each for each in sorted(path.rglob("*")) if each.is_file()]
        inside = [each for each in inside if not any(part[0] == "." for part in each.relative_to(path).parts)]
        taken = [each for each in inside if each.suffix.lower() == ".parquet" or _looks_like_text(each)]
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None
    if not taken:
        what = f"none of the {len(inside)} files in it is text, JSONL or parquet"
        raise CalibrationError(f"{path} cannot be calibrated on: {what if inside else 'there is no file in it'}.")
    return taken, [each for each in inside if each not in set(taken)]


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as stream:
        data = stream.read(_SNIFFED_BYTES)
    try:
        # The last few bytes may be the first half of a character.
        data[:-4].decode("utf-8")
    except UnicodeDecodeError as error:
        return len(data) > _SNIFFED_BYTES - 4 and error.start >= len(data) - 8
    return b"\0" not in data and bool(data.strip())


def read_files(paths: list[Path], rng: random.Random) -> Iterator[Row]:
    """The rows of files, one file after the other in a random order (a long source is not read to its end)."""
    order = list(paths)
    rng.shuffle(order)
    for path in order:
        yield from read_file(path, rng)


def read_file(path: Path, rng: random.Random) -> Iterator[Row]:
    """The rows of a file, by its suffix. Raises CalibrationError, naming the file and the line."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from read_parquet(path, rng)
        return
    with file_opened(path) as stream:
        is_jsonl = suffix in {".jsonl", ".ndjson"} or (suffix == ".json" and _begins_with_record(stream))
        yield from _read_jsonl(path, stream) if is_jsonl else _read_text(path, stream)


def _begins_with_record(stream: BinaryIO) -> bool:
    """Whether the first line is a JSON object by itself, as in many a `.json` that is JSONL."""
    line = stream.readline(MOST_LINE_BYTES)
    stream.seek(0)
    try:
        return isinstance(parse_json(line), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path: Path, rng: random.Random) -> Iterator[Row]:
    """The rows of a parquet file, its row groups in a random order. Raises CalibrationError, naming the file."""
    # Imported where it is needed: it takes a second and 50 MiB.
    import pyarrow.parquet

    limits = {"thrift_string_size_limit": _MOST_THRIFT_STRING, "thrift_container_size_limit": _MOST_THRIFT_ITEMS}
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, **limits) as file:
            groups = list(range(file.num_row_groups))
            rng.shuffle(groups)
            for group in groups:
                numbers = count(1)
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                    nbytes = batch.nbytes // max(1, batch.num_rows)
                    for values in batch.to_pylist():
                        yield Row(f"{path} row {next(numbers)} of row group {group + 1}", values, nbytes)
    except FileNotFoundError:
        raise CalibrationError(f"There is no calibration file {path}.") from None
    except Exception as error:
        # Damaged files fail as one of Arrow's errors, as an OSError, as a ValueError, or for lack of memory.
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise CalibrationError(f"{path} cannot be read as a parquet file: {reason}. Download it again.") from None


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Row]:
    position = number = 0
    while data := stream.read(DOCUMENT_BYTES):
        data += _line(stream, f"{path}, the line after byte {position + len(data):,},")
        try:
            # With line ends as Python has them.
            text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise _not_text(str(path), position + error.start) from None
        position += len(data)
        if text.strip():
            number += 1
            yield Row(f"{path} (part {number})", {"text": text}, len(data))


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Row]:
    position = 0
    for number in count(1):
        place = f"{path} line {number}"
        line = _line(stream, place)
        if not line:
            return
        if line.strip():
            yield Row(place, _record_of(line, place, position), len(line))
        position += len(line)


def _record_of(line: bytes, place: str, position: int) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        raise _not_text(place, position + error.start) from None
    except (ValueError, RecursionError) as error:
        reason = str(error)[:300]
        raise CalibrationError(f"{place} is not valid JSON: {reason}. Mend or remove the line.") from None
    if not isinstance(record, dict):
        raise CalibrationError(f"{place} holds a JSON {type(record).__name__}, not an object with 'text'.")
    return record


def _line(stream: BinaryIO, place: str) -> bytes:
    data = stream.readline(MOST_LINE_BYTES + 1)
    if len(data) > MOST_LINE_BYTES:
        raise CalibrationError(
            f"{place} is longer than {format_bytes(MOST_LINE_BYTES)}, which no document is. Divide it into lines."
        )
    return data


def _not_text(place: str, position: int) -> CalibrationError:
    return CalibrationError(f"{place} is not UTF-8 text (byte {position:,}). Give plain text, JSONL or parquet.")
