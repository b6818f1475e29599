"""The file that hidden states lie in where memory is short: unnamed, with ranges that are reserved and released."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from streamprune.checkpoint.safetensors_file import read_into
from streamprune.errors import ResourceError

#: Linux writes at most 2 GiB at a time; with smaller portions an interrupt takes effect soon.
_PORTION = 1 << 26


@dataclass(frozen=True)
class Written:
    """A tensor's location in the file: its first byte, its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def narrow(self, dim: int, start: int, count: int) -> Written:
        """The location of `count` rows from row `start` on, like `torch.Tensor.narrow`. Only along the first axis."""
        assert dim == 0
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Written(self.offset + start * row, (count, *self.shape[1:]), self.dtype)


class StatesFile:
    """Tensors in an unnamed temporary file in `folder`, which disappears however the process ends.

    Read and written with system calls, not mapped: mapped pages would count as this process's resident memory. Raises
    ResourceError, with the system's reason, if it cannot be created, written or read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = 0
        #: Released ranges (first byte, bytes), by position; neighbours are joined.
        self._free: list[tuple[int, int]] = []
        with self._named_errors("be created"):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def reserve(self, tensor: torch.Tensor) -> Written:
        """A location for a tensor: the first released range that is large enough, else the end of the file."""
        found = next((number for number, (_, size) in enumerate(self._free) if size >= tensor.nbytes), None)
        if found is None:
            offset, self._end = self._end, self._end + tensor.nbytes
        else:
            offset, size = self._free[found]
            rest = (offset + tensor.nbytes, size - tensor.nbytes)
            self._free[found : found + 1] = [rest] if rest[1] else []
        return Written(offset, tuple(tensor.shape), tensor.dtype)

    def release(self, place: Written) -> None:
        """Release a location for other tensors."""
        joined: list[tuple[int, int]] = []
        for offset, size in sorted([*self._free, (place.offset, place.nbytes)]):
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            elif size:
                joined.append((offset, size))
        self._free = joined

    def write(self, place: Written, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU tensor to its location."""
        view, done = _bytes_of(tensor), 0
        with self._named_errors("be written"):
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done : done + _PORTION], place.offset + done)

    def read(self, place: Written, into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor at a location: `into`, a CPU tensor of its shape and dtype, or in new memory."""
        tensor = torch.empty(place.shape, dtype=place.dtype) if into is None else into
        with self._named_errors("be read"):
            moved = read_into(self._file.fileno(), place.offset, [_bytes_of(tensor)])
            if moved < place.nbytes:
                raise OSError(f"it ends after {moved:,} of {place.nbytes:,} bytes")
        return tensor

    @contextmanager
    def _named_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"The file for the hidden states in {self._folder} could not {what}: {error.strerror or error}. Free "
                "space on that disk, or check it, choose another disk with -o, or keep the states in memory with "
                "--states ram."
            ) from None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data
