"""The folder that `search` writes: whether it may be created or replaced. No torch."""

from __future__ import annotations

from pathlib import Path

from streamprune.output.writer import check_output

#: The folder of the search of `run --best` is named like the output, with this suffix.
SEARCH_SUFFIX = ".search"
#: The result of a search, in its folder.
SEARCH_NAME = "search.json"
#: Its entry for the command of the `run --best` that the search was made for, until whose end it can be resumed.
BEST_COMMAND = "best_command"


def check_search_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise OutputError unless the folder `output` may be created, or with `overwrite` an earlier search replaced."""
    check_output(output, source, overwrite, SEARCH_NAME, "search")
