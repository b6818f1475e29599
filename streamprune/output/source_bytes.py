"""The bytes of a tensor of the output, from the source: copied, decoded from quantized ones, or quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from streamprune.checkpoint.safetensors_file import read_ranges
from streamprune.errors import NonFiniteError
from streamprune.files.durable import reading
from streamprune.formats.base import KeptExperts
from streamprune.formats.decoded import read_decoded
from streamprune.formats.slicing import Bytes
from streamprune.output.encoded import SHAPE, encoded_bytes
from streamprune.output.tensors import EncodedPart, OutputTensor


def source_bytes(tensor: OutputTensor, kept: KeptExperts, folder: Path) -> Iterator[memoryview]:
    """Yield the bytes of a tensor when `kept` stays of the experts of its layer, from the shards in `folder`.

    A few MiB at a time; one expert where it is decoded, one matrix where it is quantized. Raises CheckpointError for
    shards that cannot be read, NonFiniteError for weights that cannot be quantized.
    """
    if tensor.encoded is not None:
        plain = bytearray().join(_plain_bytes(tensor.encoded, kept, folder))
        try:
            yield encoded_bytes(tensor.encoded, plain)
        except NonFiniteError as error:
            source = tensor.sources[kept.experts[tensor.slot] if tensor.slot is not None else 0]
            raise NonFiniteError(f"{source.name} in {folder / source.file}: {error}") from error
        return
    if tensor.is_decoded:
        for entry in tensor.decoded_from(kept):
            yield read_decoded(entry, folder)
        return
    origin = tensor.slice_of(kept)
    path = folder / origin.file
    with reading(path), path.open("rb") as stream:
        yield from read_parts(stream, origin.parts)


def _plain_bytes(encoded: EncodedPart, kept: KeptExperts, folder: Path) -> Iterator[memoryview]:
    # Every matrix has its shape as a part, for which nothing need be read.
    return source_bytes(encoded.plain, kept, folder) if encoded.part != SHAPE else iter(())


def stretches(tensor: OutputTensor, kept: KeptExperts) -> Iterator[tuple[str, int, int]]:
    """The file, first and last (exclusive) byte of everything that `source_bytes` reads."""
    if tensor.encoded is not None:
        yield from stretches(tensor.encoded.plain, kept)
        return
    for entry in tensor.decoded_from(kept):
        for part in entry.parts.values():
            yield part.file, part.begin, part.end
    if not tensor.is_decoded:
        origin = tensor.slice_of(kept)
        for each in origin.parts:
            yield origin.file, each.begin, each.end


#: Bytes of an expert's tensor that are in memory while channels are taken from them.
_PORTION = 8 * 2**20


def read_parts(stream: BinaryIO, parts: Iterable[Bytes]) -> Iterator[memoryview]:
    """Yield the bytes of `parts` of an open file, a few MiB at a time. Raises CheckpointError and OSError."""
    for part in parts:
        if part.take is None:
            yield from read_ranges(stream, [(part.begin, part.end)])
            continue
        row, size = part.count * part.size, part.size
        if row > _PORTION:
            # Few rows of many bytes each (gate and up projections): read only the channels that stay.
            for begin in range(part.begin, part.end, row):
                yield from read_ranges(stream, ((begin + at * size, begin + (at + 1) * size) for at in part.take))
            continue
        rows = _PORTION // row * row
        for begin in range(part.begin, part.end, rows):
            end = min(begin + rows, part.end)
            (data,) = read_ranges(stream, [(begin, end)], chunk_bytes=rows)
            # One value of `size` bytes for each channel, so that numpy moves them in one step.
            table = np.frombuffer(data, dtype=f"V{size}").reshape(-1, part.count)
            yield memoryview(np.take(table, part.take, axis=1).tobytes())
