"""Super experts: the few whose outputs peak so far above all others that the model breaks down without them.

The choice of experts: from statistics and settings to the numbers of those that stay, for one layer and for all.

The choice as a run makes it: layer by layer while it streams where that is possible, else once all are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from streamprune.config import PruningTarget
from streamprune.errors import SettingsError, StreampruneError
from streamprune.models.config_json import ExpertSpec
from streamprune.saliency.methods import score_experts
from streamprune.saliency.scores import FIELDS, LayerStatistics
from streamprune.selection.schedules import check_room, keep_highest, layer_counts, read_schedule_file
from streamprune.selection.settings import Selection, mix_weights

PERCENTILE = 99.5
#: Share of the largest peak of all.
LEAST_SHARE = 0.1
#: Later layers have large peaks of another kind, next to the model's output.
FIRST_LAYERS = 0.75


def super_experts(layers: Sequence[LayerStatistics], weights: Sequence[float]) -> dict[int, tuple[int, ...]]:
    """The super experts by block, ascending; blocks without any are left out. `weights` (S,) are those of the sources.

    An expert is one if its peak is above the 99.5th percentile of the peaks of all experts and above a tenth of the
    largest, and it is in the first three quarters of the layers that have experts (Su et al., 2025, arXiv:2507.23279).
    The percentile is interpolated linearly. Sources with weight 0 count for nothing here too.
    """
    peaks = [layer.mixed(weights)["peaks"] for layer in layers]
    everywhere = np.concatenate(peaks)
    threshold = max(float(np.percentile(everywhere, PERCENTILE)), LEAST_SHARE * float(everywhere.max()))
    found = {}
    for layer, values in list(zip(layers, peaks, strict=True))[: int(FIRST_LAYERS * len(layers))]:
        experts = tuple(int(expert) for expert in np.flatnonzero(values > threshold))
        if experts:
            found[layer.block] = experts
    return found


@dataclass(frozen=True)
class ChosenLayer:
    """One block: the experts that stay (ascending), and the score and tokens of every expert.

    `tokens` are those really routed, of all sources, whatever the mix.
    """

    block: int
    kept: tuple[int, ...]
    scores: tuple[float, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Choice:
    """All layers in ascending order of blocks, and the super experts by block that were protected, if any."""

    layers: tuple[ChosenLayer, ...]
    protected: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many experts stay in each layer."""
        return tuple(len(layer.kept) for layer in self.layers)

    @property
    def counts_by_layer(self) -> dict[int, int]:
        """How many experts stay, by block."""
        return {layer.block: len(layer.kept) for layer in self.layers}

    @property
    def is_uniform(self) -> bool:
        """Whether all layers keep equally many, as a standard config says it."""
        return len(set(self.counts)) == 1


def choose(
    layers: Sequence[LayerStatistics],
    sources: Sequence[str],
    source_tokens: Sequence[int],
    selection: Selection,
    spec: ExpertSpec,
    *,
    total: int | None = None,
    counts: Sequence[int] | None = None,
) -> Choice:
    """Choose the experts that stay in all layers, by `total` of them or by `counts` per layer.

    `selection.schedule` divides a total; a schedule file states it, so that none need be given; for counts the schedule
    does not matter. Raises SettingsError where it cannot be done, with the layer and the numbers.
    """
    weights = mix_weights(selection.mix, sources, source_tokens)
    protected = super_experts(layers, weights) if selection.protect_super_experts else {}
    if counts is None and selection.has_schedule_file:
        counts = read_schedule_file(selection, spec, len(layers))
        if total is not None and sum(counts) != total:
            raise SettingsError(
                f"--schedule {selection.schedule} keeps {sum(counts):,} experts in all, but {total:,} were asked for. "
                "Give the file alone, or choose a schedule by its name."
            )
    if counts is None:
        assert total is not None
        scores = [score_layer(layer, selection, weights) for layer in layers]
        shielded = [protected.get(layer.block, ()) for layer in layers]
        counts = layer_counts(selection, spec, len(layers), total, scores, shielded)
    if len(counts) != len(layers):
        raise SettingsError(f"{len(counts)} numbers of experts were given for {len(layers)} layers with experts.")
    chosen = (
        choose_layer(layer, selection, weights, spec, keep, protected.get(layer.block, ()))
        for layer, keep in zip(layers, counts, strict=True)
    )
    return Choice(tuple(chosen), protected)


