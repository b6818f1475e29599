"""What fewer experts, narrower experts and both cost, and how much of that a refit gets back, on the demo's models.

Every model is made by streamprune itself: `score` and `prune` without a refit, `run` with it. KL divergences are nats
per token, from the unpruned model's predictions, on held-out text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring.figures import KL, MEAN, Estimate, check_held_out, estimates, evenly, held_out_text, ratio
from measuring.mixes import BALANCED, MIXES
from measuring.training import HELD_OUT_SEQUENCES
from streamprune.calibration.builtin_text import DOMAINS
from streamprune.calibration.sequences import Calibration
from streamprune.config import NO_ANCHOR, PruneSettings, RunSettings
from streamprune.demo.demo import (
    CALIBRATION_SEQUENCES,
    RECIPE_NAME,
    DemoModel,
    Echo,
    measure,
    one_thread,
    write_recipe,
)
from streamprune.errors import SettingsError
from streamprune.evaluation.metrics import Sums
from streamprune.models.open import load_config
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import run
from streamprune.tables import Table
from streamprune.targets import BY

RATIOS = (0.25, 0.5, 0.75)
CALIBRATIONS = (BALANCED, "70/30", "code only")
EXPERTS, CHANNELS, BOTH = BY
#: What becomes fewer, as the tables say it.
WORDS = {EXPERTS: "whole experts", CHANNELS: "narrower experts", BOTH: "fewer and narrower"}
#: Rows of 4 float32 values are the 16 bytes that torch's grouped product needs.
WIDTH_MULTIPLE = 4
#: What the refit of narrower experts is expected to reach at half the parameters: a share of the KL of whole experts.
EXPECTED = 0.1
LINE_WIDTH = 120


@dataclass(frozen=True)
class Setup:
    """One way to prune: the share of the experts' parameters to remove, and one of BY for what is removed.

    `calibration` is one of MIXES, whose shares its text has. With `refit` and a calibration of one domain, `anchored`
    says whether text of the other domains takes part in the fit.
    """

    calibration: str
    ratio: float
    by: str = EXPERTS
    refit: bool = False
    anchored: bool = True

    @property
    def reference(self) -> Setup:
        """What it is compared with: whole experts removed, and nothing refitted."""
        return Setup(self.calibration, self.ratio)

    @property
    def treatment(self) -> str:
        """What happens to the weights that stay."""
        return "" if not self.refit else "+ refit" if self.anchored else "+ refit, no anchor"

    def target(self) -> dict[str, Any]:
        """How far to prune, as settings of `prune` and `run`."""
        multiple = None if self.by == EXPERTS else WIDTH_MULTIPLE
        return {"ratio": self.ratio, "by": self.by, "width_multiple": multiple}


@dataclass(frozen=True)
class Outcome:
    """What one setup gave: `experts` of `width` channels in each layer, the share `kept` of the experts' parameters.

    `kl` is by domain and for MEAN. `of_reference` is its mean as a multiple of that of `setup.reference`.
    """

    setup: Setup
    experts: int
    width: int
    kept: float
    kl: Mapping[str, Estimate]
    of_reference: Estimate


@dataclass(frozen=True)
class Study:
    """One model's outcomes, in the order of the setups, and how much text of each kind was used."""

    model: str
    calibration_sequences: int
    held_out_sequences: int
    outcomes: tuple[Outcome, ...]


def all_setups(ratios: Sequence[float] = RATIOS, calibrations: Sequence[str] = CALIBRATIONS) -> list[Setup]:
    """Every way to remove each of the shares, without a refit and with every kind of it."""
    return [
        Setup(calibration, share, by, refit, anchored)
        for calibration in calibrations
        for share in ratios
        for by in BY
        for refit, anchored in ((False, True), (True, True), (True, False))
        if anchored or len(MIXES[calibration]) == 1
    ]


def check_setups(setups: Sequence[Setup], sequences: int, held_out: int) -> None:
    """Raise SettingsError for what is impossible, before anything is computed."""
    check_held_out(held_out)
    if not len(DOMAINS) <= sequences <= CALIBRATION_SEQUENCES:
        raise SettingsError(
            f"{sequences} sequences to calibrate on: {len(DOMAINS)} to {CALIBRATION_SEQUENCES} are possible."
        )
    for setup in setups:
        PruneSettings(model="", output=Path("output"), scores=Path("scores"), **setup.target())
        if setup.reference not in setups:
            raise SettingsError(f"{setup} has nothing to be compared with: add {setup.reference}.")


