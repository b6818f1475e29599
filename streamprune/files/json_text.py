"""Reading JSON with limits, and showing values from files in messages."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError

#: How deep the values of a model's JSON are nested at most. Real ones have a tenth of that.
MOST_LEVELS = 50


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def show(value: Any) -> str:
    """A value from a file for a message: without control characters, and at most 200 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested without end"
    return text if len(text) <= 200 else f"{text[:200]}…"


def show_some(names: Sequence[str]) -> str:
    """Names from a file for a message: the first one, and how many others there are."""
    return show(names[0]) + (f" and {len(names) - 1:,} other{'s' * (len(names) > 2)}" if len(names) > 1 else "")


def parse_json(data: bytes, unique: bool = False) -> Any:
    """The value of UTF-8 JSON. `unique` refuses repeated names. Raises ValueError or RecursionError if invalid."""
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_pairs if unique else None)
    if b"\\u" in data:
        # An escape can write half a surrogate pair: a string that could never be written to a file again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def json_fault(error: ValueError | RecursionError) -> str:
    """What `parse_json` found wrong, in at most 300 characters, with the place within the text it was given."""
    if isinstance(error, json.JSONDecodeError):
        # (Its own text counts lines too, beside the line of the file that messages name.)
        return f"{error.msg} at character {error.pos + 1:,}"
    return str(error)[:300]


def read_limited(path: Path, most_bytes: int) -> bytes:
    """The contents of a regular file. Raises ValueError for another kind of file, or a larger one, and OSError."""
    facts = path.stat()
    # Reading a pipe would block.
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is not a regular file")
    if facts.st_size > most_bytes:
        raise ValueError(f"it has {facts.st_size:,} bytes, more than {most_bytes:,}")
    return path.read_bytes()


#: A list of every expert of the largest models has a megabyte.
MOST_BYTES = 2**26


def read_json_file(path: Path, option: str, means: str) -> Any:
    """The value in the JSON file of `option`; `means` says in errors what the option does. Raises SettingsError."""
    try:
        data = read_limited(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{option} {show(str(path))} cannot be read: {reason}. The option {means}.") from None
    try:
        return parse_json(data, unique=True)
    except (ValueError, RecursionError):
        raise SettingsError(f"{option} {show(str(path))} is not valid JSON. The option {means}.") from None


def differences(found: Any, wanted: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ, as a path into them (`layers[2].width`), and what `show` says of both there.

    Paths have MOST_LEVELS steps at most: `where` has `depth` already.
    """
    if depth == MOST_LEVELS:
        if found != wanted:
            yield where, show(found), show(wanted)
        return
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        paths = {key: f"{where}.{key}".lstrip(".") for key in sorted(found.keys() | wanted.keys())}
    elif isinstance(found, list) and isinstance(wanted, list):
        paths = {place: f"{where}[{place}]" for place in range(max(len(found), len(wanted)))}
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    else:
        # In JSON, 1 and 1.0 and true are not the same.
        if json.dumps(found) != json.dumps(wanted):
            yield where, show(found), show(wanted)
        return
    for key, path in paths.items():
        if key in found and key in wanted:
            yield from differences(found[key], wanted[key], path, depth + 1)
        else:
            ours, theirs = (show(value[key]) if key in value else "missing" for value in (found, wanted))
            yield path, ours, theirs
