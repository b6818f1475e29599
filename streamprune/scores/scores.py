"""The scores of a model: the statistics of all its experts, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamprune.scores.statistics import LayerStatistics
from streamprune.source.config_facts import ExpertSpec


@dataclass(frozen=True)
class Scores:
    """The statistics of every layer with experts, in ascending order of blocks, and their provenance.

    `sources` names the parts of the calibration text, `source_tokens` says how many tokens each of them had. Provenance
    and layout are JSON; `layout`, which says where the checkpoint holds its experts, is None where nobody recorded it.
    """

    layers: tuple[LayerStatistics, ...]
    sources: tuple[str, ...]
    source_tokens: tuple[int, ...]
    spec: ExpertSpec
    provenance: Mapping[str, Any] = field(repr=False)
    layout: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The numbers of the blocks that have experts."""
        return tuple(layer.block for layer in self.layers)

    @property
    def tokens(self) -> int:
        """Calibration tokens of all sources together."""
        return sum(self.source_tokens)
