"""All that has to be known of a model to prune it again: kept with its scores, so that it need not be built for that.

Made once from the model's structure (`prepare.facts_of`), read back here without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.config import PruningTarget
from streamprune.errors import CheckpointError
from streamprune.fit.cache import CacheSizes, LayerCache
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.weights import weights_by_layout
from streamprune.models.config_json import ExpertSpec, ModelShape
from streamprune.models.expert_layout import Layout, layout_from_json
from streamprune.models.per_layer_experts import LoadingFacts, loading_facts_from_json
from streamprune.output.plan import PrunePlan
from streamprune.planning.expert_counts import ExpertCounts


@dataclass(frozen=True)
class ModelFacts:
    """Where the experts lie, how an output with different numbers of them is loaded, and what memory the model takes.

    `footprint` is the whole model's; None where its cache cannot be worked out.
    """

    layout: Layout
    loading: LoadingFacts
    footprint: Footprint | None

    def as_json(self) -> dict[str, Any] | None:
        """The facts as JSON, less the spec; None for a checkpoint whose tensor names fit no pattern."""
        tensors = self.layout.as_json()
        if tensors is None:
            return None
        known = self.footprint
        memory = None
        if known is not None:
            memory = {
                "cache": asdict(known.cache),
                "shape": asdict(known.shape),
                "itemsize": known.itemsize,
                "max_positions": known.max_positions,
            }
        return {"tensors": tensors, "loading": msgspec.to_builtins(self.loading), "memory": memory}

    def estimate(
        self,
        output: str,
        plan: PrunePlan,
        target: PruningTarget,
        counts: ExpertCounts,
        written: Mapping[str, TensorEntry],
    ) -> Estimate | None:
        """What the finished model will take, its weights counted in the files that were written."""
        if self.footprint is None:
            return None
        weights = weights_by_layout(written, self.layout, plan.counts)
        spec = None if weights.counts else replace(self.layout.spec, count=weights.count)
        footprint = replace(self.footprint, model=output, weights=weights, spec=spec)
        return counts.against_budget(Estimate(footprint, target.serving))


def facts_from_json(
    told: Any,
    spec: ExpertSpec,
    model: str,
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int] | None = None,
) -> ModelFacts:
    """The facts that `ModelFacts.as_json` gave, for a checkpoint with these tensors: the source's, or an output's.

    `spec` is the source's; `counts` are the experts by layer of an output, None for the source itself.
    Raises CheckpointError for anything else: they may come from a stranger.
    """
    try:
        layout = layout_from_json(told["tensors"], spec, tensors, counts)
        loading = loading_facts_from_json(told["loading"])
        memory = told["memory"]
        if memory is None:
            return ModelFacts(layout, loading, None)
        cache = memory["cache"]
        layers = tuple(LayerCache(**_numbers(layer, optional="window")) for layer in cache["layers"])
        sizes = CacheSizes(layers, **_numbers({"itemsize": cache["itemsize"]}))
        wide = memory["shape"]["wide_routing"]
        numbers = {name: value for name, value in memory["shape"].items() if name != "wide_routing"}
        if not isinstance(wide, bool):
            raise ValueError("wide_routing is neither yes nor no")
        shape = ModelShape(**_numbers(numbers), wide_routing=wide)
        rest = _numbers({name: memory[name] for name in ("itemsize", "max_positions")}, optional="max_positions")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"What the scores tell of the model's memory cannot be used ({error}). Score the model again."
        ) from None
    weights = weights_by_layout(tensors, layout, counts or dict.fromkeys(layout.expert_layers, spec.count))
    of_them = None if weights.counts else replace(spec, count=weights.count)
    return ModelFacts(layout, loading, Footprint(model, weights, of_them, sizes, shape, **rest))


def _numbers(values: Mapping[str, Any], optional: str | None = None) -> dict[str, Any]:
    """The values, if each is a number that a model can have; the one named `optional` may be None."""
    for name, value in values.items():
        if value is None and name == optional:
            continue
        if type(value) is not int or not 0 <= value < 2**40:
            raise ValueError(f"{name} is no number that a model has")
    return dict(values)
