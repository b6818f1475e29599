"""The memory of a model as it will be written: its weights decoded, or quantized, before it is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.config import OutputSettings, Storage
from streamprune.fit.estimate import Footprint
from streamprune.fit.structure import footprint_of_skeleton, weights_of_checkpoint
from streamprune.fit.weights import Weights
from streamprune.formats.decoded import decoded_entries
from streamprune.formats.quantization import without_sections
from streamprune.models.skeleton import Skeleton
from streamprune.output.source import quantizing
from streamprune.planning.facts import written_weights

#: In the name of the first expert's tensors.
_FIRST = ".experts.0."


def written_footprint(
    settings: OutputSettings,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    known: Footprint | None = None,
) -> Footprint:
    """The footprint of the unpruned model, in the format in which weights are written.

    `raw` is the source's config.json, `tensors` its checkpoint's; None if they are known from the config alone. Of a
    footprint that is `known`, only the weights are counted again: tracing the cache takes a second.
    """
    if settings.weights != "source":
        tensors = decoded_entries(tensors, raw) if tensors is not None else None
        raw = without_sections(raw)
    if known is not None and tensors is not None:
        footprint = replace(known, weights=weights_of_checkpoint(raw, skeleton, tensors))
    else:
        footprint = footprint_of_skeleton(settings.model, raw, skeleton, tensors)
    return _quantized(settings.storage, raw, skeleton, tensors, footprint) if settings.is_quantizing else footprint


def _quantized(
    storage: Storage,
    config: Mapping[str, Any],
    skeleton: Skeleton,
    plain: Mapping[str, TensorEntry] | None,
    footprint: Footprint,
) -> Footprint:
    """`footprint`, that of the plain weights, with those that are quantized as they will be stored."""
    entries = plain if plain is not None else {each.name: each for each in _entries(footprint.weights)}
    apart, encoding, layout = quantizing(storage, skeleton, config, entries)
    weights = replace(written_weights(layout, apart, encoding), measured=footprint.weights.measured)
    return replace(footprint, weights=weights, quantization=encoding.scheme(apart.values()).method)


def _entries(weights: Weights) -> Iterator[TensorEntry]:
    """The tensors, in no file, of weights that are known from a config: those of every expert where it has its own."""
    for fact in weights.facts:
        if fact.rows is None or len(fact.shape) != 3 or _FIRST not in fact.name:
            yield TensorEntry(fact.name, "", fact.dtype, fact.shape, 0, fact.nbytes)
            continue
        # The fact stands for all experts of its layer, under the name of the first one.
        for expert in range(fact.shape[0]):
            name, size = fact.name.replace(_FIRST, f".experts.{expert}."), fact.nbytes // fact.shape[0]
            yield TensorEntry(name, "", fact.dtype, fact.shape[1:], 0, size)
