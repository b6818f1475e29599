"""Reading exact byte ranges of a file, and nothing around them. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, BinaryIO

from streamprune.errors import CheckpointError

#: Chunks of a range that the system is asked to read before they are needed.
_AHEAD_CHUNKS = 8


def read_into(file: int, position: int, into: list[memoryview]) -> int:
    """Fill buffers of bytes, one after the other, from an open file, from byte `position` on.

    Returns the number of bytes read: fewer than the buffers hold only where the file ends. `into` is emptied. Raises
    OSError.
    """
    start = position
    into[:] = filter(len, into)
    while into:
        moved = os.preadv(file, into, position)
        if moved == 0:
            break
        position += moved
        while into and moved >= len(into[0]):
            moved -= len(into.pop(0))
        if moved:
            into[0] = into[0][moved:]
    return position - start


def read_ranges(
    stream: BinaryIO, ranges: Iterable[tuple[int, int]], chunk_bytes: int = 1 << 20
) -> Iterator[memoryview]:
    """Yield the bytes of `ranges` (begin, end) of an open file, at most `chunk_bytes` at a time, each in memory of its
    own.

    The system reads these bytes from the disk and nothing around them. Raises CheckpointError when the file has become
    shorter since its header was read.
    """
    disable_read_ahead(stream)
    for begin, end in ranges:
        for position in range(begin, end, chunk_bytes):
            if position + chunk_bytes < end and (position - begin) % (_AHEAD_CHUNKS * chunk_bytes) == 0:
                # Prefetch what comes next while this chunk is worked on. The system's own read-ahead would go on beyond
                # the end, into experts that are not kept.
                _advise(stream, position, min(_AHEAD_CHUNKS * chunk_bytes, end - position), "WILLNEED")
            chunk = memoryview(bytearray(min(chunk_bytes, end - position)))
            try:
                read = read_into(stream.fileno(), position, [chunk])
            except OSError as error:
                raise CheckpointError(
                    f"{stream.name} cannot be read at byte {position:,}: {error.strerror}. Check the disk."
                ) from error
            if read < len(chunk):
                raise truncated_file_error(stream.name, stream.fileno(), position + read, end)
            yield chunk


def truncated_file_error(name: object, file: int, begin: int, end: int) -> CheckpointError:
    """The error for an open file that has become shorter since its header was read, so that bytes are missing."""
    return CheckpointError(
        f"{name} ends at byte {os.fstat(file).st_size:,}, but bytes {begin:,} to {end:,} were to be read. The file was "
        "changed or cut short during the run: restore it and run again."
    )


def disable_read_ahead(stream: IO[bytes]) -> None:
    """Turn off the system's read-ahead for an open file of weights.

    Every opening of such a file has to: where one reader has made the system read ahead, it goes on with that for the
    next one, whatever that asks for (seen with Linux 6.18).
    """
    _advise(stream, 0, 0, "RANDOM")


def _advise(stream: IO[bytes], begin: int, size: int, what: str) -> None:
    """Tell the system how bytes of a file will be read (size 0: to its end), where it has such a call."""
    if hasattr(os, "posix_fadvise"):
        # A hint: where the file system does not take it, nothing is lost.
        with suppress(OSError):
            os.posix_fadvise(stream.fileno(), begin, size, getattr(os, f"POSIX_FADV_{what}"))
