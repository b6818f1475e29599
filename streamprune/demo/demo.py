"""The demo's token sequences as files: the text that commands are given.

What the demo found, in figures.

Measures what a pruned model lost: by `streamprune eval` on held-out text, with the unpruned model beside it.

The demo's figures as text: plain tables, and a paragraph that says what they show.

The demo from end to end: make a model, prune it in four ways, and measure what each has lost.

All of it is computed on the CPU: the model is tiny, and the figures are then the same with and without a GPU.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch

from streamprune.calibration.sequences import Calibration
from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import EvalSettings, RunSettings
from streamprune.demo import demo as report
from streamprune.demo.data import CALIBRATION_SEQUENCES, VOCAB_SIZE
from streamprune.demo.train import TrainedModel, torch_threads, trained_model
from streamprune.errors import OutputError
from streamprune.evaluation.evaluate import examine, read_data
from streamprune.evaluation.metrics import Sums
from streamprune.files.durable import writing
from streamprune.hardware.memory import format_bytes
from streamprune.models.config import load_config
from streamprune.pipeline.run import run
from streamprune.progress import Progress


def write_sequences(path: Path, rows: torch.Tensor) -> None:
    """Write token ids (N, L) as calibration data: a JSONL file with a sequence per line."""
    text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist())
    path.write_text(text, encoding="utf-8")


def write_recipe(folder: Path, name: str, domains: Mapping[str, torch.Tensor]) -> Path:
    """Write each domain's token ids (N, L), and a recipe that has every domain as a source; returns the recipe.

    Raises OutputError, ResourceError.
    """
    recipe = folder / f"{name}.json"
    length = max(rows.shape[1] for rows in domains.values())
    sources = [
        {"name": domain, "path": f"{name}-{domain}.jsonl", "samples": len(rows)} for domain, rows in domains.items()
    ]
    with writing(f"Writing {recipe}", folder):
        for source, rows in zip(sources, domains.values(), strict=True):
            write_sequences(folder / str(source["path"]), rows)
        recipe.write_text(json.dumps({"name": name, "sequence_length": length, "sources": sources}), encoding="utf-8")
    return recipe


#: The two calibrations: every domain alike, and code alone (which is also that domain's name).
MIX = "mix"
CODE = "code"


@dataclass(frozen=True)
class Damage:
    """One model on the held-out text: domain -> nats per token.

    `losses` is the mean next-token loss, `divergences` the mean KL(unpruned ‖ this model).
    """

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
    """The same with the model's sizes; `experts` is per block."""

    experts: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Variant:
    """The model without a share `ratio` of its experts, chosen with one of the two calibrations (MIX or CODE)."""

    ratio: float
    calibration: str
    measured: Measured


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured. `model` and `output` are the folders of the unpruned and the pruned model,
    `calibration` is the mixed calibration file; `training_seconds` is None if the model was found ready."""

    model: Path
    output: Path
    calibration: Path
    training_seconds: float | None
    before: Measured
    variants: tuple[Variant, ...]

    def variant(self, ratio: float, calibration: str = MIX) -> Measured:
        """The figures of one variant; KeyError if it was not made."""
        for item in self.variants:
            if (item.ratio, item.calibration) == (ratio, calibration):
                return item.measured
        raise KeyError((ratio, calibration))

    @property
    def damages(self) -> tuple[tuple[float, float], ...]:
        """(share removed, mean KL in nats per token) of the variants calibrated on the mix, by rising share."""
        return tuple((item.ratio, item.measured.mean_divergence) for item in self.variants if item.calibration == MIX)

    @property
    def damage_is_graded(self) -> bool:
        """Whether removing more always did more damage."""
        values = [damage for _, damage in self.damages]
        return all(less < more for less, more in pairwise(values))


@dataclass(frozen=True)
class Found:
    """What one model lost, and the sums that it follows from by domain, in the order of `damage`."""

    damage: Damage
    sums: tuple[Sums, ...] = field(repr=False)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text with a source per domain, and the folder of the unpruned model that others are compared with."""

    original: Path
    data: Calibration = field(repr=False)

    def measure(self, model: Path, trust_remote_code: bool = False) -> Found:
        """Mean next-token loss and mean KL(unpruned ‖ model) by domain, in nats per token.

        Models with different numbers of experts per block come with code: `trust_remote_code`. Raises a
        StreampruneError for a model that cannot be streamed.
        """
        settings = _settings(model, self.original, (), trust_remote_code)
        with Progress(0, quiet=True) as progress:
            evaluation = examine(settings, self.data, progress)
        sources = evaluation.result["sources"]
        losses, divergences = ({each["name"]: each[what] for each in sources} for what in ("loss", "kl"))
        return Found(Damage(losses, divergences), evaluation.sums)


