"""Names of files next to an output."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

#: Most bytes in a file name, on every usual file system.
LONGEST_NAME = 255


def sibling_path(output: Path, suffix: str) -> Path:
    """The path of `output` with a suffix. A name too long for that is cut and made unique by a hash."""
    name = os.fsencode(output.name)
    if len(name) + len(suffix) > LONGEST_NAME:
        digest = hashlib.sha256(name).hexdigest()[:16]
        # Cut between characters, so that the name stays readable where it was.
        name = name[: LONGEST_NAME - len(suffix) - 17].decode(errors="ignore").encode() + f"-{digest}".encode()
    return output.with_name(os.fsdecode(name) + suffix)
