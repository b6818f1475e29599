"""The saved hidden states of a work folder: two generations of them, and the cursor that says which is valid.

A generation is a folder. `data.bin` is a safetensors file for each micro-batch, one after the other; `index.json` (a
record with a checksum) has the size and the structure of each, and the checksum of the data. Nothing is pickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch.utils import _pytree as pytree

from streamprune.checkpoint.safetensors_file import encode_header
from streamprune.errors import UnsupportedModelError
from streamprune.files.durable import (
    checksum_of,
    kill_point,
    names_in,
    read_record,
    stream_atomically,
    sync_folder,
    write_record,
    writing,
)
from streamprune.work.layer_records import Count
from streamprune.work.records import MOST_INDEX_BYTES, MOST_RECORD_BYTES, Cursor, converted

DATA_NAME, INDEX_NAME, CURSOR_NAME = "data.bin", "index.json", "cursor.json"
#: dtypes that states may have, by their names in a safetensors header.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class BatchState:
    """What one micro-batch carries from layer to layer.

    `output` is the return value of the last layer, in the model's own structure: usually hidden states (B, L, H).
    `carried` has the dicts that layers share with later ones (keys and values, in models whose layers share them), by
    the name of the argument.
    """

    output: Any = None
    carried: dict[str, dict[Any, Any]] = field(default_factory=dict)


pytree.register_dataclass(BatchState)


class _StateEntry(msgspec.Struct):
    """Bytes of a state's safetensors file, and its structure as `_encode` gives it."""

    nbytes: Count
    output: Any
    carried: Any


class _Index(msgspec.Struct):
    facts: dict[str, Any]
    states: list[_StateEntry]
    sha256: str


def save_states(folder: Path, count: int, load: Callable[[int], BatchState], facts: Mapping[str, Any]) -> None:
    """Save `count` states in a new folder; `load(n)` gives the n-th, on the CPU. `facts` (JSON) is kept with them.

    Memory: one state. Raises OSError, and UnsupportedModelError for a state with anything other than tensors, numbers,
    strings, lists, tuples and dicts.
    """
    folder.mkdir(parents=True)
    entries: list[_StateEntry] = []

    def portions() -> Iterator[bytes | memoryview]:
        for number in range(count):
            state = load(number)
            tensors: list[torch.Tensor] = []
            # _encode appends every tensor to `tensors`; the structure has only its index.
            output, carried = _encode(state.output, tensors), _encode(state.carried, tensors)
            header = encode_header(
                {},
                ((str(place), _DTYPES[each.dtype], each.shape, each.nbytes) for place, each in enumerate(tensors)),
            )
            entries.append(_StateEntry(len(header) + sum(tensor.nbytes for tensor in tensors), output, carried))
            yield header
            for tensor in tensors:
                if tensor.nbytes:
                    yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

    checksum = stream_atomically(folder / DATA_NAME, portions())
    write_record(folder / INDEX_NAME, msgspec.to_builtins(_Index(dict(facts), entries, checksum)))


class SavedStates:
    """A generation of states with correct checksums. `facts` is the JSON that was saved with them."""

    def __init__(self, folder: Path, index: _Index) -> None:
        self._path, self._entries = folder / DATA_NAME, index.states
        self.facts = index.facts

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, number: int) -> BatchState:
        """The n-th state, on the CPU, in memory of its own. Peak memory: twice the state.

        Raises OSError, and ValueError for a file that `save_states` would not write: it may be untrusted.
        """
        entry = self._entries[number]
        with self._path.open("rb") as stream:
            stream.seek(sum(before.nbytes for before in self._entries[:number]))
            data = stream.read(entry.nbytes)
        try:
            tensors = load_safetensors(data)
            state = BatchState(_decode(entry.output, tensors), _decode(entry.carried, tensors))
            if not isinstance(state.carried, dict) or any(type(each) is not dict for each in state.carried.values()):
                raise ValueError("`carried` is not a dict of dicts")
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"no hidden states: {error}") from error
        return state


