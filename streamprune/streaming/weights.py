"""A model's weights while it is streamed: what is there at a time, and what makes way where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from streamprune.busy import Busy
from streamprune.errors import ResourceError
from streamprune.machine import free_after_failure, is_out_of_memory, release_freed_memory
from streamprune.source.opened import Opened
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.blocks import BlockLoader
from streamprune.streaming.stream import BlockStream

T = TypeVar("T")


class Weights:
    """The blocks of an opened model, one at a time, on `device`; with `ahead` the next one is read meanwhile.

    `batches`, once they are there, have hidden states that may make way for weights. Peak memory: see `BlockLoader`.
    """

    batches: MicroBatches

    def __init__(self, opened: Opened, device: torch.device, busy: Busy, ahead: bool) -> None:
        self._device, self._ahead = device, ahead
        self.loader = BlockLoader(opened.checkpoint, opened.skeleton, opened.targets, opened.dtype, device, busy)
        self.stream = BlockStream(opened.skeleton)

    def close(self) -> None:
        """Free what was read, and end the threads that read."""
        self.loader.close()

    def load_surroundings(self) -> None:
        """Load what lies around the blocks, but no output head of its own."""
        with ExitStack() as stack:
            self.enter(stack, self._surroundings, "the embeddings")

    def spare(self) -> bool:
        """Free what was read ahead, and read ahead no more; False if there was nothing."""
        self._ahead = False
        return self.loader.drop_ahead()

    @contextmanager
    def block(self, index: int, following: int | None) -> Iterator[tuple[ExitStack, nn.Module]]:
        """Block `index`, and a stack for what is entered beside it; `following` is the one to be read meanwhile."""
        with ExitStack() as stack:
            block = self.enter(stack, lambda: self.loader.block(index), f"the weights of block {index}")
            # What was read and joined on the way is free now, and too scattered to be of use for what comes.
            release_freed_memory()
            if following is not None:
                self.read_ahead(following)
            yield stack, block
        release_freed_memory()
        self.batches.watch.between_blocks()

    def read_ahead(self, index: int) -> None:
        """Begin to read a block, where there was room for that so far."""
        self._ahead = self._ahead and self.loader.read_ahead(index)

    def enter(self, stack: ExitStack, load: Callable[[], AbstractContextManager[T]], what: str) -> T:
        """Load weights for as long as `stack` lasts, also where hidden states must first make room for them."""
        while True:
            try:
                return stack.enter_context(load())
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            free_after_failure(self._device)
            if not self.batches.retreat(f"out of memory while loading {what}"):
                raise ResourceError(
                    f"Out of memory on {self._device} while loading {what} ({problem}). Use {self.batches.advice()}."
                    f"{self.batches.watch.holders()}"
                )

    def _surroundings(self) -> AbstractContextManager[None]:
        self.loader.load_surroundings(head=False)
        self.loader.leave_no_pages(None)
        return nullcontext()
