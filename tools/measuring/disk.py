"""Plain reading and copying of files, for comparison; and whether the system's page cache holds them."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

#: Read at a time: more is not quicker, and less costs calls.
CHUNK_BYTES = 16 * 1024**2


def read_all(files: Sequence[Path]) -> int:
    """Read every byte of the files, one after another, into the same buffer. Returns how many they are."""
    buffer, total = bytearray(CHUNK_BYTES), 0
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def copy_and_sync(source: Path, target: Path) -> int:
    """Copy a folder as `cp` does and flush the copies to the disk. Returns the bytes of its files."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    files = [path for path in target.rglob("*") if path.is_file()]
    subprocess.run(["sync", *map(str, files)], check=True)
    return sum(path.stat().st_size for path in files)


def drop_from_page_cache(files: Sequence[Path]) -> float | None:
    """Ask the system to forget the files' cached pages. Returns the share that it still holds; None if it cannot tell.

    Not every file system does it: the caller has to look at what this returns.
    """
    for path in files:
        with path.open("rb") as stream:
            # Pages that are not on the disk yet cannot be dropped.
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return cached_share(files)
    except OSError:
        return None


def cached_share(files: Sequence[Path]) -> float:
    """The share of the files' pages that the page cache holds, by mincore(2). Raises OSError where it does not work."""
    held = pages = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        count = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * count)()
        # A private mapping that may be written: ctypes tells the address of no other. Nothing is read or written.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            first = ctypes.c_char.from_buffer(view)
            failed = ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), vector
            )
            # The mapping cannot be closed while this looks at it.
            del first
        if failed:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        held += sum(byte & 1 for byte in vector)
        pages += count
    return held / pages if pages else 0.0
