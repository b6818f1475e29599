"""The selection of experts: from statistics and settings to the numbers of those that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from streamprune.errors import ScoresError, SettingsError
from streamprune.formats.base import ChannelMask, KeptExperts
from streamprune.models.config_json import ExpertSpec
from streamprune.saliency.methods import MixedStatistics, score_experts
from streamprune.saliency.scores import FIELDS, LayerStatistics, Scores
from streamprune.selection.schedules import DEFAULT_SPREAD, SCHEDULES, Division, ranked, room_for
from streamprune.selection.settings import SelectionSettings, mix_weights
from streamprune.selection.user_files import least_per_layer, read_schedule_file

#: What is said of scores without channels where these are needed.
NO_CHANNELS = (
    "The scores have no energies of channels, which choosing a width needs: they were made with --no-channels, or by "
    "an earlier version. Score the model again."
)
#: Super experts: their peaks are above this percentile of all peaks, and above this share of the largest peak.
PERCENTILE = 99.5
LEAST_SHARE = 0.1
#: Later layers are excluded: near the model's output they have large peaks of another kind.
FIRST_LAYERS = 0.75


@dataclass(frozen=True)
class LayerSelection:
    """Layer `index`: the experts that stay (ascending), and every expert's score and tokens (empty if unknown).

    `tokens` are all routed tokens of all sources, not weighted by the mix. `channels` are those that each kept expert
    keeps; None for all.
    """

    index: int
    kept: tuple[int, ...]
    scores: tuple[float, ...] = field(default=(), repr=False)
    tokens: tuple[int, ...] = field(default=(), repr=False)
    channels: ChannelMask | None = field(default=None, repr=False)

    @property
    def stays(self) -> KeptExperts:
        """What stays of the layer's experts."""
        return KeptExperts(self.kept, self.channels)


@dataclass(frozen=True)
class Selection:
    """The experts that stay in all layers, in ascending order of layers.

    `settings` decided the selection; None for the user's own list. `protected` are the super experts that were kept for
    any score, by layer. `mtp` is the layer for multi-token prediction, if it has scores of its own.
    """

    layers: tuple[LayerSelection, ...]
    settings: SelectionSettings | None = None
    protected: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mtp: LayerSelection | None = None

    @property
    def every(self) -> tuple[LayerSelection, ...]:
        """All layers, and the MTP layer behind them if its experts were selected by their own scores."""
        return self.layers if self.mtp is None else (*self.layers, self.mtp)

    @property
    def kept(self) -> dict[int, tuple[int, ...]]:
        """The experts that stay, by layer."""
        return {layer.index: layer.kept for layer in self.layers}

    @property
    def stays(self) -> dict[int, KeptExperts]:
        """What stays of the experts, by layer; also of the MTP layer if that has scores of its own."""
        return {layer.index: layer.stays for layer in self.every}

    @property
    def counts(self) -> tuple[int, ...]:
        """How many experts stay in each layer."""
        return tuple(len(layer.kept) for layer in self.layers)

    @property
    def counts_by_layer(self) -> dict[int, int]:
        """How many experts stay, by layer."""
        return {layer.index: len(layer.kept) for layer in self.layers}

    @property
    def is_narrower(self) -> bool:
        """Whether the experts that stay keep only some of their channels."""
        return all(layer.channels is not None for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers keep equally many, as a standard config requires."""
        return len(set(self.counts)) == 1


@dataclass(frozen=True)
class Selector:
    """Selects the experts of a model that stay: `total` of them in all layers.

    `per_layer` says how many stay in each layer, None if the scores of all layers decide that. Each of them keeps
    `width` channels; None for all. `sources` are the calibration's, with the tokens of each. Raises SettingsError for a
    mix that does not match these sources.
    """

    settings: SelectionSettings
    spec: ExpertSpec
    sources: tuple[str, ...]
    source_tokens: tuple[int, ...]
    total: int
    per_layer: Mapping[int, int] | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        # Checked here, not after hours of scoring.
        _ = self.weights

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """How often each token of each source counts."""
        return mix_weights(self.settings.mix, self.sources, self.source_tokens)

    def layer(
        self, statistics: LayerStatistics, keep: int | None = None, protected: Sequence[int] = ()
    ) -> LayerSelection:
        """The selection in one layer: of `keep` experts, or as many as `per_layer` says. Raises like `all`."""
        if keep is None:
            assert self.per_layer is not None
            # The MTP layer, a further one, keeps as many as the last.
            keep = self.per_layer.get(statistics.index, self.per_layer[max(self.per_layer)])
        scores = score_layer(statistics, self.settings, self.weights)
        try:
            kept = keep_highest(scores, keep, self.spec, protected)
        except SettingsError as error:
            raise SettingsError(f"Layer {statistics.index}: {error}") from None
        channels = keep_channels(statistics, self.weights, kept, self.width) if self.width is not None else None
        return LayerSelection(statistics.index, kept, scores, routed_tokens(statistics), channels)

    def all(self, layers: Sequence[LayerStatistics], mtp: LayerStatistics | None = None) -> Selection:
        """The selection in all layers, and in the MTP layer if that has statistics.

        Raises SettingsError, with layer and numbers, if no selection is possible.
        """
        protected = super_experts(layers, self.weights) if self.settings.protect_super_experts else {}
        counts = self.per_layer
        if counts is None:
            scores = [score_layer(layer, self.settings, self.weights) for layer in layers]
            shielded = [protected.get(layer.index, ()) for layer in layers]
            divided = layer_counts(self.settings, self.spec, len(layers), self.total, scores, shielded)
            counts = {layer.index: count for layer, count in zip(layers, divided, strict=True)}
        selected = (self.layer(layer, counts[layer.index], protected.get(layer.index, ())) for layer in layers)
        further = self.layer(mtp, counts[layers[-1].index]) if mtp is not None else None
        return Selection(tuple(selected), self.settings, protected, further)


def listed_selection(
    kept: Mapping[int, tuple[int, ...]], scores: Scores | None, settings: SelectionSettings
) -> Selection:
    """The user's own selection, with the experts' scores (by `settings`) if there are any."""
    if scores is None:
        return Selection(tuple(LayerSelection(index, experts) for index, experts in sorted(kept.items())))
    weights = mix_weights(settings.mix, scores.sources, scores.source_tokens)
    layers = (
        LayerSelection(layer.index, kept[layer.index], score_layer(layer, settings, weights), routed_tokens(layer))
        for layer in scores.layers
    )
    return Selection(tuple(layers))


def score_layer(layer: LayerStatistics, settings: SelectionSettings, weights: Sequence[float]) -> tuple[float, ...]:
    """The scores (E,) of the experts of one layer, with the sources weighted by `weights` (S,)."""
    statistics = MixedStatistics(layer.index, layer.mixed(weights), settings.seed or 0)
    return tuple(float(score) for score in score_experts(settings.method, statistics))


def routed_tokens(layer: LayerStatistics) -> tuple[int, ...]:
    """Tokens of all sources that were routed to each expert (E,)."""
    return tuple(int(count) for count in layer.values[list(FIELDS).index("tokens")].sum(axis=0))


def keep_highest(
    scores: Sequence[float], keep: int, spec: ExpertSpec, protected: Sequence[int] = ()
) -> tuple[int, ...]:
    """The numbers of the `keep` experts with the highest scores (E,), ascending; equally many in each of the groups.

    They are the first of `ranked`. Raises SettingsError if more are protected than may stay.
    """
    needed = room_for(protected, spec)
    if needed > keep:
        raise SettingsError(
            f"{len(protected)} super experts are protected, {sorted(protected)}, but the layer keeps only {keep} of "
            f"{spec.count} experts{f' in {spec.groups} equal groups' if spec.groups > 1 else ''}. Keep at least "
            f"{needed}, or omit --protect-super-experts."
        )
    each = keep // spec.groups
    return tuple(sorted(expert for members in ranked(scores, spec, protected) for expert in members[:each]))


def keep_channels(
    statistics: LayerStatistics, weights: Sequence[float], kept: Sequence[int], width: int
) -> ChannelMask:
    """The `width` channels with the highest energy of each expert in `kept`; of equal ones the first.

    Raises ScoresError for statistics without the energies of channels.
    """
    if statistics.channels is None:
        raise ScoresError(NO_CHANNELS)
    energies = statistics.mixed_channels(weights)
    best = np.argsort(-energies[list(kept)], axis=1, kind="stable")[:, :width]
    return ChannelMask.of(best, energies.shape[1])


def super_experts(layers: Sequence[LayerStatistics], weights: Sequence[float]) -> dict[int, tuple[int, ...]]:
    """The super experts by layer, ascending; layers without any are omitted. `weights` (S,): one per source.

    They are the few experts with such high output peaks that the model breaks down without them: the peak is above the
    99.5th percentile of the peaks of all experts and above a tenth of the largest, and the expert is in the
    first three quarters of the layers that have experts (Su et al., 2025, arXiv:2507.23279). The percentile is
    interpolated linearly. Sources with weight 0 are ignored.
    """
    peaks = {layer.index: layer.mixed(weights)["peaks"] for layer in layers}
    everywhere = np.concatenate(list(peaks.values()))
    threshold = max(float(np.percentile(everywhere, PERCENTILE)), LEAST_SHARE * float(everywhere.max()))
    first = list(peaks.items())[: int(FIRST_LAYERS * len(layers))]
    found = {index: tuple(np.flatnonzero(values > threshold).tolist()) for index, values in first}
    return {index: experts for index, experts in found.items() if experts}


def layer_counts(
    settings: SelectionSettings,
    spec: ExpertSpec,
    layers: int,
    total: int,
    scores: Sequence[Sequence[float]] = (),
    protected: Sequence[Sequence[int]] = (),
) -> tuple[int, ...]:
    """How many experts each of `layers` layers keeps by a schedule that has a name; their sum is `total`.

    `scores` (layers, E) are for schedules that need them. `protected` are experts per layer for which a layer keeps
    enough; not with a uniform schedule, which promises equal counts. Raises SettingsError, with the numbers, if this is
    impossible.
    """
    schedule = SCHEDULES[settings.schedule]
    shared = least_per_layer(spec, settings.floor)
    protected = protected or [()] * layers
    least = [shared if schedule.is_uniform else max(shared, room_for(experts, spec)) for experts in protected]
    fewest, every = sum(least), spec.count * layers
    if not fewest <= total <= every:
        why = f"--floor is {settings.floor}" if settings.floor else f"the router picks {spec.top_k} per token"
        raise SettingsError(
            f"{total:,} experts cannot be divided among {layers} layers of {spec.count} experts: {fewest:,} must stay "
            f"({why}), and there are {every:,}. Keep between {fewest:,} and {every:,} in all."
        )
    if total % spec.groups:
        below = total // spec.groups * spec.groups
        raise SettingsError(
            f"{total:,} experts cannot be divided among {layers} layers: the router chooses among {spec.groups} groups "
            f"of experts, which must stay equal in size. Keep {below:,} or {below + spec.groups:,} in all."
        )
    spread = DEFAULT_SPREAD if settings.spread is None else settings.spread
    return tuple(schedule.divide(Division(spec, total, least, spread, scores, protected)))


def stated_counts(settings: SelectionSettings, spec: ExpertSpec, layers: Sequence[int]) -> dict[int, int] | None:
    """How many experts stay by layer where the schedule is a file that lists them; None for the others."""
    if not settings.has_schedule_file:
        return None
    counts = read_schedule_file(Path(settings.schedule), spec, len(layers), settings.floor)
    return dict(zip(layers, counts, strict=True))


def planned_counts(
    settings: SelectionSettings, spec: ExpertSpec, layers: Sequence[int], total: int
) -> dict[int, int] | None:
    """How many experts stay by layer, of `total` in all; None if the scores of all layers decide that.

    Raises SettingsError if the schedule, which has a name, cannot be met.
    """
    # If scores decide, at least raise for what fails even with equal scores and nothing protected.
    equal_scores = [[0.0] * spec.count] * len(layers) if settings.needs_all_layers else ()
    counts = layer_counts(settings, spec, len(layers), total, equal_scores)
    return None if settings.needs_all_layers else dict(zip(layers, counts, strict=True))
