"""What a work folder records of its run, each file twice: no other file could stand in for a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamprune.disk.disk_errors import writing
from streamprune.disk.durable import reached, read_record, write_record
from streamprune.errors import ResumeError
from streamprune.work.journal import MOST_RECORD_BYTES, MOST_TOKENS_BYTES, checked_run

RUN_NAMES, TOKENS_NAMES = ("run.json", "run.copy.json"), ("tokens.json", "tokens.copy.json")


def write_run(folder: Path, run: dict[str, Any], tokens: list[list[int]]) -> None:
    """Record what is run, and on what. From here on the run can be resumed."""
    with writing(f"Recording the run in {folder}", folder):
        # The tokens first: a record of the run says that they are there.
        for names, body in ((TOKENS_NAMES, tokens), (RUN_NAMES, run)):
            for name in names:
                write_record(folder / name, body)
    reached("run recorded")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the run in a work folder; None if there is nothing whole.

    Raises ResumeError for a record that this version did not write.
    """
    for name in RUN_NAMES:
        body = read_record(folder / name, MOST_RECORD_BYTES)
        if body is not None:
            return checked_run(folder / name, body)
    return None


def has_run(folder: Path) -> bool:
    """Whether a run was recorded in a work folder, whole or not."""
    return any((folder / name).exists() for name in RUN_NAMES)


def read_tokens(folder: Path) -> list[list[int]]:
    """The recorded calibration sequences. Raises ResumeError if they are damaged."""
    for name in TOKENS_NAMES:
        tokens = read_record(folder / name, MOST_TOKENS_BYTES)
        if isinstance(tokens, list):
            return tokens
    raise ResumeError(
        f"{folder / TOKENS_NAMES[0]} is damaged, and so is its copy. Give the calibration again with the same "
        "`streamprune run` command, or begin anew with --resume never."
    )
