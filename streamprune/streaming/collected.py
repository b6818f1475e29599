"""Tokens that are kept while micro-batches go through a layer, to be used together afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamprune.hardware.device import CPU, free_after_failure, lack_of_memory


class CollectedTokens:
    """Several values (N, C_i) of each of N = `size` tokens, which come one micro-batch after the other.

    They are kept in the order of the micro-batches, whatever their sizes.
    """

    def __init__(self, size: int) -> None:
        self._size, self._filled = size, 0
        self._values: tuple[torch.Tensor, ...] = ()

    def make_room(self, like: Sequence[torch.Tensor], home: torch.device) -> None:
        """Allocate memory for tokens like these, unless that was done: on `home`, or in RAM if it has too little."""
        if not self._values and lack_of_memory(lambda: self._allocate(like, home)) is not None:
            free_after_failure(home)
            self._allocate(like, CPU)

    def add(self, values: Sequence[torch.Tensor]) -> None:
        """Add the tokens of a micro-batch."""
        end = self._filled + len(values[0])
        for mine, new in zip(self._values, values, strict=True):
            mine[self._filled : end].copy_(new)
        self._filled = end

    def take(self) -> tuple[torch.Tensor, ...]:
        """All tokens; nothing if there are none."""
        assert self._filled == self._size
        return self._values

    def _allocate(self, like: Sequence[torch.Tensor], home: torch.device) -> None:
        self._values = tuple(torch.empty((self._size, each.shape[1]), dtype=each.dtype, device=home) for each in like)
