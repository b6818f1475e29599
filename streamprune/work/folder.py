"""The work folder: everything that is needed to resume an interrupted run.

| name | what it is |
|---|---|
| `streamprune.lock` | locked by the run that writes here; has its pid |
| `run.json` | the command and everything that decides its result; a resumed run must have the same |
| `tokens.json` | the calibration sequences |
| `pruning.json` | of `streamprune prune`, instead of these: the model and the experts that are kept |
| `*.copy.json` | second copies of run.json and tokens.json, used if the first is damaged |
| `layers/` | one record per finished layer: its statistics, its shards and their checksums |
| `states/N/` | the hidden states at two points of the run, the newest and the one before |
| `evaluation.json` | the result of `--evaluate`, once it is complete |
| `refused.json` | what `--stop-if-kl` refused |
| `search.json` | of `streamprune search`: the candidates that were given up |
| `cursor.json` | which generation of states is valid; replaced atomically |
| `model/` | the finished shards |
| `finished.json` | the inode of the complete output (a folder or a scores file), before it is renamed |
| `scores.safetensors` | of `streamprune score`: the scores, before they are renamed to the output |
| `replaced/` | with --overwrite, the old output, until the new one is in place |
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from streamprune.errors import OutputError
from streamprune.files.durable import (
    PARTIAL,
    checksum_of,
    kill_point,
    names_in,
    read_record,
    sync_folder,
    write_record,
    writing,
)
from streamprune.formats.base import KeptExperts
from streamprune.saliency.scores import LayerStatistics, pack
from streamprune.work.layer_records import FinishedLayer, FinishedShard, StageResults
from streamprune.work.records import (
    MOST_LAYER_BYTES,
    MOST_RECORD_BYTES,
    RUN_NAMES,
    RecordedEvaluation,
    RecordedRefusal,
    RecordedSearch,
    converted,
)

if TYPE_CHECKING:
    from streamprune.work.saved_states import Generations


LOCK_NAME = "streamprune.lock"
_FINISHED = "finished.json"
_EVALUATION, _REFUSED, _SEARCH = "evaluation.json", "refused.json", "search.json"
REPLACED_NAME = "replaced"
#: The name of the record of shards that belong to no layer.
OUTSIDE = "outside"


class WorkFolder:
    """A work folder that this process has locked. Use as a context manager: entering creates and locks it.

    Entering raises OutputError if another run has locked it, streamprune did not make it, or it cannot be written.
    Leaving unlocks it; `remove` deletes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = folder / "model"
        self._states, self._layers = folder / "states", folder / "layers"
        self._lock: int | None = None

    def __enter__(self) -> WorkFolder:
        try:
            self._claim()
            for path in (self.staging, self._states, self._layers):
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
        """Remove the folder and everything in it."""
        # The lock is removed last, and before it what says that the output is complete: after a kill in between, the
        # folder is still recognised as streamprune's, and as of no more use.
        for path in names_in(self.folder, but=(LOCK_NAME, _FINISHED)):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
        kill_point("work folder emptied")
        with suppress(OSError):
            (self.folder / _FINISHED).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        kill_point("work folder removed")

    def start_afresh(self) -> None:
        """Remove everything of an earlier run except the lock, and an old output that was moved aside."""
        with writing(f"Emptying {self.folder}", self.folder):
            # The record of the run is removed first: it must not outlive the files that it describes.
            for name in RUN_NAMES:
                (self.folder / name).unlink(missing_ok=True)
            for path in names_in(self.folder, but=(LOCK_NAME, REPLACED_NAME)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in (self.staging, self._states, self._layers):
                path.mkdir()
            sync_folder(self.folder)

    def has_progress(self) -> bool:
        """Whether anything would be lost with the folder: finished layers, saved states, a refusal, an old output."""
        layers = any(path.stem != OUTSIDE for path in names_in(self._layers))
        refused = (self.folder / _REFUSED).exists()
        return layers or bool(names_in(self._states)) or refused or self.keeps_old_output()

    def keeps_old_output(self) -> bool:
        """Whether the folder has the old output that --overwrite replaces."""
        return (self.folder / REPLACED_NAME).exists()

    def write_layer(
        self,
        index: int | None,
        layer: LayerStatistics | None,
        kept: KeptExperts,
        shards: list[FinishedShard],
        made: StageResults | None = None,
    ) -> None:
        """Record a layer whose shards are written and flushed. `index` None: the weights that belong to no layer.

        `made` is what stages behind the scoring made of it.
        """
        result: dict[str, Any] | None = None
        if layer is not None:
            result = {"block": layer.index, "statistics": pack(layer.values)}
            if layer.channels is not None:
                result["channels"] = pack(layer.channels)
        channels = kept.channels.as_text() if kept.channels is not None else None
        stages = msgspec.structs.asdict(made or StageResults())
        record = FinishedLayer(result, kept.experts, shards, channels, **stages)
        with writing(f"Recording a layer in {self._layers}", self.folder):
            write_record(self._layer_path(index), msgspec.to_builtins(record))
        kill_point("block recorded")

    def read_layer(self, index: int | None) -> FinishedLayer | None:
        """The record of a finished layer, whose shards are not checked; None if it is not finished, or damaged."""
        return converted(read_record(self._layer_path(index), MOST_LAYER_BYTES), FinishedLayer)

    def is_intact(self, shard: FinishedShard) -> bool:
        """Whether a shard has the size and checksum that were recorded."""
        path = self.staging / shard.file
        try:
            return path.stat().st_size == shard.nbytes and checksum_of(path) == shard.sha256
        except OSError:
            return False

    def remove_other_shards(self, files: Iterable[str]) -> None:
        """Remove everything but these files from the shards' folder, because all of it becomes the output.

        Raises OutputError if that folder is a link.
        """
        if self.staging.is_symlink():
            raise OutputError(
                f"{self.staging} is a link, which streamprune did not make. Start over with --resume never."
            )
        with writing(f"Tidying {self.staging}", self.staging):
            for path in names_in(self.staging, but=tuple(files)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def forget_layer(self, index: int | None) -> None:
        """Remove the record of a layer, so that it counts as unfinished."""
        with writing(f"Removing a record in {self._layers}", self.folder):
            self._layer_path(index).unlink(missing_ok=True)

    def write_evaluation(self, result: dict[str, Any]) -> None:
        """Record the result of `--evaluate`."""
        with writing(f"Recording the evaluation in {self.folder}", self.folder):
            write_record(self.folder / _EVALUATION, result)

    def read_evaluation(self) -> dict[str, Any] | None:
        """What `write_evaluation` recorded; None if it is missing or damaged."""
        body = read_record(self.folder / _EVALUATION, MOST_RECORD_BYTES)
        return body if converted(body, RecordedEvaluation) is not None else None

    def forget_evaluation(self) -> None:
        """Remove what `write_evaluation` and `write_refusal` recorded."""
        with writing(f"Removing the evaluation in {self.folder}", self.folder):
            for name in (_EVALUATION, _REFUSED):
                (self.folder / name).unlink(missing_ok=True)

    def write_refusal(self, refusal: RecordedRefusal) -> None:
        """Record that `--stop-if-kl` refused the run."""
        with writing(f"Recording the refusal in {self.folder}", self.folder):
            write_record(self.folder / _REFUSED, msgspec.to_builtins(refusal))

    def read_refusal(self) -> RecordedRefusal | None:
        """What `write_refusal` recorded; None if it is missing or damaged."""
        return converted(read_record(self.folder / _REFUSED, MOST_RECORD_BYTES), RecordedRefusal)

    def write_search(self, given_up: Mapping[str, Any]) -> None:
        """Record the candidates that a search has given up, by name."""
        with writing(f"Recording the search in {self.folder}", self.folder):
            write_record(self.folder / _SEARCH, {"given_up": given_up})

    def read_search(self) -> dict[str, dict[str, Any]]:
        """What `write_search` recorded; nothing if it is missing or damaged."""
        found = converted(read_record(self.folder / _SEARCH, MOST_RECORD_BYTES), RecordedSearch)
        return msgspec.to_builtins(found.given_up) if found is not None else {}

    def record_complete(self, result: Path) -> None:
        """Record that `result`, a folder or a file, is complete and about to be renamed to the output."""
        write_record(self.folder / _FINISHED, {"inode": result.stat().st_ino})

    @property
    def states(self) -> Generations:
        """The saved hidden states."""
        # Imported only here: `prune` has no states and needs no torch.
        from streamprune.work.saved_states import Generations

        return Generations(self.folder, self._states)

    def _layer_path(self, index: int | None) -> Path:
        return self._layers / (f"{OUTSIDE}.json" if index is None else f"{index:05d}.json")

    def _claim(self) -> None:
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / LOCK_NAME).exists():
            raise OutputError(
                f"{self.folder} exists and was not made by streamprune. Move it, or choose another -o or --work-dir."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The system releases the lock when the process ends in any way, so it is never stale.
            _lock(lock)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise OutputError(
                f"Another run (pid {holder or 'unknown'}) is working in {self.folder}. Wait until it ends."
            ) from None
        self._lock = lock
        if not _is_at(self.folder / LOCK_NAME, lock):
            # The run that had locked it has just finished and removed the folder.
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
        # `streamprune status` locks it for an instant, to see whether another process has.
        time.sleep(0.1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def resume_command(folder: Path) -> str:
    """The command that resumes the run in a work folder."""
    # A name that begins with a dash would be parsed as an option.
    name = str(folder) if not str(folder).startswith("-") else f"./{folder}"
    return f"streamprune resume {shlex.quote(name)}"


def finished_inode(folder: Path) -> int | None:
    """The inode of the complete output of the run in a work folder; None if it is not complete."""
    body = read_record(folder / _FINISHED, MOST_RECORD_BYTES)
    return body.get("inode") if isinstance(body, dict) else None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder. Files may come and go meanwhile."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size  # noqa: PTH118
    return total
