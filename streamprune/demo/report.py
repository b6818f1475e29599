"""The demo's figures as text: plain tables, and a paragraph that says what they show."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Sequence
from statistics import fmean

from streamprune.demo.data import CALIBRATION_SEQUENCES, VOCAB_SIZE
from streamprune.demo.result import CODE, MIX, DemoResult, Measured
from streamprune.machine import format_bytes

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
