"""The contents of a safetensors checkpoint, read from its headers. Imports no torch: opening takes milliseconds."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streamprune.checkpoint.safetensors_file import (
    MAX_JSON_BYTES,
    TensorEntry,
    disable_read_ahead,
    read_header,
    read_ranges,
)
from streamprune.errors import CheckpointError
from streamprune.files.json_text import parse_json, read_limited, show, show_some
from streamprune.files.kinds import GGUF_TEXT, describe, is_gguf_model

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Suffixes that are never copied as "small files": weights in any form, and media for the original model card.
_LEFT_OUT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".ot", ".npz",
    ".mlmodel", ".tflite", ".index.json", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".wav", ".pdf",
    ".zip",
)  # fmt: skip
#: The output gets its own, or (Mistral's own params.json) it is a second config that would still state the old sizes.
_LEFT_OUT_NAMES = {CONFIG_NAME, "README.md", "streamprune.json", "report.html", "params.json"}
#: The folder for chat templates other than the default one: the only subfolder that is copied. Others ("original",
#: "onnx", "metal") have the unpruned model in other formats.
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder: the raw `config.json` and every tensor of its safetensors files, in file order.

    `notes` say what of its files is ignored, and why, for people.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def files(self) -> list[str]:
        return sorted({entry.file for entry in self.tensors.values()})

    def small_files(self) -> list[Path]:
        """Paths, relative to the folder, of the tokenizer, chat templates, licence and other files next to the weights.

        Left out: hidden files, weights, media, files that the output gets of its own (config, index, README), and
        subfolders other than `additional_chat_templates`. Links are followed. Raises CheckpointError for a broken link.
        """
        found = []
        for path in (*self.folder.iterdir(), *self.folder.glob(f"{_TEMPLATES}/*")):
            relative = path.relative_to(self.folder)
            if not is_small_file(relative.as_posix()) or (path.exists() and not path.is_file()):
                continue
            if not os.access(path, os.R_OK):
                what = f"a link to {path.readlink()}, which" if path.is_symlink() else "a file that"
                raise CheckpointError(
                    f"{path} is {what} cannot be read. Repair or remove it: it would be copied to the output."
                )
            found.append(relative)
        return sorted(found)

    def fingerprint(self) -> str:
        """SHA-256 over the config, every header, every file's size, and 16 pages of 4 KiB spread over each file.

        It distinguishes checkpoints in a second, but does not detect every changed byte.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        # The tensors stand in file order.
        for file, entries in itertools.groupby(self.tensors.values(), key=lambda entry: entry.file):
            path = self.folder / file
            size = path.stat().st_size
            digest.update(f"\n{file} {size}\n".encode())
            for entry in entries:
                digest.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.begin} {entry.end}\n".encode())
            with path.open("rb") as stream:
                disable_read_ahead(stream)
                for page in range(16):
                    stream.seek(max(0, size - 4096) * page // 15)
                    digest.update(stream.read(4096))
        return digest.hexdigest()


def is_small_file(name: str) -> bool:
    """Whether a file of a model, by its name relative to the folder, is copied to the output with the weights."""
    folder, _, base = name.rpartition("/")
    return not (
        folder not in ("", _TEMPLATES)
        or base.startswith(".")
        or name in _LEFT_OUT_NAMES
        or base.lower().endswith(_LEFT_OUT_SUFFIXES)
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and all safetensors headers of `folder`, and check that the files have every byte range.

    Raises CheckpointError for: no or broken config.json, no safetensors weights, missing, truncated or malformed
    shards, two tensors of one name that differ, an index that names files outside the folder. A name in the index that
    no shard has is only noted, as in transformers: whether the model needs it, `models.open` checks.

    A file may be a link to anywhere: the Hub cache is made of links to `../../blobs`, and people keep shards on other
    disks. Whoever placed the link chose that very file. A link to a folder is not followed: which file in it is read
    would be the choice of the index, which comes from strangers.
    """
    try:
        return _open(folder)
    except OSError as error:
        path = error.filename or folder
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check it and its permissions."
        ) from error


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} {describe(folder)}. Give a folder with {CONFIG_NAME} and *.safetensors files.")
    config = read_json(folder / CONFIG_NAME)
    indexed = _indexed_files(folder, config)
    files = sorted(set(indexed.values())) or [SINGLE_NAME]
    _check_present(folder, files)
    tensors: dict[str, TensorEntry] = {}
    twice: list[tuple[TensorEntry, TensorEntry]] = []
    for file in files:
        for entry in read_header(folder, file):
            first = tensors.setdefault(entry.name, entry)
            if first is not entry:
                _check_same(folder, first, entry)
                twice.append((first, entry))
    notes = (*_stray_notes(folder), *_twice_notes(twice), *index_notes(indexed, tensors))
    if not tensors:
        raise CheckpointError(" ".join((f"{folder} has no tensors. Download the model again.", *notes)))
    checkpoint = Checkpoint(folder=folder, config=config, tensors=tensors, notes=notes)
    checkpoint.small_files()  # Report one that cannot be read now, not at the end of the run.
    return checkpoint


def _check_same(folder: Path, one: TensorEntry, other: TensorEntry) -> None:
    """Raise CheckpointError unless two tensors of the same name have the same bytes. Memory: a portion of each."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    if alike:
        with (folder / one.file).open("rb") as first, (folder / other.file).open("rb") as second:
            ranges = ((first, one), (second, other))
            portions = (read_ranges(stream, [(entry.begin, entry.end)]) for stream, entry in ranges)
            alike = all(mine == theirs for mine, theirs in zip(*portions, strict=True))
    if not alike:
        raise CheckpointError(
            f"{folder}: tensor {show(one.name)} is in both {one.file} and {other.file}, with different contents. "
            "Download the model again."
        )


def _stray_notes(folder: Path) -> Iterator[str]:
    if (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        yield (
            f"{folder} has both {SINGLE_NAME} and {INDEX_NAME}: {SINGLE_NAME} is read, as transformers does, and not "
            "the shards that the index names (vLLM reads those). Move away what does not belong to the model."
        )


def _twice_notes(twice: Sequence[tuple[TensorEntry, TensorEntry]]) -> Iterator[str]:
    if twice:
        one, other = twice[0]
        yield (
            f"{show_some([entry.name for entry, _ in twice])}: in two files, with the same bytes ({one.file}, "
            f"{other.file}). One copy is used."
        )


def index_notes(indexed: Mapping[str, str], tensors: Iterable[str]) -> Iterator[str]:
    """Notes on the names in an index (tensor name -> file) that none of the `tensors` has."""
    there = set(tensors)
    absent = [name for name in indexed if name not in there]
    if absent:
        yield f"{INDEX_NAME} names {show_some(absent)}, but no file has that: ignored, as in transformers."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if it is missing, not UTF-8, not JSON or not an object."""
    try:
        value = parse_json(read_limited(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder {describe(path.parent)}. A model folder has {CONFIG_NAME} and "
            "*.safetensors files."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has a JSON {type(value).__name__}, not an object. Download it again.")
    return value


def _indexed_files(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Tensor name -> shard file name from the index; empty for a single-file checkpoint.

    If there are both, the single file is used, as in transformers.
    """
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} names the weight files ('transformers_weights'), which is not supported. Rename "
            f"the weights to {SINGLE_NAME} or {INDEX_NAME} and remove the entry."
        )
    found = {path.name for path in folder.iterdir()}
    if SINGLE_NAME in found:
        return {}
    if INDEX_NAME in found:
        return read_index(folder / INDEX_NAME)
    pickled = sorted(name for name in found if name.endswith(PICKLE_SUFFIXES))
    if pickled:
        raise CheckpointError(
            f"{folder} has pickled weights only ({pickled[0]}{', …' if len(pickled) > 1 else ''}). Pickle files "
            "can run code and are never opened. Use a safetensors version of the model, or convert it: "
            "https://huggingface.co/spaces/safetensors/convert"
        )
    if any(is_gguf_model(folder / name) for name in found if name.endswith(".gguf")):
        raise CheckpointError(f"{folder} {GGUF_TEXT}.")
    raise CheckpointError(f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}. Is it a complete model folder?")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file of an index, which is untrusted: file names outside the folder are refused.

    Raises CheckpointError for an index that is malformed, empty, or names other files than safetensors inside it.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no valid 'weight_map'. Download it again.")
    if not weight_map:
        raise CheckpointError(f"{path} lists no tensors. Download it again.")
    for name, file in weight_map.items():
        if not file or file.startswith("/") or ".." in PurePosixPath(file).parts or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{path} puts tensor {show(name)} in {show(file)}, outside the model folder. "
                "The index is damaged or malicious; do not use this model."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts tensor {show(name)} in {show(file)}, which is not a safetensors file. "
                "Only safetensors weights are read."
            )
    return weight_map


def _check_present(folder: Path, files: list[str]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        path = folder / missing[0]
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, first {show(missing[0])}{link}. "
            "Complete the download and try again."
        )
    home = folder.resolve()
    for file in files:
        where = (folder / file).parent.resolve()
        if not where.is_relative_to(home):
            raise CheckpointError(
                f"{folder / INDEX_NAME} reaches {show(file)} through a link to the folder {where}, outside the model "
                "folder. Link the shards themselves instead."
            )
