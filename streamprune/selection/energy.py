"""The energy of channels: how much of it a selection of narrower experts keeps, and other widths would. No torch.

The energy of a channel is Σ (g·a)²·‖w‖² over a source's own tokens: what the channel adds to the layer's output (see
`saliency.channels`). Like the saliency of experts it is summed over all layers, so that a layer counts by what it adds.

Shapes: E experts, W channels of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.saliency.scores import LayerStatistics, Scores
from streamprune.selection.retention import Retention, retention_of
from streamprune.selection.select import LayerSelection, Selection, keep_highest


def energy_retentions(scores: Scores, selection: Selection) -> tuple[Retention, ...]:
    """How much of the energy of all channels of all experts stays, by source; empty unless experts become narrower.

    `best` is the most that as many experts with as many channels per layer can keep, if both are selected for this
    source alone.
    """
    return energy_shares(scores, selection) if scores.channel_bytes and selection.is_narrower else ()


def energy_shares(scores: Scores, selection: Selection) -> tuple[Retention, ...]:
    """The same for any selection; the scores have channels."""
    return tuple(_retention(number, scores, selection) for number in range(len(scores.sources)))


def _retention(source: int, scores: Scores, selection: Selection) -> Retention:
    sums = []
    for layer, selected in zip(scores.layers, selection.layers, strict=True):
        assert layer.channels is not None
        energies = layer.channels[source]
        stay = energies_kept(energies, selected)
        lost = energies.shape[1] - selected.channels.kept_width if selected.channels is not None else 0
        best = np.partition(energies, lost, axis=1)[:, lost:].sum(axis=1, dtype=np.float64)
        ideal = keep_highest(best.tolist(), len(selected.kept), scores.spec)
        sums.append((_sum(energies), float(stay.sum()), float(best[list(ideal)].sum())))
    return retention_of(scores.sources[source], scores.layer_indices, sums)


def energies_kept(energies: NDArray[np.floating[Any]], selected: LayerSelection) -> NDArray[np.float64]:
    """The energy (K,) that each of K kept experts keeps, of the energies (E, W) of all channels of a layer."""
    stay = energies[list(selected.kept)]
    if selected.channels is not None:
        stay = np.take_along_axis(stay, selected.channels.indices, axis=1)
    found: NDArray[np.float64] = stay.sum(axis=1, dtype=np.float64)
    return found


def energy_by_width(scores: Scores, weights: Sequence[float], widths: Sequence[int]) -> list[list[float | None]]:
    """For each of `widths` the share of its energy that each source keeps, if every expert stays and becomes so wide.

    The channels are chosen with the sources weighted by `weights` (S,). None for a source without energy.
    """
    kept = np.zeros((len(widths), len(scores.sources)))
    every = np.zeros(len(scores.sources))
    for layer in scores.layers:
        assert layer.channels is not None
        order = np.argsort(-layer.mixed_channels(weights), axis=1, kind="stable")
        for source, energies in enumerate(layer.channels):
            by_rank = np.take_along_axis(energies, order, axis=1)
            every[source] += _sum(energies)
            for number, width in enumerate(widths):
                kept[number, source] += _sum(by_rank[:, :width])
    return [
        [float(part / total) if total > 0 else None for part, total in zip(row, every, strict=True)] for row in kept
    ]


def energy_by_rank(layer: LayerStatistics, weights: Sequence[float]) -> NDArray[np.float64]:
    """The mean over a layer's experts of the energy (W,) of each one's best channel, its second best, and so on."""
    means: NDArray[np.float64] = np.sort(layer.mixed_channels(weights), axis=1)[:, ::-1].mean(axis=0)
    return means


def _sum(energies: NDArray[np.floating[Any]]) -> float:
    return float(energies.sum(dtype=np.float64))
