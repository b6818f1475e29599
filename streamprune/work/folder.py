"""The work folder: all that a run needs to go on after whatever ends it. It alone suffices.

| name | what it is |
|---|---|
| `streamprune.lock` | held by the run that writes here; names its pid |
| `run.json` | the command, and what it was run on: what a later run must agree with |
| `tokens.json` | the calibration sequences |
| `pruning.json` | instead of these: which experts `streamprune prune` was keeping of which model |
| `*.copy.json` | both again, for the case that the first is damaged: nothing else could stand in for them |
| `blocks/` | one record per finished block: its result, its shards and their checksums |
| `states/N/` | the hidden states at two points of the run, the newest and the one before |
| `evaluation.json` | what `--evaluate` found, once all of it is known |
| `cursor.json` | which of those counts: the one atomic pointer |
| `model/` | the finished shards |
| `finished.json` | what is whole and gets the output's name next, a folder or a file of scores, by its inode |
| `scores.safetensors` | of `streamprune score`: the scores, until they get the output's name |
| `replaced/` | with --overwrite, the old output, until the new one has its name |
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from streamprune.errors import OutputError
from streamprune.files.durable import (
    PARTIAL,
    checksum_of,
    names_in,
    reached,
    read_record,
    sync_folder,
    write_record,
    writing,
)
from streamprune.saliency.scores import LayerStatistics, pack
from streamprune.work.records import (
    MOST_RECORD_BYTES,
    RUN_NAMES,
    is_block,
    is_evaluation,
    read_run,
    read_tokens,
    write_run,
)

if TYPE_CHECKING:
    from streamprune.work.saved_states import Generations


LOCK_NAME = "streamprune.lock"
_FINISHED = "finished.json"
_EVALUATION = "evaluation.json"
REPLACED_NAME = "replaced"
#: The block number under which the shards outside all blocks are recorded.
OUTSIDE = "outside"


@dataclass(frozen=True)
class FinishedShard:
    """A shard in the work folder: its name, size and SHA-256."""

    file: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class FinishedLayer:
    """The record of a finished block: its statistics (None without experts), the experts that stay, and its shards.

    Where nothing is written while blocks are scored, no experts and no shards are on record yet. The statistics are
    as they were read, and need not be such.
    """

    result: dict[str, Any] | None
    kept: tuple[int, ...]
    shards: list[FinishedShard]


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
        for path in names_in(self.folder, but=(LOCK_NAME,)):
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
            for path in names_in(self.folder, but=(LOCK_NAME, REPLACED_NAME)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in (self.staging, self._states, self._blocks):
                path.mkdir()
            sync_folder(self.folder)

    def has_progress(self) -> bool:
        """Whether anything would be lost with the folder: finished decoder blocks, saved states, an old output."""
        blocks = any(path.stem != OUTSIDE for path in names_in(self._blocks))
        return blocks or bool(names_in(self._states)) or self.keeps_old_output()

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

    def write_layer(
        self, block: int | None, layer: LayerStatistics | None, kept: Sequence[int], shards: list[FinishedShard]
    ) -> None:
        """Record a block whose shards are written and flushed. None: what lies outside all blocks."""
        result = {"block": layer.index, "statistics": pack(layer.values)} if layer is not None else None
        body = {"result": result, "kept": list(kept), "shards": [vars(shard) for shard in shards]}
        with writing(f"Recording a block in {self._blocks}", self.folder):
            write_record(self._block_path(block), body)
        reached("block recorded")

    def read_layer(self, block: int | None) -> FinishedLayer | None:
        """What is on record of a finished block; None if it is not finished, or its record is damaged.

        The shards' contents are not looked at: see `whole`.
        """
        body = read_record(self._block_path(block), MOST_RECORD_BYTES)
        if not is_block(body):
            return None
        shards = [FinishedShard(**shard) for shard in body["shards"]]
        return FinishedLayer(body["result"], tuple(body["kept"]), shards)

    def whole(self, shard: FinishedShard) -> bool:
        """Whether a shard is there with the bytes that were recorded."""
        path = self.staging / shard.file
        try:
            return path.stat().st_size == shard.nbytes and checksum_of(path) == shard.sha256
        except OSError:
            return False

    def leave_only(self, files: Iterable[str]) -> None:
        """Remove from the finished shards' folder what is none of these files: left by another choice, or a stranger.

        All of that folder would become the output.
        """
        if self.staging.is_symlink():
            raise OutputError(f"{self.staging} is a link, which nothing here makes. Begin anew with --resume never.")
        with writing(f"Tidying {self.staging}", self.staging):
            for path in names_in(self.staging, but=tuple(files)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def forget_layer(self, block: int | None) -> None:
        """Let a block count as unfinished."""
        with writing(f"Forgetting a block in {self._blocks}", self.folder):
            self._block_path(block).unlink(missing_ok=True)

    def write_evaluation(self, result: dict[str, Any]) -> None:
        """Record what was found on the text that was held back."""
        with writing(f"Recording the evaluation in {self.folder}", self.folder):
            write_record(self.folder / _EVALUATION, result)

    def read_evaluation(self) -> dict[str, Any] | None:
        """What `write_evaluation` recorded; None if there is nothing whole."""
        body = read_record(self.folder / _EVALUATION, MOST_RECORD_BYTES)
        return body if is_evaluation(body) else None

    def forget_evaluation(self) -> None:
        """Let nothing be known of what was lost."""
        with writing(f"Forgetting the evaluation in {self.folder}", self.folder):
            (self.folder / _EVALUATION).unlink(missing_ok=True)

    def will_be_output(self, whole: Path) -> None:
        """Record that `whole`, a folder or a file, is complete, and is about to be given the output's name."""
        write_record(self.folder / _FINISHED, {"inode": whole.stat().st_ino})

    @property
    def states(self) -> Generations:
        """The saved hidden states."""
        # Only here: what only writes from scores has none, and does without torch.
        from streamprune.work.saved_states import Generations

        return Generations(self.folder, self._states)

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


def finished_inode(folder: Path) -> int | None:
    """The inode of what was given the output's name, or was about to be, by the run in a work folder; None before."""
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
