"""The demo from end to end: make a model, prune it in four ways, and measure what each has lost.

All of it is computed on the CPU: the model is tiny, and the figures are then the same with and without a GPU.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from streamprune.demo import report
from streamprune.demo.data import CALIBRATION_SEQUENCES
from streamprune.demo.measure import HeldOut, held_out_text
from streamprune.demo.recipe import write_sequences
from streamprune.demo.result import CODE, MIX, DemoResult, Measured, Variant
from streamprune.demo.train import TrainedModel, torch_threads, trained_model
from streamprune.errors import OutputError
from streamprune.run import run
from streamprune.settings import RunSettings
from streamprune.source.architecture import load_config
from streamprune.source.checkpoint import open_checkpoint

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
    output = folder / OUTPUT_NAME
    with tempfile.TemporaryDirectory(prefix=".variants-", dir=folder) as name:
        scratch = Path(name)
        held_out = held_out_text(trained.folder, trained.held_out, scratch)

        def variant(ratio: float, calibration: str, place: Path, quiet: bool) -> Variant:
            echo(f"Pruning {ratio:.0%} of the experts, calibrated on {report.CALIBRATION_WORDS[calibration]} ...")
            run(_settings(trained.folder, place, ratio, calibrations[calibration]), quiet=quiet)
            return Variant(ratio, calibration, _measure(place, held_out))

        before = _measure(trained.folder, held_out)
        variants = [variant(MAIN_RATIO, MIX, output, quiet=False)]
        for number, (ratio, calibration) in enumerate(OTHER_VARIANTS):
            variants.append(variant(ratio, calibration, scratch / str(number), quiet=True))
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
            write_sequences(paths[name], rows)
    except OSError as error:
        raise OutputError(f"The demo's calibration data cannot be written to {folder}: {error}.") from error
    return paths


def _measure(model: Path, held_out: HeldOut) -> Measured:
    found, checkpoint = held_out.measure(model).damage, open_checkpoint(model)
    return Measured(
        losses=found.losses,
        divergences=found.divergences,
        experts=load_config(model).num_experts,
        parameters=sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()),
        weight_bytes=sum(path.stat().st_size for path in model.glob("*.safetensors")),
    )
