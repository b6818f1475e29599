"""The folder that `search` writes: whether it may be created or replaced. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from streamprune.errors import OutputError

#: The result of a search, in its folder.
SEARCH_NAME = "search.json"


def check_search_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise OutputError unless the folder `output` may be created, or with `overwrite` an earlier search replaced."""
    if output.name in {"", ".."} or os.path.ismount(output):
        raise OutputError(f"{output} cannot be the output: it must be a named folder. Choose another with -o.")
    target, origin = output.resolve(), source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise OutputError(f"The output {output} and the model {source} must not be, or contain, one another.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is not a folder. Choose another place with -o.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{output} exists and is not empty. Choose another place with -o, or add --overwrite.")
    if not (output / SEARCH_NAME).is_file():
        raise OutputError(
            f"{output} has no search (no {SEARCH_NAME}), so --overwrite does not replace it. Choose another -o."
        )
