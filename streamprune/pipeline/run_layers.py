"""The layers of a run: load finished ones, score and write the rest, save states on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NoReturn

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, ResumeError, TooMuchLostError
from streamprune.files.json_text import show
from streamprune.formats.base import KeptExperts
from streamprune.hardware.device import peak_device_bytes
from streamprune.output.background import BackgroundWriter
from streamprune.output.tensors import ComputedTensors, origins_of
from streamprune.pipeline.messages import print_refitted, print_rounded
from streamprune.pipeline.output_target import OutputTarget
from streamprune.pipeline.run_evaluation import RunEvaluation
from streamprune.pipeline.run_stages import pruning_stages
from streamprune.planning.prepare import PreparedModel
from streamprune.progress import LayerProgress
from streamprune.saliency.scores import LayerStatistics, read_statistics
from streamprune.selection.select import routed_tokens
from streamprune.streaming.batches import Runtime, Stopped
from streamprune.streaming.forward import ORIGINAL, PRUNED
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.mtp_layer import MtpLayer
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import (
    ForwardStage,
    LayerTask,
    LayerVersion,
    is_held_out,
    is_two_sided,
)
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.layer_records import FinishedShard, StageResults
from streamprune.work.saved_states import SavedStates


class RunLayers:
    """Finishes all layers of a run, scored on the calibration `streamed`.

    If the target knows what stays in every layer, they are not scored again.

    A layer is finished when its record, and with a `target` its shards, are on the disk; they are written while the
    next layer is scored. Hidden states are saved from time to time. Resuming replays the layers that were finished
    after the last save: it runs them, without scoring or writing. Every rank runs this; only rank 0 has `work` and
    writes.
    """

    def __init__(
        self,
        runtime: Runtime,
        prepared: PreparedModel,
        streamed: Calibration,
        target: OutputTarget | None,
        work: WorkFolder | None,
        evaluation: RunEvaluation | None,
    ) -> None:
        assert isinstance(runtime.settings, RunSettings)
        self._scored = {layer.index: layer for layer in target.scored} if target is not None else {}
        self._settings, self._runtime, self._processes = runtime.settings, runtime, runtime.processes
        self._progress, self._stop = runtime.progress, runtime.stop
        self._layout, self._streamed, self._target, self._work = prepared.layout, streamed, target, work
        self._evaluation, self._measures = evaluation, evaluation is not None and evaluation.during_run
        #: The index of the layer for multi-token prediction, if it is scored or written as a further layer.
        self._mtp = prepared.written.layout.mtp_layer
        self._loop = LayerLoop(runtime, self._stages(prepared), streamed)
        self._finished: dict[int, LayerStatistics | None] = {}
        self._saved_at = time.monotonic()
        self._restored = False
        self._writer = BackgroundWriter()

    def _stages(self, prepared: PreparedModel) -> list[ForwardStage]:
        """Score each layer, and also run the pruned layer if any text goes through the pruned model."""
        runtime = self._runtime
        mtp = MtpLayer(prepared) if self._mtp is not None and not self._scored else None
        weights = LayerWeights(prepared, runtime.device, runtime.busy, runtime.plan.ahead, mtp)
        choose = self._target.versions if self._target is not None else None
        pruned_stream = self._target is not None and self._settings.propagate == "pruned"
        errors = self._evaluation.errors if self._evaluation is not None and self._measures else None
        experts, tokens = self._layout.spec.count, self._streamed.tokens_of
        self._width = prepared.recorded_width if self._settings.channels else None
        if self._scored:
            first = ForwardStage(weights, ORIGINAL, is_two_sided)
        else:
            first = ScoreStage(weights, experts, tokens, choose, pruned_stream, self._width)
        return [first, *pruning_stages(runtime, prepared, first, self._target, errors)]

    def stream(self) -> tuple[list[LayerStatistics], dict[str, Any]]:
        """Finish all layers. Returns the statistics of those with experts, and how they were made, as JSON.

        Raises InterruptedRunError, with everything saved, when the user stops the run.
        """
        with self._loop:
            self._stream()
            found = [layer for _, layer in sorted(self._finished.items()) if layer is not None]
            batches = self._loop.batches
            return found, {
                "processes": self._processes.count,
                "calibration_tokens": self._streamed.tokens,
                "batch_tokens": batches.batch_tokens,
                "states": batches.place,
                "shrinks": [asdict(shrink) for shrink in batches.all_shrinks()],
            }

    def _stream(self) -> None:
        self._finished = self._processes.on_first(self._load_finished)
        count, evaluation = self._layout.layer_count, self._evaluation
        # After the last layer with experts nothing is computed, unless predictions are measured, or text is needed
        # there: to round matrices by, or for an importance matrix.
        needs_text = self._settings.needs_text or self._settings.imatrix is not None
        through = self._measures or (self._target is not None and needs_text)
        last = count - 1 if through else self._layout.expert_layers[-1]
        if self._mtp is not None and not self._scored:
            last = self._mtp
        unscored = [layer for layer in range(last + 1) if layer not in self._finished]
        if evaluation is not None and unscored:
            evaluation.forget()
        if evaluation is not None and (evaluation.result is not None or not self._measures):
            evaluation = None
        until = count if evaluation is not None else unscored[-1] if unscored else 0
        start = self._restore(unscored[0] if unscored else until) if until else 0
        # The layers to run: those to score, and those between them and the restored states.
        run = sorted({*range(start, until), *unscored})
        with self._writer:
            self._go_through(run, start, evaluation)
            self._writer.wait()
        if run and self._target is None and self._work is not None:
            # All layers are scored and recorded: the states take up the disk for nothing.
            self._work.states.forget()
        if self._asked_to_stop():
            self._stop_run()

    def _go_through(self, run: list[int], start: int, evaluation: RunEvaluation | None) -> None:
        """Finish all unfinished layers, computing those in `run`, and replay the finished layers in `run`."""
        count = self._layout.layer_count
        following = dict(pairwise(run))
        try:
            for layer in self._layers:
                if layer not in self._finished:
                    self._finish(layer, layer in run, following.get(layer))
                elif layer in run:
                    self._replay(layer, following.get(layer))
                # Once a layer has run on the restored states, they fit the model: later errors have another cause.
                self._restored = self._restored and layer < start
                if evaluation is not None and start <= layer < count and evaluation.is_due(layer):
                    self._read_predictions(layer + 1, evaluation)
            if evaluation is not None:
                self._progress.say("comparing the predictions of both models on the held-out text ...")
                self._read_predictions(count, evaluation)
        except Stopped:
            self._writer.wait()
            self._progress.say("stopping: saving the hidden states ...")
            self._loop.save(self._work)
            self._stop_run()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if not self._restored:
                raise
            # The checksums are right, but the shapes are not those of this model: the states are from something else.
            raise ResumeError(
                f"The hidden states saved in {self._settings.work_folder} do not fit this model: {show(str(error))}. "
                "Recompute them with --from-layer 0, or start over with --resume never."
            ) from error

    @property
    def _layers(self) -> range:
        """The indices of all layers, that of the MTP layer last."""
        return range(self._layout.layer_count + (self._mtp is not None))

    def _finish(self, index: int, runs: bool, following: int | None) -> None:
        started = time.monotonic()
        layer = self._scored.get(index)
        kept = self._target.kept(index, layer) if self._target is not None else KeptExperts()
        task = LayerTask.of(index, LayerVersion(kept), layer)
        if runs:
            self._loop.run_layer(task, following)
        if self._work is not None:
            self._writer.submit(lambda: self._write(task))
        elif self._processes.local_rank == 0:
            # This machine is not rank 0's, where the pages are dropped once the layer is written.
            self._loop.drop_cached_pages(index)
        self._finished[index] = task.statistics
        version = task.versions[PRUNED]
        if index == self._mtp and not runs:
            # It was scored before, or follows the last layer.
            self._progress.say(f"{self._progress.name_of(index)}: its experts are selected already")
            return
        self._progress.end_layer(
            LayerProgress(
                layer=index,
                kept=len(version.kept.experts) if self._target else None,
                experts=self._layout.spec.count if task.statistics else 0,
                fewest_tokens=min(routed_tokens(task.statistics)) if task.statistics else None,
                seconds=time.monotonic() - started,
                peak_bytes=peak_device_bytes(self._runtime.device),
                channels=self._channels_kept(version.kept),
            )
        )
        if version.refit is not None:
            print_refitted(self._progress, index, version.refit)
        if version.rounded is not None:
            print_rounded(self._progress, index, version.rounded)
        if runs and following is not None:
            self._save_if_due()

    def _channels_kept(self, kept: KeptExperts) -> tuple[int, int] | None:
        return (kept.channels.kept_width, kept.channels.width) if kept.channels is not None else None

    def _replay(self, index: int, following: int | None) -> None:
        layer = self._finished[index]
        kept = self._processes.broadcast(self._target.kept(index, layer)) if self._target else KeptExperts()
        computed = self._processes.on_first(lambda: self._read_computed(index))
        self._loop.run_layer(LayerTask.of(index, LayerVersion(kept, computed), layer, replayed=True), following)
        if self._processes.local_rank == 0:
            self._loop.drop_cached_pages(index)
        self._progress.say(f"{self._progress.name_of(index)}: already done, only its hidden states are recomputed")
        self._save_if_due()

    def _read_computed(self, index: int) -> ComputedTensors:
        """The tensors that were computed for a finished layer, as they were written. Rank 0."""
        record = self._work.read_layer(index) if self._work is not None else None
        # (Without a target no pruned layer runs, though one may be written already.)
        if record is None or not record.computed or self._target is None:
            return ComputedTensors()
        assert self._target.writer is not None
        return self._target.writer.read_computed(index, record)

    def _read_predictions(self, layer: int, evaluation: RunEvaluation) -> None:
        try:
            evaluation.on_predictions(layer, self._loop.read_predictions(layer, is_held_out)[PRUNED])
        except TooMuchLostError:
            # Saved so that resuming with another limit does not compute it again.
            self._writer.wait()
            self._loop.save(self._work)
            raise

    def _write(self, task: LayerTask | None) -> None:
        """Write and record a finished layer (None: the non-layer weights) with what stays of its experts."""
        assert self._work is not None
        version = task.versions[PRUNED] if task is not None else LayerVersion()
        layer, statistics = (task.index, task.statistics) if task is not None else (None, None)
        computed, shards = version.computed.written, list[FinishedShard]()
        if self._target is not None and self._target.writer is not None:
            with self._runtime.busy.at("write"):
                shards = self._target.writer.write_layer(layer, version.kept, computed)
        if layer is not None:
            self._loop.drop_cached_pages(layer)
        made = StageResults(
            computed=origins_of(computed),
            refit=version.refit,
            rounded=version.rounded,
            inputs=dict(version.inputs),
        )
        self._work.write_layer(layer, statistics, version.kept, shards, made)

    def _load_finished(self) -> dict[int, LayerStatistics | None]:
        """The statistics of the finished layers; their damaged shards are written again. Rank 0."""
        assert self._work is not None
        first = self._settings.from_layer
        if self._work.has_progress() and not self._scored:
            self._progress.say("resuming: checking the finished layers ...")
        found: dict[int, LayerStatistics | None] = {}
        for layer in (None, *self._layers):
            if first is not None and layer is not None and layer >= first:
                self._forget(layer)
                if self._scored:
                    continue
            if self._stop:
                # Checking tens of GiB takes a while. There is nothing new to save.
                self._finished = found
                self._stop_run()
            self._load_finished_layer(layer, found)
        if found:
            self._progress.say(f"resuming: {len(found)} of {len(self._layers)} layers are done")
        return found

    def _forget(self, index: int) -> None:
        """Let a layer count as unfinished, also for a later resume. (If it is scored already, its scores stay.)"""
        assert self._work is not None
        if not self._scored:
            self._work.forget_layer(index)
        elif (record := self._work.read_layer(index)) is not None and record.shards:
            self._work.write_layer(index, self._scored.get(index), KeptExperts(), [])

    def _load_finished_layer(self, index: int | None, found: dict[int, LayerStatistics | None]) -> None:
        assert self._work is not None
        record = self._work.read_layer(index)
        try:
            layer = self._recorded(index, record.result) if record is not None else None
        except (KeyError, TypeError, ValueError):
            self._progress.say(f"note: the record of {_name(index)} is not valid; the layer is scored again.")
            self._work.forget_layer(index)
            record = layer = None
        if index is None and self._target is None:
            return
        if record is None:
            if index is None:
                self._write(None)
            return
        if self._target is not None and self._target.writer is not None:
            kept = self._target.kept(index, layer) if index is not None else KeptExperts()
            if not self._target.writer.has_written(index, kept, record):
                if self._scored and index is not None:
                    # Not written yet, or damaged. Its record also has the statistics.
                    return
                if record.need_text:
                    self._progress.say(f"note: shards of {_name(index)} are damaged or missing; it is computed again.")
                    self._work.forget_layer(index)
                    return
                self._progress.say(f"note: shards of {_name(index)} are damaged or missing; they are written again.")
                self._write(LayerTask.of(index, LayerVersion(kept), layer) if index is not None else None)
        if index is not None:
            found[index] = layer

    def _is_scored(self, index: int | None) -> bool:
        return index is not None and (index in self._layout.expert_layers or index == self._mtp)

    def _recorded(self, index: int | None, result: dict[str, Any] | None) -> LayerStatistics | None:
        """The recorded statistics of a layer. Raises ValueError, KeyError or TypeError if they are invalid."""
        if self._scored:
            return self._scored.get(index) if index is not None else None
        if (result is None) == self._is_scored(index):
            raise ValueError("statistics of a layer without experts, or none of a layer with experts")
        if result is None or index is None:
            return None
        if result["block"] != index:
            raise ValueError("the result of another layer")
        return read_statistics(result, index, self._streamed.tokens_of, self._layout.spec.count, self._width)

    def _restore(self, first: int) -> int:
        """Restore the newest states from which layer `first` can be reached; returns the layer that they are of."""
        candidates = self._candidates(first)
        while (saved := self._processes.on_first(lambda: next(candidates, None))) is not None:
            try:
                self._loop.restore(saved)
            except (OSError, KeyError, TypeError, ValueError) as error:
                if self._processes.count > 1:
                    # The other ranks have begun to restore these states: it is too late to try older ones.
                    raise ResumeError(
                        f"The saved hidden states cannot be restored: {error}. Check the disk and run again, or "
                        "compute them anew with --from-layer 0."
                    ) from error
                self._refuse(error)
                continue
            self._restored = True
            self._progress.say(f"resuming: hidden states saved in {_name(saved.facts['layer'])}")
            return int(saved.facts["layer"])
        return 0

    def _candidates(self, first: int) -> Iterator[SavedStates]:
        """The saved states, newest first, from which layer `first` can be reached. Rank 0."""
        assert self._work is not None
        for saved in self._work.states.intact():
            facts = saved.facts
            if self._scored and facts.get("stage") == ScoreStage.name:
                # Left from the scoring by a run that was killed right after it.
                continue
            try:
                self._loop.check(saved)
                # States saved within a layer that is to be scored also need the sums up to there.
                complete = self._loop.begins_layer(facts) or facts.get("statistics") is not None
                complete = complete or bool(self._scored)
                complete = complete or not self._is_scored(first)
                if facts["layer"] < first or (facts["layer"] == first and complete):
                    yield saved
            except (OSError, KeyError, TypeError, ValueError) as error:
                self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        self._progress.say(f"note: saved hidden states cannot be used ({error}); older ones are used instead.")

    def _save_if_due(self) -> None:
        # All ranks follow the clock of rank 0, which is monotonic.
        due = time.monotonic() - self._saved_at >= self._settings.checkpoint_every
        if self._processes.broadcast(due):
            # Resuming can only use states up to the first unfinished layer, so the layers before are recorded first.
            self._writer.wait()
            self._loop.save(self._work)
            self._saved_at = time.monotonic()
        if self._asked_to_stop():
            raise Stopped

    def _asked_to_stop(self) -> bool:
        return any(self._processes.collect(bool(self._stop)))

    def _stop_run(self) -> NoReturn:
        raise InterruptedRunError(
            f"Stopped on request. {len(self._finished)} of {len(self._layers)} layers are done; all finished "
            f"work is saved. Resume with: {resume_command(self._settings.work_folder)}"
        )


def both_sweeps(scored: Mapping[str, Any], computed: Mapping[str, Any]) -> dict[str, Any]:
    """How the layers were scored and then computed in a sweep of their own, from what `stream` returned of each.

    The calibration is what was scored on; the sequences that weights are computed from are a part of it.
    """
    return {**scored, "states": computed["states"], "shrinks": [*scored["shrinks"], *computed["shrinks"]]}


def _name(layer: int | None) -> str:
    return "the non-layer weights" if layer is None else f"layer {layer}"
