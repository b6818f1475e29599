"""The work folder: all that a run needs to go on after whatever ends it. It alone suffices.

| name | what it is |
|---|---|
| `streamprune.lock` | held by the run that writes here; names its pid |
| `run.json` | the command, and what it was run on: what a later run must agree with |
| `tokens.json` | the calibration sequences |
| `blocks/` | one record per finished block: its result, its shards and their checksums |
| `states/N/` | the hidden states at two points of the run, the newest and the one before |
| `cursor.json` | which of those counts: the one atomic pointer |
| `model/` | the finished shards |
| `replaced/` | with --overwrite, the old output, until the new one has its name |
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from streamprune.durable import PARTIAL, checksum_of, reached, read_record, sync_folder, write_record
from streamprune.errors import OutputError, ResumeError
from streamprune.saved_states import INDEX_NAME, SavedStates, open_states, save_states
from streamprune.stream import BatchState

LOCK_NAME = "streamprune.lock"
_RUN, _TOKENS, _CURSOR, _REPLACED = "run.json", "tokens.json", "cursor.json", "replaced"
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
                f"{self.folder} cannot be created: {error.strerror}. Choose another place with -o or --work-dir."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_afresh(self) -> None:
        """Forget an earlier run: everything but the lock, and an old output that was moved aside."""
        for path in self.folder.iterdir():
            if path.name in (LOCK_NAME, _REPLACED):
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in (self.staging, self._states, self._blocks):
            path.mkdir()
        sync_folder(self.folder)

    def has_progress(self) -> bool:
        """Whether any decoder block is finished or any state saved: what would be lost with the folder."""
        return any(path.stem != OUTSIDE for path in self._blocks.iterdir()) or any(self._states.iterdir())

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder."""
        return folder_bytes(self.folder)

    def write_run(self, run: dict[str, Any], tokens: list[list[int]]) -> None:
        """Record what is run, and on what. From here on the run can be resumed."""
        write_record(self.folder / _TOKENS, tokens)
        write_record(self.folder / _RUN, run)
        reached("run recorded")

    def read_run(self) -> dict[str, Any] | None:
        """What `write_run` recorded; None if there is nothing whole."""
        return read_run(self.folder)

    def read_tokens(self) -> list[list[int]]:
        """The recorded calibration sequences. Raises ResumeError if they are damaged."""
        tokens = read_record(self.folder / _TOKENS)
        if not isinstance(tokens, list):
            raise ResumeError(
                f"{self.folder / _TOKENS} is damaged. Give the calibration again with the same `streamprune run` "
                "command, or begin anew with --resume never."
            )
        return tokens

    def write_block(self, block: int | None, result: dict[str, Any] | None, shards: list[FinishedShard]) -> None:
        """Record a block whose shards are written and flushed. None: what lies outside all blocks."""
        body = {"result": result, "shards": [vars(shard) for shard in shards]}
        write_record(self._block_path(block), body)
        reached("block recorded")

    def read_block(self, block: int | None) -> tuple[dict[str, Any] | None, list[FinishedShard]] | None:
        """The result and the shards of a finished block; None if it is not finished, or its record is damaged.

        The shards' contents are not looked at: see `whole`.
        """
        body = read_record(self._block_path(block))
        if not isinstance(body, dict):
            return None
        return body["result"], [FinishedShard(**shard) for shard in body["shards"]]

    def whole(self, shard: FinishedShard) -> bool:
        """Whether a shard is there with the bytes that were recorded."""
        path = self.staging / shard.file
        return path.is_file() and path.stat().st_size == shard.nbytes and checksum_of(path) == shard.sha256

    def forget_block(self, block: int | None) -> None:
        """Let a block count as unfinished."""
        self._block_path(block).unlink(missing_ok=True)

    def save(self, count: int, load: Callable[[int], BatchState], facts: dict[str, Any]) -> None:
        """Make `count` hidden states and the facts about them durable, then point the cursor at them.

        The generation before is kept, older ones go.
        """
        numbers, before = self._generations(), self._pointed()
        number = max(numbers, default=0) + 1
        save_states(self._states / str(number), count, load, facts)
        sync_folder(self._states)
        reached("states saved")
        kept = [number, *before[:1]]
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
            index = read_record(self._states / str(number) / INDEX_NAME)
            if isinstance(index, dict):
                return int(index["facts"]["block"])
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
        (self.folder / _CURSOR).unlink(missing_ok=True)
        for number in self._generations():
            shutil.rmtree(self._states / str(number), ignore_errors=True)

    def _pointed(self) -> list[int]:
        """The generations that the cursor names; with a damaged cursor all that there are, newest first."""
        body = read_record(self.folder / _CURSOR)
        if isinstance(body, dict):
            return [number for number in body["generations"] if isinstance(number, int)]
        return sorted(self._generations(), reverse=True)

    def _generations(self) -> list[int]:
        if not self._states.is_dir():
            return []
        return [int(path.name) for path in self._states.iterdir() if path.name.isdecimal()]

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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            path.unlink()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in a work folder."""
    return f"streamprune resume {shlex.quote(str(folder))}"


def read_run(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the run in a work folder; None if there is nothing whole."""
    body = read_record(folder / _RUN)
    return body if isinstance(body, dict) else None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
