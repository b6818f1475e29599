"""A JSON file that the user names in an option: read with limits, and told about in one message if it cannot be."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError
from streamprune.source.shard import parse_json, show

#: A list of every expert of the largest models has a megabyte.
MOST_BYTES = 2**26


def read_json_file(path: Path, option: str, means: str) -> Any:
    """The value in the file that `option` names, and `means` to be such. Raises SettingsError if there is none."""
    try:
        facts = path.stat()
        # To read a pipe would be to wait for ever.
        if not stat.S_ISREG(facts.st_mode):
            raise SettingsError(f"{option} {path} is no regular file. The option {means}.")
        if facts.st_size > MOST_BYTES:
            raise SettingsError(f"{option} {path} has {facts.st_size:,} bytes; {MOST_BYTES:,} are read at most.")
        return parse_json(path.read_bytes(), unique=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"{option} {show(str(path))} cannot be read: {reason}. The option {means}.") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{option} {show(str(path))} is not valid JSON. The option {means}.") from None
