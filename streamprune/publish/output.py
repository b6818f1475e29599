"""An output for publishing: which files belong to it, which are skipped and why, and whether it is complete.

It is compared with its source, or, without the source, checked by its own files. Imports torch only to verify it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from streamprune.checkpoint.hub import cached_model, resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.common_settings import WORK_SUFFIX
from streamprune.errors import CheckpointError, OutputError, ReportError, ScoresError, SettingsError, VerifyError
from streamprune.files.json_text import show
from streamprune.files.names import sibling_path
from streamprune.hardware.memory import format_bytes
from streamprune.models.per_layer_experts import LoadingFacts, has_per_layer_experts, modeling_source
from streamprune.output.plan import REPORT_NAME
from streamprune.output.verified_record import check_kept
from streamprune.output.verify import check_computed, refuse_extra_weights, verify
from streamprune.reporting.card import HUB_ID
from streamprune.reporting.evaluations import FOLDER_NAME
from streamprune.reporting.facts import read_scores_of
from streamprune.reporting.record import Record, damage, read_record
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME
from streamprune.work.folder import resume_command
from streamprune.work.records import has_pruning, has_run

CARD_NAME = "README.md"
#: Files that are added to an output later: these, and those in these folders with these suffixes. (`reporting.write`
#: defines two of them, but needs matplotlib.)
_LATER_FILES = {"report.html"}
_LATER_FOLDERS = {FOLDER_NAME: ".json", "pictures": ".png"}
#: Why a file with such a suffix is skipped.
_KINDS = {".partial": "not finished", ".incomplete": "not finished", ".tmp": "not finished", ".log": "a log"}
_NO_PART = "belongs to no part of the model"


@dataclass(frozen=True)
class PublishedFile:
    """A file that belongs to the model: its name within the folder, its size, and when it was last changed."""

    name: str
    nbytes: int
    changed_ns: int = field(repr=False)


@dataclass(frozen=True)
class PublishedOutput:
    """An output's checkpoint and record, the files that are published, and the others with a reason."""

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
        """Raise OutputError if a file has changed since it was verified."""
        for file in self.files:
            path = self.folder / file.name
            try:
                facts = path.stat()
            except OSError as error:
                raise OutputError(f"{path} can no longer be read: {error.strerror or error}. Push again.") from error
            if (facts.st_size, facts.st_mtime_ns) != (file.nbytes, file.changed_ns):
                raise OutputError(f"{path} has changed since it was verified. Push again when nothing writes there.")


def read_output(output: Path) -> PublishedOutput:
    """The files of an output that would be published. Only headers and JSON are read.

    Raises OutputError for a folder that is not a complete output of streamprune, and for a link out of the folder:
    whoever made it may not have meant to publish its target.
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
        raise OutputError(f"{output} is not a complete model: {damage(error)}. Prune again, or restore it.") from None
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
    return PublishedOutput(output.resolve(), checkpoint, record, tuple(files), tuple(sorted(left_out)))


def _check_output(output: Path) -> None:
    is_folder = output.is_dir()
    work = output if is_folder else sibling_path(output, WORK_SUFFIX)
    if has_run(work) or has_pruning(work):
        what = "the work folder of an unfinished run" if is_folder else "not finished"
        raise OutputError(f"{output} is {what}. Resume with: {resume_command(work)}")
    if not is_folder:
        raise OutputError(f"{output} is not a folder. Give the folder of a model that streamprune wrote.")
    if not (output / REPORT_NAME).is_file():
        raise OutputError(
            f"{output} was not written by streamprune: it has no {REPORT_NAME}. Give the folder of a pruned model."
        )


def _walk(home: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder, and its relative name (for a hidden folder only its name, with a slash at the end).

    Links to folders count as files: they are not followed.
    """
    for place, folders, files in os.walk(home):
        hidden = [f"{base}/" for base in folders if base.startswith(".")]
        links = [base for base in folders if not base.startswith(".") and Path(place, base).is_symlink()]
        for base in sorted([*files, *links, *hidden]):
            path = Path(place, base)
            yield path, path.relative_to(home).as_posix() + ("/" if base.endswith("/") else "")
        folders[:] = [base for base in folders if not base.startswith(".")]


def _reason(path: Path, name: str, wanted: set[str]) -> str | None:
    """Why a file is skipped; None for one that is published."""
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
            f"{output / name} is a link out of the folder, to {path.resolve()}. Replace it by a copy if it is to be "
            "published."
        )
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OutputError(f"{output / name} is not a regular file. Prune again, or restore it.")
    return PublishedFile(name, facts.st_size, facts.st_mtime_ns)


