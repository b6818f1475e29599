"""How far the hidden states of a pruned model are from the original's, block by block, and where that is kept.

Carrying the calibration tokens through the blocks, and scoring the blocks that have experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from streamprune.calibration.sequences import Calibration, MicroBatch
from streamprune.config import RunSettings
from streamprune.distributed.processes import ALONE, Processes
from streamprune.errors import UnsupportedModelError
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.planning.prepare import PreparedModel
from streamprune.progress import Busy, Progress
from streamprune.saliency.hooks import ExpertsTap, tap_experts
from streamprune.saliency.scores import FIELDS, MAXIMA_PLACES, LayerStatistics
from streamprune.saliency.statistics import ExpertStatistics
from streamprune.selection.select import Selector
from streamprune.streaming.batches import MicroBatches, Shrink
from streamprune.streaming.forward import ORIGINAL, PRUNED, relative_errors, side_of, with_side
from streamprune.streaming.layer_loader import Weights
from streamprune.streaming.predictions import PredictionReader, SequenceFigures, SlicedHead
from streamprune.streaming.saved import Point, Saved, point_of
from streamprune.streaming.states import non_finite_tokens
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder
from streamprune.work.saved_states import BatchState


class LayerErrors:
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

    def end_layer(self, block: int, processes: Processes) -> None:
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


class LayerScorer:
    """Scores a prepared model's blocks one after the other, each exactly once, from the first or from saved states.

    Peak memory: a block's weights (see `LayerLoader`), those of the next one where the plan has room for them, the
    embeddings, one micro-batch's workspace, and the hidden states of all calibration tokens where the plan puts them
    (on disk: in `folder`). Use as a context manager: entering loads the embeddings, leaving frees the hidden states.
    Of several `processes` each has one, with a share of the micro-batches; the statistics of a block are those of all.
    """

    def __init__(
        self,
        settings: RunSettings,
        prepared: PreparedModel,
        calibration: Calibration,
        plan: MemoryPlan,
        device: torch.device,
        progress: Progress,
        folder: Path,
        selector: Selector | None = None,
        stop: StopRequest | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._prepared, self._device, self._progress = prepared, device, progress
        self.sources = len(calibration.sources)
        self._selector = selector
        # Whether what goes on to the next block is the output of the pruned one.
        self._goes_on_pruned = selector is not None and settings.propagate == "pruned"
        self._held = calibration.held
        skeleton = prepared.skeleton
        self.busy = Busy()
        self._weights = Weights(prepared, device, self.busy, plan.ahead)
        self._taps = tap_experts({i: skeleton.blocks[i].get_submodule(path) for i, path in skeleton.experts.items()})
        self._stream, self._processes = self._weights.stream, processes
        self._batches = self._weights.batches = MicroBatches(
            settings, calibration, plan, device, progress, folder, stop, self.busy, self._weights.spare, processes
        )
        self._point, self._plan = Point(0), plan
        #: How far the states of what was held back are from the original's, behind each block.
        self.errors = LayerErrors(self.sources)
        self._heads: dict[str, SlicedHead] = {}
        if self._held is not None:
            head = SlicedHead(self._weights.loader, self._stream)
            self._heads = {PRUNED: head, ORIGINAL: head}

    def __enter__(self) -> LayerScorer:
        with ExitStack() as stack:
            stack.callback(self._close)
            self._weights.load_surroundings()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._weights.close()
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

    @property
    def last_layer(self) -> int:
        """The last block that anything has to go through."""
        return self._prepared.layout.expert_layers[-1] if self._held is None else self._prepared.layout.layer_count - 1

    def score_block(self, index: int) -> LayerStatistics | None:
        """Run block `index` on all micro-batches; the statistics of its experts, or None if it has none.

        Goes on within the block where it was saved there. Raises Stopped between two micro-batches.
        """
        tap = self._taps.get(index)
        point = self._start(index)
        with self._loaded(index) as (stack, block):
            layer = self._score(block, tap) if tap is not None else None
            if tap is None and point.passing == 0:
                self._pass(block)
            selector = self._selector if self._prunes(index) else None
            kept = selector.layer(layer).kept if layer is not None and selector is not None else ()
            self._pruned_pass(stack, index, block, kept)
        self._point = Point(index + 1)
        return layer

    def replay_layer(self, index: int, kept: Sequence[int]) -> None:
        """Carry the hidden states through a block whose experts `kept` are known, without scoring it again."""
        point = self._start(index)
        point.total = None
        with self._loaded(index) as (stack, block):
            if point.passing == 0:
                self._pass(block)
            self._pruned_pass(stack, index, block, kept)
        self._point = Point(index + 1)

    def read_off(self, block: int) -> list[SequenceFigures]:
        """What is predicted, before block `block` or behind the last one, for the text that was held back.

        Of all processes, by sequence in the order of one alone. Raises Stopped; then it begins anew.
        """
        self._point = Point(block)
        examiner = PredictionReader(self._weights, self._heads, self._plan, self._device, self._progress, _is_held)
        found = [each for part in self._processes.collect(examiner.read_off(block)) for each in part]
        return sorted(found, key=lambda each: each.order)

    def drop_cached_pages(self, index: int) -> None:
        """Put out of the system's cache what reading block `index` brought into it: nobody needs it any more."""
        self._weights.loader.drop_cached_pages(index)

    def save(self, work: WorkFolder | None) -> None:
        """Save the hidden states, and how far the block in work is.

        Raises NonFiniteError where they are of no use: nobody would look at them again.
        """
        point, total = self._point, copy.deepcopy(self._point.total)
        point.check_finite(self._prepared.dtype)
        if total is not None and not point.passing:
            self._processes.add_up(total.values, MAXIMA_PLACES)
        statistics = total.packed() if total is not None else None
        facts: dict[str, Any] = {"block": point.block, "pass": point.passing, "statistics": statistics}
        if self._held is not None:
            facts["errors"] = self.errors.saved(self._processes)
        self._batches.save(work, point.done, facts)

    def restore(self, saved: Saved) -> int:
        """Go on where states were saved; returns the block.

        Raises ValueError, KeyError or TypeError for facts that are not of this run.
        """
        facts, point = saved.facts, self.check(saved)
        # Sums that are still to be added up count in one process; once they are complete, in each.
        if facts["statistics"] is not None and (self._processes.is_first or point.passing):
            point.total = self._no_statistics(self.sources)
            point.total.unpack(facts["statistics"])
        if self._held is not None:
            self.errors.restore(facts["errors"], point.block, self._processes.is_first)
        self._batches.restore(saved)
        point.done = self._batches.own(point.done)
        self._point = point
        return point.block

    def check(self, saved: Saved) -> Point:
        """How far saved states are. Raises ValueError, KeyError or TypeError for facts that are not of this run."""
        point = point_of(saved)
        self._batches.check(saved.facts["sizes"])
        if self._held is not None:
            self.errors.check(saved.facts["errors"], point.block)
        return point

    def _start(self, index: int) -> Point:
        if self._point.block != index:
            self._point = Point(index)
        passes = [self._takes_part(index, passing) for passing in (0, 1)]
        self._progress.start_layer(index, sum(map(self._batches.sequences_among, passes)))
        return self._point

    def _prunes(self, index: int) -> bool:
        """Whether anything goes through a block as it will be."""
        return self._held is not None or (self._goes_on_pruned and index in self._taps)

    def _takes_part(self, index: int, passing: int) -> Callable[[MicroBatch], bool]:
        """Which micro-batches go through a block as it is (0), or as it will be (1)."""
        if passing == 0:
            return lambda batch: True
        return lambda batch: batch.held or (self._goes_on_pruned and index in self._taps)

    def _loaded(self, index: int) -> AbstractContextManager[tuple[ExitStack, nn.Module]]:
        return self._weights.block(index, index + 1 if index < self.last_layer else None)

    def _enter_pruned(self, stack: ExitStack, index: int, block: nn.Module, kept: Sequence[int]) -> nn.Module:
        twin = self._prepared.pruned_layer(index, len(kept))
        return self._weights.enter(
            stack,
            lambda: self._weights.loader.pruned_layer(index, block, twin, kept),
            f"a copy of block {index} with the experts that stay",
        )

    def _score(self, block: nn.Module, tap: ExpertsTap) -> LayerStatistics:
        point = self._point
        if point.total is None:
            point.total = self._no_statistics(self.sources)
        if point.passing == 0:
            with tap.listening(block):
                self._pass(block, tap)
            self._processes.add_up(point.total.values, MAXIMA_PLACES)
        layer = point.total.of_layer(point.block)
        if not layer.values[list(FIELDS).index("tokens")].any():
            raise UnsupportedModelError(
                f"Block {point.block} has experts, but its forward bypassed them, so they cannot be scored. "
                "Please report this model."
            )
        return layer

    def _pruned_pass(self, stack: ExitStack, index: int, block: nn.Module, kept: Sequence[int]) -> None:
        """Send what goes through a block as it will be through it."""
        if not self._prunes(index):
            return
        point = self._point
        if point.passing == 0:
            point.passing, point.done = 1, 0
        self._pass(self._enter_pruned(stack, index, block, kept) if index in self._taps else block)
        if self._held is not None:
            self.errors.end_layer(index, self._processes)

    def _no_statistics(self, sources: int = 1) -> ExpertStatistics:
        return ExpertStatistics(self._prepared.layout.spec.count, self._device, sources)

    def _pass(self, block: nn.Module, tap: ExpertsTap | None = None) -> None:
        """Send the micro-batches that are left through a block; what `tap` hears is added to the point's total."""
        point = self._point
        stays = point.passing == 0 and self._goes_on_pruned and point.block in self._taps
        side = ORIGINAL if point.passing == 0 else PRUNED
        errors: torch.Tensor | None = None

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState | None:
            nonlocal errors
            if tap is not None:
                # Collected apart for every attempt: one that runs out of memory later must not be counted.
                tap.statistics = None if batch.held else self._no_statistics()
            # (Or the card would have to come to an end of its work first.)
            ids = batch.ids.to(self._device, non_blocking=True)
            before = side_of(state, side) if batch.held else state
            after = self._stream.run_layer(point.block, block, ids, before)
            point.unchecked.append((number, ids.numel(), non_finite_tokens(after)))
            if self._device.type == "cpu":
                point.check_finite(self._prepared.dtype)
            if not batch.held:
                return None if stays else after
            both = with_side(state, side, after)
            errors = relative_errors(both, ids.numel()).sum() if side == PRUNED else None
            return both

        def commit(done: int, batch: MicroBatch) -> None:
            if tap is not None and tap.statistics is not None and point.total is not None:
                point.total.merge(tap.statistics, batch.source)
            if errors is not None and batch.held:
                self.errors.add(batch.source, errors)
            point.done = done

        # Where nobody listens, and nothing of it would be kept, the others do not.
        takes_part = _is_held if stays and tap is None else self._takes_part(point.block, point.passing)
        self._batches.run(point.block, compute, commit, point.done, takes_part)
        # Only now, where there is a card: to look at a number is to wait until it is computed.
        point.check_finite(self._prepared.dtype)
        self.busy.settle()


def _is_held(batch: MicroBatch) -> bool:
    return batch.held
