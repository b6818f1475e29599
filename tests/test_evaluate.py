"""`streamprune eval`: streamed figures equal those of the whole models in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.config import EvalSettings
from streamprune.evaluation.evaluate import evaluate_text, read_data
from streamprune.planning.memory_needs import sums_per_token
from streamprune.progress import Progress
from streamprune.streaming import predictions as examining
from streamprune.streaming import predictions as vocabulary
from tests.helpers import known_family, load_whole, prune
from tests.peak import Peak
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
        return evaluate_text(options, read_data(options), progress).result


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


def test_memory_is_that_of_a_block_and_a_slice_of_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the vocabulary: but for the embeddings, which are there whole, not a byte of a head's more.

    Logits of all tokens would take 7.5 MiB and 30 MiB for each model, a head 1 MiB and 4 MiB.
    """
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    monkeypatch.setattr(examining, "_LARGEST_SLICE", 512)
    monkeypatch.setattr(vocabulary, "_PORTION", 2**16)
    data = write_token_ids(tmp_path / "ids.jsonl", sequences=20)
    peaks = []
    for size in (4096, 16384):
        config = tiny_config(known_family("qwen3_moe"))
        config.vocab_size = size
        model = make_model(tmp_path / f"m{size}", config)
        prune(model, tmp_path / f"out{size}", keep=5, calibration=(str(data),), samples=4)
        with Peak() as peak:
            measured(tmp_path / f"out{size}", model, data, batch_tokens=120, dtype="float32")
        embeddings = 2 * size * config.hidden_size * 4
        peaks.append(peak.nbytes - embeddings)
    assert peaks[1] < peaks[0] + 4096 * config.hidden_size * 4 / 2
    assert max(peaks) < 4 * 2**20


def test_the_memory_plan_counts_the_sums_over_the_vocabulary() -> None:
    for compared in (1, 3):
        assert vocabulary.sums_width(compared) * 8 == sums_per_token(compared)
