"""The sizes of plain weights once they are quantized by a scheme: counted, to the byte. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from streamprune.checkpoint.safetensors_file import DTYPE_BITS
from streamprune.fit.weights import WeightFact, Weights
from streamprune.quantize.schemes import Scheme


def quantized_weights(weights: Weights, scheme: Scheme, chosen: Callable[[WeightFact], bool]) -> Weights:
    """The weights with the parts of the `chosen` matrices, stored by the scheme, in their place.

    A fact may be one matrix (out, in), or hold those of all experts of a layer along its first axis.
    """
    facts: list[WeightFact] = []
    for fact in weights.facts:
        facts += _parts(fact, scheme) if chosen(fact) else [fact]
    return replace(weights, facts=tuple(facts))


def _parts(fact: WeightFact, scheme: Scheme) -> Iterator[WeightFact]:
    outer, matrix = fact.shape[:-2], fact.shape[-2:]
    stored = scheme.stored(matrix)
    largest = max(stored, key=lambda part: _nbytes(*stored[part]))
    for part, (dtype, shape) in stored.items():
        yield replace(
            fact,
            name=f"{fact.name.removesuffix('weight')}{scheme.leaves[part]}",
            dtype=dtype,
            shape=(*outer, *shape),
            nbytes=math.prod(outer) * _nbytes(dtype, shape),
            channel_axis=_channel_axis(fact, scheme, part),
            format=scheme.format.name,
            decoded_shape=fact.shape if part == largest else None,
        )


def _channel_axis(fact: WeightFact, scheme: Scheme, part: str) -> int | None:
    """The axis of the channels if the part's size is proportional to their number: with twice as many it doubles."""
    axis = fact.channel_axis
    if axis is None:
        return None
    matrix = fact.shape[-2:]
    doubled = tuple(size * 2 if place == axis else size for place, size in enumerate(matrix))
    return axis if _nbytes(*scheme.stored(doubled)[part]) == 2 * _nbytes(*scheme.stored(matrix)[part]) else None


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
