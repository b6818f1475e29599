"""How far the pruned model's hidden states are from the original's, by layer and source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from streamprune.distributed.processes import Processes


def _is_error(value: Any) -> bool:
    return type(value) is float and 0 <= value < math.inf


class LayerErrors:
    """Sums over tokens of the pruned states' relative errors (`forward.relative_errors`), by layer and source.

    `by_layer` are those of finished layers, of all ranks.
    """

    def __init__(self, sources: int) -> None:
        self.by_layer: dict[int, list[float]] = {}
        self._sources = sources
        self._partial = torch.zeros(sources, dtype=torch.float64)

    def add(self, source: int, errors: torch.Tensor) -> None:
        """Add a micro-batch's sum to the current layer."""
        self._partial[source] += errors.cpu()

    def end_layer(self, layer: int, processes: Processes) -> None:
        """Add up the sums of all ranks for the current layer, which is finished."""
        processes.add_up(self._partial)
        self.by_layer[layer] = self._partial.tolist()
        self._partial.zero_()

    def saved(self, processes: Processes) -> dict[str, Any]:
        """All sums as JSON, exact to the bit."""
        partial = self._partial.clone()
        processes.add_up(partial)
        return {
            "layers": [[layer, *values] for layer, values in sorted(self.by_layer.items())],
            "partial": partial.tolist(),
        }

    def check(self, saved: Any, layer: int) -> None:
        """Raise ValueError, KeyError or TypeError unless `saved` has errors for every layer before `layer`."""
        rows = [values for number, *values in saved["layers"] if number < layer]
        sound = [number for number, *_ in saved["layers"]] == list(range(len(saved["layers"]))) and len(rows) == layer
        for row in [*rows, saved["partial"]]:
            sound = sound and len(row) == self._sources and all(map(_is_error, row))
        if not sound:
            raise ValueError("its relative errors are not valid")

    def restore(self, saved: Mapping[str, Any], layer: int, first: bool) -> None:
        """Restore what was saved in layer `layer`. Sums that are not added up yet are restored in rank 0 (`first`)."""
        self.by_layer = {row[0]: row[1:] for row in saved["layers"] if row[0] < layer}
        self._partial = torch.tensor(saved["partial"] if first else [0.0] * self._sources, dtype=torch.float64)
