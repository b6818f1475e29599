"""What lies at a path, for messages about one that is not what a command expects."""

from __future__ import annotations

from pathlib import Path

GGUF_TEXT = "has the model as GGUF, for llama.cpp, instead of the safetensors that it was made from"
#: What a folder is, by a file in it: the first that is there.
_KINDS = (
    ("streamprune.lock", "is a work folder of streamprune"),
    ("streamprune.json", "is a model that streamprune wrote"),
    ("search.json", "is a folder that `streamprune search` wrote"),
    ("scores.safetensors", "is a folder of scores"),
    ("config.json", "is a model that streamprune did not write (it has no streamprune.json)"),
    ("*.gguf", GGUF_TEXT),
    ("adapter_config.json", "has an adapter (LoRA), which has to be merged into its model first"),
)


def describe(path: Path) -> str:
    """What lies at `path`, as the rest of a sentence that begins with the path: `does not exist`, `is a file`."""
    try:
        if path.is_dir():
            known = (text for pattern, text in _KINDS if next(path.glob(pattern), None) is not None)
            is_empty = next(path.iterdir(), None) is None
            return next(known, "is an empty folder" if is_empty else "has no file that streamprune knows")
        if not path.exists():
            return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return GGUF_TEXT if path.suffix.lower() == ".gguf" else "is a file"
