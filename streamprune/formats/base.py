"""The interface of a storage format: which tensors of a checkpoint make a parameter, and how.

A plain checkpoint stores every parameter as one tensor. A quantized one stores the values and their companions (scales,
zero points, ...) as several. Other packages get a stored tensor as a `StoredTensor` and call its format; they never
look at names or dtypes themselves. Needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamprune.checkpoint.safetensors_file import TensorEntry

if TYPE_CHECKING:
    import torch

#: First and last (exclusive) byte of a part of a file.
ByteRange = tuple[int, int]


@dataclass(frozen=True)
class ExpertRows:
    """The experts in a tensor that holds all of a layer: `stride` rows of `axis` per expert, then `tail` rows that
    belong to no expert."""

    axis: int
    stride: int
    tail: int

    def size(self, experts: int) -> int:
        """The length of the axis with so many experts."""
        return self.stride * experts + self.tail

    def resized(self, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
        """The shape of the tensor with so many experts."""
        return (*shape[: self.axis], self.size(experts), *shape[self.axis + 1 :])


@dataclass(frozen=True)
class StoredTensor:
    """What a stored tensor is: one part of a parameter, stored in a format.

    `parameter` is the name that the parameter has in a plain checkpoint of the same model (`...up_proj.weight`). `part`
    is "" for the values, else the name of the companion (`scale_inv`).
    """

    parameter: str
    part: str
    format: Format


class Format(ABC):
    """One way to store parameters. Implementations have no state and no side effects."""

    #: The name of the format for messages.
    name: str

    @abstractmethod
    def parts_of(self, module: Mapping[str, TensorEntry]) -> Mapping[str, tuple[str, str]] | None:
        """For each tensor of one module (by its full name) the parameter it is a part of, and the part's name.

        None if the module is not stored in this format. Decided by the module's own tensors, since one checkpoint may
        mix formats: experts packed, attention plain.
        """

    @abstractmethod
    def expert_rows(self, entry: TensorEntry, part: str, of: ExpertRows, experts: int) -> ExpertRows | None:
        """Where the experts are in a stored tensor of a parameter whose own experts are at `of`.

        None for a part that is the same for all experts, such as a scale of the complete tensor. Raises
        UnsupportedModelError if the axis cannot be found.
        """

    @abstractmethod
    def slice_experts(self, entry: TensorEntry, rows: ExpertRows, kept: Sequence[int]) -> list[ByteRange] | None:
        """The bytes of the file that make up the stored tensor with the experts `kept` only, in their order.

        None if the bytes cannot be taken from the source, so that the tensor has to be encoded again.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The plain parameter, from its stored parts by their names, on their device.

        Happens before transformers' own conversion, which then sees a plain checkpoint.
        """

    @abstractmethod
    def encode(self, parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors, by name, of a parameter with these values."""

    @abstractmethod
    def pruned_config(self, config: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> Mapping[str, Any]:
        """config.json of the output, with the expert indices in its quantization section renumbered.

        `kept` are the experts that stay, by layer.
        """


def decode_tensors(tensors: dict[str, torch.Tensor], stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The parameters, under their plain names, of stored tensors that hold all parts of each.

    Takes the tensors out of the dict, one parameter after the other: a stored tensor is freed once it is decoded.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        groups.setdefault(stored[name].parameter, {})[stored[name].part] = name
    decoded = {}
    for parameter, names in groups.items():
        storage = stored[next(iter(names.values()))].format
        decoded[parameter] = storage.decode({part: tensors.pop(name) for part, name in names.items()})
    return decoded
