"""What is known about a model before its weights are read: where its experts are, and what memory it takes.

`ModelFacts` are kept with the scores, so that a model need not be built to be pruned again. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from streamprune.checkpoint.index import Checkpoint
from streamprune.errors import CheckpointError, ScoresError
from streamprune.fit.cache import CacheSizes
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.positions import max_positions
from streamprune.fit.weights import weights_by_layout
from streamprune.formats.pick import pick_formats
from streamprune.formats.quantization import Quantization
from streamprune.models.config_json import ExpertSpec, ModelShape, WidthSpec
from streamprune.models.expert_layout import Layout
from streamprune.models.layout_json import layout_as_json, layout_from_json, width_from_json
from streamprune.models.per_layer_experts import LoadingFacts, loading_facts_from_json
from streamprune.output.encoded import encoded_layout
from streamprune.output.plan import PrunePlan
from streamprune.planning.counts import ExpertCounts, Prunable
from streamprune.saliency.scores import Scores
from streamprune.selection.select import NO_CHANNELS
from streamprune.targets import PruningTarget, ServingSpec

#: Bytes of a weight where the scores do not say it.
_USUAL_ITEMSIZE = 2


@dataclass(frozen=True)
class _Memory:
    """What the memory of a model depends on in addition to its weights, as stored with the scores."""

    cache: CacheSizes
    shape: ModelShape
    itemsize: int
    max_positions: int | None


class _FactsJson(msgspec.Struct):
    tensors: dict[str, Any]
    loading: dict[str, Any]
    memory: _Memory | None


@dataclass(frozen=True)
class ModelFacts:
    """Where the experts are, how an output with different numbers of them is loaded, and what memory the model takes.

    `footprint` is that of the unpruned model; None if the size of its cache is unknown.
    """

    layout: Layout
    loading: LoadingFacts
    footprint: Footprint | None

    def as_json(self) -> dict[str, Any] | None:
        """The facts as JSON, less the spec; None for a checkpoint whose tensor names fit no pattern."""
        tensors = layout_as_json(self.layout)
        if tensors is None:
            return None
        known = self.footprint
        memory = None
        if known is not None:
            memory = asdict(_Memory(known.cache, known.shape, known.itemsize, known.max_positions))
        return {"tensors": tensors, "loading": msgspec.to_builtins(self.loading), "memory": memory}

    def serving(self, target: PruningTarget, config: Mapping[str, Any]) -> ServingSpec:
        """How the pruned model is to be used; `config` is the source's config.json."""
        return target.serving(self.footprint.max_positions if self.footprint is not None else max_positions(config))

    def estimate(
        self,
        output: str,
        plan: PrunePlan,
        target: PruningTarget,
        counts: ExpertCounts,
        written: Checkpoint,
    ) -> Estimate | None:
        """The memory of the finished model, with its weights counted in the written files."""
        if self.footprint is None:
            return None
        stored = pick_formats(written.tensors, written.config)
        layout = encoded_layout(plan.layout, plan.tensors) if plan.encoding is not None else plan.layout
        weights = weights_by_layout(written.tensors, layout, plan.counts, stored)
        spec = None if weights.counts else replace(self.layout.spec, count=weights.count)
        method = Quantization.of(written.config).method
        footprint = replace(self.footprint, model=output, weights=weights, spec=spec, quantization=method, forms=None)
        if plan.width is not None:
            footprint = replace(footprint, width=plan.width, shape=replace(footprint.shape, expert=plan.width))
        # What is written is the source of this estimate.
        use = replace(target.serving(footprint.max_positions), weights=target.gguf or "source")
        return counts.against_budget(Estimate(footprint, use))


