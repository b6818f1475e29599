"""The interface of a storage format: which tensors of a checkpoint make a parameter, and how.

A plain checkpoint stores every parameter as one tensor. A quantized one stores the values and their companions (scales,
zero points, ...) as several. Other packages get a stored tensor as a `StoredTensor` and call its format; they never
look at names or dtypes themselves. Needs no torch.
"""

from __future__ import annotations

import base64
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

#: What to do where quantized weights cannot be pruned.
WAY_OUT = "Prune the bfloat16 or float16 original instead, and quantize the result."


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
class ChannelRows:
    """The channels of the experts along `axis` of a tensor.

    All channels lie there `repeats` times, one after the other (2 for gate and up projection joined), with `step`
    consecutive rows for each channel (2 if gate and up alternate). If the axis holds several experts, each of them does
    so by itself.
    """

    axis: int
    repeats: int = 1
    step: int = 1

    def resized(self, shape: tuple[int, ...], width: int, new_width: int) -> tuple[int, ...]:
        """The shape of the tensor with `new_width` channels per expert instead of `width`."""
        return (*shape[: self.axis], shape[self.axis] // width * new_width, *shape[self.axis + 1 :])


@dataclass(frozen=True)
class ChannelMask:
    """Which of their `width` channels a layer's kept experts keep: equally many each.

    `bits` has a row of ceil(width / 8) bytes for every kept expert, the first channel in the highest bit.
    """

    width: int
    bits: bytes = field(repr=False)

    @classmethod
    def of(cls, indices: NDArray[np.integer[Any]], width: int) -> ChannelMask:
        """The mask of the channels `indices` (K, W'), in any order, of K kept experts."""
        mask = np.zeros((len(indices), width), dtype=bool)
        np.put_along_axis(mask, np.asarray(indices, dtype=np.int64), True, axis=1)
        return cls(width, np.packbits(mask, axis=1).tobytes())

    @classmethod
    def from_text(cls, text: str, width: int, experts: int) -> ChannelMask:
        """The mask that `as_text` gave. Raises ValueError for anything else: the text may be untrusted."""
        mask = cls(width, base64.b64decode(text, validate=True))
        if len(mask.bits) != experts * math.ceil(width / 8):
            raise ValueError(f"{len(mask.bits)} bytes are no channels of {experts} experts of {width}")
        rows = mask._rows()
        counts = np.unique(rows.sum(axis=1))
        if len(counts) != 1 or not counts[0] or rows.shape[0] != experts or mask != cls.of(mask.indices, width):
            raise ValueError("the experts of a layer keep different numbers of channels, or none")
        return mask

    def as_text(self) -> str:
        """The mask for JSON."""
        return base64.b64encode(self.bits).decode()

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """The channels (K, W') that each kept expert keeps, ascending."""
        rows = self._rows()
        return np.nonzero(rows)[1].reshape(len(rows), -1)

    @property
    def kept_width(self) -> int:
        """How many channels each kept expert keeps."""
        return int(self.indices.shape[1])

    def _rows(self) -> NDArray[np.bool_]:
        packed = np.frombuffer(self.bits, dtype=np.uint8).reshape(-1, math.ceil(self.width / 8))
        return np.unpackbits(packed, axis=1, count=self.width).astype(bool)


@dataclass(frozen=True)
class KeptExperts:
    """What stays of a layer's experts: their numbers, ascending, and the channels of each; None if all of them stay."""

    experts: tuple[int, ...] = ()
    channels: ChannelMask | None = None


@dataclass(frozen=True)
class StoredTensor:
    """What a stored tensor is: one part of a parameter, stored in a format.

    `parameter` is the name that the parameter has in a plain checkpoint of the same model (`...up_proj.weight`). `part`
    is "" for values that lie there as one tensor of the parameter's own shape, else the part's name (`scale`).
    """

    parameter: str
    part: str
    format: Format


class Format(ABC):
    """One way to store parameters. An instance is a value: it holds what config.json says of it (block size, bits)."""

    #: Whether one tensor may hold all experts of a layer, as some models have them. Else each projection of each expert
    #: is stored by itself.
    joins_experts: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The format for people: `FP8 (blocks of 128 x 128)`."""

    def expert_rows(self, entry: TensorEntry, part: str, of: ExpertRows, experts: int) -> ExpertRows | None:
        """Where the experts are in a stored tensor of a parameter that holds all of them, its own being at `of`.

        None for a part that is the same for all experts, such as one scale of the complete tensor. Raises
        UnsupportedModelError if the axis cannot be found.

        Here: quantized experts are one after the other along the first axis of every part.
        """
        if len(entry.shape) <= 1 and math.prod(entry.shape) == 1:
            return None
        if (of.stride, of.tail) != (1, 0) or entry.shape[:1] != (experts,):
            raise UnsupportedModelError(
                f"{entry.name} {list(entry.shape)}, stored as {self.name}, does not hold its {experts} experts along "
                f"its first axis, so none can be cut out. {WAY_OUT}"
            )
        return ExpertRows(0, 1, 0)

    def channel_rows(self, shape: tuple[int, ...], part: str, of: ChannelRows, width: int) -> ChannelRows | None:
        """Where the channels are in a stored tensor that has this shape for each expert.

        The parameter has them at `of`, from which conversions may have split or joined them (gate, up). None if they
        cannot be found, or not be cut: in quantized tensors, several channels share a scale or a byte.
        """
        return None

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The plain parameter in `dtype`, from its stored parts by their names, on their device.

        Happens before transformers' own conversion, which then sees a plain checkpoint. Quantized values are computed
        in float32, and rounded once; of a tensor that holds all experts, one expert at a time. Raises CheckpointError
        for values that cannot be right.
        """

    @abstractmethod
    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The safetensors dtype and the shape of every part of a weight of this shape (out, in)."""

    @abstractmethod
    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that `decode` gives for parts of these shapes."""


def group_parts(names: Iterable[str], stored: Mapping[str, StoredTensor]) -> dict[str, tuple[Format, dict[str, str]]]:
    """For each parameter, by its plain name, its format and which of the tensors `names` is each of its parts."""
    groups: dict[str, tuple[Format, dict[str, str]]] = {}
    for name in names:
        each = stored[name]
        groups.setdefault(each.parameter, (each.format, {}))[1][each.part] = name
    return groups


def plain_shapes(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters, by their plain names, that stored tensors of these shapes decode to."""
    return {
        parameter: storage.plain_shape({part: shapes[name] for part, name in names.items()})
        for parameter, (storage, names) in group_parts(stored, stored).items()
    }


def decode_tensors(
    tensors: dict[str, torch.Tensor], stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The parameters, under their plain names, of stored tensors that hold all parts of each.

    Quantized ones get `dtype`. Takes the tensors out of the dict, one parameter after the other: a stored tensor is
    freed once it is decoded.
    """
    decoded = {}
    for parameter, (storage, names) in group_parts(tensors, stored).items():
        try:
            decoded[parameter] = storage.decode({part: tensors.pop(name) for part, name in names.items()}, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{parameter} cannot be decoded. {error}") from error
    return decoded
