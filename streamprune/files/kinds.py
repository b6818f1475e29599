"""What lies at a path, for messages about one that is not what a command expects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

#: The metadata of an importance matrix has this entry: the key, the type string (8), the length, and the value.
_IMATRIX_TYPE = b"general.type" + (8).to_bytes(4, "little") + (7).to_bytes(8, "little") + b"imatrix"
_HEADER_BYTES = 4096
#: The first entry of the metadata with which a scores file begins: the number of its format.
SCORES_MARK = "streamprune_scores"
_IMATRIX_TEXT = "has an importance matrix for llama.cpp's llama-quantize, and no model"
#: What is said of a model as GGUF.
GGUF_TEXT = "has the model as GGUF, for llama.cpp, instead of the safetensors that it was made from"
#: What a folder is, by a file in it: the first that is there.
_KINDS = (
    ("streamprune.lock", "is a work folder of streamprune"),
    ("streamprune.json", "is a model that streamprune wrote"),
    ("search.json", "is a folder that `streamprune search` wrote"),
    ("scores.safetensors", "is a folder of scores"),
    ("config.json", "is a model that streamprune did not write (it has no streamprune.json)"),
    ("adapter_config.json", "has an adapter (LoRA), which has to be merged into its model first"),
)


def describe(path: Path) -> str:
    """What lies at `path`, as the rest of a sentence that begins with the path: `does not exist`, `is a file`."""
    try:
        if path.is_dir():
            return next(_known(path), "has no file that streamprune knows")
        if not path.exists():
            return "does not exist"
        if path.suffix.lower() == ".gguf":
            return _gguf_text([path])
        return "is a scores file" if is_scores_file(path) else "is a file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _known(folder: Path) -> Iterator[str]:
    """What a folder is, by each file in it that says so."""
    yield from (text for name, text in _KINDS if (folder / name).exists())
    if files := list(folder.glob("*.gguf")):
        yield _gguf_text(files)
    if next(folder.iterdir(), None) is None:
        yield "is an empty folder"


def _gguf_text(files: Sequence[Path]) -> str:
    return GGUF_TEXT if any(map(is_gguf_model, files)) else _IMATRIX_TEXT


def is_scores_file(path: Path) -> bool:
    """Whether a regular file begins as the scores files of streamprune do. Raises OSError if it cannot be read."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        # (A safetensors file begins with the length of its header.)
        return stream.read(64)[8:].startswith(f'{{"__metadata__":{{"{SCORES_MARK}":'.encode())


def is_gguf_model(path: Path) -> bool:
    """Whether a GGUF file is a model, and no importance matrix, which `run --imatrix` and llama-imatrix write.

    One that cannot be read is taken for a model.
    """
    try:
        with path.open("rb") as stream:
            return _IMATRIX_TYPE not in stream.read(_HEADER_BYTES)
    except OSError:
        return True
