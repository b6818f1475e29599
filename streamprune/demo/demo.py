"""The demo from end to end: make a model, prune it in four ways, reload each result and measure what was lost.

All of it is computed on the CPU: the model is tiny, and the figures are then the same with and without a GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from streamprune.demo import report
from streamprune.demo.data import CALIBRATION_SEQUENCES
from streamprune.demo.result import CODE, MIX, DemoResult, Measured, Variant
from streamprune.demo.train import TrainedModel, torch_threads, trained_model
from streamprune.errors import CheckpointError, OutputError
from streamprune.run import run
from streamprune.settings import RunSettings

#: The share of experts that the result on disk has lost.
MAIN_RATIO = 0.5
OTHER_VARIANTS = ((0.25, MIX), (0.75, MIX), (0.5, CODE))
OUTPUT_NAME = "pruned"


def run_demo(
    folder: Path,
    steps: int = 700,
    seed: int = 0,
    threads: int | None = None,
    echo: Callable[[str], None] = print,
) -> DemoResult:
    """Train (or find) the model under `folder`, prune it, and tell the user by `echo` what happened.

    The model with half its experts stays in `folder`/pruned, replacing an earlier one; the other variants are measured
    and removed. Raises StreampruneError: see `trained_model` and `streamprune.run.run`.
    """
    with torch_threads(threads):
        trained = trained_model(folder, steps, seed, threads, echo)
        result = _prune_and_measure(folder, trained, echo)
    for line in report.lines(result):
        echo(line)
    return result


def _prune_and_measure(folder: Path, trained: TrainedModel, echo: Callable[[str], None]) -> DemoResult:
    calibrations = _write_calibrations(folder / "calibration", trained.calibration)
    model = _load(trained.folder)
    reference = _log_probabilities(model, trained.held_out)
    before = _measure(model, trained.folder, trained.held_out, reference)
    output = folder / OUTPUT_NAME

    def variant(ratio: float, calibration: str, place: Path, quiet: bool) -> Variant:
        echo(f"Pruning {ratio:.0%} of the experts, calibrated on {report.CALIBRATION_WORDS[calibration]} ...")
        run(_settings(trained.folder, place, ratio, calibrations[calibration]), quiet=quiet)
        return Variant(ratio, calibration, _measure(_load(place), place, trained.held_out, reference))

    variants = [variant(MAIN_RATIO, MIX, output, quiet=False)]
    with tempfile.TemporaryDirectory(prefix=".variants-", dir=folder) as scratch:
        for number, (ratio, calibration) in enumerate(OTHER_VARIANTS):
            variants.append(variant(ratio, calibration, Path(scratch) / str(number), quiet=True))
    return DemoResult(
        model=trained.folder,
        output=output,
        calibration=calibrations[MIX],
        training_seconds=trained.seconds,
        before=before,
        variants=tuple(sorted(variants, key=lambda item: (item.calibration != MIX, item.ratio))),
    )


def _settings(model: Path, output: Path, ratio: float, calibration: Path) -> RunSettings:
    return RunSettings(
        model=str(model),
        output=output,
        ratio=ratio,
        calibration=(str(calibration),),
        samples=CALIBRATION_SEQUENCES,
        device="cpu",
        overwrite=True,
    )


def _write_calibrations(folder: Path, sequences: Mapping[str, torch.Tensor]) -> dict[str, Path]:
    """Two JSONL files of equally many token sequences: every domain alike, and code alone."""
    share = CALIBRATION_SEQUENCES // len(sequences)
    chosen = {MIX: torch.cat([domain[:share] for domain in sequences.values()]), CODE: sequences[CODE]}
    paths = {name: folder / f"{name}.jsonl" for name in chosen}
    try:
        folder.mkdir(exist_ok=True)
        for name, rows in chosen.items():
            text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist())
            paths[name].write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The demo's calibration data cannot be written to {folder}: {error}.") from error
    return paths


def _load(folder: Path) -> Any:
    """The model as any user of transformers loads it. Raises CheckpointError unless every weight finds its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise CheckpointError(f"transformers loads {folder} with problems: {problems}. Please report this.")
    return model.eval()


@torch.inference_mode()
def _log_probabilities(model: Any, held_out: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model predicts at each position that has a next token: domain -> (N, SEQ_LEN - 1, VOCAB_SIZE)."""
    return {
        name: model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for name, ids in held_out.items()
    }


@torch.inference_mode()
def _measure(
    model: Any, folder: Path, held_out: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> Measured:
    """Loss and Kullback-Leibler divergence per domain, in nats per token, and sizes. `reference`: the unpruned model's
    log-probabilities."""
    losses, divergences = {}, {}
    for name, predicted in _log_probabilities(model, held_out).items():
        losses[name] = -float(predicted.gather(-1, held_out[name][:, 1:, None]).double().mean())
        known = reference[name]
        divergences[name] = float((known.exp() * (known - predicted)).sum(-1).double().mean())
    return Measured(
        losses=losses,
        divergences=divergences,
        experts=model.config.num_experts,
        parameters=model.num_parameters(),
        weight_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )
