"""The demo: prune a small trained model in four ways, and show what each has lost on held-out text.

All of it is computed on the CPU: the model is tiny, and the figures are then the same with and without a GPU.
"""

from __future__ import annotations

import math
import shlex
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch

from streamprune.calibration.sequences import Calibration
from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import EvalSettings, RunSettings
from streamprune.demo.data import CALIBRATION_SEQUENCES, VOCAB_SIZE, write_recipe
from streamprune.demo.train import DemoModel, Echo, torch_threads
from streamprune.evaluation.evaluate import Evaluation, examine, read_data
from streamprune.hardware.memory import format_bytes
from streamprune.models.config import load_config
from streamprune.pipeline.run import run
from streamprune.progress import Progress

#: The two calibrations: all domains, and code alone (which is also that domain's name).
MIX, CODE = "mix", "code"
#: What is pruned: the share of experts removed, and the calibration. The first result is kept.
VARIANTS = ((0.5, MIX), (0.25, MIX), (0.75, MIX), (0.5, CODE))
OUTPUT_NAME = "pruned"
WIDTH = 100


@dataclass(frozen=True)
class Damage:
    """One model on the held-out text: mean next-token loss, and mean KL(unpruned ‖ model), by domain, in nats."""

    losses: Mapping[str, float]
    divergences: Mapping[str, float]

    @property
    def mean_loss(self) -> float:
        """Over the domains, nats per token."""
        return fmean(self.losses.values())

    @property
    def mean_divergence(self) -> float:
        """Over the domains, nats per token."""
        return fmean(self.divergences.values())


@dataclass(frozen=True)
class Measured(Damage):
    """The same with the model's sizes; `experts` is per layer."""

    experts: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured. `variants` are by share removed and calibration (MIX or CODE).

    `model` and `output` are the folders of the unpruned model and of the one with half its experts; `calibration` is
    the recipe of the mix.
    """

    model: Path
    output: Path
    calibration: Path
    before: Measured
    variants: Mapping[tuple[float, str], Measured]

    @property
    def damages(self) -> dict[float, float]:
        """Mean KL in nats per token by share removed, ascending, calibrated on the mix."""
        return {ratio: each.mean_divergence for (ratio, name), each in sorted(self.variants.items()) if name == MIX}

    @property
    def damage_is_graded(self) -> bool:
        """Whether removing more always did more damage."""
        return all(less < more for less, more in pairwise(self.damages.values()))


def run_demo(folder: Path, model: DemoModel, threads: int | None = None, echo: Echo = print) -> DemoResult:
    """Prune the model in four ways, measure each, and print the figures with `echo`.

    The model with half its experts is kept in `folder`/pruned and replaces an earlier one; the others are deleted once
    measured. Raises StreampruneError: see `pipeline.run.run`.
    """
    with torch_threads(threads):
        result = _prune_and_measure(folder, model, echo)
    for line in _lines(result):
        echo(line)
    return result


def read_held_out(original: Path, domains: Mapping[str, torch.Tensor], folder: Path) -> Calibration:
    """The token ids (N, L) of each domain as text for `measure`; they are written to `folder` as a recipe."""
    recipe = write_recipe(folder, "held-out", domains)
    return read_data(EvalSettings(model=str(original), data=(str(recipe),), device="cpu"))


def measure(model: Path, original: Path, text: Calibration, trust_remote_code: bool = False) -> Evaluation:
    """Compare a model with the unpruned one as `streamprune eval --against` does. Raises StreampruneError.

    Models with different numbers of experts per layer come with Python code: `trust_remote_code`.
    """
    settings = EvalSettings(model=str(model), against=str(original), trust_remote_code=trust_remote_code, device="cpu")
    with Progress(0, quiet=True) as progress:
        return examine(settings, text, progress)


def figures_by_domain(evaluation: Evaluation, name: str) -> dict[str, float]:
    """One of an evaluation's figures, such as `loss` or `kl`, by domain."""
    return {each["name"]: each[name] for each in evaluation.result["sources"]}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (header, *rows)
    ]