def study(
    model: DemoModel,
    setups: Iterable[Setup],
    echo: Echo = print,
    sequences: int = CALIBRATION_SEQUENCES,
    held_out: int = HELD_OUT_SEQUENCES,
) -> Study:
    """Prune a model by each of the setups, calibrated on `sequences` sequences in all, and measure what comes out on
    `held_out` sequences of each domain.

    One thread does all of it, so that the same digits come out every time. Raises StreampruneError: see
    `check_setups`, `run` and `prune`.
    """
    wanted = list(dict.fromkeys(setups))
    check_setups(wanted, sequences, held_out)
    found: dict[Setup, tuple[Sums, ...]] = {}
    sizes: dict[Setup, tuple[int, int]] = {}
    with one_thread(), tempfile.TemporaryDirectory(prefix="streamprune-damage-") as name:
        scratch = Path(name)
        text = held_out_text(model, held_out, scratch)
        texts = {each: _CalibrationText(model, each, sequences, scratch) for each in _calibrations(wanted)}
        for number, setup in enumerate(wanted, 1):
            output = texts[setup.calibration].prune(setup)
            found[setup], sizes[setup] = _measured(output, model, text), _size(output)
            echo(f"  {number} of {len(wanted)}: {describe(setup)}")
    full = _size(model.folder)
    outcomes = [
        Outcome(
            setup,
            *sizes[setup],
            sizes[setup][0] * sizes[setup][1] / (full[0] * full[1]),
            estimates(model.held_out, found[setup], KL),
            ratio(found[setup], found[setup.reference], KL),
        )
        for setup in wanted
    ]
    return Study(model_name(model), sequences, held_out, tuple(outcomes))


class _CalibrationText:
    """A calibration with the shares of its mix, its scores, and the models that are pruned by it, in `scratch`."""

    def __init__(self, model: DemoModel, name: str, sequences: int, scratch: Path) -> None:
        self._model, self._folder = model, scratch / name.replace("/", "-").replace(" ", "-")
        rows = mixed(MIXES[name], sequences)
        self._recipe = write_recipe(
            self._folder, "calibration", {domain: evenly(model.calibration[domain], rows[domain]) for domain in rows}
        )
        # The anchor is the demo's own text, never held-out text. The built-in text, which is the default, is made of
        # the same documents as the held-out sequences.
        others = {domain: rows for domain, rows in model.calibration.items() if domain not in MIXES[name]}
        self._anchor = write_recipe(self._folder, "anchor", others) if others else None
        self._scores = self._folder / "scores.safetensors"
        run(self._settings(self._scores, only_score=True), quiet=True)

    def prune(self, setup: Setup) -> Path:
        """The pruned model's folder, in place of the last one."""
        output = self._folder / "pruned"
        if setup.refit:
            anchor = None
            if self._anchor is not None:
                anchor = str(self._anchor) if setup.anchored else NO_ANCHOR
            run(self._settings(output, refit=True, anchor=anchor, overwrite=True, **setup.target()), quiet=True)
        else:
            prune(
                PruneSettings(
                    model=str(self._model.folder), output=output, scores=self._scores, overwrite=True, **setup.target()
                ),
                quiet=True,
            )
        return output

    def _settings(self, output: Path, **others: Any) -> RunSettings:
        return RunSettings(
            model=str(self._model.folder), output=output, calibration=(str(self._recipe),), device="cpu", **others
        )


def mixed(shares: Mapping[str, int], sequences: int) -> dict[str, int]:
    """The number of sequences of each domain for `sequences` in all, nearly: each one is rounded."""
    return {domain: round(sequences * share / sum(shares.values())) for domain, share in shares.items()}


def _calibrations(setups: Iterable[Setup]) -> list[str]:
    return list(dict.fromkeys(setup.calibration for setup in setups))


def _measured(output: Path, model: DemoModel, text: Calibration) -> tuple[Sums, ...]:
    return measure(output, model.folder, text).sums


def _size(model: Path) -> tuple[int, int]:
    """Experts per layer, and channels of each."""
    config = load_config(model)
    return config.num_experts, config.moe_intermediate_size


def model_name(model: DemoModel) -> str:
    """A model's shape and seed."""
    config, recipe = load_config(model.folder), json.loads((model.folder.parent / RECIPE_NAME).read_bytes())
    return f"{config.num_hidden_layers} layers × {config.num_experts} experts, seed {recipe['seed']}"


def as_json(study: Study) -> dict[str, Any]:
    """The study as JSON, for `from_json`."""
    return asdict(study)


def from_json(found: Mapping[str, Any]) -> Study:
    """The study that `as_json` described; other entries are ignored."""

    def outcome(each: Mapping[str, Any]) -> Outcome:
        kl = {name: Estimate(**figures) for name, figures in each["kl"].items()}
        of_reference = Estimate(**each["of_reference"])
        return Outcome(**{**each, "setup": Setup(**each["setup"]), "kl": kl, "of_reference": of_reference})

    outcomes = tuple(outcome(each) for each in found["outcomes"])
    return Study(found["model"], found["calibration_sequences"], found["held_out_sequences"], outcomes)


