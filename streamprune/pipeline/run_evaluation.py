"""`run --evaluate`: the damage measured on text that was held back, beside the scoring or once all is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, TooMuchLostError
from streamprune.evaluation.evaluate import EvaluationForward, about, mean_errors, of_choice, stream_all
from streamprune.evaluation.metrics import mean_kl, summarize, table
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.pipeline.finish import SelectionResult, save_scores
from streamprune.planning.prepare import PreparedModel
from streamprune.progress import Busy, Progress
from streamprune.streaming.batches import MicroBatches, Stopped
from streamprune.streaming.forward import ORIGINAL, PRUNED
from streamprune.streaming.layer_loader import Weights
from streamprune.streaming.predictions import PredictionReader, SequenceFigures, SlicedHead
from streamprune.streaming.scoring import LayerErrors
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder, resume_command

#: Looks within the model with --stop-if-kl, evenly over its depth. Each costs as much as the output head does.
_LOOKS = 8
#: What is read off within the model overstates the damage: on the demo's model up to 2.6 times what came in the end.
#: Only what is so many times too much ends a run early; what is left of doubt is settled in the end.
_HOPELESS = 4


class RunEvaluation:
    """What `run --evaluate` finds out, kept in the work folder. `result` is all of it, once it is known.

    With `is_beside` it is measured while the blocks are scored, else by `settle`, once all is chosen.

    With --stop-if-kl the predictions are also read off within the model, as if the blocks so far were all: through the
    final norm and the head (the "logit lens": nostalgebraist 2020, and Belrose et al. 2023, arXiv:2303.08112).
    """

    def __init__(
        self,
        settings: RunSettings,
        prepared: PreparedModel,
        held: Calibration,
        work: WorkFolder,
        progress: Progress,
        is_beside: bool,
    ) -> None:
        self.is_beside = is_beside
        self._settings, self._prepared, self._held = settings, prepared, held
        self._work, self._progress = work, progress
        self._blocks = prepared.layout.layer_count
        recorded = work.read_evaluation()
        known = recorded is not None and recorded.get("data", {}).get("fingerprint") == held.fingerprint
        self.result: dict[str, Any] | None = recorded if known else None

    @property
    def is_done(self) -> bool:
        """Whether all of it is known."""
        return self.result is not None

    def forget(self) -> None:
        """Nothing is known any more: blocks are done again."""
        self.result = None
        self._work.forget_evaluation()

    def is_due(self, block: int) -> bool:
        """Whether the predictions are to be looked at behind block `block`, within the model."""
        step = max(1, self._blocks // _LOOKS)
        return self._settings.stop_if_kl is not None and (block + 1) % step == 0 and block + 1 < self._blocks

    def hear(self, block: int, figures: Sequence[SequenceFigures], errors: LayerErrors) -> None:
        """What is predicted before block `block`; with as many as there are, by the model: that is all then.

        Raises TooMuchLostError where, within the model, it is far beyond what the user wants.
        """
        if block == self._blocks:
            self._keep(figures, errors)
            return
        kl, most = mean_kl(figures), self._settings.stop_if_kl
        self._progress.say(f"read off behind block {block}/{self._blocks}: KL divergence {kl:.4f} nats per token")
        if most is not None and kl > _HOPELESS * most:
            raise TooMuchLostError(
                f"Behind block {block} of {self._blocks} the predictions of the pruned model are {kl:.3g} nats per "
                "token from the original's (KL divergence on the text held back), more than "
                f"{_HOPELESS} x --stop-if-kl {most:g}. Keep more experts, try another --method or other calibration "
                "text; or go on all the same with: "
                f"{self._anyway(kl)}"
            )

    def settle(self, decided: SelectionResult, plan: MemoryPlan, device: torch.device, stop: StopRequest) -> None:
        """Make sure that what is lost is known, tell it, and that it is no more than the user wants.

        Raises TooMuchLostError if it is, with the scores left for another choice.
        """
        if self.result is None:
            self._examine_choice(decided, plan, device, stop)
        assert self.result is not None
        self._progress.say("on text that was held back:")
        for line in table(self.result):
            self._progress.say(line)
        kl, most = self.result["all"]["kl"], self._settings.stop_if_kl
        if most is not None and kl > most:
            scores = save_scores(self._settings, decided.scores)
            raise TooMuchLostError(
                f"The predictions of the pruned model are {kl:.3g} nats per token from the original's (KL divergence "
                f"on the text held back), more than --stop-if-kl {most:g}. Choose otherwise with `streamprune prune` "
                f"and --scores {scores}; or go on all the same with: {self._anyway(kl)}"
            )

    def _anyway(self, kl: float) -> str:
        return f"{resume_command(self._work.folder)} --stop-if-kl {2 * kl:.2g}"

    def _examine_choice(
        self, decided: SelectionResult, plan: MemoryPlan, device: torch.device, stop: StopRequest
    ) -> None:
        """Measure what was chosen once all was scored: one more pass over the model, by this process alone."""
        prepared, held = self._prepared, self._held
        kept = decided.selection.kept
        self._progress.say("measuring what was chosen on the text that was held back ...")
        with ExitStack() as stack:
            busy = Busy()
            weights = Weights(prepared, device, busy, plan.ahead)
            stack.callback(weights.close)
            batches = MicroBatches(
                self._settings, held, plan, device, self._progress, self._work.folder, stop, busy, weights.spare
            )
            weights.batches = batches
            stack.callback(batches.close)
            weights.load_surroundings()
            stream = EvaluationForward(
                of_choice(weights, kept, prepared.pruned_layer), batches, device, len(held.sources), True
            )
            head = SlicedHead(weights.loader, weights.stream)
            try:
                stream_all(stream, 2, self._blocks, held, device, self._progress)
                examiner = PredictionReader(weights, {ORIGINAL: head, PRUNED: head}, plan, device, self._progress)
                found = examiner.read_off(self._blocks)
            except Stopped:
                raise InterruptedRunError(
                    "Stopped as asked; all blocks are scored. What was chosen is measured anew when you go on with: "
                    f"{resume_command(self._work.folder)}"
                ) from None
        self._keep(found, stream.errors)

    def _keep(self, figures: Sequence[SequenceFigures], errors: LayerErrors) -> None:
        self.result = {
            # The model is the one that this lies with, whatever it is called.
            **about(None, self._settings.model, self._prepared, self._held, held_back=True, against_source=True),
            **summarize(figures, self._held.sources, mean_errors(errors, self._held)),
        }
        self._work.write_evaluation(self.result)
