"""The hidden states in a work folder: two generations of them, and the cursor that says which counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamprune.disk.disk_errors import writing
from streamprune.disk.durable import names_in, reached, read_record, sync_folder, write_record
from streamprune.streaming.stream import BatchState
from streamprune.work.journal import MOST_RECORD_BYTES, is_cursor
from streamprune.work.saved_states import SavedStates, open_states, save_states, saved_facts

_CURSOR = "cursor.json"


class Generations:
    """The saved states of a work folder, which lie in its subfolder `states`."""

    def __init__(self, folder: Path, states: Path) -> None:
        self._folder, self._states = folder, states

    def save(self, count: int, load: Callable[[int], BatchState], facts: dict[str, Any]) -> None:
        """Make `count` hidden states and the facts about them durable, then point the cursor at them.

        The generation before is kept, older ones go.
        """
        numbers, before = self._numbers(), self._pointed()
        number = max(numbers, default=0) + 1
        kept = [number, *before[:1]]
        with writing(f"Saving the hidden states in {self._states}", self._folder):
            save_states(self._states / str(number), count, load, facts)
            sync_folder(self._states)
            reached("states saved")
            write_record(self._folder / _CURSOR, {"generations": kept})
        reached("cursor moved")
        for old in numbers:
            if old not in kept:
                shutil.rmtree(self._states / str(old), ignore_errors=True)

    def whole(self) -> list[SavedStates]:
        """The generations that are whole, newest first."""
        opened = (open_states(self._states / str(number)) for number in self._pointed())
        return [states for states in opened if states is not None]

    def block(self) -> int | None:
        """The block in which states were last saved, by their record alone; None if none are."""
        for number in self._pointed():
            facts = saved_facts(self._states / str(number))
            if facts is not None and isinstance(facts.get("block"), int):
                return int(facts["block"])
        return None

    def forget_old(self) -> None:
        """Remove saved hidden states that the cursor does not name, and all but the newest that are whole."""
        pointed = self._pointed()
        whole = next((number for number in pointed if open_states(self._states / str(number)) is not None), None)
        for number in self._numbers():
            if number != whole:
                shutil.rmtree(self._states / str(number), ignore_errors=True)

    def forget(self) -> None:
        """Remove all saved hidden states."""
        with writing(f"Removing the hidden states from {self._folder}", self._folder):
            (self._folder / _CURSOR).unlink(missing_ok=True)
        for number in self._numbers():
            shutil.rmtree(self._states / str(number), ignore_errors=True)

    def _pointed(self) -> list[int]:
        """The generations that the cursor names; with a damaged cursor all that there are, newest first."""
        body = read_record(self._folder / _CURSOR, MOST_RECORD_BYTES)
        return list(body["generations"]) if is_cursor(body) else sorted(self._numbers(), reverse=True)

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in names_in(self._states) if path.name.isascii() and path.name.isdecimal()]
