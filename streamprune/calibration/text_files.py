"""The rows of files and folders: plain text, JSON and parquet, also compressed.

A file is read line by line, or a few rows at a time, and only as far as rows are asked for.
"""

from __future__ import annotations

import codecs
import gzip
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

from streamprune.calibration.left_out import LeftOut
from streamprune.calibration.recipe import USUAL_FIELDS, Source, file_opened
from streamprune.calibration.rows import (
    ARRAY,
    LINES,
    OTHER,
    Row,
    json_kind,
    not_text,
    read_array,
    read_line,
    read_lines,
)
from streamprune.errors import CalibrationError, CommentedJsonError

#: Longer texts are cut at line ends into documents of about this many bytes, so that a few large files do not have to
#: be tokenized as a whole for a small sample.
DOCUMENT_BYTES = 1 << 13
#: How many bytes at the start of a file decide whether it is text.
_SNIFFED_BYTES = 1 << 13
#: Rows of a parquet file that are decoded at a time. Few, since dictionary encoding can repeat one long text in each.
BATCH_ROWS = 16
#: Bytes of text, and numbers of columns and row groups, that a parquet file's description may claim.
_MOST_THRIFT_STRING, _MOST_THRIFT_ITEMS = 1 << 26, 1 << 20
#: Suffixes of compressed files, in pyarrow's words.
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_LINES_SUFFIXES = (".jsonl", ".ndjson")


def read_files(source: Source, rng: random.Random, left_out: LeftOut) -> Iterator[Row]:
    """The rows of a source's files, one file after the other in a random order.

    (A long source is not read to its end.) Raises CalibrationError now for a path without text, later for a file.
    """
    found = [(path, files_of(path)) for path in source.paths]
    left_out.files += [file for _, (_, others) in found for file in others]
    order = [(file, file != path) for path, (files, _) in found for file in files]
    rng.shuffle(order)
    is_stated = source.text is not None or source.field is not None or source.messages is not None

    def rows() -> Iterator[Row]:
        for file, is_within_folder in order:
            # (A folder of code has JSON that is no data.)
            yield from read_file(file, rng, left_out if is_within_folder and not is_stated else None)

    return rows()


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that a path names: itself, or all files in a folder in order of their names; and those skipped.

    Hidden files and files that do not look like text are skipped. Raises CalibrationError if no file is left.
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
    if path.suffix.lower() in _COMPRESSED:
        try:
            with _opened(path) as stream:
                data = stream.read(_SNIFFED_BYTES)
        except CalibrationError:
            return False
    else:
        with path.open("rb") as stream:
            data = stream.read(_SNIFFED_BYTES)
    try:
        # (The last bytes that were read may be the first half of a character.)
        codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < _SNIFFED_BYTES)
    except UnicodeDecodeError:
        return False
    return b"\0" not in data and bool(data.strip())


class _Decompressed(io.RawIOBase):
    """The contents of a compressed stream. Reading raises CalibrationError, naming the file, if it is damaged."""

    def __init__(self, path: Path, stream: BinaryIO, codec: str) -> None:
        self._path = path
        if codec == "gzip":
            self._stream: Any = gzip.GzipFile(fileobj=stream)
        else:
            # Imported where it is needed: it takes a second and 50 MiB.
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:
            # Damaged files fail as an OSError, an EOFError, or one of zlib's or Arrow's errors.
            reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            raise CalibrationError(f"{self._path} cannot be decompressed: {reason}. Download it again.") from None
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's contents, decompressed if its name says that it is compressed. Raises CalibrationError."""
    with file_opened(path) as stream:
        codec = _COMPRESSED.get(path.suffix.lower())
        if codec is None:
            yield stream
        else:
            yield cast(BinaryIO, io.BufferedReader(_Decompressed(path, stream, codec), 1 << 16))


def read_file(path: Path, rng: random.Random, left_out: LeftOut | None = None) -> Iterator[Row]:
    """The rows of a file: records of parquet and of JSON, as its suffix and its contents say, or else parts of text.

    With `left_out` JSON that is no records, or whose first has none of USUAL_FIELDS or a comment beside it, is text,
    and noted there. Raises CalibrationError, naming the file and the line.
    """
    if path.suffix.lower() == ".parquet":
        yield from read_parquet(path, rng)
        return
    kind = _kind(path)
    if left_out is not None and kind != OTHER and not _has_usual_fields(path, kind):
        kind = OTHER
        left_out.prose.append(path)
    elif left_out is not None and kind == OTHER and _suffix(path) == ".json":
        left_out.prose.append(path)
    with _opened(path) as stream:
        yield from {LINES: read_lines, ARRAY: read_array, OTHER: _read_text}[kind](str(path), stream)


def _kind(path: Path) -> str:
    """How a file is read: LINES, ARRAY, or OTHER for text."""
    suffix = _suffix(path)
    if suffix in _LINES_SUFFIXES:
        return LINES
    with _opened(path) as stream:
        kind, first = json_kind(stream)
    # Text that begins with a record is one per line, whatever its name is.
    return kind if suffix == ".json" or (kind == LINES and is_usual(first)) else OTHER


def _suffix(path: Path) -> str:
    """The suffix of a file, of a compressed one that of what is in it."""
    return (path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path).suffix.lower()


def _has_usual_fields(path: Path, kind: str) -> bool:
    """Whether the first record has a field that counts, and no comment in or behind it."""
    first: Row | None = None
    with _opened(path) as stream:
        rows = read_lines(str(path), stream) if kind == LINES else read_array(str(path), stream)
        try:
            first = next(rows, None)
            next(rows, None)
        except CommentedJsonError:
            return False
        except CalibrationError:
            # Reported when the file is read.
            pass
    return first is None or first.error is not None or is_usual(first.values)


def is_usual(record: dict[str, Any]) -> bool:
    """Whether a record has a field that counts where nothing else is stated."""
    return any(key in record for key in USUAL_FIELDS)


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


def _read_text(name: str, stream: BinaryIO) -> Iterator[Row]:
    position = number = 0
    while data := stream.read(DOCUMENT_BYTES):
        data += read_line(stream, f"{name}, the line after byte {position + len(data):,},")
        try:
            # With line ends as in Python's text mode.
            text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise not_text(name, position + error.start, data) from None
        position += len(data)
        if text.strip():
            number += 1
            yield Row(f"{name} (part {number})", {"text": text}, len(data))
