"""Comparing written tensors with the bytes of the source that they have to be. Streaming, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry, read_ranges
from streamprune.errors import VerifyError
from streamprune.files.durable import reading
from streamprune.models.tensor_slices import OutputTensor


@dataclass(frozen=True)
class Proof:
    """What was compared: so many tensors, and bytes of them."""

    tensors: int
    nbytes: int


def compare_tensors(
    expected: Sequence[OutputTensor],
    kept: Mapping[int, Sequence[int]],
    source: Checkpoint,
    folder: Path,
    entries: Mapping[str, TensorEntry],
) -> Proof:
    """Compare the tensors `entries` in `folder` with what `expected` takes from the source for the experts `kept`.

    `kept` lists the experts by block. Raises VerifyError for a tensor that is missing, too many, of another shape or
    dtype, or that differs in a byte.
    """
    names = {tensor.name for tensor in expected}
    for what, odd in (
        ("lacks", names - entries.keys()),
        ("has, beyond what the source gives,", entries.keys() - names),
    ):
        if odd:
            raise VerifyError(f"{folder} {what} {len(odd)} tensors, first {min(odd)}.")
    total = 0
    for tensor in expected:
        entry = entries[tensor.name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise VerifyError(
                f"{folder / entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}, but has to be "
                f"{tensor.dtype} {list(tensor.shape)}."
            )
        file, ranges = tensor.ranges(kept.get(tensor.block, ()) if tensor.block is not None else ())
        _compare_bytes(folder / entry.file, entry, source.folder / file, ranges)
        total += entry.nbytes
    return Proof(len(expected), total)


def _compare_bytes(path: Path, entry: TensorEntry, origin: Path, ranges: Iterable[tuple[int, int]]) -> None:
    position = entry.begin
    with _reading_back(path):
        written = path.open("rb")
    with written as ours, reading(origin), origin.open("rb") as theirs:
        for begin, end in ranges:
            for wanted in read_ranges(theirs, [(begin, end)]):
                with _reading_back(path):
                    found = _read(ours, position, len(wanted))
                if found != bytes(wanted):
                    at = next(
                        (n for n, (a, b) in enumerate(zip(found, bytes(wanted), strict=False)) if a != b), len(found)
                    )
                    raise VerifyError(
                        f"{path}: {entry.name} differs from the source at byte {position + at:,} of the file "
                        f"({position + at - entry.begin:,} of the tensor), which stands for byte {begin + at:,} of "
                        f"{origin}. If it was made from that very model, prune again, and if that happens again, check "
                        "the disk."
                    )
                position += len(wanted)
                begin += len(wanted)
    if position != entry.end:
        raise VerifyError(f"{path}: {entry.name} has {entry.end - position:,} bytes more than the source gives.")


@contextmanager
def _reading_back(path: Path) -> Iterator[None]:
    """Within the block an OSError becomes a VerifyError about `path`, a file of the result."""
    try:
        yield
    except OSError as error:
        raise VerifyError(f"{path} cannot be read back: {error.strerror or error}. Check the disk.") from error


def _read(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)
