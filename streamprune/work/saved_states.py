"""The saved hidden states of a work folder: two generations of them, and the cursor that says which is valid.

A generation is a folder: `data.bin` holds all tensors one after the other as raw bytes, `index.json` (a record with a
checksum) says where each lies, what it belongs to, and the checksum of the data. Nothing is pickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from streamprune.checkpoint.ranges import read_into
from streamprune.errors import UnsupportedModelError
from streamprune.files.durable import (
    checksum_of,
    names_in,
    reached,
    read_record,
    stream_atomically,
    sync_folder,
    write_record,
    writing,
)
from streamprune.work.records import MOST_INDEX_BYTES, MOST_RECORD_BYTES, is_cursor


@dataclass
class BatchState:
    """What one micro-batch carries from layer to layer.

    `output` is what the last layer returned, in the model's own structure: usually hidden states (B, L, H).
    `carried` is what layers pass on to later ones in a mapping they share (keys and values, in models whose
    layers share them), by the name of the argument.
    """

    output: Any = None
    carried: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def to(self, device: torch.device) -> BatchState:
        """A copy on `device`; tensors that are there already are shared."""
        return BatchState(_to(self.output, device), _to(self.carried, device))


def _to(value: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda item: item.to(device) if isinstance(item, torch.Tensor) else item, value)


DATA_NAME, INDEX_NAME = "data.bin", "index.json"
#: How deep a state may be nested, and how many dimensions a tensor may have: far more than any model's.
_DEEPEST, _MOST_DIMENSIONS = 50, 16
#: dtypes that hidden states may have, by the name under which they are saved.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


def save_states(folder: Path, count: int, load: Callable[[int], BatchState], facts: dict[str, Any]) -> None:
    """Save `count` states in a new folder; `load(n)` gives the n-th, on the CPU. `facts` (JSON) is kept with them.

    Memory: one state. Raises OSError, and UnsupportedModelError for a state that is made of other things than tensors,
    numbers, strings, lists, tuples and dicts.
    """
    folder.mkdir(parents=True)
    states: list[Any] = []
    position = 0

    def portions() -> Iterator[memoryview]:
        nonlocal position
        for number in range(count):
            state = load(number)
            tensors: list[torch.Tensor] = []
            states.append({"output": _encode(state.output, tensors), "carried": _encode(state.carried, tensors)})
            places = []
            for tensor in tensors:
                flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                places.append([position, str(flat.dtype).removeprefix("torch."), list(tensor.shape)])
                position += flat.nbytes
                if flat.nbytes:
                    array: Any = flat.view(torch.uint8).numpy()
                    yield memoryview(array)
            states[-1]["tensors"] = places

    checksum = stream_atomically(folder / DATA_NAME, portions())
    write_record(folder / INDEX_NAME, {"facts": facts, "states": states, "bytes": position, "sha256": checksum})


class SavedStates:
    """A generation of states, checked. `facts` is what was saved with them."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self._folder, self._index = folder, index
        self.facts: dict[str, Any] = index["facts"]

    def __len__(self) -> int:
        return len(self._index["states"])

    def load(self, number: int) -> BatchState:
        """The n-th state, on the CPU, in memory of its own."""
        entry = self._index["states"][number]
        with (self._folder / DATA_NAME).open("rb") as stream:
            tensors = [_read_tensor(stream.fileno(), *place) for place in entry["tensors"]]
        return BatchState(_decode(entry["output"], tensors), _decode(entry["carried"], tensors))


def open_states(folder: Path) -> SavedStates | None:
    """The generation in `folder`; None if any of it is missing, damaged, or not what `save_states` writes."""
    index = _read_index(folder)
    if index is None or checksum_of(folder / DATA_NAME) != index["sha256"]:
        return None
    return SavedStates(folder, index)


def saved_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the generation in `folder`, by its index alone; None if that is missing or damaged."""
    index = _read_index(folder)
    return index["facts"] if index is not None else None


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a generation. It need not be ours, so that nothing in it counts before it is checked.

    The tensors must fill the data from end to end: none can claim memory for bytes that are not there.
    """
    index = read_record(folder / INDEX_NAME, MOST_INDEX_BYTES)
    try:
        size = (folder / DATA_NAME).stat().st_size
        if not isinstance(index["facts"], dict) or not isinstance(index["states"], list):
            return None
        if not isinstance(index["sha256"], str) or index["bytes"] != size:
            return None
        position = 0
        for state in index["states"]:
            for offset, dtype, shape in state["tensors"]:
                if offset != position:
                    return None
                position += _nbytes(_DTYPES[dtype], shape)
            count = len(state["tensors"])
            if not all(_is_node(state[part], count, _DEEPEST) for part in ("output", "carried")):
                return None
            if not all(
                key.keys() == {"value"} and values.keys() == {"dict"} for key, values in state["carried"]["dict"]
            ):
                return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return index if position == size else None


