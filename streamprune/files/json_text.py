"""Reading JSON with limits, and showing values from files in messages."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63


def show(value: Any) -> str:
    """A value from a file for a message: without control characters, and at most 200 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested without end"
    return text if len(text) <= 200 else f"{text[:200]}…"


def parse_json(data: bytes, unique: bool = False) -> Any:
    """The value of UTF-8 JSON; `unique` refuses repeated names. ValueError or RecursionError if there is none."""
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_pairs if unique else None)
    if b"\\u" in data:
        # An escape can write half a surrogate pair: a string that could never be written to a file again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


#: A list of every expert of the largest models has a megabyte.
MOST_BYTES = 2**26


def read_json_file(path: Path, option: str, means: str) -> Any:
    """The value in the JSON file of `option`; `means` says in errors what the option does. Raises SettingsError."""
    try:
        facts = path.stat()
        # Reading a pipe would block.
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
