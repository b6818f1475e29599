"""A checkpoint whose experts lie in tensors of all experts, seen as one whose experts have tensors of their own.

Quantized experts are stored one by one, under the names from which transformers joins them again: they are read from
its own weight conversion. The entries are byte ranges of the tensors that there are, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.formats.base import ExpertRows
from streamprune.formats.decoded import DecodedEntry
from streamprune.models.expert_layout import Target
from streamprune.models.linear_weights import EXPERT_MATRICES
from streamprune.models.skeleton import Skeleton

#: Stands for the expert's number in transformers' patterns of names.
_NUMBER = "*"
_WAY_OUT = "Leave out --weights (or, of a quantized source, write --weights bf16)."


def with_separate_experts(
    skeleton: Skeleton, targets: Mapping[str, Target], tensors: Mapping[str, TensorEntry]
) -> Mapping[str, TensorEntry]:
    """Plain tensors with a matrix (out, in) of its own for each expert; the same object if they have those already.

    Raises UnsupportedModelError if transformers reads this model's experts only joined, or joins them in another way
    than one below the other.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        if _holds_all_experts(skeleton, targets[name], entry):
            result |= {each.name: each for each in _separate(skeleton, targets[name], entry)}
        else:
            result[name] = entry
    return result if result.keys() != tensors.keys() else tensors


def _holds_all_experts(skeleton: Skeleton, target: Target, entry: TensorEntry) -> bool:
    """Whether a tensor is a matrix of every expert of its layer in one."""
    if target.name is None or target.layer is None or len(entry.shape) != 3:
        return False
    path, _, leaf = target.name.rpartition(".")
    return leaf in EXPERT_MATRICES and path.endswith(f".{target.layer}.{skeleton.experts.get(target.layer)}")


def _separate(skeleton: Skeleton, target: Target, entry: TensorEntry) -> Iterator[TensorEntry]:
    """The entries of every expert's own matrices."""
    assert target.name is not None
    converter = _joining(skeleton, target.name)
    parameter = skeleton.model.get_parameter(target.name)
    if converter is None or entry.shape != tuple(parameter.shape) or target.rows != ExpertRows(0, 1, 0):
        raise UnsupportedModelError(
            f"The experts of this {skeleton.model.config.model_type} model cannot be quantized: its checkpoint has "
            f"them in one tensor ({entry.name}), and transformers {transformers.__version__} does not read quantized "
            f"ones with tensors of their own back into this model. {_WAY_OUT}"
        )
    if isinstance(entry, DecodedEntry):
        raise UnsupportedModelError(
            f"{entry.name} is quantized in the source, with all experts in one tensor, from which single matrices are "
            f"not read. {_WAY_OUT}"
        )
    patterns = [pattern.replace("\\", "").removeprefix(".") for pattern in converter.source_patterns]
    joined = converter.target_patterns[0].replace("\\", "").removeprefix(".")
    before, count = entry.name.removesuffix(joined), entry.shape[0]
    size = entry.nbytes // count // len(patterns)
    for expert in range(count):
        for place, pattern in enumerate(patterns):
            name, begin = before + pattern.replace(_NUMBER, str(expert)), entry.begin
            begin += (expert * len(patterns) + place) * size
            shape = (entry.shape[1] // len(patterns), entry.shape[2])
            yield replace(entry, name=name, shape=shape, begin=begin, end=begin + size)


def _joining(skeleton: Skeleton, parameter: str) -> WeightConverter | None:
    """The conversion that joins every expert's own matrices to `parameter`, one below the other; None if none does."""
    for each in get_model_conversion_mapping(skeleton.model):
        if not isinstance(each, WeightConverter) or len(each.target_patterns) != 1:
            continue
        joins = [type(step) for step in each.operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
        below = all(getattr(step, "dim", 0) == place for place, step in enumerate(each.operations))
        apart = all(_NUMBER in pattern for pattern in each.source_patterns)
        if parameter.endswith(each.target_patterns[0].replace("\\", "")) and joins and apart and below:
            return each
    return None
