"""The page cache: which pages of a file are in it, and removing pages that only this process brought in.

A model has tens of GiB that are read once. If they stay in the cache, they displace what other programs use.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

#: The first byte and the number of bytes of a part of a file.
Stretch = tuple[int, int]


def uncached_ranges(file: int, begin: int, size: int) -> list[Stretch]:
    """The stretches of an open file's bytes `begin` to `begin + size` that are not in the cache, in whole pages.

    Empty if the system does not tell.
    """
    page = mmap.PAGESIZE
    first = begin // page * page
    flags = cached_flags(file, first, begin + size - first)
    if flags is None:
        return []
    stretches, at = [], first
    for cached, group in itertools.groupby(flags, key=lambda flag: flag & 1):
        size = sum(page for _ in group)
        if not cached:
            stretches.append((at, size))
        at += size
    return stretches


def cached_flags(file: int, begin: int, size: int) -> bytes | None:
    """One byte for each page from `begin` (a multiple of the page size): odd if it is cached. None if unknown."""
    if not hasattr(os, "posix_fadvise") or size <= 0:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    # A mapping that is never touched takes no memory.
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, begin)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        flags = ctypes.create_string_buffer((size + mmap.PAGESIZE - 1) // mmap.PAGESIZE)
        return flags.raw if libc.mincore(address, size, flags) == 0 else None
    finally:
        libc.munmap(address, size)


def drop_from_cache(file: int, stretches: Iterable[Stretch]) -> None:
    """Remove parts of an open file from the cache, unless they are not on the disk yet or in use."""
    if hasattr(os, "posix_fadvise"):
        for begin, size in stretches:
            # Only a hint, which some file systems ignore.
            with suppress(OSError):
                os.posix_fadvise(file, begin, size, os.POSIX_FADV_DONTNEED)


@contextmanager
def cache_unchanged(stretches: Mapping[Path, Sequence[Stretch]]) -> Iterator[None]:
    """On exit, remove these parts of files from the cache, except pages that were cached before."""
    fresh: dict[Path, list[Stretch]] = {}
    for path, wanted in stretches.items():
        # The code that reads a missing file reports it.
        with suppress(OSError), path.open("rb") as stream:
            fresh[path] = [found for begin, size in wanted for found in uncached_ranges(stream.fileno(), begin, size)]
    try:
        yield
    finally:
        drop_files_from_cache(fresh)


def drop_files_from_cache(stretches: Mapping[Path, Sequence[Stretch]]) -> None:
    """Remove parts of files from the cache. Missing files are ignored."""
    for path, each in stretches.items():
        with suppress(OSError), path.open("rb") as stream:
            drop_from_cache(stream.fileno(), each)
