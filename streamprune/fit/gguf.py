"""The sizes of a model as a GGUF file of llama.cpp, from the facts of its weights. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from streamprune.fit.weights import WeightFact, Weights, WeightSizes
from streamprune.models.config_json import ModelShape
from streamprune.quantize.gguf_types import GgufModel, role_of, row_bytes, tensor_type

#: What stays in 32 bits whatever the quantization.
_PLAIN = ("conv", "norm", "bias", "A_log", "dt_bias", "sinks")


def gguf_sizes(
    weights: Weights, shape: ModelShape, quantization: str, width: int | None, experts: float | None = None
) -> WeightSizes:
    """The sizes in one of GGUF_TYPES, with `width` channels per expert (None: all).

    Rows whose length no block divides fall back to larger types, as `llama-quantize` has it. A model of exactly eight
    experts gets more bits in its attention there: `experts` is how many each layer is to have; None for all.
    """
    facts = weights.decoded(2).facts
    model = _model(facts, weights.count if experts is None else experts)
    full = shape.expert

    def stored(fact: WeightFact) -> WeightFact:
        narrower = fact if width is None else replace(fact, shape=_narrowed(fact, full, width))
        return replace(narrower, nbytes=_bytes(narrower, quantization, model, width or full))

    return replace(weights, facts=tuple(map(stored, facts))).sizes()


def _axis_of_channels(fact: WeightFact, width: int) -> int | None:
    """The axis of a tensor of experts with `width` channels each along which these lie; None for one without.

    Named from its end. Most checkpoints store projections as rows for each output, some the transposed matrices. Where
    the hidden size is as large as the channels, the former is assumed: the bytes are the same.
    """
    matrix = _matrix(fact)
    if not fact.of_experts or fact.category == "router" or not matrix:
        return None
    if role_of(fact.name.removesuffix("_bias").removesuffix(".bias")) == "down":
        # (Its bias has a value for each of the hidden size.)
        return next((axis for axis in (-1, -2) if len(matrix) == 2 and matrix[axis] == width), None)
    # Gate and up projections may be one tensor.
    return next((axis for axis in range(-len(matrix), 0) if matrix[axis] in (width, 2 * width)), None)


def _narrowed(fact: WeightFact, full: int, width: int) -> tuple[int, ...]:
    """The shape of a tensor with `width` of the `full` channels per expert."""
    axis, shape = _axis_of_channels(fact, full), list(fact.shape)
    if axis is not None:
        shape[axis] = shape[axis] // full * width
    return tuple(shape)


def _matrix(fact: WeightFact) -> tuple[int, ...]:
    """The shape of one expert's tensor, or of one that belongs to no expert."""
    rows = fact.rows
    return fact.shape[1:] if rows is not None and (rows.axis, rows.stride) == (0, 1) else fact.shape


def _model(facts: Iterable[WeightFact], experts: float) -> GgufModel:
    trunk = [fact for fact in facts if fact.category not in ("MTP", "vision") and fact.layer is not None]
    values, rows = {}, {"query": 1.0, "key": 1.0}
    for fact in trunk:
        role = role_of(fact.name)
        if role in ("value", "qkv") and len(fact.shape) == 2 and fact.layer is not None:
            values[fact.layer] = True
        if role in rows and len(fact.shape) == 2:
            rows[role] = float(fact.shape[0])
    layers = 1 + max((fact.layer or 0 for fact in trunk), default=0)
    tied = not any(fact.category == "head" for fact in facts)
    return GgufModel(layers, experts, rows["query"] / rows["key"], tuple(sorted(values)), tied)


def _bytes(fact: WeightFact, quantization: str, model: GgufModel, width: int) -> int:
    """Bytes of one tensor in the file."""
    matrix, values = _matrix(fact), math.prod(fact.shape)
    if fact.category == "vision":
        # A file of its own, in 16 bits.
        return 2 * values
    if len(matrix) != 2 or 1 in matrix or fact.category == "router" or any(part in fact.name for part in _PLAIN):
        return 4 * values
    role, layer = role_of(fact.name), -1 if fact.layer is None else fact.layer
    if fact.category in ("embeddings", "head"):
        role = fact.category
    elif fact.of_experts:
        role = "expert down" if role == "down" else "experts"
    elif role in ("value", "qkv") and layer not in model.value_layers:
        role = "other"
    # Rows of a projection to the experts' channels are as long as the hidden size, of one from them as their width.
    columns, axis = matrix[-1], _axis_of_channels(fact, width)
    if axis is not None:
        columns = matrix[axis if role == "expert down" else -3 - axis]
    if role == "mla":
        # The file has two parts of it: one by heads, with rows as long as a head's keys, one with those of the latent.
        return sum(_matrix_bytes(quantization, "other", layer, columns, half, model) for columns, half in (
            (128, values // 2), (matrix[-1], values - values // 2)
        ))  # fmt: skip
    return _matrix_bytes(quantization, role, layer, columns, values, model)


def _matrix_bytes(quantization: str, role: str, layer: int, columns: int, values: int, model: GgufModel) -> int:
    kind = tensor_type(quantization, role, layer, columns, model)
    return values // columns * row_bytes(kind, columns)
