"""Hidden states in a file: tensors as raw bytes, and how they hang together as JSON. Never pickled.

Layout of a generation: `data.bin` holds all tensors one after the other, `index.json` (a record with a checksum) says
where each lies, what it belongs to, and the checksum of the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from streamprune.durable import checksum_of, read_record, stream_whole, write_record
from streamprune.errors import UnsupportedModelError
from streamprune.stream import BatchState

DATA_NAME, INDEX_NAME = "data.bin", "index.json"
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

    checksum = stream_whole(folder / DATA_NAME, portions())
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
    """The generation in `folder`; None if any of it is missing or damaged."""
    index = read_record(folder / INDEX_NAME)
    if not isinstance(index, dict) or checksum_of(folder / DATA_NAME) != index.get("sha256"):
        return None
    return SavedStates(folder, index)


def _read_tensor(file: int, offset: int, dtype: str, shape: list[int]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=_DTYPES[dtype])
    size, done = math.prod(shape) * tensor.itemsize, 0
    if size:
        array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        while done < size:
            moved = os.preadv(file, [view[done:]], offset + done)
            if moved == 0:
                raise OSError(f"{DATA_NAME} ends after {offset + done:,} bytes")
            done += moved
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
        f"The model passes a {type(value).__name__} from block to block, which cannot be saved for a later resume."
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
