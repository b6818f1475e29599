"""The plain tensors of a model, from which every form of its weights is made, and footprints that know all forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.common_settings import OutputSettings
from streamprune.fit.estimate import Footprint
from streamprune.fit.published import published_facts
from streamprune.fit.structure import footprint_of_skeleton, weights_of_checkpoint
from streamprune.fit.weights import WeightFact, Weights
from streamprune.formats.decoded import decoded_entries
from streamprune.formats.quantization import Quantization, without_sections
from streamprune.models.skeleton import Skeleton
from streamprune.output.source import quantizing
from streamprune.planning.sizes import PlainTensors, WrittenSizes
from streamprune.targets import Storage

#: In the name of the first expert's tensors.
_FIRST = ".experts.0."


def written_footprint(
    settings: OutputSettings,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    known: Footprint | None = None,
) -> Footprint:
    """The footprint of the unpruned model, with what its weights take in every form.

    `raw` is the source's config.json, `tensors` its checkpoint's; None if they are known from the config alone. Of a
    footprint that is `known`, only the weights are counted again: tracing the cache takes a second.
    """
    if known is not None and tensors is not None:
        footprint = replace(known, weights=weights_of_checkpoint(raw, skeleton, tensors))
    else:
        footprint = footprint_of_skeleton(settings.model, raw, skeleton, tensors)

    def load() -> PlainTensors:
        return plain_tensors(settings.storage, raw, skeleton, tensors, footprint.weights)

    return replace(footprint, forms=WrittenSizes(load), config=raw)


def plain_tensors(
    storage: Storage,
    raw: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry] | None,
    weights: Weights,
) -> PlainTensors:
    """The plain tensors of a model with the config.json `raw`, and what `storage` quantizes of them.

    `tensors` are its checkpoint's; None if only the config is known, from which its `weights` follow then. Raises
    UnsupportedModelError where experts have no matrices of their own.
    """
    plain, stored = without_sections(raw), frozenset(fact.format for fact in weights.facts if fact.of_experts)
    if tensors is None:
        entries = {each.name: each for each in _entries(_plain_facts(plain, skeleton, weights))}
    else:
        entries = dict(decoded_entries(tensors, raw) if Quantization.of(raw).method else tensors)
    # In the order of names, so that a refusal names the same tensor wherever the headers come from.
    apart, encoding, layout = quantizing(storage, skeleton, plain, dict(sorted(entries.items())))
    return PlainTensors(apart, layout, encoding, stored - {""})


def _plain_facts(plain: Mapping[str, Any], skeleton: Skeleton, weights: Weights) -> Iterable[WeightFact]:
    """The tensors of weights that a config alone tells; of quantized ones, as they would be plain."""
    if not weights.formats:
        return weights.facts
    counts = dict.fromkeys(skeleton.experts, skeleton.spec.count)
    others = [fact for fact in weights.facts if fact.category == "vision" and not fact.format]
    return [*published_facts(skeleton.model, plain, skeleton, counts), *others]


def _entries(facts: Iterable[WeightFact]) -> Iterator[TensorEntry]:
    """The tensors, in no file, that facts of a config stand for: those of every expert where it has its own."""
    for fact in facts:
        if fact.rows is None or len(fact.shape) != 3 or _FIRST not in fact.name:
            yield TensorEntry(fact.name, "", fact.dtype, fact.shape, 0, fact.nbytes)
            continue
        # The fact stands for all experts of its layer, under the name of the first one.
        for expert in range(fact.shape[0]):
            name, size = fact.name.replace(_FIRST, f".experts.{expert}."), fact.nbytes // fact.shape[0]
            yield TensorEntry(name, "", fact.dtype, fact.shape[1:], 0, size)
