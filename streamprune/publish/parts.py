"""Which files of an output belong to it, and so are published; what else lies there, and why that stays. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.config import WORK_SUFFIX, beside
from streamprune.errors import CheckpointError, OutputError
from streamprune.files.json_text import show
from streamprune.output.writer import REPORT_NAME
from streamprune.reporting.evaluations import FOLDER_NAME
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME
from streamprune.work.folder import resume_command
from streamprune.work.records import has_pruning, has_run

CARD_NAME = "README.md"
#: What is made of an output later: such files, and those in such folders with such endings. (`reporting` names two
#: of them, but needs matplotlib.)
_LATER_FILES = {"report.html"}
_LATER_FOLDERS = {FOLDER_NAME: ".json", "pictures": ".png"}
#: Why a file stays that has such an ending.
_KINDS = {".partial": "not finished", ".incomplete": "not finished", ".tmp": "not finished", ".log": "a log"}
_NO_PART = "belongs to no part of the model"


@dataclass(frozen=True)
class Part:
    """A file that belongs to the model: its name within the folder, its size, and when it was last changed."""

    name: str
    nbytes: int
    changed_ns: int = field(repr=False)


@dataclass(frozen=True)
class Parts:
    """An output taken apart: its checkpoint and record, the files that are published, and the others with a reason."""

    folder: Path
    checkpoint: Checkpoint = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    files: tuple[Part, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files that are published."""
        return sum(part.nbytes for part in self.files)

    def check_unchanged(self) -> None:
        """Raise OutputError if a file is another one by now: what was verified is what has to be published."""
        for part in self.files:
            path = self.folder / part.name
            try:
                facts = path.stat()
            except OSError as error:
                raise OutputError(f"{path} cannot be read any more: {error.strerror or error}. Push again.") from error
            if (facts.st_size, facts.st_mtime_ns) != (part.nbytes, part.changed_ns):
                raise OutputError(f"{path} was changed since it was looked at. Push again when nothing writes there.")


def parts_of(output: Path) -> Parts:
    """Take an output apart. Nothing is read but headers and JSON.

    Raises OutputError for a folder that is no complete output of streamprune, or whose parts are links that lead out of
    it: whoever placed them may not have meant to publish what lies there.
    """
    _check_output(output)
    report = _report(output)
    try:
        checkpoint = open_checkpoint(output)
    except CheckpointError as error:
        raise OutputError(f"{output} is no complete model: {damage(error)}. Prune again, or restore it.") from None
    wanted = _wanted(checkpoint, report)
    files: list[Part] = []
    left_out: list[tuple[str, str]] = []
    for path, name in _walk(output.resolve(), left_out):
        if name in wanted or _made_later(name):
            files.append(_part(path, name, output))
        else:
            left_out.append((name, _reason(path)))
    missing = sorted(wanted - {part.name for part in files})
    if missing:
        raise OutputError(
            f"{output} is not complete: {len(missing)} of {len(wanted)} files are missing, first {show(missing[0])}. "
            "Prune again, or restore them."
        )
    return Parts(output.resolve(), checkpoint, report, tuple(sorted(files, key=_name)), tuple(sorted(left_out)))


def damage(error: Exception) -> str:
    """What is wrong by an error about a checkpoint, without its advice, which is for models that were downloaded."""
    said, _, advice = str(error).rpartition(". ")
    return said or advice.rstrip(".")


def _name(part: Part) -> str:
    return part.name


def _check_output(output: Path) -> None:
    if not output.is_dir():
        work = beside(output, WORK_SUFFIX)
        if has_run(work) or has_pruning(work):
            raise OutputError(f"{output} is not finished. Go on with: {resume_command(work)}")
        raise OutputError(f"{output} is not a folder. Give the folder of a model that streamprune wrote.")
    if has_run(output) or has_pruning(output):
        raise OutputError(f"{output} is the work folder of something unfinished. Go on with: {resume_command(output)}")
    if not (output / REPORT_NAME).is_file():
        raise OutputError(
            f"{output} was not written by streamprune: it has no {REPORT_NAME}. Give the folder of a pruned model."
        )


def _report(output: Path) -> dict[str, Any]:
    path = output / REPORT_NAME
    try:
        report = read_json(path)
    except CheckpointError as error:
        raise OutputError(f"{damage(error)}. Prune again, or restore it.") from None
    files, settings, source = (report.get(name) for name in ("files", "settings", "source"))
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise OutputError(
            f"{path} does not list the files that belong to the model: another version of streamprune wrote it, or it "
            f"was changed. Prune again: from its own scores (`streamprune prune SOURCE --scores {output}`) that takes "
            "the time of a file copy."
        )
    if not isinstance(settings, dict) or not isinstance(source, dict):
        raise OutputError(f"{path} does not tell what the model was made from. Was it changed? Prune again.")
    return report


def _wanted(checkpoint: Checkpoint, report: dict[str, Any]) -> set[str]:
    """The files without which the model is not complete."""
    wanted = {CONFIG_NAME, REPORT_NAME, CARD_NAME, INDEX_NAME, *checkpoint.files, *report["files"]}
    if report.get("calibration") is not None:
        wanted.add(f"{SCORES_FOLDER}/{SCORES_NAME}")
    return wanted


def _made_later(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    if folder:
        ending = _LATER_FOLDERS.get(folder)
        return ending is not None and base.endswith(ending)
    return name in _LATER_FILES


def _walk(home: Path, left_out: list[tuple[str, str]]) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with its name in it; what is hidden is added to `left_out`, and folders that are links
    are taken for files: what they lead to is not looked at."""
    for place, folders, files in os.walk(home):
        for base in sorted(folders):
            path = Path(place, base)
            name = path.relative_to(home).as_posix()
            if base.startswith("."):
                left_out.append((f"{name}/", "hidden"))
            elif path.is_symlink():
                yield path, name
        folders[:] = [base for base in sorted(folders) if not base.startswith(".")]
        for base in sorted(files):
            path = Path(place, base)
            name = path.relative_to(home).as_posix()
            if base.startswith("."):
                left_out.append((name, "hidden"))
            else:
                yield path, name


def _part(path: Path, name: str, output: Path) -> Part:
    if not path.resolve().is_relative_to(output.resolve()):
        raise OutputError(
            f"{output / name} is a link that leads out of the folder, to {path.resolve()}. Put a copy in its place if "
            "it is to be published."
        )
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OutputError(f"{output / name} is no regular file. Prune again, or restore it.")
    return Part(name, facts.st_size, facts.st_mtime_ns)


def _reason(path: Path) -> str:
    if path.is_symlink():
        return f"a link; {_NO_PART}"
    return _KINDS.get(path.suffix.lower(), _NO_PART)