def held_out_text(original: Path, domains: Mapping[str, torch.Tensor], folder: Path) -> HeldOut:
    """The token ids of each domain, (N, L), read as `streamprune eval` reads them: from a recipe, left in `folder`."""
    recipe = write_recipe(folder, "held-out", domains)
    return HeldOut(original, read_data(_settings(original, None, (str(recipe),), False)))


def _settings(model: Path, original: Path | None, data: tuple[str, ...], trust_remote_code: bool) -> EvalSettings:
    return EvalSettings(
        model=str(model),
        against=str(original) if original is not None else None,
        data=data,
        trust_remote_code=trust_remote_code,
        device="cpu",
    )


WIDTH = 100
CALIBRATION_WORDS = {MIX: "a mix of all domains", CODE: "code alone"}
#: The two calibrations are compared with half the experts removed.
COMPARED_RATIO = 0.5


def lines(result: DemoResult) -> list[str]:
    """All that is told when the demo has ended, line by line."""
    domains = list(result.before.losses)
    models: list[tuple[str, Measured]] = [("before", result.before)]
    models += [(f"{item.ratio:.0%} removed, {item.calibration}", item.measured) for item in result.variants]
    return [
        "",
        f"Held-out loss in nats per token, lower is better (knowing nothing: {math.log(VOCAB_SIZE):.2f})",
        *table(
            ["model", *domains, "mean"],
            [[name, *(f"{m.losses[d]:.3f}" for d in domains), f"{m.mean_loss:.3f}"] for name, m in models],
        ),
        "",
        "Damage: KL divergence from the unpruned model's predictions, in nats per token",
        *table(
            ["model", *domains, "mean"],
            [
                [name, *(f"{m.divergences[d]:.3f}" for d in domains), f"{m.mean_divergence:.3f}"]
                for name, m in models[1:]
            ],
        ),
        "",
        "Sizes",
        *table(
            ["model", "experts per block", "parameters", "weights"],
            [[name, str(m.experts), f"{m.parameters:,}", format_bytes(m.weight_bytes)] for name, m in models],
        ),
        "",
        *_places(result),
        "",
        *textwrap.wrap(" ".join(_findings(result)), WIDTH),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (header, *rows)
    ]


def _places(result: DemoResult) -> list[str]:
    command = ["streamprune", "run", str(result.model), "--ratio", f"{COMPARED_RATIO:g}"]
    command += ["--calibration", str(result.calibration), "--samples", str(CALIBRATION_SEQUENCES)]
    return [
        f"The unpruned model:          {result.model}",
        f"The model with half of it:   {result.output}",
        "The same from the command line:",
        f"  {shlex.join([*command, '-o', 'OUTPUT'])}",
    ]


def _findings(result: DemoResult) -> list[str]:
    half = result.variant(COMPARED_RATIO)
    share = half.weight_bytes / result.before.weight_bytes
    return [
        f"What was seen: with {half.experts} of {result.before.experts} experts per block, the weights take "
        f"{share:.0%} of the space, and the mean held-out loss went from {result.before.mean_loss:.2f} to "
        f"{half.mean_loss:.2f}.",
        _graded_damage(result),
        _calibration_matters(result),
        "How much a large model loses is another matter: this one is tiny, and was trained for minutes.",
    ]


def _graded_damage(result: DemoResult) -> str:
    removed = ", ".join(f"{ratio:.0%}" for ratio, _ in result.damages)
    nats = ", ".join(f"{damage:.3f}" for _, damage in result.damages)
    verdict = (
        "the more was removed, the more was lost"
        if result.damage_is_graded
        else "the damage did not grow with the share, as it does once a model is trained for long enough (--steps)"
    )
    return f"Removing {removed} of the experts changed the predictions by {nats} nats per token: {verdict}."


def _calibration_matters(result: DemoResult) -> str:
    mix = result.variant(COMPARED_RATIO).divergences
    code = result.variant(COMPARED_RATIO, CODE).divergences
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
            run(_settings_demo(trained.folder, place, ratio, calibrations[calibration]), quiet=quiet)
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


def _settings_demo(model: Path, output: Path, ratio: float, calibration: Path) -> RunSettings:
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
