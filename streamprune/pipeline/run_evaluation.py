"""`run --evaluate`: the damage measured on held-out text, during the scoring or once all experts are selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, TooMuchLostError
from streamprune.evaluation.evaluate import about, mean_errors, measure
from streamprune.evaluation.metrics import mean_kl, summary_of, sums_by_source
from streamprune.evaluation.terminal import text_lines
from streamprune.pipeline.finish import save_scores
from streamprune.planning.prepare import PreparedModel
from streamprune.progress import Busy
from streamprune.saliency.scores import Scores
from streamprune.selection.select import Selection
from streamprune.streaming.batches import Runtime, Stopped, every
from streamprune.streaming.forward import ORIGINAL
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.predictions import SequenceFigures
from streamprune.streaming.stages import ForwardStage, LayerErrors, PrunedForwardStage
from streamprune.work.folder import WorkFolder, resume_command

#: How often predictions are measured within the model with --stop-if-kl, evenly over its depth. Each time costs as much
#: as the output head does.
_LOOKS = 8
#: The KL divergence within the model overstates the damage: on the demo's model up to 2.6 times that of the last layer.
#: Only this many times too much ends a run early; what is in doubt is decided after the last layer.
_HOPELESS = 4


class RunEvaluation:
    """What `run --evaluate` measures, kept in the work folder. `result` is all of it, once it is complete.

    `during_run`: it is measured while the layers are scored, else by `complete`, once all experts are selected. With
    --stop-if-kl predictions are also measured within the model, as if the layers so far were all: through the final
    norm and the head (the "logit lens": nostalgebraist 2020, and Belrose et al. 2023, arXiv:2303.08112). Every rank has
    one and comes to the same result; only rank 0 has `work` and prints.
    """

    def __init__(
        self,
        runtime: Runtime,
        prepared: PreparedModel,
        held_out: Calibration,
        work: WorkFolder | None,
        during_run: bool,
    ) -> None:
        assert isinstance(runtime.settings, RunSettings)
        self.during_run = during_run
        self.errors = LayerErrors(len(held_out.sources))
        self._settings, self._runtime, self._prepared, self._held_out = runtime.settings, runtime, prepared, held_out
        self._work, self._progress, self._processes = work, runtime.progress, runtime.processes
        self._layers = prepared.layout.layer_count
        recorded = self._processes.on_first(lambda: work.read_evaluation() if work is not None else None)
        known = recorded is not None and recorded.get("data", {}).get("fingerprint") == held_out.fingerprint
        self.result: dict[str, Any] | None = recorded if known else None

    def forget(self) -> None:
        """Drop the result: layers are scored again."""
        self.result = None
        if self._work is not None:
            self._work.forget_evaluation()

    def is_due(self, layer: int) -> bool:
        """Whether predictions are to be measured after layer `layer`, before the last one."""
        step = max(1, self._layers // _LOOKS)
        return self._settings.stop_if_kl is not None and (layer + 1) % step == 0 and layer + 1 < self._layers

    def on_predictions(self, layer: int, figures: Sequence[SequenceFigures]) -> None:
        """Take the predictions from the states before layer `layer`; after the last layer they are the result.

        Raises TooMuchLostError where, within the model, the damage is far beyond what the user accepts.
        """
        if layer == self._layers:
            self._keep(figures)
            return
        kl, most = mean_kl(figures), self._settings.stop_if_kl
        place = f"layer {layer - 1}/{self._layers - 1}"
        self._progress.say(f"predictions after {place}: KL divergence {kl:.4f} nats per token")
        if most is not None and kl > _HOPELESS * most:
            advice = "Keep more experts, try another --method or other calibration text"
            raise self._too_much_lost(f"After {place} the", kl, f"{_HOPELESS} x --stop-if-kl {most:g}", advice)

    def complete(self, selection: Selection) -> None:
        """Measure what was selected, unless the result is complete: one more pass over the model, by all ranks.

        Raises InterruptedRunError when the user asks to stop.
        """
        if self.result is not None:
            return
        prepared, held_out = self._prepared, self._held_out
        runtime = replace(self._runtime, busy=Busy())
        weights = LayerWeights(prepared, runtime.device, runtime.busy, runtime.plan.ahead)
        self._progress.say("measuring the pruned model on the held-out text ...")
        stages = [
            ForwardStage(weights, ORIGINAL),
            PrunedForwardStage(weights, prepared.pruned_layer, False, every, self.errors),
        ]
        try:
            figures = measure(runtime, stages, held_out, self.errors, selection.kept)
        except Stopped:
            raise InterruptedRunError(
                "Stopped as asked; all layers are scored. The pruned model is measured anew when you resume with: "
                f"{resume_command(self._settings.work_folder)}"
            ) from None
        self._keep(figures)

    def judge(self, scores: Scores) -> None:
        """Print the result. Raises TooMuchLostError if it is beyond --stop-if-kl, with the scores saved. Rank 0."""
        assert self.result is not None
        self._progress.say("on held-out text:")
        for line in text_lines(self.result):
            self._progress.say(line)
        kl, most = self.result["all"]["kl"], self._settings.stop_if_kl
        if most is not None and kl > most:
            path = save_scores(self._settings, scores)
            advice = f"Select otherwise with `streamprune prune` and --scores {path}"
            raise self._too_much_lost("The", kl, f"--stop-if-kl {most:g}", advice)

    def _keep(self, figures: Sequence[SequenceFigures]) -> None:
        sources = self._held_out.sources
        self.result = {
            # No name: the model is the one in whose folder the result is kept.
            **about(None, self._settings.model, self._prepared, self._held_out, held_back=True, against_source=True),
            **summary_of(sums_by_source(figures, sources), sources, mean_errors(self.errors, self._held_out)),
        }
        if self._work is not None:
            self._work.write_evaluation(self.result)

    def _too_much_lost(self, subject: str, kl: float, limit: str, advice: str) -> TooMuchLostError:
        return TooMuchLostError(
            f"{subject} predictions of the pruned model are {kl:.3g} nats per token from the original's (KL divergence "
            f"on the held-out text), more than {limit}. {advice}; or accept it with: "
            f"{resume_command(self._settings.work_folder)} --stop-if-kl {2 * kl:.2g}"
        )
