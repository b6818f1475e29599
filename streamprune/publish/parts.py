"""Which files of an output belong to it, and so are published; which others lie there, and why they stay. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint, open_checkpoint
from streamprune.config import WORK_SUFFIX, sibling_path
from streamprune.errors import CheckpointError, OutputError, ReportError
from streamprune.files.json_text import show
from streamprune.output.plan import REPORT_NAME
from streamprune.reporting.evaluations import FOLDER_NAME
from streamprune.reporting.record import Record, damage, read_record
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME
from streamprune.work.folder import resume_command
from streamprune.work.records import has_pruning, has_run

CARD_NAME = "README.md"
#: What is made of an output later: such files, and those in such folders with such endings. (`reporting.write` names
#: two of them, but needs matplotlib.)
_LATER_FILES = {"report.html"}
_LATER_FOLDERS = {FOLDER_NAME: ".json", "pictures": ".png"}
#: Why a file with such an ending stays.
_KINDS = {".partial": "not finished", ".incomplete": "not finished", ".tmp": "not finished", ".log": "a log"}
_NO_PART = "belongs to no part of the model"


@dataclass(frozen=True)
class PublishedFile:
    """A file that belongs to the model: its name within the folder, its size, and when it was last changed."""

    name: str
    nbytes: int
    changed_ns: int = field(repr=False)


@dataclass(frozen=True)
class Parts:
    """An output taken apart: its checkpoint and record, the files that are published, and the others with a reason."""

    folder: Path
    checkpoint: Checkpoint = field(repr=False)
    record: Record = field(repr=False)
    files: tuple[PublishedFile, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files that are published."""
        return sum(file.nbytes for file in self.files)

    def check_unchanged(self) -> None:
        """Raise OutputError if a file was changed since: what was verified is what has to be published."""
        for file in self.files:
            path = self.folder / file.name
            try:
                facts = path.stat()
            except OSError as error:
                raise OutputError(f"{path} cannot be read any more: {error.strerror or error}. Push again.") from error
            if (facts.st_size, facts.st_mtime_ns) != (file.nbytes, file.changed_ns):
                raise OutputError(f"{path} was changed since it was looked at. Push again when nothing writes there.")


def parts_of(output: Path) -> Parts:
    """Take an output apart. Nothing is read but headers and JSON.

    Raises OutputError for a folder that is no complete output of streamprune, or whose parts are links that lead out of
    it: whoever placed them may not have meant to publish what lies there.
    """
    _check_output(output)
    try:
        record = read_record(output)
    except ReportError as error:
        raise OutputError(str(error)) from None
    if record.files is None:
        raise OutputError(
            f"{output / REPORT_NAME} does not list the files that belong to the model: another version of streamprune "
            f"wrote it, or it was changed. Prune again: from its own scores (`streamprune prune SOURCE --scores "
            f"{output}`) that takes the time of a file copy."
        )
    try:
        checkpoint = open_checkpoint(output)
    except CheckpointError as error:
        raise OutputError(f"{output} is no complete model: {damage(error)}. Prune again, or restore it.") from None
    # The files without which the model is not complete.
    wanted = {CONFIG_NAME, REPORT_NAME, CARD_NAME, INDEX_NAME, *checkpoint.files, *record.files}
    if record.calibration is not None:
        wanted.add(f"{SCORES_FOLDER}/{SCORES_NAME}")
    files: list[PublishedFile] = []
    left_out: list[tuple[str, str]] = []
    for path, name in _walk(output.resolve()):
        reason = _reason(path, name, wanted)
        if reason is None:
            files.append(_published(path, name, output))
        else:
            left_out.append((name, reason))
    missing = sorted(wanted - {file.name for file in files})
    if missing:
        raise OutputError(
            f"{output} is not complete: {len(missing)} of {len(wanted)} files are missing, first {show(missing[0])}. "
            "Prune again, or restore them."
        )
    files.sort(key=lambda file: file.name)
    return Parts(output.resolve(), checkpoint, record, tuple(files), tuple(sorted(left_out)))


def _check_output(output: Path) -> None:
    if not output.is_dir():
        work = sibling_path(output, WORK_SUFFIX)
        if has_run(work) or has_pruning(work):
            raise OutputError(f"{output} is not finished. Resume with: {resume_command(work)}")
        raise OutputError(f"{output} is not a folder. Give the folder of a model that streamprune wrote.")
    if has_run(output) or has_pruning(output):
        raise OutputError(f"{output} is the work folder of something unfinished. Resume with: {resume_command(output)}")
    if not (output / REPORT_NAME).is_file():
        raise OutputError(
            f"{output} was not written by streamprune: it has no {REPORT_NAME}. Give the folder of a pruned model."
        )


def _walk(home: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with its name in it (of a hidden folder only that, with a slash at the end).

    Folders that are links are taken for files: what they lead to is not looked at.
    """
    for place, folders, files in os.walk(home):
        for base in sorted(folders):
            path = Path(place, base)
            if base.startswith("."):
                yield path, f"{path.relative_to(home).as_posix()}/"
            elif path.is_symlink():
                files.append(base)
        folders[:] = [base for base in sorted(folders) if not base.startswith(".")]
        for base in sorted(files):
            path = Path(place, base)
            yield path, path.relative_to(home).as_posix()


def _reason(path: Path, name: str, wanted: set[str]) -> str | None:
    """Why a file stays; None for one that is published."""
    if path.name.startswith("."):
        return "hidden"
    folder, _, base = name.rpartition("/")
    is_later = name in _LATER_FILES or (folder in _LATER_FOLDERS and base.endswith(_LATER_FOLDERS[folder]))
    if name in wanted or is_later:
        return None
    return f"a link; {_NO_PART}" if path.is_symlink() else _KINDS.get(path.suffix.lower(), _NO_PART)


def _published(path: Path, name: str, output: Path) -> PublishedFile:
    if not path.resolve().is_relative_to(output.resolve()):
        raise OutputError(
            f"{output / name} is a link that leads out of the folder, to {path.resolve()}. Put a copy in its place if "
            "it is to be published."
        )
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OutputError(f"{output / name} is no regular file. Prune again, or restore it.")
    return PublishedFile(name, facts.st_size, facts.st_mtime_ns)
