"""The layers of a search: each is read once, scored once, and every candidate's version of it is made and measured.

What is on record of a layer are its statistics; the hidden states of all candidates are saved from time to time. A
search that was interrupted goes on from the last saved states, and computes the same numbers again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from streamprune.calibration.sequences import MicroBatch
from streamprune.config import RunSettings, SearchSettings
from streamprune.errors import InterruptedRunError
from streamprune.evaluation.metrics import mean_kl
from streamprune.files.json_text import show
from streamprune.formats.base import KeptExperts
from streamprune.hardware.device import peak_device_bytes
from streamprune.pipeline.run_stages import computing_stages
from streamprune.pipeline.search_text import SearchText
from streamprune.planning.candidates import Candidate
from streamprune.planning.prepare import PreparedModel
from streamprune.progress import LayerProgress
from streamprune.saliency.scores import LayerStatistics, read_statistics
from streamprune.selection.select import Selector, routed_tokens
from streamprune.streaming.batches import Among, Runtime, Stopped
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.mtp_layer import MtpLayer
from streamprune.streaming.predictions import SequenceFigures
from streamprune.streaming.refit_target import RefitTarget
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import ForwardStage, LayerTask, PrunedForwardStage, is_held_out
from streamprune.streaming.written_tensors import written_tensors
from streamprune.work.folder import WorkFolder, resume_command

#: How often predictions are measured within the model to give up candidates, evenly over its depth.
_MEASUREMENTS = 4
#: Below this KL divergence within the model (nats per token) no candidate is given up, however good the best one is.
_HARMLESS = 0.01


@dataclass(frozen=True)
class Side:
    """A candidate, the settings of a run of its own, and the model as it is prepared for that; `nbytes` of weights."""

    candidate: Candidate
    settings: RunSettings
    prepared: PreparedModel
    nbytes: int

    @property
    def name(self) -> str:
        """The name of the candidate, and of its states."""
        return self.candidate.name

    def stages(self, runtime: Runtime, weights: LayerWeights, text: SearchText) -> Iterator[ForwardStage]:
        """What is done with a layer for it."""
        use_of, written = text.use_of(self.candidate), None
        if self.settings.sends_text or self.settings.is_quantizing:
            written = written_tensors(self.prepared, runtime.device)
        if self.settings.sends_text and written is not None:
            yield from computing_stages(runtime, self.settings, self.prepared, weights, written, self.name, use_of)
        among, make_pruned = _measured_or_used(use_of), self.prepared.pruned_layer
        yield PrunedForwardStage(weights, make_pruned, False, among, written=written, side=self.name)


def _measured_or_used(use_of: Callable[[MicroBatch], str]) -> Among:
    return lambda batch: batch.held_out or bool(use_of(batch))


class SearchLayers:
    """Sends the text of a search through all layers, the original ones and those of every candidate.

    `measured` then has the predictions on the held-out text by candidate, and `given_up` says of the others at which
    layer they were given up, with the KL divergence within the model there, and the best one's.
    """

    def __init__(
        self,
        runtime: Runtime,
        prepared: PreparedModel,
        text: SearchText,
        sides: Sequence[Side],
        work: WorkFolder,
    ) -> None:
        assert isinstance(runtime.settings, SearchSettings)
        self._settings, self._runtime, self._work = runtime.settings, runtime, work
        self._progress, self._layout = runtime.progress, prepared.layout
        self._calibration, self._selectors = text.calibration, _selectors(runtime.settings, prepared, text, sides)
        self._width = prepared.recorded_width if self._settings.channels else None
        #: The index of the layer for multi-token prediction, if it is scored as a further layer.
        self._mtp = prepared.written.layout.mtp_layer
        mtp = MtpLayer(prepared) if self._mtp is not None else None
        weights = LayerWeights(prepared, runtime.device, runtime.busy, runtime.plan.ahead, mtp)
        score = ScoreStage(
            weights, self._layout.spec.count, self._calibration.tokens_of, self._versions, False, self._width
        )
        if any(side.candidate.refit for side in sides):
            score.target = RefitTarget(weights)
        stages: list[ForwardStage] = [score]
        for side in sides:
            stages += side.stages(runtime, weights, text)
        self._loop = LayerLoop(runtime, stages, text.calibration)
        self._saved_at = time.monotonic()
        self.scored: dict[int, LayerStatistics] = {}
        self.measured: dict[str, list[SequenceFigures]] = {}
        self.given_up: dict[str, dict[str, Any]] = work.read_search()

    def stream(self) -> dict[str, Any]:
        """Measure all candidates; returns how it was done, as JSON.

        Raises InterruptedRunError, with the states saved, when the user stops the search.
        """
        with self._loop:
            start, begins = self._restore()
            for name in self.given_up:
                self._loop.give_up(name)
            try:
                if begins and self._is_due(start - 1):
                    # The search may have been stopped within this measurement. Made twice it gives up the same ones.
                    self._give_up_hopeless(start - 1)
                self._go_through(start)
            except Stopped:
                self._progress.say("stopping: saving the hidden states ...")
                self._loop.save(self._work)
                self._stop()
            batches = self._loop.batches
            return {
                "calibration_tokens": self._calibration.tokens,
                "batch_tokens": batches.batch_tokens,
                "states": batches.place,
                "shrinks": [asdict(shrink) for shrink in batches.all_shrinks()],
            }

    def _go_through(self, start: int) -> None:
        count = self._layout.layer_count
        for layer in range(start, count):
            self._run(layer)
            if self._is_due(layer):
                self._give_up_hopeless(layer)
            if layer + 1 < count and time.monotonic() - self._saved_at >= self._settings.checkpoint_every:
                self._loop.save(self._work)
                self._saved_at = time.monotonic()
            if self._runtime.stop:
                raise Stopped
        if self._mtp is not None:
            # (Also where it was scored before a search was stopped in what follows: that has the same result.)
            self._run(self._mtp)
        self._progress.say("comparing the predictions of all candidates with the original's on the held-out text ...")
        self.measured = self._loop.read_predictions(count, is_held_out)

    def _run(self, index: int) -> None:
        started, last = time.monotonic(), self._layout.layer_count - 1 if self._mtp is None else self._mtp
        task = LayerTask(index)
        self._loop.run_layer(task, index + 1 if index < last else None)
        self._loop.drop_cached_pages(index)
        if task.statistics is not None:
            self.scored[index] = task.statistics
        self._work.write_layer(index, task.statistics, KeptExperts(), [])
        self._progress.end_layer(
            LayerProgress(
                layer=index,
                kept=None,
                experts=self._layout.spec.count if task.statistics else 0,
                fewest_tokens=min(routed_tokens(task.statistics)) if task.statistics else None,
                seconds=time.monotonic() - started,
                peak_bytes=peak_device_bytes(self._runtime.device),
            )
        )

    def _versions(self, layer: LayerStatistics) -> Mapping[str, KeptExperts]:
        return {
            name: selector.layer(layer).stays
            for name, selector in self._selectors.items()
            if name not in self._loop.given_up
        }

    def _is_due(self, layer: int) -> bool:
        count = self._layout.layer_count
        step = max(1, count // _MEASUREMENTS)
        # (A single candidate has nothing to be compared with.)
        several = len(self._selectors) - len(self.given_up) > 1
        return bool(self._settings.drop_above) and several and (layer + 1) % step == 0 and 0 < layer + 1 < count

    def _give_up_hopeless(self, layer: int) -> None:
        """Give up the candidates whose predictions, as if the model ended here, are far worse than the best ones."""
        found = {name: mean_kl(each) for name, each in self._loop.read_predictions(layer + 1, is_held_out).items()}
        best, factor = min(found.values()), self._settings.drop_above
        place = f"layer {layer}/{self._layout.layer_count - 1}"
        listed = ", ".join(f"{name}: {kl:.4f}" for name, kl in sorted(found.items(), key=lambda item: item[1]))
        self._progress.say(f"KL divergence after {place}, nats per token: {listed}")
        hopeless = {name: kl for name, kl in found.items() if kl > max(factor * best, _HARMLESS)}
        if not hopeless:
            return
        for name, kl in hopeless.items():
            self.given_up[name] = {"layer": layer, "kl": kl, "best_kl": best}
            self._progress.say(
                f"{name} is given up: its KL divergence after {place} is {kl:.3g} nats per token, above "
                f"{factor:g} x the best one's {best:.3g} (--drop-above 0 measures all to the end)"
            )
        # Recorded before states without them are saved.
        self._work.write_search(self.given_up)
        for name in hopeless:
            self._loop.give_up(name)

    def _restore(self) -> tuple[int, bool]:
        """Restore the newest usable states; returns the layer to go on with, and whether nothing of it is done."""
        recorded = self._recorded()
        for saved in self._work.states.intact():
            try:
                self._loop.check(saved)
                layer = int(saved.facts["layer"])
                if not set(saved.facts.get("given_up", ())) <= self.given_up.keys() or layer > len(recorded):
                    raise ValueError("what is on record does not reach them")
                self._loop.restore(saved)
            except (OSError, KeyError, TypeError, ValueError) as error:
                self._progress.say(f"note: saved hidden states cannot be used ({show(str(error))}).")
                continue
            self.scored = {index: each for index, each in enumerate(recorded[:layer]) if each is not None}
            self._progress.say(f"resuming: {layer} layers are done")
            return layer, self._loop.begins_layer(saved.facts)
        if recorded:
            self._progress.say("resuming: no usable hidden states are saved, so all layers are computed again")
        return 0, True

    def _recorded(self) -> list[LayerStatistics | None]:
        """The statistics of the first layers, as far as they are on record."""
        found: list[LayerStatistics | None] = []
        for index in range(self._layout.layer_count):
            record = self._work.read_layer(index)
            has_experts = index in self._layout.expert_layers
            if record is None or (record.result is None) == has_experts:
                break
            try:
                found.append(self._read(index, record.result) if record.result is not None else None)
            except (KeyError, TypeError, ValueError):
                break
        return found

    def _read(self, index: int, result: Mapping[str, Any]) -> LayerStatistics:
        count = self._layout.spec.count
        return read_statistics(result, index, self._calibration.tokens_of, count, self._width)

    def _stop(self) -> NoReturn:
        raise InterruptedRunError(
            f"Stopped on request. {len(self._recorded())} of {self._layout.layer_count} layers are done; all finished "
            f"work is saved. Resume with: {resume_command(self._settings.work_folder)}"
        )


def _selectors(
    settings: SearchSettings, prepared: PreparedModel, text: SearchText, sides: Sequence[Side]
) -> dict[str, Selector]:
    """What selects each candidate's experts and channels, by its name."""
    layout, calibration = prepared.layout, text.calibration
    found = {}
    for side in sides:
        counts = side.candidate.counts(layout.expert_layers, 0)
        found[side.name] = Selector(
            settings.selection, layout.spec, calibration.sources, calibration.tokens_of, counts.total,
            counts.per_layer, side.candidate.width,
        )  # fmt: skip
    return found
