"""Carrying the calibration tokens through the blocks, and scoring the blocks that have experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from streamprune.allocation import keep_highest
from streamprune.batches import MicroBatches, Shrink
from streamprune.blocks import BlockLoader
from streamprune.calibration import Calibration
from streamprune.errors import NonFiniteError, ResourceError, UnsupportedModelError
from streamprune.machine import free_after_failure, is_out_of_memory, release_freed_memory
from streamprune.memory import MemoryPlan
from streamprune.prepare import Prepared
from streamprune.progress import Progress
from streamprune.saliency import ExpertsTap, ExpertStatistics, tap_experts
from streamprune.settings import RunSettings
from streamprune.states import non_finite_tokens
from streamprune.stream import BatchState, BlockStream


@dataclass(frozen=True)
class LayerResult:
    """The scores of one MoE block: `scores` and `counts` over all source experts, `kept` the numbers that stay."""

    index: int
    kept: tuple[int, ...]
    scores: tuple[float, ...]
    counts: tuple[int, ...]


class BlockScorer:
    """Scores a prepared model's blocks one after the other, from the first, each exactly once.

    Peak memory: a block's weights (see `BlockLoader`), the embeddings, one micro-batch's workspace, and the hidden
    states of all calibration tokens where the plan puts them (on disk: in `folder`). Use as a context manager: entering
    loads the embeddings, leaving frees the hidden states.
    """

    def __init__(
        self,
        settings: RunSettings,
        prepared: Prepared,
        calibration: Calibration,
        plan: MemoryPlan,
        device: torch.device,
        progress: Progress,
        folder: Path,
    ) -> None:
        self._settings, self._prepared, self._device, self._progress = settings, prepared, device, progress
        skeleton = prepared.skeleton
        self._loader = BlockLoader(prepared.checkpoint, skeleton, prepared.targets, prepared.dtype, device)
        self._taps = tap_experts({i: skeleton.blocks[i].get_submodule(path) for i, path in skeleton.experts.items()})
        self._stream = BlockStream(skeleton)
        self._batches = MicroBatches(settings, calibration, plan, device, progress, folder)

    def __enter__(self) -> BlockScorer:
        try:
            with ExitStack() as stack:
                self._enter(stack, self._surroundings, "the embeddings")
        except BaseException:
            self._batches.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()

    @property
    def batch_tokens(self) -> int:
        """Tokens per micro-batch at most, by now."""
        return self._batches.batch_tokens

    @property
    def shrinks(self) -> list[Shrink]:
        """Every time that memory ran short and the micro-batches shrank."""
        return self._batches.shrinks

    @property
    def states_place(self) -> str:
        """Where the hidden states lie by now: "device", "ram" or "disk"."""
        return self._batches.place

    def score_block(self, index: int) -> LayerResult | None:
        """Run block `index` on all micro-batches; its scores and kept experts, or None if it has no experts."""
        tap = self._taps.get(index)
        passes = 2 if tap is not None and self._settings.propagate == "pruned" else 1
        self._progress.start_block(index, passes * self._batches.sequences)
        with ExitStack() as stack:
            block = self._enter(stack, lambda: self._loader.block(index), f"the weights of block {index}")
            if tap is None:
                self._pass(index, block, store=True)
                layer = None
            else:
                layer = self._score(index, block, tap, store=passes == 1)
                if passes == 2:
                    self._pass(index, self._enter_pruned(stack, index, block, layer), store=True)
        release_freed_memory()
        self._batches.watch.between_blocks()
        return layer

    def _enter_pruned(self, stack: ExitStack, index: int, block: nn.Module, layer: LayerResult) -> nn.Module:
        twin = self._prepared.pruned.get_submodule(f"{self._prepared.skeleton.blocks_path}.{index}")
        return self._enter(
            stack,
            lambda: self._loader.pruned_block(index, block, twin, layer.kept),
            f"a copy of block {index} with the experts that stay",
        )

    def _score(self, index: int, block: nn.Module, tap: ExpertsTap, store: bool) -> LayerResult:
        total = ExpertStatistics(self._prepared.plan.spec.count, self._device)
        try:
            self._pass(index, block, store, tap, total)
        finally:
            tap.statistics = None
        return self._decide(index, total)

    def _pass(
        self,
        index: int,
        block: nn.Module,
        store: bool,
        tap: ExpertsTap | None = None,
        total: ExpertStatistics | None = None,
    ) -> None:
        """Send all micro-batches through a block; what `tap` hears of those that succeed is added to `total`."""

        def compute(number: int, ids: torch.Tensor, state: BatchState) -> BatchState:
            if tap is not None:
                # Collected apart for every attempt: one that runs out of memory later must not be counted.
                tap.statistics = ExpertStatistics(self._prepared.plan.spec.count, self._device)
            state = self._stream.run_block(index, block, ids, state)
            self._check_finite(index, number, ids, state)
            return state

        def commit() -> None:
            if tap is not None and tap.statistics is not None and total is not None:
                total.merge(tap.statistics)

        self._batches.run(index, compute, commit, store)

    def _decide(self, index: int, statistics: ExpertStatistics) -> LayerResult:
        counts = tuple(int(count) for count in statistics.counts.cpu())
        if not any(counts):
            raise UnsupportedModelError(
                f"Block {index} has experts, but its forward bypassed them, so they cannot be scored. "
                "Please report this model."
            )
        scores = tuple(float(score) for score in statistics.reap())
        plan = self._prepared.plan
        return LayerResult(index, keep_highest(scores, plan.keep, plan.spec.groups), scores, counts)

    def _check_finite(self, index: int, number: int, batch: torch.Tensor, state: BatchState) -> None:
        bad = non_finite_tokens(state)
        if bad:
            raise NonFiniteError(
                f"Block {index}, batch {number}: {bad} of {batch.numel()} tokens have NaN or infinite states, "
                f"so no score could be trusted. Computed in {self._prepared.dtype}; try --dtype float32 or bfloat16, "
                "and check that the model itself works."
            )

    def _surroundings(self) -> AbstractContextManager[nn.Module]:
        self._loader.load_surroundings(head=False)
        return nullcontext(self._prepared.skeleton.model)

    def _enter(self, stack: ExitStack, load: Callable[[], AbstractContextManager[nn.Module]], what: str) -> nn.Module:
        """Load weights for as long as `stack` lasts, also where hidden states must first make room for them."""
        while True:
            try:
                return stack.enter_context(load())
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            free_after_failure(self._device)
            if not self._batches.retreat(f"out of memory while loading {what}"):
                raise ResourceError(
                    f"Out of memory on {self._device} while loading {what} ({problem}). Use {self._batches.advice()}."
                    f"{self._batches.watch.holders()}"
                )
