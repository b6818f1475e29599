"""`streamprune eval`: streamed figures equal those of the whole models in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.evaluation.evaluate import evaluate, read_data
from streamprune.evaluation.settings import EvalSettings
from streamprune.progress import Progress
from streamprune.streaming import examining
from tests.helpers import known_family, load_whole, prune
from tests.tiny import make_model, tiny_config, write_token_ids

#: Of every kind: biases and scales in the head, soft caps, tied weights, keys and values shared between blocks, latent
#: attention, state spaces, a vision tower, experts in one tensor and in many.
FAMILIES = (
    "qwen3_moe", "phimoe", "gemma4_text", "granitemoe", "cohere2_moe", "gpt_oss", "deepseek_v3", "llama4", "jamba",
    "qwen3_next",
)  # fmt: skip


def measured(model: Path, against: Path | None, *data: Path, **settings: Any) -> dict[str, Any]:
    options = EvalSettings(
        model=str(model), against=str(against) if against else None, data=tuple(map(str, data)), **settings
    )
    with Progress(0, quiet=True) as progress:
        return evaluate(options, read_data(options), progress)


def rows(path: Path) -> list[torch.Tensor]:
    return [torch.tensor([json.loads(line)["input_ids"]]) for line in path.read_text().splitlines()]


@torch.no_grad()
def in_memory(model: Any, original: Any | None, path: Path) -> dict[str, float]:
    """The plain formulas on all logits of both models, in float64."""
    losses, others, divergences, agreed = [], [], [], []
    for ids in rows(path):
        told = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        losses.append(-told.gather(-1, ids[0, 1:, None])[:, 0])
        if original is not None:
            known = original(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            others.append(-known.gather(-1, ids[0, 1:, None])[:, 0])
            divergences.append((known.exp() * (known - told)).sum(-1))
            agreed.append((known.argmax(-1) == told.argmax(-1)).double())
    loss = torch.cat(losses)
    found = {"tokens": len(loss), "loss": float(loss.mean()), "perplexity": float(loss.mean().exp())}
    if original is not None:
        kl = torch.cat(divergences).sort().values
        found |= {
            "original_loss": float(torch.cat(others).mean()),
            "kl": float(kl.mean()),
            "kl_p99": float(kl[-(-99 * len(kl) // 100) - 1]),
            "top1_agreement": float(torch.cat(agreed).mean()),
        }
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_figures_equal_those_of_the_whole_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slices of the vocabulary, several micro-batches, two sources; loss, KL, agreement to 1e-6."""
    monkeypatch.setattr(examining, "_LARGEST_SLICE", 100)
    family = known_family(name)
    original = make_model(tmp_path / "m", tiny_config(family))
    pruned = tmp_path / "out"
    one, two = write_token_ids(tmp_path / "one.jsonl"), write_token_ids(tmp_path / "two.jsonl", 3, 17, seed=5)
    prune(original, pruned, keep=family.keep, calibration=(str(one),))
    result = measured(pruned, original, one, two, dtype="float32", batch_tokens=48)
    before, after = load_whole(original), load_whole(pruned)
    for source, path in zip(result["sources"], (one, two), strict=True):
        for name, value in in_memory(after, before, path).items():
            assert source[name] == pytest.approx(value, abs=1e-6, rel=1e-6), (source["name"], name)
    assert result["all"]["kl"] > 0
