"""What a safetensors checkpoint holds, read from its headers alone. Imports no torch: opening takes milliseconds.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header that maps each
tensor name to dtype, shape and byte range, then the tensors' bytes, without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from streamprune.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

#: Bits per element of each dtype that the safetensors format knows.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

#: The safetensors library refuses larger headers too: a claimed length beyond this is an attack or damage.
MAX_HEADER_BYTES = 100_000_000

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: What is never copied along as a "small file": weights in any form.
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".mlmodel")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a shard: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder: the raw `config.json` and every tensor of its safetensors files, in file order."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def files(self) -> list[str]:
        return sorted({entry.file for entry in self.tensors.values()})

    def small_files(self) -> list[Path]:
        """Paths, relative to the folder, of the tokenizer, chat template, licence and other files beside the weights.

        Hidden files, weights in any format, the index and the README (replaced by the new model's card) are left out.
        """
        found = []
        for root, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
            for name in sorted(names):
                relative = (Path(root) / name).relative_to(self.folder)
                ours = name in {CONFIG_NAME, INDEX_NAME, "README.md", "streamprune.json"} and len(relative.parts) == 1
                if not (ours or name.startswith(".") or name.endswith((*WEIGHT_SUFFIXES, ".index.json"))):
                    found.append(relative)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over the config, every header, every file's size, and 16 pages of 4 KiB spread over each file.

        It tells checkpoints apart in a second; it is no proof that every byte is unchanged.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            path = self.folder / file
            size = path.stat().st_size
            digest.update(f"\n{file} {size}\n".encode())
            for entry in self.tensors.values():
                if entry.file == file:
                    digest.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.begin} {entry.end}\n".encode())
            with path.open("rb") as stream:
                for page in range(16):
                    stream.seek(max(0, size - 4096) * page // 15)
                    digest.update(stream.read(4096))
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and all safetensors headers of `folder`, and check that every byte range is really there.

    Raises CheckpointError for: no or broken config.json, pickled weights, missing, truncated or malformed shards, an
    index that names files outside the folder or tensors that no shard has.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. Give a folder that holds config.json and *.safetensors files."
        )
    config = read_json(folder / CONFIG_NAME)
    indexed = _indexed_files(folder)
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(set(indexed.values())) if indexed else [SINGLE_NAME]:
        for entry in read_header(folder, file):
            if entry.name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {entry.name!r} is in both {tensors[entry.name].file} and {file}. "
                    "Download the model again."
                )
            tensors[entry.name] = entry
    for name, file in indexed.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / INDEX_NAME} says that tensor {name!r} is in {file}, but that file does not hold it. "
                "The shards and the index do not belong together; download the model again."
            )
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors. Download the model again.")
    return Checkpoint(folder=folder, config=config, tensors=tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if it is missing, not UTF-8, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing. A model folder holds {CONFIG_NAME} and *.safetensors files."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object. Download it again.")
    return value


def _indexed_files(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name from the index; empty for a single-file checkpoint."""
    if not (folder / INDEX_NAME).exists():
        if (folder / SINGLE_NAME).exists():
            return {}
        pickled = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLE_SUFFIXES))
        if pickled:
            raise CheckpointError(
                f"{folder} holds pickled weights only ({pickled[0]}{', …' if len(pickled) > 1 else ''}). Pickle files "
                "can run code and are never opened. Use a safetensors version of the model, or convert it: "
                "https://huggingface.co/spaces/safetensors/convert"
            )
        raise CheckpointError(f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}. Is it a complete model folder?")
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_NAME} has no valid 'weight_map'. Download it again.")
    for name, file in weight_map.items():
        parts = PurePosixPath(file).parts
        if not file or file.startswith("/") or ".." in parts or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{folder / INDEX_NAME} puts tensor {name!r} in {file!r}, outside the model folder. "
                "The index is damaged or malicious; do not use this model."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_NAME} puts tensor {name!r} in {file!r}, which is not a safetensors file. "
                "Only safetensors weights are read."
            )
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(set(weight_map.values()))} shards are missing, first {missing[0]}. "
            "Complete the download and try again."
        )
    return weight_map


def read_header(folder: Path, file: str) -> list[TensorEntry]:
    """The tensors of one safetensors file in byte order, with the whole header checked against the file's size."""
    path = folder / file
    try:
        with path.open("rb") as stream:
            return _parse_header(path, file, stream)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from None


def _parse_header(path: Path, file: str, stream: BinaryIO) -> list[TensorEntry]:
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _damaged(path, f"it has {size:,} bytes, but its first eight claim a header of {length:,}")
    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    start = 8 + length
    entries = sorted(
        (_parse_entry(path, file, name, value, start) for name, value in header.items() if name != "__metadata__"),
        key=lambda entry: (entry.begin, entry.end),
    )
    position = start
    for entry in entries:
        if entry.begin != position:
            raise _damaged(path, f"tensor {entry.name!r} starts at byte {entry.begin:,} instead of {position:,}")
        position = entry.end
    if position != size:
        what = "is cut short" if size < position else "has bytes that belong to no tensor"
        raise _damaged(path, f"it {what}: {size:,} bytes on disk, {position:,} by its header")
    return entries


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_entry(path: Path, file: str, name: str, value: Any, start: int) -> TensorEntry:
    def is_size(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63

    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(is_size(size) for size in shape):
        raise _damaged(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
        raise _damaged(path, f"tensor {name!r} has the impossible byte range {offsets!r}")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise _damaged(path, f"tensor {name!r} of {dtype} {shape} cannot fill the byte range {offsets}")
    return TensorEntry(name, file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}. Download this file again.")


def read_ranges(stream: BinaryIO, ranges: list[tuple[int, int]], chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
    """Yield the bytes of `ranges` (begin, end) of an open file, at most `chunk_bytes` at a time."""
    for begin, end in ranges:
        position = begin
        while position < end:
            data = os.pread(stream.fileno(), min(chunk_bytes, end - position), position)
            if not data:
                raise CheckpointError(
                    f"{stream.name} ended at byte {position:,} while bytes up to {end:,} were expected. "
                    "The file was changed or truncated during the run."
                )
            position += len(data)
            yield data
