"""The state of a model's files, by which it is seen whether they changed between two sittings."""

from __future__ import annotations

from streamprune.disk.disk_errors import reading
from streamprune.source.checkpoint import CONFIG_NAME, Checkpoint


def file_states(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change (ns) of every file of the model that goes into the result, tokenizer files included."""
    states = {}
    for file in (*checkpoint.files, CONFIG_NAME, *map(str, checkpoint.small_files())):
        with reading(checkpoint.folder / file):
            facts = (checkpoint.folder / file).stat()
        states[file] = [facts.st_size, facts.st_mtime_ns]
    return states
