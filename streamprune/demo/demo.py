"""The demo: prune a small trained model in four ways, and show what each costs on held-out text.

The model comes with the package, as bfloat16 weights, tokenizer, token sequences and a note of how it was made;
`tools/train_demo` makes it. Everything is computed on the CPU: the model is tiny, and the results are the same with and
without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from streamprune.calibration.builtin_text import DOMAINS
from streamprune.calibration.sequences import Calibration
from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import EvalSettings, RunSettings
from streamprune.evaluation.evaluate import Evaluation, evaluate_text, read_data
from streamprune.files.durable import writing
from streamprune.hardware.memory import check_disk, format_bytes
from streamprune.models.open import load_config
from streamprune.pipeline.run import run
from streamprune.progress import Progress
from streamprune.reporting.evaluations import TEXT_NAME, results_folder, without_folders, write_result
from streamprune.tables import Table

SHIPPED = Path(__file__).resolve().parent / "trained"
#: In that folder, and in the folder of any trained model.
MODEL_NAME, SEQUENCES_NAME, RECIPE_NAME = "model", "sequences.npz", "recipe.json"
#: Disk space for the model and four pruned ones, with a reserve.
NEEDED_BYTES = 64 * 1024**2
#: Tokens that one result is calibrated on, as sequences: of all domains in equal parts, or of code alone.
CALIBRATION_SEQUENCES = 256
#: The two calibrations: all domains, and code alone (which is also that domain's name).
MIX, CODE = "mix", "code"
#: What is pruned: the share of experts removed, and the calibration. The first result is kept.
VARIANTS = ((0.5, MIX), (0.25, MIX), (0.75, MIX), (0.5, CODE))

Echo = Callable[[str], None]


@dataclass(frozen=True)
class DemoModel:
    """A trained model on disk. `calibration` and `held_out` map a domain to token ids, int64 (N, L)."""

    folder: Path
    calibration: Mapping[str, torch.Tensor] = field(repr=False)
    held_out: Mapping[str, torch.Tensor] = field(repr=False)


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
        """Whether the KL divergence always grew with the share removed."""
        return all(less < more for less, more in pairwise(self.damages.values()))


def shipped_model(folder: Path, echo: Echo = print) -> DemoModel:
    """Copy the trained model that comes with the package to `folder`, as float32, unless the copy exists.

    The package has bfloat16 weights, with which CPUs without special instructions compute 60 times slower than with
    float32. Raises OutputError, ResourceError if `folder` cannot be written.
    """
    place = folder / f"shipped-{hashlib.sha256((SHIPPED / RECIPE_NAME).read_bytes()).hexdigest()[:12]}"
    if not place.is_dir():
        check_disk(folder, NEEDED_BYTES)
        model = Qwen3MoeForCausalLM.from_pretrained(SHIPPED / MODEL_NAME, dtype=torch.float32)
        with saving(place, model, PreTrainedTokenizerFast.from_pretrained(SHIPPED / MODEL_NAME)) as staging:
            for name in (SEQUENCES_NAME, RECIPE_NAME):
                shutil.copy(SHIPPED / name, staging)
    echo(f"The trained model: {place / MODEL_NAME}")
    return load_model(place)


def load_model(place: Path) -> DemoModel:
    """The model that `saving` saved in a folder, with its sequences."""
    with np.load(place / SEQUENCES_NAME, allow_pickle=False) as arrays:
        parts = {
            part: {name: torch.from_numpy(arrays[f"{part}/{name}"]).long() for name in DOMAINS}
            for part in ("calibration", "held_out")
        }
    return DemoModel(place / MODEL_NAME, **parts)


@contextmanager
def saving(place: Path, model: Any, tokenizer: Any) -> Iterator[Path]:
    """Save a model in a folder, to which the caller adds other files. The folder is renamed to `place` at the end, so
    that `place` is always complete. Raises OutputError, ResourceError.
    """
    with writing(f"Saving the model in {place}", place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=place.parent) as name:
            staging = Path(name) / place.name
            model.save_pretrained(staging / MODEL_NAME)
            tokenizer.save_pretrained(staging / MODEL_NAME)
            yield staging
            if not place.is_dir():  # otherwise another process has made the same model meanwhile
                staging.rename(place)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums are reproducible; the number of threads is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_recipe(folder: Path, name: str, domains: Mapping[str, torch.Tensor]) -> Path:
    """Write each domain's token ids (N, L) and a recipe with every domain as a source; returns the recipe's path.

    Raises OutputError, ResourceError.
    """
    recipe = folder / f"{name}.json"
    length = max(rows.shape[1] for rows in domains.values())
    sources = []
    with writing(f"Writing {recipe}", folder):
        folder.mkdir(exist_ok=True)
        for domain, rows in domains.items():
            path = folder / f"{name}-{domain}.jsonl"
            path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()), encoding="utf-8")
            sources.append({"name": domain, "path": path.name, "samples": len(rows)})
        recipe.write_text(json.dumps({"name": name, "sequence_length": length, "sources": sources}), encoding="utf-8")
    return recipe


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
        return evaluate_text(settings, text, progress)


def figures_by_domain(evaluation: Evaluation, name: str) -> dict[str, float]:
    """One of an evaluation's figures, such as `loss` or `kl`, by domain."""
    return {each["name"]: each[name] for each in evaluation.result["sources"]}


