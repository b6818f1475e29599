"""What the system says when a file cannot be written or read, told as one of our errors: what, where, what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamprune.errors import CheckpointError, OutputError, ResourceError
from streamprune.machine import disk_bytes, existing_folder, format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = "Then give the same command again: what is finished is kept."


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Within the block an OSError becomes an OutputError, one of a full disk a ResourceError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in _FULL:
            raise ResourceError(
                f"{what} failed: no room on the disk of {folder}{where}: {reason}{_free(folder)}. Free some. {_AGAIN}"
            ) from error
        raise OutputError(f"{what} failed{where}: {reason}. Check the disk and its permissions. {_AGAIN}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block an OSError becomes a CheckpointError about `path`, a file of the model."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror or error}. Was it moved or changed during the "
            f"run? Restore it, or check the disk. {_AGAIN}"
        ) from error


def _free(folder: Path) -> str:
    try:
        return f", {format_bytes(disk_bytes(existing_folder(folder))[1])} free"
    except OSError:
        return ""
