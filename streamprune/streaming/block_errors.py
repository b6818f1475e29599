"""How far the hidden states of a pruned model are from the original's, block by block, and where that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from streamprune.together.processes import Processes


class BlockErrors:
    """Sums of relative errors over tokens, by block and source; see `pairs.relative_errors`.

    `whole` are those of the blocks that all of it has gone through, of all processes, by block.
    """

    def __init__(self, sources: int) -> None:
        self.whole: dict[int, list[float]] = {}
        self._sources = sources
        self._partial = torch.zeros(sources, dtype=torch.float64)

    def add(self, source: int, errors: torch.Tensor) -> None:
        """Add a micro-batch's sum to the block in work."""
        self._partial[source] += errors.cpu()

    def end_block(self, block: int, processes: Processes) -> None:
        """Add up what all processes have of the block in work, which is finished."""
        processes.add_up(self._partial)
        self.whole[block] = self._partial.tolist()
        self._partial.zero_()

    def saved(self, processes: Processes) -> dict[str, Any]:
        """All of it as JSON, exact to the bit."""
        partial = self._partial.clone()
        processes.add_up(partial)
        return {
            "blocks": [[block, *values] for block, values in sorted(self.whole.items())],
            "partial": partial.tolist(),
        }

    def check(self, saved: Any, block: int) -> None:
        """Raise ValueError, KeyError or TypeError unless `saved` gives them for every block before `block`."""
        rows = [values for number, *values in saved["blocks"] if number < block]
        sound = [number for number, *_ in saved["blocks"]] == list(range(len(saved["blocks"]))) and len(rows) == block
        for row in [*rows, saved["partial"]]:
            sound = sound and len(row) == self._sources and all(type(x) is float and 0 <= x < math.inf for x in row)
        if not sound:
            raise ValueError("errors that no run has")

    def restore(self, saved: Mapping[str, Any], block: int, first: bool) -> None:
        """Go on where they were saved, in block `block`. What is still to be added up counts in the `first` process."""
        self.whole = {row[0]: row[1:] for row in saved["blocks"] if row[0] < block}
        self._partial = torch.tensor(saved["partial"] if first else [0.0] * self._sources, dtype=torch.float64)
