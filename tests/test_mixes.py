"""Calibration mixes on a small trained model: the published effect, what predicts it, and the tool that shows both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from measuring.figures import KL, LOSS, MEAN
from measuring.mixes import (
    BALANCED,
    GENERAL,
    MIXES,
    REFERENCE,
    Cell,
    Setup,
    Study,
    check_setups,
    choice_setups,
    correlation,
    extremes,
    mix_setups,
    outcome_tables,
    outcomes,
    pairs,
    spearman,
)

from streamprune.calibration.builtin_text import DOMAINS
from streamprune.demo.demo import Damage
from streamprune.errors import SettingsError
from streamprune.evaluation.metrics import sums_by_source
from streamprune.selection.settings import parse_mix
from streamprune.streaming.predictions import SequenceFigures, TokenFigures
from tests.conftest import DemoRun
from tests.programs import run_program
from tests.thorough import thorough

#: Held-out sequences of each domain: an eighth of what the tool takes, enough for what is asserted here.
HELD_OUT = 8
#: The tool draws once more.
SEEDS = (0, 1)

# The copy of the shipped model is the demo's.
pytestmark = pytest.mark.xdist_group("demo")


def run_tool(folder: Path, *arguments: str) -> CompletedProcess[str]:
    given = ("-o", str(folder), "--held-out", str(HELD_OUT), *arguments)
    return run_program("mixes", *given, RANDOM_SEEDS=SEEDS)


@pytest.fixture(scope="module")
def study(demo_run: DemoRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the tool prints, and its JSON."""
    path = tmp_path_factory.mktemp("mixes") / "mixes.json"
    methods, schedules = ("--methods", "reap", "random"), ("--schedules", "uniform", "global")
    done = run_tool(demo_run.folder, "--ratios", "0.5", "0.75", *methods, *schedules, "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())


def cells_by_mix(figures: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    wanted = (ratio, "reap", "uniform")
    setups = [(cell["setup"], cell) for cell in figures["cells"]]
    return {each["mix"]: cell for each, cell in setups if (each["ratio"], each["method"], each["schedule"]) == wanted}


@pytest.fixture(scope="module")
def by_mix(study: tuple[str, dict[str, Any]]) -> Mapping[str, Any]:
    return cells_by_mix(study[1], 0.5)


def general(cell: Mapping[str, Any], what: str) -> float:
    return fmean(cell[what][name] for name in GENERAL)


def test_general_text_in_the_mix_saves_the_other_domains(by_mix: Mapping[str, Any]) -> None:
    assert list(by_mix) == list(MIXES)
    alone, some, even = (by_mix[mix] for mix in ("code only", "70/30", BALANCED))
    for mixed in (some, even):
        assert general(alone, "divergences") > 1.2 * general(mixed, "divergences")
        assert general(alone, "losses") > general(mixed, "losses")
    # Most of what a balanced mix saves, 30 % of general text save already; to code they cost less.
    saved = [general(alone, "divergences") - general(mixed, "divergences") for mixed in (some, even)]
    assert saved[0] > 0.5 * saved[1]
    assert alone["divergences"]["code"] < 0.8 * min(some["divergences"]["code"], even["divergences"]["code"])


def test_the_less_code_in_the_mix_the_more_code_loses(study: tuple[str, dict[str, Any]]) -> None:
    """With three quarters removed, where every mix of this model keeps other experts. (With half of them removed, 50/50
    and balanced keep the same ones, and 30 % of other text happens to cost code a little more than both.)"""
    cells = [cells_by_mix(study[1], 0.75)[mix] for mix in MIXES]
    lost, kept = ([cell[what]["code"] for cell in cells] for what in ("divergences", "retention"))
    assert lost == sorted(lost)
    assert kept == sorted(kept, reverse=True)
    assert len(set(lost)) == len(set(kept)) == len(MIXES)


def test_retention_tells_beforehand_who_loses(by_mix: Mapping[str, Any]) -> None:
    alone, even = by_mix["code only"]["retention"], by_mix[BALANCED]["retention"]
    assert alone["code"] > even["code"]
    for name in ("arithmetic", "records"):
        # The two whose text shares least with code.
        assert alone[name] < even[name] - 0.05
        assert by_mix["code only"]["divergences"][name] > by_mix[BALANCED]["divergences"][name]
    for values, falls in (
        ([general(cell, "retention") for cell in by_mix.values()], False),
        ([cell["retention"]["code"] for cell in by_mix.values()], True),
    ):
        assert values == sorted(values, reverse=falls)
    assert all(0 < share < 1 for cell in by_mix.values() for share in cell["retention"].values())


def test_scores_beat_chance_and_global_divides_the_same_total(study: tuple[str, dict[str, Any]]) -> None:
    cells = [cell for cell in study[1]["cells"] if (cell["setup"]["mix"], cell["setup"]["ratio"]) == (BALANCED, 0.5)]
    damage = {
        (method, schedule): fmean(
            fmean(cell["divergences"].values())
            for cell in cells
            if (cell["setup"]["method"], cell["setup"]["schedule"]) == (method, schedule)
        )
        for method in ("reap", "random")
        for schedule in ("uniform", "global")
    }
    for schedule in ("uniform", "global"):
        assert damage["reap", schedule] < damage["random", schedule]
    for cell in cells:
        assert sum(cell["counts"]) == 4 * 16
        assert (set(cell["counts"]) == {16}) == (cell["setup"]["schedule"] == "uniform")
    assert sorted(cell["setup"]["seed"] for cell in cells) == [0, 0, 0, 0, 1, 1]


def test_tables_have_the_figures_of_the_json(study: tuple[str, dict[str, Any]], by_mix: Mapping[str, Any]) -> None:
    text, figures = study
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for mix, cell in by_mix.items():
        for what, form in (("losses", ".3f"), ("divergences", ".3f"), ("retention", ".1%")):
            values = [*(cell[what][name] for name in DOMAINS), general(cell, what), fmean(cell[what].values())]
            assert " ".join([f"50% removed, {mix}", *(format(value, form) for value in values)]) in lines
    found = figures["retention_and_damage"]["mixes"]
    row = f"mixes, all removed {found['correlation']:+.2f} {found['within_domains']:+.2f} "
    assert row + f"{found['agreeing']} of {found['total']} " in "\n".join(lines)
    assert figures["seed"] == 0
    assert figures["calibration_tokens"] == 4 * 256 * 128
    assert set(figures["versions"]) == {"streamprune", "python", "torch", "transformers", "numpy"}


def test_every_choice_is_printed_by_domain_with_intervals(study: tuple[str, dict[str, Any]]) -> None:
    """Share removed × method × schedule: means within their intervals, and equal to the cells' own."""
    text, figures = study
    assert figures["held_out_sequences"] == HELD_OUT
    found = {(each["ratio"], each["method"], each["schedule"]): each for each in figures["outcomes"]}
    assert list(found) == [
        (ratio, method, schedule)
        for ratio in (0.5, 0.75)
        for method in ("reap", "random")
        for schedule in ("uniform", "global")
    ]
    for (ratio, method, schedule), each in found.items():
        assert each["seeds"] == (list(SEEDS) if method == "random" else [0])
        own = [
            cell
            for cell in figures["cells"]
            if cell["setup"].items()
            >= {"mix": BALANCED, "ratio": ratio, "method": method, "schedule": schedule}.items()
        ]
        for what, of_cells in ((KL, "divergences"), (LOSS, "losses")):
            assert list(each[what]) == [*DOMAINS, MEAN]
            for domain, estimate in each[what].items():
                means = [fmean(cell[of_cells].values()) if domain == MEAN else cell[of_cells][domain] for cell in own]
                assert estimate["mean"] == pytest.approx(fmean(means), abs=1e-9)
                assert estimate["low"] < estimate["mean"] < estimate["high"]
                change = each[f"{what}_difference"][domain]
                usual = found[ratio, *REFERENCE][what][domain]["mean"]
                assert change["mean"] == pytest.approx(estimate["mean"] - usual, abs=1e-9)
                assert change["low"] <= change["mean"] <= change["high"]
        row = " ".join(
            f"{each[KL][name]['mean']:.3f} ±{(each[KL][name]['high'] - each[KL][name]['low']) / 2:.3f}"
            for name in (*DOMAINS, MEAN)
        )
        assert f"{method}, {schedule} {row}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_more_removed_is_more_lost(study: tuple[str, dict[str, Any]]) -> None:
    outcomes = study[1]["outcomes"]
    half, most = ([each for each in outcomes if each["ratio"] == ratio] for ratio in (0.5, 0.75))
    for less, more in zip(half, most, strict=True):
        assert all(0 < less[KL][name]["high"] < more[KL][name]["low"] for name in (*DOMAINS, MEAN)), less["method"]
        assert less[LOSS][MEAN]["mean"] < more[LOSS][MEAN]["mean"]


def test_scores_beat_chance_by_more_than_the_luck_of_the_text(study: tuple[str, dict[str, Any]]) -> None:
    for each in study[1]["outcomes"]:
        if each["method"] == "random":
            assert each["kl_difference"][MEAN]["low"] > 0
            assert each["loss_difference"][MEAN]["low"] > 0
    text = " ".join(study[0].split())
    for ratio in (0.5, 0.75):
        found = next(
            each for each in study[1]["outcomes"]
            if (each["ratio"], each["method"], each["schedule"]) == (ratio, "reap", "global")
        )  # fmt: skip
        for what, title in ((KL, "KL divergence from the unpruned model"), (LOSS, "Held-out loss in nats per token")):
            # Of scores, `global` may cost more than `uniform` as well: where its own interval says so.
            others = "reap with global; " if found[f"{what}_difference"][MEAN]["low"] > 0 else ""
            (verdict,) = re.findall(rf"{title}[^.]*, {ratio:.0%} removed .*?(?: More: ([^.]*)\.)", text)
            assert verdict == f"{others}random with every schedule"


@thorough
def test_second_run_prints_the_same_digits(
    study: tuple[str, dict[str, Any]], demo_run: DemoRun, tmp_path: Path
) -> None:
    path = tmp_path / "again.json"
    done = run_tool(demo_run.folder, "--ratios", "0.5", "--only-mixes", "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = study[1]["cells"], json.loads(path.read_text())["cells"]
    assert again == first[: len(MIXES)]
    # (Other rows make other columns wider, and the last paragraph longer.)
    paragraphs = [text.partition("With 50% removed,") for text in (done.stdout, study[0])]
    lines, before = ({" ".join(line.split()) for line in text.splitlines()} for text, _, _ in paragraphs)
    assert lines < before
    last, longer = (" ".join(text.split()) for _, _, text in paragraphs)
    assert last
    assert longer.startswith(last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "1.5"), "--ratio 1.5 is not between 0 and 1"),
        (("--methods", "reep"), "invalid choice: 'reep'"),
        (("--json", "/proc/nowhere/mixes.json"), "Writing the figures failed"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    json_file = () if "--json" in arguments else ("--json", str(tmp_path / "mixes.json"))
    done = run_tool(tmp_path / "demo", *arguments, *json_file)
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo").exists()


def test_impossible_setups_are_refused_before_any_work() -> None:
    with pytest.raises(SettingsError, match="--method 'best' is unknown"):
        check_setups([Setup(BALANCED, 0.5, "best")], HELD_OUT)
    for number in (1, 65):
        with pytest.raises(SettingsError, match=f"{number} held-out sequences of each domain: 2 to 64 are possible"):
            check_setups([Setup(BALANCED, 0.5)], number)


def test_mixes_have_the_shares_of_their_names(tmp_path: Path) -> None:
    for mix, code in (("code only", 1), ("70/30", 0.7), ("50/50", 0.5), (BALANCED, 0.25)):
        shares = parse_mix(str(Setup(mix, 0.5).settings(tmp_path, tmp_path, tmp_path).mix))
        assert shares["code"] / sum(shares.values()) == pytest.approx(code)
        assert len({shares.get(name, 0) for name in GENERAL}) == 1


def test_grids_are_complete() -> None:
    assert len(set(mix_setups())) == 12
    grid = choice_setups(("reap", "random"), ("uniform", "global"), (0.5, 0.75), (0, 1, 2))
    assert len(set(grid)) == len(grid) == 2 * 2 * (1 + 3)
    assert {setup.mix for setup in grid} == {BALANCED}


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [0.1, 7, 8, 1e9]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [3, 2, 1, 0]) == pytest.approx(-1)
    # 1 − 6 Σd² / (n (n² − 1)) with d = 1, 1, 1, 1, 0.
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(spearman([1, 1], [1, 2]))
    assert math.isnan(spearman([], []))


def cell(ratio: float, kept: Mapping[str, float], lost: Mapping[str, float]) -> Cell:
    return Cell(losses=lost, divergences=lost, setup=Setup(BALANCED, ratio), counts=(1,), retention=kept)


def test_agreement_of_retention_and_damage_by_hand() -> None:
    good = cell(0.5, {"a": 0.9, "b": 0.3}, {"a": 0.1, "b": 9.0})
    better = cell(0.5, {"a": 0.8, "b": 0.4}, {"a": 0.2, "b": 8.0})
    wrong = cell(0.5, {"a": 0.7, "b": 0.5}, {"a": 0.1, "b": 9.5})
    other = cell(0.75, {"a": 0.1, "b": 0.1}, {"a": 0.0, "b": 0.0})
    assert correlation([good, better]) == pytest.approx(-1)
    # Domain b is damaged more although it is kept as well: it shows unless each domain is ranked for itself.
    uneven = [cell(0.5, {"a": kept, "b": kept}, {"a": 1 - kept, "b": 9 - kept}) for kept in (0.2, 0.6)]
    assert correlation(uneven, relative=True) == pytest.approx(-1)
    assert -1 < correlation(uneven) < 0
    assert math.isnan(correlation([]))
    counted = pairs([good, better, wrong, other])
    # good/better agree twice, better/wrong never, good/wrong: a is damaged alike and does not count, b disagrees.
    assert (counted.agreeing, counted.total, counted.share) == (2, 5, 0.4)
    assert math.isnan(pairs([good]).share)
    assert extremes(good).agree
    assert extremes(cell(0.5, {"a": 0.2, "b": 0.3}, {"a": 0.1, "b": 0.4})).agree is False


def made_study(figures: Mapping[Setup, torch.Tensor]) -> Study:
    """A study of two domains' sequences with ten tokens each, of which the mean losses are (2, N), KL half of them."""
    sums = {}
    for setup, rows in figures.items():
        found = []
        for domain, row in enumerate(rows):
            for number, mean in enumerate(row):
                loss = mean.repeat(1, 10)
                tokens = TokenFigures(loss, torch.zeros_like(loss), loss / 2, torch.ones_like(loss))
                found.append(SequenceFigures((0, number, 0), domain, tokens))
        sums[setup] = tuple(sums_by_source(found, ["a", "b"]))
    return Study(0, Damage({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}), (), sums)


def test_differences_are_paired_and_draws_averaged() -> None:
    usual = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)).double() + 1
    wobble = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)).double() - 0.5
    wobble -= wobble.mean(1, keepdim=True)
    reference, slight, same = (Setup(BALANCED, 0.5, method) for method in ("reap", "ean", "frequency"))
    draws = [Setup(BALANCED, 0.5, "random", seed=seed) for seed in (0, 1)]
    made = made_study(
        {
            reference: usual, slight: usual - 0.02, same: usual + wobble,
            draws[0]: usual + 1, draws[1]: usual + 3,
        }
    )  # fmt: skip
    by_method = {each.method: each for each in outcomes(made, [reference, slight, same, *draws])}
    less = by_method["ean"]
    # The two overlap widely, yet every sequence loses less.
    assert less.loss[MEAN].high > by_method["reap"].loss[MEAN].mean + 0.02
    change = less.loss_difference[MEAN]
    assert (change.mean, change.low, change.high) == pytest.approx((-0.02,) * 3)
    assert less.kl_difference["a"].mean == pytest.approx(-0.01)
    assert not by_method["frequency"].loss_difference[MEAN].is_apart_from_zero
    assert by_method["random"].seeds == (0, 1)
    assert by_method["random"].loss["b"].mean == pytest.approx(float(usual[1].mean()) + 2)
    text = " ".join(" ".join(outcome_tables(list(by_method.values()))).split())
    assert (
        "Less loss than reap with uniform: ean with uniform. More: random with uniform. No significant difference: "
        "frequency with uniform."
    ) in text
