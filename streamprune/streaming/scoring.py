"""Carrying the calibration tokens through the blocks, and scoring the blocks that have experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from streamprune.busy import Busy
from streamprune.choice.chooser import Chooser
from streamprune.errors import NonFiniteError, ResourceError, UnsupportedModelError
from streamprune.machine import free_after_failure, is_out_of_memory, release_freed_memory
from streamprune.memory.plan import MemoryPlan
from streamprune.prepare import Prepared
from streamprune.progress import Progress
from streamprune.scores.statistics import FIELDS, MAXIMA, LayerStatistics
from streamprune.settings import RunSettings
from streamprune.streaming.batches import MicroBatches, Shrink
from streamprune.streaming.blocks import BlockLoader
from streamprune.streaming.saliency import ExpertsTap, tap_experts
from streamprune.streaming.saved import Point, Saved
from streamprune.streaming.states import non_finite_tokens
from streamprune.streaming.statistics import ExpertStatistics
from streamprune.streaming.stream import BatchState, BlockStream
from streamprune.text.calibration import Calibration, MicroBatch
from streamprune.together.processes import ALONE, Processes
from streamprune.work.folder import WorkFolder
from streamprune.work.journal import is_count
from streamprune.work.stop import StopRequest

#: Where in the statistics those lie that are maxima.
_MAXIMA = tuple(number for number, name in enumerate(FIELDS) if name in MAXIMA)


class BlockScorer:
    """Scores a prepared model's blocks one after the other, each exactly once, from the first or from saved states.

    Peak memory: a block's weights (see `BlockLoader`), those of the next one where the plan has room for them, the
    embeddings, one micro-batch's workspace, and the hidden states of all calibration tokens where the plan puts them
    (on disk: in `folder`). Use as a context manager: entering loads the embeddings, leaving frees the hidden states.
    Of several `processes` each has one, with a share of the micro-batches; the statistics of a block are those of all.
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
        chooser: Chooser | None = None,
        stop: StopRequest | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._prepared, self._device, self._progress = prepared, device, progress
        self.sources = len(calibration.sources)
        # With it, what goes on to the next block is the output of the block pruned as it says.
        self._chooser = chooser if settings.propagate == "pruned" else None
        skeleton = prepared.skeleton
        self.busy = Busy()
        self._loader = BlockLoader(prepared.checkpoint, skeleton, prepared.targets, prepared.dtype, device, self.busy)
        self._ahead = plan.ahead
        self._taps = tap_experts({i: skeleton.blocks[i].get_submodule(path) for i, path in skeleton.experts.items()})
        self._stream, self._processes = BlockStream(skeleton), processes
        self._batches = MicroBatches(
            settings, calibration, plan, device, progress, folder, stop, self.busy, self._spare, processes
        )
        self._point = Point(0)

    def __enter__(self) -> BlockScorer:
        try:
            with ExitStack() as stack:
                self._enter(stack, self._surroundings, "the embeddings")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._loader.close()
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

    def score_block(self, index: int) -> LayerStatistics | None:
        """Run block `index` on all micro-batches; the statistics of its experts, or None if it has none.

        Goes on within the block where it was saved there. Raises Stopped between two micro-batches.
        """
        tap = self._taps.get(index)
        passes = 2 if tap is not None and self._chooser is not None else 1
        point = self._start(index, passes)
        with self._loaded(index) as (stack, block):
            if tap is None:
                self._pass(block, store=True)
                layer = None
            else:
                layer = self._score(block, tap, store=passes == 1)
                if self._chooser is not None:
                    if point.passing == 0:
                        point.passing, point.done = 1, 0
                    kept = self._chooser.layer(layer).kept
                    self._pass(self._enter_pruned(stack, index, block, kept), store=True)
        self._point = Point(index + 1)
        return layer

    def replay_block(self, index: int, kept: Sequence[int]) -> None:
        """Carry the hidden states through a block whose experts `kept` are known, without scoring it again."""
        pruned = index in self._taps and self._chooser is not None
        point = self._start(index, 1)
        point.total = None
        if point.passing == 0 and pruned:
            # Saved within the scoring pass, which leaves the states as they are.
            point.passing, point.done = 1, 0
        with self._loaded(index) as (stack, block):
            self._pass(self._enter_pruned(stack, index, block, kept) if pruned else block, store=True)
        self._point = Point(index + 1)

    def leave_no_pages(self, index: int) -> None:
        """Put out of the system's cache what reading block `index` brought into it: nobody needs it any more."""
        self._loader.leave_no_pages(index)

    def save(self, work: WorkFolder | None) -> None:
        """Save the hidden states, and how far the block in work is.

        Raises NonFiniteError where they are of no use: nobody would look at them again.
        """
        point, total = self._point, copy.deepcopy(self._point.total)
        self._check_finite(point)
        if total is not None and not point.passing:
            self._processes.add_up(total.values, _MAXIMA)
        statistics = total.packed() if total is not None else None
        self._batches.save(work, point.done, {"block": point.block, "pass": point.passing, "statistics": statistics})

    def restore(self, saved: Saved) -> int:
        """Go on where states were saved; returns the block.

        Raises ValueError, KeyError or TypeError for facts that are not of this run.
        """
        facts, point = saved.facts, self.check(saved)
        # Sums that are still to be added up count in one process; once they are complete, in each.
        if facts["statistics"] is not None and (self._processes.is_first or point.passing):
            point.total = self._no_statistics(self.sources)
            point.total.unpack(facts["statistics"])
        self._batches.restore(saved)
        point.done = self._batches.own(point.done)
        self._point = point
        return point.block

    def check(self, saved: Saved) -> Point:
        """How far saved states are. Raises ValueError, KeyError or TypeError for facts that are not of this run."""
        facts = saved.facts
        point = Point(facts["block"], facts["pass"], facts["done"])
        numbers = (point.block, point.passing, point.done, facts["batch_tokens"], *facts["sizes"])
        if not all(map(is_count, numbers)) or point.passing > 1 or not point.done <= len(facts["sizes"]) == len(saved):
            raise ValueError("facts that no run has")
        self._batches.check(facts["sizes"])
        return point

    def _spare(self) -> bool:
        """Free what was read ahead, and read ahead no more."""
        self._ahead = False
        return self._loader.drop_ahead()

    def _start(self, index: int, passes: int) -> Point:
        if self._point.block != index:
            self._point = Point(index)
        self._progress.start_block(index, passes * self._batches.sequences)
        return self._point

    @contextmanager
    def _loaded(self, index: int) -> Iterator[tuple[ExitStack, nn.Module]]:
        with ExitStack() as stack:
            block = self._enter(stack, lambda: self._loader.block(index), f"the weights of block {index}")
            # What was read and joined on the way is free now, and too scattered to be of use for what comes.
            release_freed_memory()
            if self._ahead and index < self._prepared.layout.moe_blocks[-1]:
                self._ahead = self._loader.read_ahead(index + 1)
            yield stack, block
        release_freed_memory()
        self._batches.watch.between_blocks()

    def _enter_pruned(self, stack: ExitStack, index: int, block: nn.Module, kept: Sequence[int]) -> nn.Module:
        twin = self._prepared.pruned_block(index, len(kept))
        return self._enter(
            stack,
            lambda: self._loader.pruned_block(index, block, twin, kept),
            f"a copy of block {index} with the experts that stay",
        )

    def _score(self, block: nn.Module, tap: ExpertsTap, store: bool) -> LayerStatistics:
        point = self._point
        if point.total is None:
            point.total = self._no_statistics(self.sources)
        if point.passing == 0:
            with tap.listening(block):
                self._pass(block, store, tap)
            self._processes.add_up(point.total.values, _MAXIMA)
        layer = point.total.of_layer(point.block)
        if not layer.values[list(FIELDS).index("tokens")].any():
            raise UnsupportedModelError(
                f"Block {point.block} has experts, but its forward bypassed them, so they cannot be scored. "
                "Please report this model."
            )
        return layer

    def _no_statistics(self, sources: int = 1) -> ExpertStatistics:
        return ExpertStatistics(self._prepared.layout.spec.count, self._device, sources)

    def _pass(self, block: nn.Module, store: bool, tap: ExpertsTap | None = None) -> None:
        """Send the micro-batches that are left through a block; what `tap` hears is added to the point's total."""
        point = self._point

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            if tap is not None:
                # Collected apart for every attempt: one that runs out of memory later must not be counted.
                tap.statistics = self._no_statistics()
            # (Or the card would have to come to an end of its work first.)
            ids = batch.ids.to(self._device, non_blocking=True)
            state = self._stream.run_block(point.block, block, ids, state)
            point.unchecked.append((number, ids.numel(), non_finite_tokens(state)))
            if self._device.type == "cpu":
                self._check_finite(point)
            return state

        def commit(done: int, source: int) -> None:
            if tap is not None and tap.statistics is not None and point.total is not None:
                point.total.merge(tap.statistics, source)
            point.done = done

        self._batches.run(point.block, compute, commit, store, point.done)
        # Only now, where there is a card: to look at a number is to wait until it is computed.
        self._check_finite(point)
        self.busy.settle()

    def _check_finite(self, point: Point) -> None:
        unchecked, point.unchecked = point.unchecked, []
        for number, tokens, count in unchecked:
            bad = int(count)
            if bad:
                raise NonFiniteError(
                    f"Block {point.block}, batch {number}: {bad} of {tokens} tokens have NaN or infinite states, so "
                    f"that no score could be trusted. Computed in {self._prepared.dtype}; try --dtype float32 or "
                    "bfloat16, and check that the model itself works."
                )

    def _surroundings(self) -> AbstractContextManager[nn.Module]:
        self._loader.load_surroundings(head=False)
        self._loader.leave_no_pages(None)
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
