"""The work folder: all that a run needs to go on after whatever ends it. It alone suffices.

| name | what it is |
|---|---|
| `streamprune.lock` | held by the run that writes here; names its pid |
| `run.json` | the command, and what it was run on: what a later run must agree with |
| `tokens.json` | the calibration sequences |
| `*.copy.json` | both again, for the case that the first is damaged: nothing else could stand in for them |
| `blocks/` | one record per finished block: its result, its shards and their checksums |
| `states/N/` | the hidden states at two points of the run, the newest and the one before |
| `cursor.json` | which of those counts: the one atomic pointer |
| `model/` | the finished shards |
| `finished.json` | which folder is whole and gets the output's name next, by its inode |
| `replaced/` | with --overwrite, the old output, until the new one has its name |
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from streamprune.errors import OutputError
from streamprune.streaming.stream import BatchState
from streamprune.work.disk_errors import writing
from streamprune.work.durable import PARTIAL, checksum_of, reached, read_record, sync_folder, write_record
from streamprune.work.journal import MOST_RECORD_BYTES, is_block, is_cursor
from streamprune.work.run_record import RUN_NAMES, read_run, read_tokens, write_run
from streamprune.work.saved_states import SavedStates, open_states, save_states, saved_facts

LOCK_NAME = "streamprune.lock"
_CURSOR, _FINISHED = "cursor.json", "finished.json"
REPLACED_NAME = "replaced"
#: The block number under which the shards outside all blocks are recorded.
OUTSIDE = "outside"


@dataclass(frozen=True)
class FinishedShard:
    """A shard in the work folder: its name, size and SHA-256."""

    file: str
    nbytes: int
    sha256: str


class WorkFolder:
    """A work folder that this process holds. Use as a context manager: entering creates and locks it.

    Entering raises OutputError when another run holds it, when it is somebody else's folder, or when it cannot be
    written. Leaving unlocks it; `remove` takes it away.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = folder / "model"
        self._states, self._blocks = folder / "states", folder / "blocks"
        self._lock: int | None = None

    def __enter__(self) -> WorkFolder:
        try:
            self._claim()
            for path in (self.staging, self._states, self._blocks):
                path.mkdir(exist_ok=True)
        except OSError as error:
            self._release()
            raise OutputError(
                f"{self.folder} cannot be written: {error.strerror}. Choose another place with -o or --work-dir."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        # What makes it ours goes last, so that a kill in between does not leave a folder that nobody dares to touch.
        for path in _names(self.folder, but=(LOCK_NAME,)):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_afresh(self) -> None:
        """Forget an earlier run: everything but the lock, and an old output that was moved aside."""
        with writing(f"Emptying {self.folder}", self.folder):
            # What is on record goes first: what follows would be of no use to it.
            for name in RUN_NAMES:
                (self.folder / name).unlink(missing_ok=True)
            for path in _names(self.folder, but=(LOCK_NAME, REPLACED_NAME)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in (self.staging, self._states, self._blocks):
                path.mkdir()
            sync_folder(self.folder)

    def has_progress(self) -> bool:
        """Whether anything would be lost with the folder: finished decoder blocks, saved states, an old output."""
        blocks = any(path.stem != OUTSIDE for path in _names(self._blocks))
        return blocks or bool(_names(self._states)) or self.keeps_old_output()

    def keeps_old_output(self) -> bool:
        """Whether an output that --overwrite was to replace lies in here."""
        return (self.folder / REPLACED_NAME).exists()

    def write_run(self, run: dict[str, Any], tokens: list[list[int]]) -> None:
        """Record what is run, and on what. From here on the run can be resumed."""
        write_run(self.folder, run, tokens)

    def read_run(self) -> dict[str, Any] | None:
        """What `write_run` recorded; None if there is nothing whole."""
        return read_run(self.folder)

    def read_tokens(self) -> list[list[int]]:
        """The recorded calibration sequences. Raises ResumeError if they are damaged."""
        return read_tokens(self.folder)

    def write_block(self, block: int | None, result: dict[str, Any] | None, shards: list[FinishedShard]) -> None:
        """Record a block whose shards are written and flushed. None: what lies outside all blocks."""
        body = {"result": result, "shards": [vars(shard) for shard in shards]}
        with writing(f"Recording a block in {self._blocks}", self.folder):
            write_record(self._block_path(block), body)
        reached("block recorded")

    def read_block(self, block: int | None) -> tuple[dict[str, Any] | None, list[FinishedShard]] | None:
        """The result and the shards of a finished block; None if it is not finished, or its record is damaged.

        The shards' contents are not looked at: see `whole`.
        """
        body = read_record(self._block_path(block), MOST_RECORD_BYTES)
        if not is_block(body):
            return None
        return body["result"], [FinishedShard(**shard) for shard in body["shards"]]

    def whole(self, shard: FinishedShard) -> bool:
        """Whether a shard is there with the bytes that were recorded."""
        path = self.staging / shard.file
        try:
            return path.stat().st_size == shard.nbytes and checksum_of(path) == shard.sha256
        except OSError:
            return False

    def forget_block(self, block: int | None) -> None:
        """Let a block count as unfinished."""
        with writing(f"Forgetting a block in {self._blocks}", self.folder):
            self._block_path(block).unlink(missing_ok=True)

    def will_be_output(self, folder: Path) -> None:
        """Record that `folder` is whole, and is about to be given the output's name."""
        write_record(self.folder / _FINISHED, {"inode": folder.stat().st_ino})

    def save(self, count: int, load: Callable[[int], BatchState], facts: dict[str, Any]) -> None:
        """Make `count` hidden states and the facts about them durable, then point the cursor at them.

        The generation before is kept, older ones go.
        """
        numbers, before = self._generations(), self._pointed()
        number = max(numbers, default=0) + 1
        kept = [number, *before[:1]]
        with writing(f"Saving the hidden states in {self._states}", self.folder):
            save_states(self._states / str(number), count, load, facts)
            sync_folder(self._states)
            reached("states saved")
            write_record(self.folder / _CURSOR, {"generations": kept})
        reached("cursor moved")
        for old in numbers:
            if old not in kept:
                shutil.rmtree(self._states / str(old), ignore_errors=True)

    def saved(self) -> list[SavedStates]:
        """The generations that are whole, newest first."""
        opened = (open_states(self._states / str(number)) for number in self._pointed())
        return [states for states in opened if states is not None]

    def saved_block(self) -> int | None:
        """The block in which states were last saved, by their record alone; None if none are."""
        for number in self._pointed():
            facts = saved_facts(self._states / str(number))
            if facts is not None and isinstance(facts.get("block"), int):
                return int(facts["block"])
        return None

    def forget_old_states(self) -> None:
        """Remove saved hidden states that the cursor does not name, and all but the newest that are whole."""
        pointed = self._pointed()
        whole = next((number for number in pointed if open_states(self._states / str(number)) is not None), None)
        for number in self._generations():
            if number != whole:
                shutil.rmtree(self._states / str(number), ignore_errors=True)

    def forget_states(self) -> None:
        """Remove all saved hidden states."""
        with writing(f"Removing the hidden states from {self.folder}", self.folder):
            (self.folder / _CURSOR).unlink(missing_ok=True)
        for number in self._generations():
            shutil.rmtree(self._states / str(number), ignore_errors=True)

    def _pointed(self) -> list[int]:
        """The generations that the cursor names; with a damaged cursor all that there are, newest first."""
        body = read_record(self.folder / _CURSOR, MOST_RECORD_BYTES)
        return list(body["generations"]) if is_cursor(body) else sorted(self._generations(), reverse=True)

    def _generations(self) -> list[int]:
        return [int(path.name) for path in _names(self._states) if path.name.isascii() and path.name.isdecimal()]

    def _block_path(self, block: int | None) -> Path:
        return self._blocks / (f"{OUTSIDE}.json" if block is None else f"{block:05d}.json")

    def _claim(self) -> None:
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / LOCK_NAME).exists():
            raise OutputError(
                f"{self.folder} is in the way and was not made by streamprune. Move it, or choose another -o or "
                "--work-dir."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The system takes the lock back when its holder ends in any way, so that none is ever stale.
            _lock(lock)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise OutputError(
                f"Another run (pid {holder or 'unknown'}) is working in {self.folder}. Wait for it."
            ) from None
        self._lock = lock
        if not _is_at(self.folder / LOCK_NAME, lock):
            # The run that held it has just finished, and took the folder away.
            self._release()
            self._claim()
            return
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        for path in self.folder.rglob(f"*{PARTIAL}"):
            path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # `streamprune status` holds it for an instant, to see whether anybody does.
        time.sleep(0.1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in a work folder."""
    # A name that begins like an option would be taken for one.
    name = str(folder) if not str(folder).startswith("-") else f"./{folder}"
    return f"streamprune resume {shlex.quote(name)}"


def _names(folder: Path, but: tuple[str, ...] = ()) -> list[Path]:
    """What lies in a folder; nothing if it is not there."""
    try:
        return [path for path in folder.iterdir() if path.name not in but]
    except OSError:
        return []


def finished_inode(folder: Path) -> int | None:
    """The inode of the folder that the run in a work folder gave the output's name, or was about to; None before."""
    body = read_record(folder / _FINISHED, MOST_RECORD_BYTES)
    return body.get("inode") if isinstance(body, dict) else None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder, which may change meanwhile."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size  # noqa: PTH118
    return total