def open_states(folder: Path) -> SavedStates | None:
    """The generation in `folder`; None if any of it is missing or damaged."""
    index = _read_index(folder)
    try:
        size = (folder / DATA_NAME).stat().st_size
    except OSError:
        return None
    if index is None or sum(entry.nbytes for entry in index.states) != size:
        return None
    return SavedStates(folder, index) if checksum_of(folder / DATA_NAME) == index.sha256 else None


def _read_index(folder: Path) -> _Index | None:
    return converted(read_record(folder / INDEX_NAME, MOST_INDEX_BYTES), _Index)


def _encode(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` as JSON; tensors are appended to the list, and are replaced by their index."""
    if isinstance(value, torch.Tensor) and value.dtype in _DTYPES:
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    # Only the plain types: a subclass could not be made again from its items.
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if type(value) is dict:
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    raise UnsupportedModelError(
        f"The model passes a {type(value).__name__} from layer to layer, which cannot be saved for a later resume."
    )


def _decode(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `_encode` made `node` of. Raises KeyError, TypeError, ValueError or RecursionError for anything else."""
    match node:
        case {"tensor": number}:
            return tensors[str(number)]
        case {"value": None | bool() | int() | float() | str() as value}:
            return value
        case {"list": items}:
            return [_decode(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"dict": pairs}:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
    raise ValueError("an unknown structure")


class Generations:
    """The saved states of a work folder, in its subfolder `states`."""

    def __init__(self, folder: Path, states: Path) -> None:
        self._folder, self._states = folder, states

    def save(self, count: int, load: Callable[[int], BatchState], facts: Mapping[str, Any]) -> None:
        """Make `count` hidden states and the facts about them durable, then point the cursor at them.

        The generation before is kept, older ones are removed.
        """
        numbers, before = self._numbers(), self._pointed()
        number = max(numbers, default=0) + 1
        kept = [number, *before[:1]]
        with writing(f"Saving the hidden states in {self._states}", self._folder):
            save_states(self._states / str(number), count, load, facts)
            sync_folder(self._states)
            kill_point("states saved")
            write_record(self._folder / CURSOR_NAME, {"generations": kept})
        kill_point("cursor moved")
        self._remove(old for old in numbers if old not in kept)

    def intact(self) -> Iterator[SavedStates]:
        """The generations that are complete and undamaged, newest first."""
        opened = (open_states(self._states / str(number)) for number in self._pointed())
        return (states for states in opened if states is not None)

    def layer(self) -> int | None:
        """The layer in which states were last saved, by their record alone; None if none are."""
        indices = (_read_index(self._states / str(number)) for number in self._pointed())
        layers = (index.facts.get("layer") for index in indices if index is not None)
        return next((layer for layer in layers if isinstance(layer, int)), None)

    def forget_old(self) -> None:
        """Remove all generations but the newest intact one."""
        pointed = self._pointed()
        newest = next((number for number in pointed if open_states(self._states / str(number)) is not None), None)
        self._remove(number for number in self._numbers() if number != newest)

    def forget(self) -> None:
        """Remove all saved hidden states."""
        with writing(f"Removing the hidden states from {self._folder}", self._folder):
            (self._folder / CURSOR_NAME).unlink(missing_ok=True)
        self._remove(self._numbers())

    def _remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            shutil.rmtree(self._states / str(number), ignore_errors=True)

    def _pointed(self) -> list[int]:
        """The generations that the cursor names; with a damaged cursor all that exist, newest first."""
        cursor = converted(read_record(self._folder / CURSOR_NAME, MOST_RECORD_BYTES), Cursor)
        return cursor.generations if cursor is not None else sorted(self._numbers(), reverse=True)

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in names_in(self._states) if path.name.isascii() and path.name.isdecimal()]
