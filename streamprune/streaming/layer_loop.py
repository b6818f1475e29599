"""Work that goes on behind the one who hands it over: a block is written while the next one is scored.

One sitting of a run: take up what earlier ones finished, score and write what is left, save on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch

from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, ResumeError, ScoresError, TooMuchLostError
from streamprune.files.json_text import show
from streamprune.hardware.device import peak_device_bytes
from streamprune.models.expert_layout import Layout
from streamprune.output.writer import OutputWriter
from streamprune.progress import LayerProgress, Progress
from streamprune.saliency.scores import LayerStatistics, check_layer, unpack
from streamprune.selection.select import Selector, routed_tokens
from streamprune.streaming.batches import Stopped
from streamprune.streaming.predictions import SequenceFigures
from streamprune.streaming.scoring import LayerErrors, LayerScorer
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.records import FinishedShard


class BackgroundWriter:
    """A thread that does one piece of work after the other. Use as a context manager: leaving waits for it.

    At most one piece is under way; what it raises is raised by the next call here. Where the block ends with an error
    of its own, that one counts.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:
                with suppress(Exception):
                    self.wait()
        finally:
            self._thread.shutdown()

    def hand(self, work: Callable[[], None]) -> None:
        """Wait for the piece before, and begin this one."""
        self.wait()
        self._under_way = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until all that was handed over is done."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()


@dataclass(frozen=True)
class OutputTarget:
    """Where finished blocks go when they are written while others are still scored."""

    writer: OutputWriter
    selector: Selector

    def kept(self, layer: LayerStatistics | None) -> tuple[int, ...]:
        """The experts of a block that stay."""
        return self.selector.layer(layer).kept if layer is not None else ()


class Examination(Protocol):
    """What is made of the predictions for the text that was held back."""

    is_beside: bool
    """Whether they are made while blocks are scored, and not later."""

    @property
    def is_done(self) -> bool:
        """Whether all of it is known."""

    def forget(self) -> None:
        """Nothing is known any more: blocks are done again."""

    def is_due(self, block: int) -> bool:
        """Whether the predictions are to be looked at behind block `block`, within the model."""

    def hear(self, block: int, figures: Sequence[SequenceFigures], errors: LayerErrors) -> None:
        """What is predicted before block `block`; with as many as there are, by the model.

        Raises TooMuchLostError where it is no use to go on.
        """


