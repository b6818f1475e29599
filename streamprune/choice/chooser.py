"""The choice as a run makes it: layer by layer while it streams where that is possible, else once all are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from streamprune.choice.choose import Choice, ChosenLayer, choose, choose_layer
from streamprune.choice.mix import mix_weights
from streamprune.choice.schedule import layer_counts
from streamprune.choice.schedule_file import read_schedule_file
from streamprune.choice.selection import Selection
from streamprune.scores.statistics import LayerStatistics
from streamprune.settings import Goal
from streamprune.source.config_facts import ExpertSpec


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


def selection_of(goal: Goal) -> Selection:
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
