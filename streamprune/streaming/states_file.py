"""Tensors in one file without a name, read and written with plain system calls.

Not mapped: the pages of a mapping count as this process's resident memory, which is what the file is to spare.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.errors import ResourceError

#: Linux moves at most 2 GiB at a time; smaller portions keep an interrupt from waiting long.
_PORTION = 1 << 26


@dataclass(frozen=True)
class Written:
    """A tensor's place in the file: its first byte, its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, count: int) -> Written:
        """The place of `count` rows of the first dimension, from row `start`."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Written(self.offset + start * row, (count, *self.shape[1:]), self.dtype)


class StatesFile:
    """A file in `folder` that no name leads to, so that it is gone when it is closed, however the process ends.

    Raises ResourceError, with the system's reason, when it cannot be made, written or read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = 0
        #: Released stretches (first byte, bytes), by position; neighbours are joined.
        self._free: list[tuple[int, int]] = []
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed("be created", error) from None

    def close(self) -> None:
        self._file.close()

    def reserve(self, tensor: torch.Tensor) -> Written:
        """A place for a tensor: the first released stretch that is large enough, else the end of the file."""
        for number, (offset, size) in enumerate(self._free):
            if size >= tensor.nbytes:
                rest = [(offset + tensor.nbytes, size - tensor.nbytes)] if size > tensor.nbytes else []
                self._free[number : number + 1] = rest
                return Written(offset, tuple(tensor.shape), tensor.dtype)
        offset, self._end = self._end, self._end + tensor.nbytes
        return Written(offset, tuple(tensor.shape), tensor.dtype)

    def release(self, place: Written) -> None:
        """Give a place back for other tensors."""
        joined: list[tuple[int, int]] = []
        for offset, size in sorted([*self._free, (place.offset, place.nbytes)]):
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            elif size:
                joined.append((offset, size))
        self._free = joined

    def write(self, place: Written, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU tensor to its place."""
        view = _bytes_of(tensor)
        try:
            self._move(lambda start, end: os.pwrite(self._file.fileno(), view[start:end], place.offset + start), view)
        except OSError as error:
            raise self._failed("be written", error) from None

    def read(self, place: Written) -> torch.Tensor:
        """The tensor at a place, in memory of its own."""
        tensor = torch.empty(place.shape, dtype=place.dtype)
        view = _bytes_of(tensor)
        try:
            self._move(lambda start, end: os.preadv(self._file.fileno(), [view[start:end]], place.offset + start), view)
        except OSError as error:
            raise self._failed("be read", error) from None
        return tensor

    def _move(self, transfer: Callable[[int, int], int], view: memoryview) -> None:
        done = 0
        while done < len(view):
            moved = transfer(done, min(done + _PORTION, len(view)))
            if moved == 0:
                raise OSError(f"it ends after {done:,} of {len(view):,} bytes")
            done += moved

    def _failed(self, what: str, error: OSError) -> ResourceError:
        return ResourceError(
            f"The file for the hidden states in {self._folder} could not {what}: {error.strerror or error}. Make room "
            "on that disk or check it, choose another place with -o, or keep the states in memory with --states ram."
        )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
