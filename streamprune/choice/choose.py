"""The choice of experts: from statistics and settings to the numbers of those that stay, for one layer and for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamprune.choice.allocation import check_room, keep_highest
from streamprune.choice.mix import mix_weights
from streamprune.choice.schedule import layer_counts
from streamprune.choice.schedule_file import read_schedule_file
from streamprune.choice.selection import Selection
from streamprune.choice.super_experts import super_experts
from streamprune.errors import SettingsError, StreampruneError
from streamprune.scores.methods import score_experts
from streamprune.scores.statistics import FIELDS, LayerStatistics
from streamprune.source.config_facts import ExpertSpec


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
    def counts_by_block(self) -> dict[int, int]:
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
