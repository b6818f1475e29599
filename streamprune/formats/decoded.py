"""A quantized checkpoint as the plain one that it decodes to: its tensors, and their bytes one matrix at a time.

Needs torch only when bytes are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamprune.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry, read_ranges
from streamprune.files.durable import reading
from streamprune.formats.base import ExpertRows, Format, group_parts
from streamprune.formats.pick import pick_formats
from streamprune.formats.plain import PLAIN

#: The dtype of decoded tensors.
DTYPE = "BF16"


@dataclass(frozen=True)
class DecodedEntry(TensorEntry):
    """A tensor of the plain checkpoint, in bfloat16, and the stored tensors that it is decoded from, by part.

    `begin` is 0: it lies in no file. (`file` is that of its first part.)
    """

    parts: Mapping[str, TensorEntry] = field(kw_only=True, repr=False, compare=False)
    format: Format = field(kw_only=True, compare=False)

    def expert(self, number: int, experts: int) -> DecodedEntry:
        """The part of a tensor of `experts` experts that belongs to one of them, with a first axis of length 1."""
        parts = {}
        for name, part in self.parts.items():
            rows = self.format.expert_rows(part, name, ExpertRows(0, 1, 0), experts)
            if rows is not None:
                size = part.nbytes // experts
                begin = part.begin + number * size
                part = replace(part, shape=(1, *part.shape[1:]), begin=begin, end=begin + size)
            parts[name] = part
        return replace(self, shape=(1, *self.shape[1:]), end=self.nbytes // experts, parts=parts)


def decoded_entries(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of the plain checkpoint that a checkpoint with this config.json decodes to; plain ones stay."""
    stored = pick_formats(tensors, config)
    result: dict[str, TensorEntry] = {}
    for name, (storage, names) in group_parts(stored, stored).items():
        parts = {part: tensors[each] for part, each in names.items()}
        if storage is PLAIN:
            result[name] = parts[""]
            continue
        shape = storage.plain_shape({part: entry.shape for part, entry in parts.items()})
        size, file = math.prod(shape) * DTYPE_BITS[DTYPE] // 8, next(iter(parts.values())).file
        result[name] = DecodedEntry(name, file, DTYPE, shape, 0, size, parts=parts, format=storage)
    return result


def read_decoded(entry: DecodedEntry, folder: Path) -> memoryview:
    """The bytes of a decoded tensor, whose stored parts are in `folder`. In memory: the tensor, and its parts."""
    import torch

    from streamprune.checkpoint.reader import DTYPES

    parts = {}
    for name, part in entry.parts.items():
        path = folder / part.file
        with reading(path), path.open("rb") as stream:
            data = bytearray().join(read_ranges(stream, [(part.begin, part.end)]))
        parts[name] = torch.frombuffer(data, dtype=DTYPES[part.dtype]).reshape(part.shape)
    tensor = entry.format.decode(parts, torch.bfloat16).contiguous()
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)
