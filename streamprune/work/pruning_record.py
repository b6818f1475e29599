"""What `streamprune prune` records in its work folder: the command, and which experts it was keeping of which model.

Nothing is lost with it but the time of a file copy, so that one that is damaged counts as none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamprune.disk.disk_errors import writing
from streamprune.disk.durable import read_record, write_record
from streamprune.settings import PruneSettings
from streamprune.work.command import command_of, settings_from
from streamprune.work.journal import MOST_RECORD_BYTES, is_pruning

PRUNING_NAME = "pruning.json"


def write_pruning(folder: Path, settings: PruneSettings, blocks: int, decided: dict[str, Any]) -> None:
    """Record what is pruned: a model of so many blocks, and `decided` (JSON), which decides every byte of the result.

    From here on the pruning can be resumed. Raises OutputError or ResourceError if the disk fails.
    """
    with writing(f"Recording the pruning in {folder}", folder):
        write_record(folder / PRUNING_NAME, {"command": command_of(settings), "blocks": blocks, "decided": decided})


def read_pruning(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the pruning in a work folder; None if there is nothing whole of this version's."""
    body = read_record(folder / PRUNING_NAME, MOST_RECORD_BYTES)
    return body if is_pruning(body) else None


def has_pruning(folder: Path) -> bool:
    """Whether a pruning was recorded in a work folder, whole or not."""
    return (folder / PRUNING_NAME).exists()


def settings_of_pruning(recorded: dict[str, Any], work: Path) -> PruneSettings:
    """The settings of a recorded pruning, to go on with it in `work`. Raises ResumeError if they make no sense."""
    return settings_from(PruneSettings, recorded["command"], work, resume="required")
