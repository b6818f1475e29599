"""`run --evaluate`: what pruning cost, measured on held-out text during the scoring or after the selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, TooMuchLostError
from streamprune.evaluation.evaluate import about, mean_errors, measure
from streamprune.evaluation.metrics import mean_kl, summary_of, sums_by_source
from streamprune.evaluation.terminal import text_lines
from streamprune.pipeline.finish import save_scores
from streamprune.planning.prepare import PreparedModel
from streamprune.progress import Busy, Progress
from streamprune.saliency.scores import Scores
from streamprune.selection.select import Selection
from streamprune.streaming.batches import Runtime, Stopped, every
from streamprune.streaming.forward import ORIGINAL
from streamprune.streaming.layer_errors import LayerErrors
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.predictions import SequenceFigures
from streamprune.streaming.stages import ForwardStage, PrunedForwardStage
from streamprune.streaming.written_tensors import written_tensors
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.records import RecordedRefusal

#: How often predictions are measured within the model with --stop-if-kl, evenly over its depth. Each measurement costs
#: as much as the output head.
_MEASUREMENTS = 8
#: The KL divergence within the model overstates that of the last layer: up to 2.6 times on the demo's model. So only a
#: multiple of the limit ends a run early; otherwise the limit is checked after the last layer.
_ABORT_FACTOR = 4


def was_held_back(held_out: Calibration, given: Scores | None, progress: Progress) -> bool:
    """Whether the experts were scored without the held-out text; prints a warning if they may have been scored on it.

    `given` are the scores of --scores; None if the run scores without that text.
    """
    if given is None:
        return True
    stated = (given.provenance["calibration"] or {}).get("held_back") or {}
    if stated.get("fingerprint") == held_out.fingerprint:
        return True
    progress.say(
        "warning: the experts may have been scored on the text that is held out here, since the scores of --scores do "
        "not state that it was held out of them: the pruned model may look better on it than it is. To measure "
        "elsewhere, use `streamprune eval --data` with other text."
    )
    return False


def refuse_again(settings: RunSettings, work: WorkFolder) -> None:
    """Raise TooMuchLostError if --stop-if-kl has refused the run in a work folder, and still does. Rank 0.

    So the same command says so at once. (--from-layer scores layers again.)
    """
    refused, most = work.read_refusal(), settings.stop_if_kl
    if refused is None or most is None or settings.from_layer is not None or refused.kl <= refused.factor * most:
        return
    raise _too_much_lost(refused, most, work.folder, "It was refused before, and nothing that decides it has changed. ")


def _too_much_lost(refused: RecordedRefusal, most: float, work_folder: Path, before: str = "") -> TooMuchLostError:
    limit = f"--stop-if-kl {most:g}" if refused.factor == 1 else f"{refused.factor} x --stop-if-kl {most:g}"
    return TooMuchLostError(
        f"{before}{refused.subject} divergence of the pruned model from the original is {refused.kl:.3g} nats per "
        f"token on the held-out text, above {limit}. {refused.advice}; or accept it with: "
        f"{resume_command(work_folder)} --stop-if-kl {2 * refused.kl:.2g}"
    )


class RunEvaluation:
    """The measurements of `run --evaluate`, stored in the work folder. `result` is None until they are complete.

    With `during_run` they are made while the layers are scored, else by `complete`, after the selection. With
    --stop-if-kl predictions are also measured within the model, as if it ended after the current layer: through the
    final norm and the head (the "logit lens": nostalgebraist 2020, and Belrose et al. 2023, arXiv:2303.08112).
    `held_back` says whether the experts were scored without the held-out text. Every rank has one and gets the same
    result; only rank 0 has `work` and prints.
    """

    def __init__(
        self,
        runtime: Runtime,
        prepared: PreparedModel,
        held_out: Calibration,
        work: WorkFolder | None,
        during_run: bool,
        held_back: bool = True,
    ) -> None:
        assert isinstance(runtime.settings, RunSettings)
        self.during_run, self._held_back = during_run, held_back
        #: Once all layers are scored, in rank 0: what another selection can be made from.
        self.scores: Scores | None = None
        self.errors = LayerErrors(len(held_out.sources))
        self._settings, self._runtime, self._prepared, self._held_out = runtime.settings, runtime, prepared, held_out
        self._work, self._progress, self._processes = work, runtime.progress, runtime.processes
        self._layers = prepared.layout.layer_count
        recorded = self._processes.on_first(lambda: work.read_evaluation() if work is not None else None)
        same_text = recorded is not None and recorded.get("data", {}).get("fingerprint") == held_out.fingerprint
        self.result: dict[str, Any] | None = recorded if same_text else None

    def forget(self) -> None:
        """Drop the result, because layers are scored again."""
        self.result = None
        if self._work is not None:
            self._work.forget_evaluation()

    def is_due(self, layer: int) -> bool:
        """Whether predictions are to be measured after layer `layer`, which is not the last one."""
        step = max(1, self._layers // _MEASUREMENTS)
        return self._settings.stop_if_kl is not None and (layer + 1) % step == 0 and layer + 1 < self._layers

    def on_predictions(self, layer: int, figures: Sequence[SequenceFigures]) -> None:
        """Process the predictions from the states that enter `layer`; after the last layer they are the result.

        Raises TooMuchLostError if, within the model, the KL divergence is far above --stop-if-kl.
        """
        if layer == self._layers:
            self._keep(figures)
            return
        kl, most = mean_kl(figures), self._settings.stop_if_kl
        place = f"layer {layer - 1}/{self._layers - 1}"
        self._progress.say(f"predictions after {place}: KL divergence {kl:.4f} nats per token")
        if most is not None and kl > _ABORT_FACTOR * most:
            advice = self._advice() or "Keep more experts, try another --method or other calibration text"
            self._refuse(RecordedRefusal(f"After {place} the KL", kl, _ABORT_FACTOR, advice))

    def complete(self, prepared: PreparedModel, selection: Selection) -> None:
        """Measure the pruned model in one more pass over all layers, by all ranks, unless the result is complete.

        `prepared` has the numbers of experts that were selected. What is rounded, is rounded to nearest.

        Raises InterruptedRunError when the user stops the run.
        """
        if self.result is not None:
            return
        held_out, settings = self._held_out, self._settings
        runtime = replace(self._runtime, busy=Busy())
        written = written_tensors(prepared, runtime.device) if settings.is_quantizing else None
        weights = LayerWeights(prepared, runtime.device, runtime.busy, runtime.plan.ahead)
        self._progress.say("measuring the pruned model on the held-out text ...")
        stages = [
            ForwardStage(weights, ORIGINAL),
            PrunedForwardStage(weights, prepared.pruned_layer, False, every, self.errors, written),
        ]
        try:
            figures = measure(runtime, stages, held_out, self.errors, selection.stays)
        except Stopped:
            raise InterruptedRunError(
                "Stopped on request. All layers are scored. Only the evaluation is repeated when you resume with: "
                f"{resume_command(self._settings.work_folder)}"
            ) from None
        self._keep(figures)

    def judge(self) -> None:
        """Print the result. If it is above --stop-if-kl, saves the scores and raises TooMuchLostError. Rank 0."""
        assert self.result is not None
        self._progress.say("on held-out text:")
        for line in text_lines(self.result):
            self._progress.say(line)
        kl, most = self.result["all"]["kl"], self._settings.stop_if_kl
        if most is not None and kl > most:
            self._refuse(RecordedRefusal("The KL", kl, 1, self._advice()))

    def _advice(self) -> str:
        """How to select anew without scoring again, from the scores, which are saved; empty if there are none yet."""
        if self.scores is None:
            return ""
        path = self._settings.scores or save_scores(self._settings, self.scores)
        command = "run" if self._settings.sends_text else "prune"
        if self._settings.refit:
            command += " --refit"
        return f"Change the selection with `streamprune {command} --scores {path}`"

    def _keep(self, figures: Sequence[SequenceFigures]) -> None:
        sources = self._held_out.sources
        self.result = {
            # model=None: the result is stored in the model's own folder.
            **about(None, self._settings.model, self._prepared, self._held_out, self._held_back, against_source=True),
            **summary_of(sums_by_source(figures, sources), sources, mean_errors(self.errors, self._held_out)),
        }
        if self._work is not None:
            self._work.write_evaluation(self.result)

    def _refuse(self, refused: RecordedRefusal) -> NoReturn:
        """Raise TooMuchLostError, recorded by the first rank, so that the same command says it again."""
        most = self._settings.stop_if_kl
        assert most is not None
        if self._work is not None:
            self._work.write_refusal(refused)
        raise _too_much_lost(refused, most, self._settings.work_folder)
