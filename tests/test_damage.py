"""The tool that compares fewer and narrower experts, with and without a refit: its grid, its arithmetic, its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from measuring.damage import (
    BOTH,
    CHANNELS,
    EXPERTS,
    Outcome,
    Setup,
    Study,
    against_whole,
    all_setups,
    as_json,
    check_setups,
    figure,
    from_json,
    mixed,
    overviews,
)
from measuring.figures import KL, MEAN, Estimate, evenly, ratio
from measuring.mixes import BALANCED, MIXES

from streamprune.calibration.builtin_text import DOMAINS
from streamprune.errors import SettingsError
from streamprune.evaluation.metrics import Sums, sums_by_source
from streamprune.streaming.predictions import SequenceFigures, TokenFigures
from tests.conftest import DemoRun
from tests.programs import run_program

CODE_ONLY = "code only"

# The copy of the shipped model is the demo's.
pytestmark = pytest.mark.xdist_group("demo")


def test_tables_json_and_markdown_have_the_same_figures(demo_run: DemoRun, tmp_path: Path) -> None:
    path = tmp_path / "damage.json"
    little = ("--ratios", "0.5", "--calibrations", BALANCED, "--sequences", "32", "--held-out", "4")
    done = run_program("damage", "-o", str(demo_run.folder), *little, "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(path.read_text())
    study = from_json(figures)
    assert (study.model, study.calibration_sequences) == ("4 layers × 32 experts, seed 0", 32)
    assert set(figures["versions"]) == {"streamprune", "python", "torch", "transformers", "numpy"}
    outcomes = {(each.setup.by, each.setup.refit): each for each in study.outcomes}
    sizes = {EXPERTS: (16, 32, 0.5), CHANNELS: (32, 16, 0.5), BOTH: (22, 24, 22 * 24 / 1024)}
    lines, shown = (
        [" ".join(line.split()) for line in text.splitlines()]
        for text in (done.stdout, run_program("damage", "--show", str(path)).stdout)
    )
    assert list(outcomes) == [(by, refit) for by in sizes for refit in (False, True)]
    for (by, refit), each in outcomes.items():
        assert (each.experts, each.width, each.kept) == sizes[by]
        assert list(each.kl) == [*DOMAINS, MEAN]
        assert all(0 < estimate.low < estimate.mean < estimate.high for estimate in each.kl.values())
        assert each.of_reference.mean == pytest.approx(each.kl[MEAN].mean / outcomes[EXPERTS, False].kl[MEAN].mean)
        shown_as = figure(each.kl[MEAN])
        row = next(line for line in lines if f"{each.experts} × {each.width}" in line and ("refit" in line) == refit)
        assert shown_as in row
        assert any(shown_as in line for line in shown)
    whole, narrow, refitted = (
        outcomes[key].kl[MEAN] for key in ((EXPERTS, False), (CHANNELS, False), (CHANNELS, True))
    )
    assert narrow.high < whole.low
    assert refitted.high < narrow.low


def test_grid_is_complete_and_anchors_matter_to_one_source_only() -> None:
    setups = all_setups()
    assert len(set(setups)) == len(setups) == 3 * 3 * (2 + 2 + 3)
    assert {each.calibration for each in setups if not each.anchored} == {CODE_ONLY}
    assert [each.treatment for each in setups[-3:]] == ["", "+ refit", "+ refit, no anchor"]
    check_setups(setups, 256, 64)
    assert Setup(BALANCED, 0.5).target() == {"ratio": 0.5, "by": EXPERTS, "width_multiple": None}
    assert Setup(BALANCED, 0.5, BOTH).target() == {"ratio": 0.5, "by": BOTH, "width_multiple": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "1.5"), "--ratio 1.5 is not between 0 and 1"),
        (("--sequences", "300"), "300 sequences to calibrate on: 4 to 256 are possible"),
        (("--held-out", "1"), "1 held-out sequences of each domain: 2 to 64 are possible"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    done = run_program("damage", "-o", str(tmp_path / "demo"), "--json", str(tmp_path / "damage.json"), *arguments)
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_setup_needs_its_reference() -> None:
    with pytest.raises(SettingsError, match="nothing to be compared with"):
        check_setups([Setup(BALANCED, 0.5, CHANNELS)], 256, 64)


def test_calibrations_have_the_shares_of_their_names() -> None:
    assert mixed(MIXES[CODE_ONLY], 256) == {"code": 256}
    assert mixed(MIXES[BALANCED], 256) == dict.fromkeys(DOMAINS, 64)
    assert mixed(MIXES["70/30"], 256) == {name: 179 if name == "code" else 26 for name in DOMAINS}
    assert evenly(torch.arange(10), 4).tolist() == [0, 2, 5, 7]


def made_sums(rows: torch.Tensor) -> list[Sums]:
    """The sums of two domains' sequences with ten tokens each, of which the mean KL are the rows (2, N)."""
    found = []
    for domain, row in enumerate(rows):
        for number, mean in enumerate(row):
            kl = mean.repeat(1, 10)
            tokens = TokenFigures(kl, torch.zeros_like(kl), kl, torch.ones_like(kl))
            found.append(SequenceFigures((0, number, 0), domain, tokens))
    return sums_by_source(found, ["a", "b"])


def test_ratios_are_paired() -> None:
    other = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)).double() + 0.1
    tenth = ratio(made_sums(other / 10), made_sums(other), KL)
    # Sequences differ widely, their ratios do not.
    assert (tenth.mean, tenth.low, tenth.high) == pytest.approx((0.1,) * 3)
    spread = ratio(made_sums(other.flip(1)), made_sums(other), KL)
    assert spread.mean == pytest.approx(1)
    assert spread.low < 0.95 < 1.05 < spread.high


def made_study(model: str, means: dict[Setup, float]) -> Study:
    reference = next(iter(means.values()))
    outcomes = [
        Outcome(setup, 16, 32, 0.5, {"code": around(mean), MEAN: around(mean)}, around(mean / reference))
        for setup, mean in means.items()
    ]
    return Study(model, 256, 64, tuple(outcomes))


def around(mean: float) -> Estimate:
    return Estimate(mean, mean * 0.9, mean * 1.1)


def test_several_models_share_tables() -> None:
    whole, narrow = Setup(CODE_ONLY, 0.5), Setup(CODE_ONLY, 0.5, CHANNELS, refit=True)
    bare = replace(narrow, anchored=False)
    studies = [
        made_study("first", {whole: 2.0, narrow: 0.1, bare: 0.3}),
        made_study("second", {whole: 1.0, narrow: 0.11}),
    ]
    assert [from_json(json.loads(json.dumps({"date": "today"} | as_json(each)))) for each in studies] == studies
    (table,) = overviews(studies)
    assert list(table.columns) == ["kept", "model", "whole experts", "+ refit", "+ refit, no anchor"]
    assert [list(row) for row in table.rows] == [
        ["50%", "first", "2.0000 ±.2000", ".1000 ±.0100", ".3000 ±.0300"],
        ["50%", "second", "1.0000 ±.1000", ".1100 ±.0110", ""],
    ]
    compared = against_whole(studies)
    assert list(compared.columns) == ["calibration", "kept", "first", "second", "at most 10%"]
    assert [list(row) for row in compared.rows] == [
        ["code only", "50%", "5.0% (4.5% to 5.5%)", "11.0% (9.9% to 12.1%)", "1 of 2"]
    ]
    assert [figure(around(mean)) for mean in (12.3456, 0.01, 0.0007)] == [
        "12.3456 ±1.2346",
        ".0100 ±.0010",
        ".00070 ±.00007",
    ]