class LayerLoop:
    """Goes through all blocks once. `stream` returns the statistics of all that have experts.

    A block is finished when its shards (with an `outlet`) and its record are durable, which they become while the next
    one is scored. Hidden states are saved every so often, when all blocks before are finished: those that were finished
    since then are run again without being scored or written.
    """

    def __init__(
        self,
        settings: RunSettings,
        layout: Layout,
        scorer: LayerScorer,
        source_tokens: Sequence[int],
        outlet: OutputTarget | None,
        work: WorkFolder,
        progress: Progress,
        stop: StopRequest,
        examination: Examination | None = None,
    ) -> None:
        self._settings, self._layout, self._examination = settings, layout, examination
        self._scorer, self._outlet, self._work, self._progress, self._stop = scorer, outlet, work, progress, stop
        self._finished: dict[int, LayerStatistics | None] = {}
        self._source_tokens = source_tokens
        self._saved_at = time.monotonic()
        self._restored = False
        self._behind = BackgroundWriter()

    def stream(self, device: torch.device) -> list[LayerStatistics]:
        """Finish all blocks. Raises InterruptedRunError, with everything saved, when the user asks to stop."""
        self._take_up()
        # Nothing needs the hidden states behind the last block that has experts, unless predictions are to be read off.
        unscored = [block for block in range(self._scorer.last_layer + 1) if block not in self._finished]
        examination = self._examination
        if examination is not None and unscored:
            examination.forget()
        if examination is not None and (examination.is_done or not examination.is_beside):
            examination = None
        blocks = self._layout.layer_count
        until = blocks if examination is not None else unscored[-1] if unscored else 0
        start = self._restore(unscored[0] if unscored else until) if until else 0
        with self._behind:
            self._go_through(range(start, until), device, examination)
            self._behind.wait()
        if self._stop:
            self._leave()
        return [layer for _, layer in sorted(self._finished.items()) if layer is not None]

    def _go_through(self, carried: range, device: torch.device, examination: Examination | None) -> None:
        """Finish what is not, and carry the states through those of the blocks `carried` that are."""
        try:
            for block in range(self._layout.layer_count):
                if block not in self._finished:
                    self._finish(block, device)
                elif block in carried:
                    self._replay(block)
                # A block has taken the restored states: whatever goes wrong from here on has another cause.
                self._restored = self._restored and block < carried.start
                if examination is not None and block >= carried.start and examination.is_due(block):
                    self._read_off(block + 1, examination)
            if examination is not None:
                self._progress.say("reading off what both predict for the text that was held back ...")
                self._read_off(self._layout.layer_count, examination)
        except Stopped:
            self._behind.wait()
            self._save_and_leave()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if not self._restored:
                raise
            # Whole, but of shapes that this model's blocks do not take: somebody else made them.
            raise ResumeError(
                f"The hidden states saved in {self._work.folder} do not go with this model: {show(str(error))}. "
                "Compute them anew: add --from-layer 0, or begin anew with --resume never."
            ) from error

    def _finish(self, block: int, device: torch.device) -> None:
        started = time.monotonic()
        last = self._scorer.last_layer
        layer = self._scorer.score_block(block) if block <= last else None
        # Chosen here, since the device is this thread's.
        kept = self._outlet.kept(layer) if self._outlet else ()
        self._behind.hand(lambda: self._write(block, layer, kept))
        self._finished[block] = layer
        self._progress.end_layer(
            LayerProgress(
                layer=block,
                layers=self._layout.layer_count,
                kept=len(kept) if self._outlet else None,
                experts=self._layout.spec.count if layer else 0,
                fewest_tokens=min(routed_tokens(layer)) if layer else None,
                seconds=time.monotonic() - started,
                peak_bytes=peak_device_bytes(device),
            )
        )
        if block < last:
            self._save_if_due()

    def _replay(self, block: int) -> None:
        layer = self._finished[block]
        self._scorer.replay_layer(block, self._outlet.kept(layer) if self._outlet else ())
        self._scorer.drop_cached_pages(block)
        self._progress.say(f"layer {block}/{self._layout.layer_count - 1}: done before; its tokens are carried on")
        self._save_if_due()

    def _read_off(self, block: int, examination: Examination) -> None:
        try:
            examination.hear(block, self._scorer.read_off(block), self._scorer.errors)
        except TooMuchLostError:
            # Who wants to go on all the same need not compute it again.
            self._behind.wait()
            self._scorer.save(self._work)
            raise

    def _write(self, block: int | None, layer: LayerStatistics | None, kept: tuple[int, ...]) -> None:
        """Write and record a finished block with the experts that stay, as far as they are chosen."""
        shards: list[FinishedShard] = []
        if self._outlet is not None:
            with self._scorer.busy.at("write"):
                shards = self._outlet.writer.write_layer(block, kept)
        if block is not None:
            self._scorer.drop_cached_pages(block)
        self._work.write_layer(block, layer, kept, shards)

    def _take_up(self) -> None:
        """Read which blocks are finished; write again what of their shards is damaged."""
        first = self._settings.from_layer
        if self._work.has_progress():
            self._progress.say("resuming: checking what is done ...")
        for block in (None, *range(self._layout.layer_count)):
            if first is not None and block is not None and block >= first:
                self._work.forget_layer(block)
            if self._stop:
                # Checking tens of GiB takes a while. There is nothing new to save.
                self._leave()
            self._take_up_block(block)
        if self._finished:
            self._progress.say(f"resuming: {len(self._finished)} of {self._layout.layer_count} layers are done")

    def _take_up_block(self, block: int | None) -> None:
        record = self._work.read_layer(block)
        try:
            layer = self._layer(block, record.result) if record is not None else None
        except (KeyError, TypeError, ValueError):
            self._progress.say(f"note: the record of {_name(block)} is of no use; it is done again.")
            self._work.forget_layer(block)
            record = layer = None
        if block is None and self._outlet is None:
            return
        if record is None:
            if block is None:
                self._write(None, None, ())
            return
        if self._outlet is not None and not self._outlet.writer.has_written(block, self._outlet.kept(layer), record):
            self._progress.say(f"note: what was written of {_name(block)} is damaged or missing; it is written again.")
            self._write(block, layer, self._outlet.kept(layer))
        if block is not None:
            self._finished[block] = layer

    def _layer(self, block: int | None, result: dict[str, Any] | None) -> LayerStatistics | None:
        """The recorded statistics of a block. ValueError, KeyError or TypeError for what no scoring here can give."""
        if (result is None) == (block in self._layout.expert_layers):
            raise ValueError("a result where there are no experts, or none where there are some")
        if result is None or block is None:
            return None
        if result["block"] != block:
            raise ValueError("the result of another block")
        return self._statistics(block, result["statistics"])

    def _statistics(self, block: int, text: str) -> LayerStatistics:
        """Recorded statistics, or sums on the way to such. ValueError or TypeError for what no scoring can give."""
        experts = self._layout.spec.count
        layer = LayerStatistics(block, unpack(text, len(self._source_tokens), experts))
        try:
            # Now, and not after hours, when they are written with all others.
            check_layer(layer, self._source_tokens, experts)
        except ScoresError as error:
            raise ValueError(str(error)) from None
        return layer

    def _restore(self, first: int) -> int:
        """Restore the newest states from which block `first` can be reached; returns the block to go on with."""
        for saved in self._work.states.whole():
            try:
                facts = saved.facts
                # Within an unfinished block the sums up to there are needed too.
                fresh = not facts["done"] and not facts["pass"]
                whole = fresh or facts["statistics"] is not None or first not in self._layout.expert_layers
                if facts["statistics"] is not None:
                    self._statistics(facts["block"], facts["statistics"])
                if facts["block"] < first or (facts["block"] == first and whole):
                    block = self._scorer.restore(saved)
                    self._restored = True
                    self._progress.say(f"resuming: hidden states saved in {_name(block)}")
                    return block
            except (OSError, KeyError, TypeError, ValueError) as error:
                self._progress.say(f"note: saved hidden states are of no use ({error}); older ones are taken.")
        return 0

    def _save_if_due(self) -> None:
        # By a clock that never jumps.
        if time.monotonic() - self._saved_at >= self._settings.checkpoint_every:
            # Saved states are of use only from the first block on that is not finished.
            self._behind.wait()
            self._scorer.save(self._work)
            self._saved_at = time.monotonic()
        if self._stop:
            raise Stopped

    def _save_and_leave(self) -> None:
        self._progress.say("stopping: saving the hidden states ...")
        self._scorer.save(self._work)
        self._leave()

    def _leave(self) -> NoReturn:
        raise InterruptedRunError(
            f"Stopped as asked; {len(self._finished)} of {self._layout.layer_count} blocks are done, and all of it is "
            f"saved. Go on with: {resume_command(self._work.folder)}"
        )


def _name(block: int | None) -> str:
    return "weights outside the layers" if block is None else f"layer {block}"