def choose_layer(
    layer: LayerStatistics,
    selection: Selection,
    weights: Sequence[float],
    spec: ExpertSpec,
    keep: int,
    protected: Sequence[int] = (),
) -> ChosenLayer:
    """Choose the `keep` experts of one layer that stay; `weights` (S,) are those of `mix_weights`.

    A streaming run may call it as soon as the layer is scored, unless `selection.needs_all_layers`; the result is that
    of `choose`, to the bit.
    """
    try:
        check_room(protected, keep, spec.count, spec.groups)
    except StreampruneError as error:
        raise SettingsError(f"Layer {layer.block}: {error}") from None
    scores = score_layer(layer, selection, weights)
    return ChosenLayer(layer.block, keep_highest(scores, keep, spec.groups, protected), scores, routed_tokens(layer))


def choose_kept(
    layers: Sequence[LayerStatistics],
    sources: Sequence[str],
    source_tokens: Sequence[int],
    selection: Selection,
    kept: Mapping[int, Sequence[int]],
) -> Choice:
    """The choice that the user made alone (`keep_file`), with the scores that the experts have by `selection`."""
    weights = mix_weights(selection.mix, sources, source_tokens)
    return Choice(
        tuple(
            ChosenLayer(
                layer.block, tuple(kept[layer.block]), score_layer(layer, selection, weights), routed_tokens(layer)
            )
            for layer in layers
        )
    )


def score_layer(layer: LayerStatistics, selection: Selection, weights: Sequence[float]) -> tuple[float, ...]:
    """The scores (E,) of the experts of one layer, with the sources weighed by `weights` (S,)."""
    scores = score_experts(selection.method, layer.mixed(weights), layer.block, selection.seed)
    return tuple(float(score) for score in scores)


def routed_tokens(layer: LayerStatistics) -> tuple[int, ...]:
    """Tokens of all sources that were routed to each expert (E,)."""
    return tuple(int(count) for count in layer.values[list(FIELDS).index("tokens")].sum(axis=0))


@dataclass(frozen=True)
class Chooser:
    """Chooses the experts of a model: `total` of them in all `blocks` that have some.

    `counts` says how many stay in each block, None where only all the scores together decide that. `sources` are the
    calibration's, with the tokens of each. Raises SettingsError for a mix that does not go with them.
    """

    selection: Selection
    spec: ExpertSpec
    blocks: tuple[int, ...]
    total: int
    counts: Mapping[int, int] | None
    sources: tuple[str, ...]
    source_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        # Now, and not after hours of scoring.
        _ = self.weights

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """How often each token of each source counts."""
        return mix_weights(self.selection.mix, self.sources, self.source_tokens)

    def layer(self, statistics: LayerStatistics) -> ChosenLayer:
        """The choice in one layer. Only where `counts` are known."""
        assert self.counts is not None
        return choose_layer(statistics, self.selection, self.weights, self.spec, self.counts[statistics.block])

    def all(self, layers: Sequence[LayerStatistics]) -> Choice:
        """The choice in all layers, the same as one layer after the other where that is possible."""
        if self.counts is None:
            return choose(layers, self.sources, self.source_tokens, self.selection, self.spec, total=self.total)
        counts = [self.counts[layer.block] for layer in layers]
        return choose(layers, self.sources, self.source_tokens, self.selection, self.spec, counts=counts)


def selection_of(goal: PruningTarget) -> Selection:
    """How a run's settings say that experts are chosen. Raises SettingsError for impossible values."""
    return Selection(
        method=goal.method,
        mix=goal.mix,
        schedule=goal.schedule,
        spread=goal.spread,
        floor=goal.floor,
        protect_super_experts=goal.protect_super_experts,
        seed=goal.seed or 0,
    )


def stated_counts(selection: Selection, spec: ExpertSpec, blocks: Sequence[int]) -> dict[int, int] | None:
    """How many experts stay by block where the schedule is a file that lists them; None for the others."""
    if not selection.has_schedule_file:
        return None
    return dict(zip(blocks, read_schedule_file(selection, spec, len(blocks)), strict=True))


def planned_counts(selection: Selection, spec: ExpertSpec, blocks: Sequence[int], total: int) -> dict[int, int] | None:
    """How many experts stay by block, of `total` in all; None where only all the scores together decide that.

    Raises SettingsError where the schedule cannot be met.
    """
    stated = stated_counts(selection, spec, blocks)
    if selection.needs_all_layers:
        if stated is None:
            # What is certain to fail fails now: as if no score were known and nothing protected.
            nothing = [[0.0] * spec.count] * len(blocks)
            layer_counts(selection, spec, len(blocks), total, nothing)
        return None
    if stated is not None:
        return stated
    return dict(zip(blocks, layer_counts(selection, spec, len(blocks), total), strict=True))
