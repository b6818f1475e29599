"""Files that survive a crash: written under another name, flushed to the disk, then renamed. And disk errors.

After a power cut such a file is either the old one or the new one, complete (fsync(2), rename(2)).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamprune.errors import CheckpointError, OutputError, ResourceError
from streamprune.files.json_text import parse_json, read_limited
from streamprune.hardware.memory import format_bytes, free_disk_bytes

#: Portions that may wait to be hashed.
_MOST_PENDING = 4
#: The suffix of a file while it is written. Only a crash leaves such files, which are then useless.
PARTIAL = ".partial"


def kill_point(point: str) -> None:
    """Does nothing. tools/kill replaces it, to end the process at the named point."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file with these contents, or leave the old one. Raises OSError."""
    stream_atomically(path, [data])


def stream_atomically(path: Path, portions: Iterable[bytes | memoryview]) -> str:
    """Replace `path` by a file with these contents, portion by portion; returns their SHA-256 in hex.

    A portion must not change after it was yielded.
    """
    partial = path.with_name(path.name + PARTIAL)
    digest, pending = hashlib.sha256(), deque[Future[None]]()
    # Hashed in a thread while the next portions are written.
    with partial.open("wb") as stream, ThreadPoolExecutor(1) as hasher:
        for portion in portions:
            stream.write(portion)
            pending.append(hasher.submit(digest.update, portion))
            if len(pending) > _MOST_PENDING:
                pending.popleft().result()
        for each in pending:
            each.result()
        kill_point(f"{path.name}: written")
        stream.flush()
        os.fsync(stream.fileno())
    kill_point(f"{path.name}: flushed")
    partial.rename(path)
    kill_point(f"{path.name}: renamed")
    sync_folder(path.parent)
    kill_point(f"{path.name}: durable")
    return digest.hexdigest()


def names_in(folder: Path, but: tuple[str, ...] = ()) -> list[Path]:
    """The entries of a folder; empty if it does not exist."""
    try:
        return [path for path in folder.iterdir() if path.name not in but]
    except OSError:
        return []


def write_record(path: Path, body: Any) -> str:
    """Replace `path` by a JSON file with `body` and its checksum; returns the checksum."""
    text = json.dumps(body, ensure_ascii=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(path, f'{{"sha256": "{checksum}", "body": {text}}}\n'.encode())
    return checksum


def read_record(path: Path, limit: int = 2**30) -> Any:
    """The body of a file that `write_record` wrote; None if it is missing, damaged or larger than `limit` bytes."""
    try:
        record = parse_json(read_limited(path, limit))
        if not isinstance(record, dict) or set(record) != {"sha256", "body"}:
            return None
        text = json.dumps(record["body"], ensure_ascii=False)
    except (OSError, ValueError, RecursionError):
        return None
    return record["body"] if hashlib.sha256(text.encode()).hexdigest() == record["sha256"] else None


def checksum_of(path: Path) -> str | None:
    """The SHA-256 of a file in hex; None if it cannot be read, or is not a regular file."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def sync_file(path: Path) -> None:
    """Flush a file that other code wrote."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = "Then run the same command again: finished work is kept."


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError, or for a full disk into a ResourceError, that begins with `what`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in _FULL:
            raise ResourceError(
                f"{what} failed: the disk of {folder}{where} is full: {reason}{_free(folder)}. Free space. {_AGAIN}"
            ) from error
        raise OutputError(f"{what} failed{where}: {reason}. Check the disk and its permissions. {_AGAIN}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError about `path`, a file of the model."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror or error}. Was it moved or changed during the "
            f"run? Restore it, or check the disk. {_AGAIN}"
        ) from error


def _free(folder: Path) -> str:
    try:
        return f", {format_bytes(free_disk_bytes(folder))} free"
    except OSError:
        return ""
