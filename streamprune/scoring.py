"""Carrying the calibration tokens through the blocks, and scoring the blocks that have experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from streamprune.allocation import keep_highest
from streamprune.blocks import BlockLoader
from streamprune.calibration import Calibration
from streamprune.errors import NonFiniteError, ResourceError, UnsupportedModelError
from streamprune.machine import release_freed_memory
from streamprune.prepare import Prepared
from streamprune.progress import Progress
from streamprune.saliency import ExpertsTap, ExpertStatistics, tap_experts
from streamprune.settings import RunSettings
from streamprune.states import HiddenStates, non_finite_tokens
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

    Peak memory: a block's weights (see `BlockLoader`), the embeddings, the hidden states of all calibration tokens, and
    one micro-batch's workspace.
    """

    def __init__(
        self,
        settings: RunSettings,
        prepared: Prepared,
        calibration: Calibration,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._settings, self._prepared, self._device, self._progress = settings, prepared, device, progress
        skeleton = prepared.skeleton
        self._loader = BlockLoader(prepared.checkpoint, skeleton, prepared.targets, prepared.dtype, device)
        self._taps = tap_experts({i: skeleton.blocks[i].get_submodule(path) for i, path in skeleton.experts.items()})
        self._stream = BlockStream(skeleton)
        self._batches = calibration.micro_batches(settings.batch_tokens_on(device.type))
        self._states = HiddenStates(len(self._batches))
        self._loader.load_surroundings(head=False)

    def score_block(self, index: int) -> LayerResult | None:
        """Run block `index` on all micro-batches; its scores and kept experts, or None if it has no experts."""
        tap = self._taps.get(index)
        passes = 2 if tap is not None and self._settings.propagate == "pruned" else 1
        self._progress.start_block(index, passes * len(self._batches))
        with self._loader.block(index) as block:
            layer = None
            if tap is not None:
                layer = self._score(index, block, tap, store=passes == 1)
            else:
                self._pass(index, block, store=True)
            if layer is not None and passes == 2:
                twin = self._prepared.pruned.get_submodule(f"{self._prepared.skeleton.blocks_path}.{index}")
                with self._loader.pruned_block(index, block, twin, layer.kept) as pruned:
                    self._pass(index, pruned, store=True)
        release_freed_memory()
        return layer

    def _score(self, index: int, block: nn.Module, tap: ExpertsTap, store: bool) -> LayerResult:
        tap.statistics = ExpertStatistics(self._prepared.plan.spec.count, self._device)
        try:
            self._pass(index, block, store)
            return self._decide(index, tap.statistics)
        finally:
            tap.statistics = None

    def _pass(self, index: int, block: nn.Module, store: bool) -> None:
        for number, batch in enumerate(self._batches):
            try:
                state = self._states.load(number, self._device)
                state = self._stream.run_block(index, block, batch.to(self._device), state)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise ResourceError(
                    f"Out of memory on {self._device} in block {index}, with {batch.shape[0]} sequences of "
                    f"{batch.shape[1]} tokens at a time. Use a smaller --batch-tokens or --seq-len, or --device cpu."
                ) from error
            self._check_finite(index, number, batch, state)
            if store:
                self._states.store(number, state)
            self._progress.step()

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
