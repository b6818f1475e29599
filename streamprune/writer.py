"""Writing the output: shard after shard into a work folder beside it, which becomes the output when all is there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from streamprune.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, TensorEntry, read_header, read_ranges
from streamprune.errors import OutputError
from streamprune.machine import check_disk
from streamprune.plan import PrunePlan, ShardPlan

#: Says that a work folder is ours, so that removing it cannot hit somebody's data.
MARKER_NAME = "streamprune.lock"
REPORT_NAME = "streamprune.json"
REPLACED_NAME = "replaced"


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise OutputError unless `output` may be created (or replaced, with `overwrite`)."""
    if output.name in {"", ".."}:
        raise OutputError(f"{output} cannot be the output: it must be a folder with a name. Choose another with -o.")
    if os.path.ismount(output):
        raise OutputError(f"{output} is a mount point, which cannot be created in one step. Use -o {output / 'model'}.")
    target, origin = output.resolve(), source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise OutputError(f"The output {output} and the model {source} must not be, or contain, one another.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is not a folder. Choose another place with -o.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{output} exists and is not empty. Choose another place with -o, or add --overwrite.")
    if not (output / CONFIG_NAME).exists():
        raise OutputError(
            f"{output} holds no model (no {CONFIG_NAME}), so --overwrite does not replace it. Choose another -o."
        )


class OutputWriter:
    """Writes a pruned checkpoint to `OUT.work/model` and renames it to OUT in `finish`.

    Use as a context manager: leaving it without `finish` removes what was written. Entering it checks the disk. Needs a
    few MiB of memory, whatever the sizes of tensors and shards. Raises OutputError or ResourceError.
    """

    def __init__(self, plan: PrunePlan, checkpoint: Checkpoint, output: Path, overwrite: bool) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._output = output
        self._overwrite = overwrite
        self._work = output.with_name(output.name + ".work")
        self._staging = self._work / "model"
        self._lock: int | None = None

    @property
    def work_folder(self) -> Path:
        """A folder on the output's disk for what the run needs meanwhile; it goes when the writer is left."""
        return self._work

    def __enter__(self) -> OutputWriter:
        try:
            self._claim()
        except OSError as error:
            raise OutputError(
                f"{self._work} cannot be created: {error.strerror}. Choose another place with -o."
            ) from None
        try:
            # Again, and only now: a run that was killed may have left its files, or an output that it moved aside.
            check_output(self._output, self._checkpoint.folder, self._overwrite)
            check_disk(self._work, self._plan.output_bytes)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._restore_replaced()
        shutil.rmtree(self._work, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _claim(self) -> None:
        if self._work.exists() and not (self._work / MARKER_NAME).exists():
            raise OutputError(
                f"{self._work} is in the way and was not made by streamprune. Move it, or choose another -o."
            )
        self._work.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._work / MARKER_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise OutputError(
                f"Another run (pid {holder or 'unknown'}) is writing {self._output}. Wait for it."
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock
        # A run that was killed left its half-written files behind, or the folder that it was about to replace.
        self._restore_replaced()
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()

    def _restore_replaced(self) -> None:
        replaced = self._work / REPLACED_NAME
        if replaced.exists() and not self._output.exists():
            replaced.rename(self._output)

    def write_block(self, block: int | None, kept: Sequence[int]) -> None:
        """Write the shards of a block (None: of everything outside the blocks), keeping the experts `kept` in order."""
        with _told_as_output_error(self._output):
            for shard in self._plan.shards:
                if shard.block == block:
                    self._write_shard(shard, kept)

    def _write_shard(self, shard: ShardPlan, kept: Sequence[int]) -> None:
        path = self._staging / shard.file
        with path.open("wb") as stream:
            stream.write(_encode_header(shard))
            for tensor in shard.tensors:
                file, ranges = tensor.ranges(kept)
                with (self._checkpoint.folder / file).open("rb") as source:
                    for data in read_ranges(source, ranges):
                        stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def headers(self) -> dict[str, TensorEntry]:
        """Every tensor in the files that are written so far, read back from their headers."""
        with _told_as_output_error(self._output):
            files = [shard.file for shard in self._plan.shards if (self._staging / shard.file).is_file()]
            return {entry.name: entry for file in files for entry in read_header(self._staging, file)}

    def finish(self, report: dict[str, Any], card: str) -> None:
        """Write index, config, report, card and the source's small files, then give the output its name."""
        with _told_as_output_error(self._output):
            self._write_small_files(report, card)
            self._check_sizes()
            for folder in {path.parent for path in self._staging.rglob("*")}:
                _sync_folder(folder)
            # Hours may have passed: whatever came to lie there meanwhile is not ours to replace.
            check_output(self._output, self._checkpoint.folder, self._overwrite)
            if self._output.is_dir() and any(self._output.iterdir()):
                # Moved aside first, so that it is whole until the new one is; a run after a crash here puts it back.
                self._output.rename(self._work / REPLACED_NAME)
            self._staging.rename(self._output)
            _sync_folder(self._output.absolute().parent)

    def _write_small_files(self, report: dict[str, Any], card: str) -> None:
        weight_map = {tensor.name: shard.file for shard in self._plan.shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": self._plan.output_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        for relative in self._checkpoint.small_files():
            target = self._staging / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._checkpoint.folder / relative, target)
            _sync_file(target)
        _write_text(self._staging / INDEX_NAME, _to_json(index))
        _write_text(self._staging / CONFIG_NAME, _to_json(dict(self._plan.config)))
        _write_text(self._staging / REPORT_NAME, _to_json(report))
        _write_text(self._staging / "README.md", card)

    def _check_sizes(self) -> None:
        for shard in self._plan.shards:
            size = (self._staging / shard.file).stat().st_size
            expected = shard.nbytes + len(_encode_header(shard))
            if size != expected:
                raise OutputError(
                    f"{shard.file} has {size:,} bytes instead of {expected:,}. Nothing was kept; run again."
                )


@contextmanager
def _told_as_output_error(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"Writing {output} failed: {error}. Nothing of it was kept.") from error


def _encode_header(shard: ShardPlan) -> bytes:
    """The safetensors header of a shard whose tensors follow one another; padded to 8 bytes as the format asks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard.tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
