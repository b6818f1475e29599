"""The folder that `search` writes: whether it may be created or replaced. No torch."""

from __future__ import annotations

from pathlib import Path

from streamprune.output.writer import check_output

#: The result of a search, in its folder.
SEARCH_NAME = "search.json"


def check_search_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise OutputError unless the folder `output` may be created, or with `overwrite` an earlier search replaced."""
    check_output(output, source, overwrite, SEARCH_NAME, "search")