def prove(output: PublishedOutput, source: str | None, trust_remote_code: bool, offline: bool) -> dict[str, Any]:
    """Compare an output with `source` (a folder or a Hub id), or with what its record names if that is here.

    Where no source is here, its own files are checked: that all tensors are there with the shapes that the model of its
    config has, as many experts as its record says, and computed tensors with the hashes on record. With `offline` a
    Hub model counts only if it is in the cache. Returns what `--json` prints and a line (`text`) for the user. Raises
    VerifyError for an output that is not what it should be.
    """
    _check_card_and_scores(output)
    folder, tensors = output.folder, output.checkpoint.tensors
    found = {"kind": "source", "tensors": len(tensors), "bytes": output.checkpoint.nbytes}
    what = f"{len(tensors):,} tensors, {format_bytes(output.checkpoint.nbytes)}"
    origin, missing = _recorded_source(output, trust_remote_code) if source is None else (None, "")
    if source is not None:
        origin = _named_source(output, source, trust_remote_code, offline)
    if origin is not None:
        but = verify(folder, origin, trust_remote_code).exceptions
        return {**found, "text": f"verified: {what}, identical to the bytes of the source in {origin}{but}"}
    try:
        _check_files(output, trust_remote_code)
    except CheckpointError as error:
        raise VerifyError(f"{folder} is not valid: {damage(error)}. Prune again, or restore it.") from error
    text = (
        f"verified without the source: {what}, complete, with the shapes that config.json and {REPORT_NAME} require. "
        f"Not compared with the bytes of the source: {missing}"
    )
    return {**found, "kind": "files", "text": text}


def _named_source(output: PublishedOutput, source: str, trust_remote_code: bool, offline: bool) -> Path:
    """The folder of the source that the user names; a Hub model is downloaded unless `offline`."""
    settings = output.record.settings
    revision = settings.revision if source == settings.model else None
    if not offline or Path(source).expanduser().is_dir():
        return resolve_model(source, revision, trust_remote_code)
    cached = cached_model(source, revision, trust_remote_code)
    if cached is None:
        raise SettingsError(
            f"--source {source} is neither a folder nor in the Hub cache, and --dry-run does not use the network. Omit "
            "one of the two."
        )
    return cached


def _recorded_source(output: PublishedOutput, trust_remote_code: bool) -> tuple[Path | None, str]:
    """The folder of the source that the record names; or None, and why it is not here."""
    model, revision = output.record.settings.model, output.record.settings.revision
    if not HUB_ID.fullmatch(model):
        return None, "no --source is given."
    cached = cached_model(model, revision, trust_remote_code)
    if cached is None:
        return None, f"{model} is not in the Hub cache, and no --source is given."
    try:
        fingerprint = open_checkpoint(cached).fingerprint()
    except (CheckpointError, OSError):
        fingerprint = None
    if fingerprint != output.record.source.fingerprint:
        return None, f"the copy of {model} in the Hub cache is of another revision, and no --source is given."
    return cached, ""


def _check_card_and_scores(output: PublishedOutput) -> None:
    try:
        ModelCard.load(output.folder / CARD_NAME)
    except Exception as error:
        # Any error of yaml and the card's classes. The Hub would refuse the card too, after all files were sent.
        line = " ".join(str(error).split())[:200]
        raise VerifyError(
            f"{output.folder / CARD_NAME}: its metadata are not valid YAML ({line}). Correct it."
        ) from None
    try:
        read_scores_of(output.folder, output.record)
    except ReportError as error:
        raise VerifyError(str(error)) from None
    except ScoresError as error:
        raise VerifyError(f"{damage(error)}. Prune again, or restore it.") from None


def _check_files(output: PublishedOutput, trust_remote_code: bool) -> None:
    """Raise CheckpointError or VerifyError unless the files match each other and the model of their config."""
    # Imported here: they need torch and transformers.
    from streamprune.models.open import describe_model, open_moe
    from streamprune.models.per_layer_loading import find_loading_facts

    checkpoint, folder, record = output.checkpoint, output.folder, output.record
    refuse_extra_weights(folder, checkpoint)
    stated = read_json(folder / INDEX_NAME).get("metadata")
    if not isinstance(stated, dict) or stated.get("total_size") != checkpoint.nbytes:
        raise VerifyError(f"{folder / INDEX_NAME} does not state the {checkpoint.nbytes:,} bytes of all tensors.")
    model = describe_model(folder, checkpoint.config, trust_remote_code)
    check_kept(folder, {layer.index: layer.kept for layer in record.layers}, tuple(model.counts), record.experts)
    for layer, kept in record.counts.items():
        if kept != model.counts[layer]:
            raise VerifyError(
                f"{folder / REPORT_NAME} lists {kept} experts for layer {layer}, but according to config.json "
                f"the model has {model.counts[layer]}. Prune again."
            )
    opened = open_moe(checkpoint, trust_remote_code, model=model)
    width = opened.layout.width.width if opened.layout.width is not None else None
    if record.settings.width not in (None, width):
        raise VerifyError(
            f"{folder / REPORT_NAME} says that each expert keeps {record.settings.width} channels, but according to "
            f"config.json it has {width}. Prune again."
        )
    if has_per_layer_experts(model.counts):
        _check_code(output, find_loading_facts(model.raw, model.config, opened.skeleton))
    check_computed(folder, checkpoint.tensors)


def _check_code(output: PublishedOutput, facts: LoadingFacts) -> None:
    """Everybody who loads a model with different numbers of experts per layer runs its code: it has to be ours."""
    path = output.folder / facts.file_name
    if not path.is_file() or path.read_bytes() != modeling_source(facts).encode():
        raise VerifyError(f"{path} differs from the modeling code that this version writes. Prune again.")
    named = output.checkpoint.config.get("auto_map")
    models = {
        str(code).partition(".")[0]
        for auto, code in (named.items() if isinstance(named, dict) else ())
        if str(auto).startswith("AutoModel")
    }
    if models != {path.stem}:
        raise VerifyError(f"{output.folder / CONFIG_NAME} does not name {path.name} as its model's code. Prune again.")