def describe(setup: Setup) -> str:
    """A setup in words."""
    what = f"{WORDS[setup.by]} {setup.treatment}".rstrip()
    return f"{setup.calibration}, {1 - setup.ratio:.0%} kept, {what}"


def figure(estimate: Estimate) -> str:
    """A mean and half of its interval, without zeros before the points: long columns are easier to read so."""
    places = 4 if estimate.mean >= 0.01 else 5
    parts = (f"{value:.{places}f}" for value in (estimate.mean, (estimate.high - estimate.low) / 2))
    return " ±".join(part.removeprefix("0") if part.startswith("0.") else part for part in parts)


def overviews(studies: Sequence[Study]) -> list[Table]:
    """A table per calibration: a row per share kept and model, a column per way to remove it, mean KL ± half of its
    interval."""
    tables = []
    for calibration in _calibrations(each.setup for study in studies for each in study.outcomes):
        found = {
            (each.setup.ratio, study.model, replace(each.setup, ratio=0.0)): each
            for study in studies
            for each in study.outcomes
            if each.setup.calibration == calibration
        }
        setups = list(dict.fromkeys(setup for _, _, setup in found))
        rows = [
            [
                f"{1 - share:.0%}",
                model,
                *(figure(found[key].kl[MEAN]) if (key := (share, model, setup)) in found else "" for setup in setups),
            ]
            for share, model in sorted(dict.fromkeys((share, model) for share, model, _ in found))
        ]
        columns = ["kept", "model", *(setup.treatment or WORDS[setup.by] for setup in setups)]
        tables.append(Table(f"Mean KL over the domains, calibration: {calibration}", columns, rows, align="ll"))
    return tables


def details(study: Study) -> Iterator[Table]:
    """A table per calibration and share removed: KL by domain, and the mean as a share of that of whole experts."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for each in study.outcomes:
        groups.setdefault((each.setup.calibration, each.setup.ratio), []).append(each)
    for (calibration, share), group in groups.items():
        rows = [
            [
                f"{WORDS[each.setup.by]} {each.setup.treatment}".rstrip(),
                f"{each.experts} × {each.width}",
                f"{each.kept:.1%}",
                *map(figure, each.kl.values()),
                f"{each.of_reference.mean:.1%}",
            ]
            for each in group
        ]
        columns = ["", "experts", "kept", *group[0].kl, "of whole"]
        yield Table(f"KL by domain, calibration: {calibration}, {1 - share:.0%} kept", columns, rows)


def against_whole(studies: Sequence[Study]) -> Table:
    """Narrower experts with a refit against whole ones without: the share of their mean KL, and its interval.

    A row per calibration and share kept, a column per model; the last column counts the models that reach EXPECTED.
    """
    found = {(each.setup, study.model): each.of_reference for study in studies for each in study.outcomes}
    setups = sorted({setup for setup, _ in found if setup == narrower_refitted(setup)}, key=_order)
    rows = []
    for setup in setups:
        shares = [found.get((setup, study.model)) for study in studies]
        known = [each for each in shares if each is not None]
        reached = sum(each.mean <= EXPECTED for each in known)
        cells = [f"{each.mean:.1%} ({each.low:.1%} to {each.high:.1%})" if each is not None else "" for each in shares]
        rows.append([setup.calibration, f"{1 - setup.ratio:.0%}", *cells, f"{reached} of {len(known)}"])
    columns = ["calibration", "kept", *(study.model for study in studies), f"at most {EXPECTED:.0%}"]
    title = "Narrower experts with a refit: their mean KL as a share of that of whole experts without one"
    return Table(title, columns, rows, align="ll")


def narrower_refitted(setup: Setup) -> Setup:
    """Narrower experts with a refit, as many parameters removed with the same calibration."""
    return Setup(setup.calibration, setup.ratio, CHANNELS, refit=True)


def _order(setup: Setup) -> tuple[int, float]:
    return CALIBRATIONS.index(setup.calibration), setup.ratio


INTRODUCTION = (
    "KL divergence from the unpruned model's predictions on held-out text, in nats per token, ± half of the 95 % "
    "interval of a bootstrap over the held-out sequences (about other text, not about other models). `kept` is the "
    "share of the experts' parameters that stays; `of whole` compares the mean with that of whole experts without a "
    "refit. The calibrations have the same number of sequences, drawn from the demo's calibration text, in the shares "
    "of their names. With code only, the anchor of the refit is calibration text of the other domains: text of the "
    "very kinds that are measured, so that text of unseen kinds would gain less. (Without --anchor it would be the "
    "built-in text, which is made of the documents that are held out here.)"
)