def _nbytes(dtype: torch.dtype, shape: list[int]) -> int:
    """Bytes of a tensor. ValueError for a shape that no tensor has, an empty one with absurd strides among them."""
    values = extent = dtype.itemsize
    for side in shape:
        if type(side) is not int or side < 0 or len(shape) > _MOST_DIMENSIONS:
            raise ValueError("a shape that no tensor has")
        values, extent = values * side, extent * max(1, side)
    if extent >= 2**63:
        raise ValueError("a shape beyond every address")
    return values


def _is_node(node: Any, tensors: int, depth: int, key: bool = False) -> bool:
    """Whether `node` is what `_encode` makes, with `tensors` tensors; `key`: of something hashable."""
    if not isinstance(node, dict) or len(node) != 1 or depth < 0:
        return False
    ((kind, content),) = node.items()
    if kind == "value":
        return content is None or isinstance(content, (bool, int, float, str))
    if kind == "tensor":
        return type(content) is int and 0 <= content < tensors and not key
    if kind not in (("tuple",) if key else ("tuple", "list", "dict")) or not isinstance(content, list):
        return False
    if kind != "dict":
        return all(_is_node(item, tensors, depth - 1, key) for item in content)
    return all(
        isinstance(pair, list)
        and len(pair) == 2
        and _is_node(pair[0], tensors, depth - 1, key=True)
        and _is_node(pair[1], tensors, depth - 1)
        for pair in content
    )


def _read_tensor(file: int, offset: int, dtype: str, shape: list[int]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=_DTYPES[dtype])
    if tensor.nbytes:
        array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        moved = read_into(file, offset, [memoryview(array)])
        if moved < tensor.nbytes:
            raise OSError(f"{DATA_NAME} ends after {offset + moved:,} bytes")
    return tensor


def _encode(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` as JSON; tensors are put into the list, and stand as their number."""
    if isinstance(value, torch.Tensor):
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


def _decode(node: Any, tensors: list[torch.Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


_CURSOR = "cursor.json"


class Generations:
    """The saved states of a work folder, which lie in its subfolder `states`."""

    def __init__(self, folder: Path, states: Path) -> None:
        self._folder, self._states = folder, states

    def save(self, count: int, load: Callable[[int], BatchState], facts: dict[str, Any]) -> None:
        """Make `count` hidden states and the facts about them durable, then point the cursor at them.

        The generation before is kept, older ones go.
        """
        numbers, before = self._numbers(), self._pointed()
        number = max(numbers, default=0) + 1
        kept = [number, *before[:1]]
        with writing(f"Saving the hidden states in {self._states}", self._folder):
            save_states(self._states / str(number), count, load, facts)
            sync_folder(self._states)
            reached("states saved")
            write_record(self._folder / _CURSOR, {"generations": kept})
        reached("cursor moved")
        for old in numbers:
            if old not in kept:
                shutil.rmtree(self._states / str(old), ignore_errors=True)

    def intact(self) -> list[SavedStates]:
        """The generations that are complete and undamaged, newest first."""
        opened = (open_states(self._states / str(number)) for number in self._pointed())
        return [states for states in opened if states is not None]

    def layer(self) -> int | None:
        """The layer in which states were last saved, by their record alone; None if none are."""
        for number in self._pointed():
            facts = saved_facts(self._states / str(number))
            if facts is not None and isinstance(facts.get("layer"), int):
                return int(facts["layer"])
        return None

    def forget_old(self) -> None:
        """Remove saved hidden states that the cursor does not name, and all but the newest intact one."""
        pointed = self._pointed()
        newest = next((number for number in pointed if open_states(self._states / str(number)) is not None), None)
        for number in self._numbers():
            if number != newest:
                shutil.rmtree(self._states / str(number), ignore_errors=True)

    def forget(self) -> None:
        """Remove all saved hidden states."""
        with writing(f"Removing the hidden states from {self._folder}", self._folder):
            (self._folder / _CURSOR).unlink(missing_ok=True)
        for number in self._numbers():
            shutil.rmtree(self._states / str(number), ignore_errors=True)

    def _pointed(self) -> list[int]:
        """The generations that the cursor names; with a damaged cursor all that there are, newest first."""
        body = read_record(self._folder / _CURSOR, MOST_RECORD_BYTES)
        return list(body["generations"]) if is_cursor(body) else sorted(self._numbers(), reverse=True)

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in names_in(self._states) if path.name.isascii() and path.name.isdecimal()]