def run_demo(folder: Path, model: DemoModel, echo: Echo = print) -> DemoResult:
    """Prune the model in four ways, measure each, and print the figures with `echo`.

    The model with half its experts is kept in `folder`/pruned and replaces an earlier one; the others are deleted once
    measured. Raises StreampruneError: see `pipeline.run.run`.
    """
    share = CALIBRATION_SEQUENCES // len(model.calibration)
    mix = write_recipe(folder / "calibration", MIX, {name: rows[:share] for name, rows in model.calibration.items()})
    code = write_recipe(folder / "calibration", CODE, {CODE: model.calibration[CODE]})
    kept, variants = folder / "pruned", {}
    with one_thread(), tempfile.TemporaryDirectory(prefix=".variants-", dir=folder) as name:
        held_out = read_held_out(model.folder, model.held_out, Path(name))
        echo("Measuring the unpruned model on held-out text ...")
        before = _measured(model.folder, model.folder, held_out)
        for number, (ratio, text) in enumerate(VARIANTS):
            what, recipe = ("code alone", code) if text == CODE else ("a mix of all domains", mix)
            echo(f"Pruning {ratio:.0%} of the experts, calibrated on {what} ...")
            output = Path(name) / str(number) if number else kept
            settings = RunSettings(
                model=str(model.folder), output=output, ratio=ratio, calibration=(str(recipe),), device="cpu",
                overwrite=True,
            )  # fmt: skip
            run(settings, quiet=number > 0)
            echo("Measuring it on held-out text ...")
            variants[ratio, text] = _measured(output, model.folder, held_out, is_kept=number == 0)
    result = DemoResult(model.folder, kept, mix, before, variants)
    for line in _lines(result):
        echo(line)
    return result


def _measured(model: Path, original: Path, held_out: Calibration, is_kept: bool = False) -> Measured:
    """A model's figures; those of the output that is kept are saved with it, for its report."""
    evaluation, checkpoint, config = measure(model, original, held_out), open_checkpoint(model), load_config(model)
    if is_kept:
        write_result(results_folder(model), TEXT_NAME, without_folders(evaluation.result))
    return Measured(
        losses=figures_by_domain(evaluation, "loss"),
        divergences=figures_by_domain(evaluation, "kl"),
        experts=config.num_experts,
        parameters=sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()),
        weight_bytes=sum(path.stat().st_size for path in model.glob("*.safetensors")),
    )


def _lines(result: DemoResult) -> list[str]:
    """The lines that the demo prints at its end."""
    variants = sorted(result.variants.items(), key=lambda item: (item[0][1] != MIX, item[0][0]))
    removed = [(f"{ratio:.0%} removed, {name}", measured) for (ratio, name), measured in variants]
    models = [("before", result.before), *removed]
    columns = ["model", *result.before.losses, "mean"]

    def row(name: str, values: Mapping[str, float]) -> list[str]:
        return [name, *(f"{value:.3f}" for value in (*values.values(), fmean(values.values())))]

    vocabulary = load_config(result.model).vocab_size
    title = f"Held-out loss in nats per token, lower is better (uniform guess: {math.log(vocabulary):.2f})"
    losses = Table(title, columns, [row(name, each.losses) for name, each in models])
    title = "Damage: KL divergence from the unpruned model's predictions, in nats per token"
    damages = Table(title, columns, [row(name, each.divergences) for name, each in removed])
    rows = [[name, str(each.experts), f"{each.parameters:,}", format_bytes(each.weight_bytes)] for name, each in models]
    sizes = Table("Sizes", ["model", "experts per layer", "parameters", "weights"], rows)
    command = ["streamprune", "run", str(result.model), "--ratio", "0.5"]
    command += ["--calibration", str(result.calibration), "-o", "OUTPUT"]
    return [
        *(line for table in (losses, damages, sizes) for line in ("", *table.text())),
        "",
        f"The unpruned model:               {result.model}",
        f"The model with half its experts:  {result.output}",
        "The same from the command line:",
        f"  {shlex.join(command)}",
        "",
        *textwrap.wrap(" ".join(_findings(result)), 100),
    ]


def _findings(result: DemoResult) -> list[str]:
    before, half = result.before, result.variants[0.5, MIX]
    removed = ", ".join(f"{ratio:.0%}" for ratio in result.damages)
    nats = ", ".join(f"{damage:.3f}" for damage in result.damages.values())
    graded = "the more was removed, the more was lost"
    if not result.damage_is_graded:
        graded = "the divergence did not grow with the share, unlike in models that are trained for longer"
    mix, code = half.divergences, result.variants[0.5, CODE].divergences
    others = [name for name in mix if name != CODE]
    with_mix, with_code = (fmean(damage[name] for name in others) for damage in (mix, code))
    factors = ", ".join(f"{code[name] / mix[name]:.1f} on {name}" for name in mix)
    verdict = "experts unused by the calibration text are removed, so calibrate on text like your workload"
    if with_code <= with_mix:
        verdict = "it did not hurt the other domains more here, unlike in models that are trained for longer"
    return [
        f"Result: with {half.experts} of {before.experts} experts per layer, the weights take "
        f"{half.weight_bytes / before.weight_bytes:.0%} of the space, and the mean held-out loss went from "
        f"{before.mean_loss:.2f} to {half.mean_loss:.2f}.",
        f"Removing {removed} of the experts changed the predictions by {nats} nats per token: {graded}.",
        f"Calibrated on code alone instead of the mix, the model with half its experts has this multiple of the KL "
        f"divergence: {factors}; {with_code / with_mix:.1f} on all but code ({with_code:.3f} against {with_mix:.3f}): "
        f"{verdict}.",
        "These numbers do not carry over to large models: this one is tiny, and was trained for minutes.",
    ]
