"""Measures what a pruned model lost: on held-out text by domain, against what the unpruned model predicts there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from streamprune.demo.result import Damage
from streamprune.errors import CheckpointError


def load_whole(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model as any user of transformers loads it. Raises CheckpointError unless every weight finds its place.

    Models with different numbers of experts per block come with the code that loads them: `trust_remote_code`.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise CheckpointError(f"transformers loads {folder} with problems: {problems}. Please report this.")
    return model.eval()


@dataclass(frozen=True)
class Yardstick:
    """Held-out token ids by domain, int64 (N, L), and what the unpruned model predicts at each position that has a
    next token: log-probabilities (N, L - 1, V)."""

    held_out: Mapping[str, torch.Tensor] = field(repr=False)
    reference: Mapping[str, torch.Tensor] = field(repr=False)

    @torch.inference_mode()
    def measure(self, model: Any) -> Damage:
        """Mean next-token loss and mean KL(unpruned ‖ model) by domain, in nats per token."""
        losses, divergences = {}, {}
        for name, ids in self.held_out.items():
            predicted = _log_probabilities(model, ids)
            losses[name] = -float(predicted.gather(-1, ids[:, 1:, None]).double().mean())
            known = self.reference[name]
            divergences[name] = float((known.exp() * (known - predicted)).sum(-1).double().mean())
        return Damage(losses, divergences)


@torch.inference_mode()
def yardstick(model: Any, held_out: Mapping[str, torch.Tensor]) -> Yardstick:
    """What `model`, which is not pruned, predicts on the held-out text."""
    return Yardstick(held_out, {name: _log_probabilities(model, ids) for name, ids in held_out.items()})


def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)  # type: ignore[no-any-return]