def facts_from_json(
    kept: Any,
    spec: ExpertSpec,
    model: str,
    checkpoint: Checkpoint,
    counts: Mapping[int, int] | None = None,
    width: int | None = None,
) -> ModelFacts:
    """The facts that `ModelFacts.as_json` gave, for a checkpoint with those tensors: the source's, or an output's.

    `spec` is the source's; `counts` are the experts by layer of an output, None for the source itself; `width` are the
    channels of an output's experts, None if they have all.
    Raises CheckpointError for anything else: the JSON may be untrusted.
    """
    try:
        found = msgspec.convert(kept, _FactsJson)
        if not all(0 <= number < 2**40 for number in _numbers(msgspec.to_builtins(found.memory))):
            raise ValueError("a number out of range")
        if found.memory is not None:
            _check_itemsize(found.memory)
    except ValueError as error:
        raise CheckpointError(
            f"The memory facts in the scores file are invalid ({error}). Score the model again."
        ) from None
    tensors, config = checkpoint.tensors, checkpoint.config
    layout = layout_from_json(found.tensors, spec, tensors, counts, width)
    loading, memory = loading_facts_from_json(found.loading), found.memory
    if memory is None:
        return ModelFacts(layout, loading, None)
    counts = counts or dict.fromkeys(layout.expert_layers, spec.count)
    weights = weights_by_layout(tensors, layout, counts, pick_formats(tensors, config))
    of_them = None if weights.counts else replace(spec, count=weights.count)
    footprint = Footprint(
        model,
        weights,
        of_them,
        memory.cache,
        memory.shape,
        itemsize=memory.itemsize,
        max_positions=memory.max_positions,
        width=layout.width.width if layout.width is not None else None,
        quantization=Quantization.of(config).method,
    )
    return ModelFacts(layout, loading, footprint)


def check_scores_match(path: Path, scores: Scores, layout: Layout) -> None:
    """Raise ScoresError unless scores and model have the same layers, experts and channels.

    A matching fingerprint is not enough: the scores file may have been edited.
    """
    if (scores.spec, scores.layer_indices) != (layout.spec, layout.expert_layers):
        raise ScoresError(
            f"{path} has scores of {len(scores.layers)} layers with {scores.spec.count} experts "
            f"(top-{scores.spec.top_k}), but the model has {len(layout.expert_layers)} with {layout.spec.count} "
            f"(top-{layout.spec.top_k}), or other layers have experts. Score the model again."
        )
    if scores.mtp is not None and layout.mtp_layer is not None and scores.mtp.index != layout.mtp_layer:
        raise ScoresError(
            f"{path} has scores of an MTP layer {scores.mtp.index}, but the model has it as layer {layout.mtp_layer}. "
            "Score the model again."
        )
    energies = scores.layers[0].channels
    if energies is not None and layout.width is not None and energies.shape[2] != layout.width.width:
        raise ScoresError(
            f"{path} has scores of {energies.shape[2]} channels for each expert, but the model has "
            f"{layout.width.width}. Score the model again."
        )


def prunable_from_scores(scores: Scores) -> Prunable:
    """What can be removed of a model, channels included, by its scores alone.

    Raises ScoresError for scores without energies of channels, unless they say why the width of the experts is fixed,
    and for scores that contradict themselves.
    """
    layout, energies = scores.layout or {}, scores.layers[0].channels
    try:
        width, reason = width_from_json(layout.get("tensors", {}))
        memory = layout.get("memory")
        itemsize = _USUAL_ITEMSIZE
        if memory is not None:
            itemsize = _check_itemsize(msgspec.convert(memory, _Memory))
        if width is not None and energies is not None and width.width != energies.shape[2]:
            raise ValueError(f"{width.width} channels per expert, but scores of {energies.shape[2]}")
    except ValueError as error:
        raise ScoresError(f"The layout in the scores file is invalid ({error}). Score the model again.") from None
    if energies is None and (width is not None or not reason):
        raise ScoresError(NO_CHANNELS)
    if energies is not None and width is None and not reason:
        # The layout is not recorded, since patterns cannot describe it.
        width = WidthSpec((), (), energies.shape[2])
    return Prunable(scores.spec, scores.layer_indices, width, reason, itemsize)


def _check_itemsize(memory: _Memory) -> int:
    """The bytes of a weight. Raises ValueError if no dtype has so many."""
    if memory.itemsize not in (1, 2, 4, 8):
        raise ValueError(f"weights of {memory.itemsize} bytes")
    return memory.itemsize


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int):
        yield value