def _prune_and_measure(folder: Path, model: DemoModel, echo: Echo) -> DemoResult:
    share = CALIBRATION_SEQUENCES // len(model.calibration)
    texts = {
        MIX: {name: rows[:share] for name, rows in model.calibration.items()},
        CODE: {CODE: model.calibration[CODE]},
    }
    recipes = {name: write_recipe(folder / "calibration", name, domains) for name, domains in texts.items()}
    variants = {}
    with tempfile.TemporaryDirectory(prefix=".variants-", dir=folder) as name:
        held_out = read_held_out(model.folder, model.held_out, Path(name))
        before = _measured(model.folder, model.folder, held_out)
        for number, (ratio, calibration) in enumerate(VARIANTS):
            text = "code alone" if calibration == CODE else "a mix of all domains"
            echo(f"Pruning {ratio:.0%} of the experts, calibrated on {text} ...")
            output = Path(name) / str(number) if number else folder / OUTPUT_NAME
            settings = RunSettings(
                model=str(model.folder), output=output, ratio=ratio, calibration=(str(recipes[calibration]),),
                device="cpu", overwrite=True,
            )  # fmt: skip
            run(settings, quiet=number > 0)
            variants[ratio, calibration] = _measured(output, model.folder, held_out)
    return DemoResult(model.folder, folder / OUTPUT_NAME, recipes[MIX], before, variants)


def _measured(model: Path, original: Path, held_out: Calibration) -> Measured:
    evaluation, checkpoint = measure(model, original, held_out), open_checkpoint(model)
    return Measured(
        losses=figures_by_domain(evaluation, "loss"),
        divergences=figures_by_domain(evaluation, "kl"),
        experts=load_config(model).num_experts,
        parameters=sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()),
        weight_bytes=sum(path.stat().st_size for path in model.glob("*.safetensors")),
    )


def _lines(result: DemoResult) -> list[str]:
    """What the demo prints at its end."""
    variants = sorted(result.variants.items(), key=lambda item: (item[0][1] != MIX, item[0][0]))
    removed = [(f"{ratio:.0%} removed, {name}", measured) for (ratio, name), measured in variants]
    models = [("before", result.before), *removed]
    header = ["model", *result.before.losses, "mean"]
    losses = [[name, *_row(each.losses, each.mean_loss)] for name, each in models]
    damages = [[name, *_row(each.divergences, each.mean_divergence)] for name, each in removed]
    sizes = [[name, str(m.experts), f"{m.parameters:,}", format_bytes(m.weight_bytes)] for name, m in models]
    command = ["streamprune", "run", str(result.model), "--ratio", "0.5"]
    command += ["--calibration", str(result.calibration), "-o", "OUTPUT"]
    return [
        "",
        f"Held-out loss in nats per token, lower is better (knowing nothing: {math.log(VOCAB_SIZE):.2f})",
        *table(header, losses),
        "",
        "Damage: KL divergence from the unpruned model's predictions, in nats per token",
        *table(header, damages),
        "",
        "Sizes",
        *table(["model", "experts per layer", "parameters", "weights"], sizes),
        "",
        f"The unpruned model:          {result.model}",
        f"The model with half of it:   {result.output}",
        "The same from the command line:",
        f"  {shlex.join(command)}",
        "",
        *textwrap.wrap(" ".join(_findings(result)), WIDTH),
    ]


def _row(values: Mapping[str, float], mean: float) -> list[str]:
    return [f"{value:.3f}" for value in (*values.values(), mean)]


def _findings(result: DemoResult) -> list[str]:
    before, half = result.before, result.variants[0.5, MIX]
    removed = ", ".join(f"{ratio:.0%}" for ratio in result.damages)
    nats = ", ".join(f"{damage:.3f}" for damage in result.damages.values())
    graded = (
        "the more was removed, the more was lost"
        if result.damage_is_graded
        else "the damage did not grow with the share, as it does once a model is trained for long enough (--steps)"
    )
    return [
        f"What was seen: with {half.experts} of {before.experts} experts per layer, the weights take "
        f"{half.weight_bytes / before.weight_bytes:.0%} of the space, and the mean held-out loss went from "
        f"{before.mean_loss:.2f} to {half.mean_loss:.2f}.",
        f"Removing {removed} of the experts changed the predictions by {nats} nats per token: {graded}.",
        _calibration_matters(half.divergences, result.variants[0.5, CODE].divergences),
        "How much a large model loses is another matter: this one is tiny, and was trained for minutes.",
    ]


def _calibration_matters(mix: Mapping[str, float], code: Mapping[str, float]) -> str:
    others = [name for name in mix if name != CODE]
    with_mix, with_code = (fmean(damage[name] for name in others) for damage in (mix, code))
    factors = ", ".join(f"{code[name] / mix[name]:.1f} on {name}" for name in mix)
    verdict = (
        "experts that the calibration text does not use are the ones that go, so calibrate on what you will ask for"
        if with_code > with_mix
        else "it did not hurt the other domains more here, as it does once a model is trained for long enough (--steps)"
    )
    return (
        f"Calibrated on code alone instead of the mix, the half-size model was damaged this many times as much: "
        f"{factors}; {with_code / with_mix:.1f} on all but code ({with_code:.3f} against {with_mix:.3f}): {verdict}."
    )
