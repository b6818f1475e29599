"""Safetensors files: their headers, checked against the file's size, and exact byte ranges of them. Imports no torch.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header that maps each
tensor name to dtype, shape and byte range, then the tensors' bytes, without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from streamprune.errors import CheckpointError
from streamprune.files.json_text import parse_json, show

#: Bits per element of each dtype of the safetensors format.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

#: The safetensors library refuses larger headers too: a larger length is damage or an attack. Configs and indexes are
#: far smaller, so this limits the memory for any JSON that is read here.
MAX_JSON_BYTES = 100_000_000
#: How many chunks the system prefetches.
_AHEAD_CHUNKS = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a shard: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(folder: Path, file: str) -> list[TensorEntry]:
    """The tensors of one safetensors file in byte order, with the whole header checked against the file's size."""
    path = folder / file
    with path.open("rb") as stream:
        disable_read_ahead(stream)
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if prefix == b"version ":
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights themselves. Fetch them: `git lfs pull`."
            )
        length = int.from_bytes(prefix, "little")
        if size < 8:
            raise _damaged(path, f"it has only {size} bytes")
        if length > min(size - 8, MAX_JSON_BYTES):
            limit = f" (the format allows {MAX_JSON_BYTES:,})" if length > MAX_JSON_BYTES else ""
            raise _damaged(path, f"it has {size:,} bytes, but its first eight claim a header of {length:,}{limit}")
        try:
            header = parse_json(stream.read(length), unique=True)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"its header is not valid JSON ({error})") from None
    entries, position = header_entries(path, file, header, 8 + length)
    if position != size:
        what = "is cut short" if size < position else "has bytes that belong to no tensor"
        raise _damaged(path, f"it {what}: {size:,} bytes on disk, {position:,} by its header")
    return entries


def header_entries(path: Path, file: str, header: Any, start: int) -> tuple[list[TensorEntry], int]:
    """The tensors that a header states, in byte order, and the position where their bytes end.

    `start` is where the bytes begin, after the header; `path` is the file's name in errors. Raises CheckpointError for
    tensors whose dtype, shape and byte range do not go together, and for gaps or overlaps between them.
    """
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    entries = sorted(
        (_parse_entry(path, file, name, value, start) for name, value in header.items() if name != "__metadata__"),
        key=lambda entry: (entry.begin, entry.end),
    )
    position = start
    for entry in entries:
        if entry.begin != position:
            raise _damaged(path, f"tensor {show(entry.name)} starts at byte {entry.begin:,} instead of {position:,}")
        position = entry.end
    return entries, position


def _parse_entry(path: Path, file: str, name: str, value: Any, start: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"tensor {show(name)} has the unknown dtype {show(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise _damaged(path, f"tensor {show(name)} has the impossible shape {show(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _damaged(path, f"tensor {show(name)} has the impossible byte range {show(offsets)}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        # Capped, since a product of a million large sizes would take hours; beyond 2^63 it is wrong anyway.
        bits = min(bits * size, 2**63)
    if (offsets[1] - offsets[0]) * 8 != bits:
        raise _damaged(path, f"tensor {show(name)} of {dtype} {show(shape)} cannot fill the byte range {offsets}")
    return TensorEntry(name, file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def encode_header(metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The beginning of a file whose tensors (name, dtype, shape, bytes) follow one another in this order.

    Padded to 8 bytes, as the format requires. The same arguments give the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        end = position + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}. Download this file again.")


def read_into(file: int, position: int, into: list[memoryview]) -> int:
    """Fill buffers of bytes, one after the other, from an open file, from byte `position` on.

    Returns the number of bytes read: fewer than requested only at the end of the file. `into` is emptied. Raises
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

    The system reads only these bytes from the disk, without read-ahead. Raises CheckpointError if the file has become
    shorter since its header was read.
    """
    disable_read_ahead(stream)
    for begin, end in ranges:
        for position in range(begin, end, chunk_bytes):
            if position + chunk_bytes < end and (position - begin) % (_AHEAD_CHUNKS * chunk_bytes) == 0:
                # Prefetch the next chunks while this one is processed. The system's own read-ahead would continue
                # beyond the end, into experts that are not kept.
                _advise(stream, position, min(_AHEAD_CHUNKS * chunk_bytes, end - position), "WILLNEED")
            chunk = memoryview(bytearray(min(chunk_bytes, end - position)))
            try:
                read_exactly(stream.fileno(), position, [chunk], stream.name)
            except OSError as error:
                raise CheckpointError(
                    f"{stream.name} cannot be read at byte {position:,}: {error.strerror}. Check the disk."
                ) from error
            yield chunk


def read_exactly(file: int, position: int, into: list[memoryview], name: object) -> None:
    """Fill buffers of bytes as `read_into` does, from an open file called `name`.

    Raises CheckpointError when it has become shorter since its header was read, and OSError.
    """
    end = position + sum(map(len, into))
    position += read_into(file, position, into)
    if position < end:
        raise CheckpointError(
            f"{name} ends at byte {os.fstat(file).st_size:,}, but bytes {position:,} to {end:,} were to be read. The "
            "file was changed or cut short during the run: restore it and run again."
        )


def disable_read_ahead(stream: IO[bytes]) -> None:
    """Turn off the system's read-ahead for an open file of weights.

    Has to be called whenever such a file is opened: where one reader has made the system read ahead, it does so for the
    next one too, whatever that asks for (seen with Linux 6.18).
    """
    _advise(stream, 0, 0, "RANDOM")


def _advise(stream: IO[bytes], begin: int, size: int, what: str) -> None:
    """Advise the system how bytes of a file will be read (size 0: to its end), where it has such a call."""
    if hasattr(os, "posix_fadvise"):
        # Only a hint, which some file systems do not support.
        with suppress(OSError):
            os.posix_fadvise(stream.fileno(), begin, size, getattr(os, f"POSIX_FADV_{what}"))
