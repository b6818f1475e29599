"""Pruning to a budget: `run --budget-gib` keeps as many experts as fit, and no more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.errors import DoesNotFitError, SettingsError, UnsupportedModelError
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.hardware.memory import format_bytes
from streamprune.reporting.facts import read_facts
from streamprune.reporting.record import PlannedUse
from streamprune.selection.select import layer_counts
from streamprune.selection.settings import SelectionSettings
from streamprune.targets import ServingSpec
from tests.helpers import known_family, prune
from tests.thorough import by_family, crossed
from tests.tiny import FAMILIES, Family, make_model, tiny_config, write_token_ids

GIB = 1024**3
#: One layout each: an expert per tensor, all in one, with biases, groups, multi-token prediction left out, vision.
LAYOUTS = ["qwen3_moe", "qwen3_vl_moe", "gpt_oss", "deepseek_v3", "granitemoe", "dbrx", "qwen3_5_moe", "gemma4_text"]
CHOSEN = [family for family in FAMILIES if family.id in LAYOUTS]


def budget_for(footprint: Footprint, keep: int, spare: int = 0) -> float:
    """A budget in GiB that holds `keep` experts per block and `spare` bytes."""
    return (Fit(footprint, ServingSpec(context=128, keep=keep), 0).total + spare) / GIB


@by_family({"qwen3_moe", "gpt_oss"}, CHOSEN)
def test_the_written_files_and_the_other_terms_fill_the_budget(family: Family, tmp_path: Path) -> None:
    """What is on disk and the other terms stay within the budget, and one more expert per block would exceed it.

    (One more per group, where the router's groups must stay equal.)
    """
    source = make_model(tmp_path / "model", tiny_config(family))
    footprint = read_footprint(str(source))
    assert footprint.spec is not None
    step = int(footprint.spec.groups * footprint.weights.sizes().expert_bytes())
    # Not a byte to spare, and just short of the next number.
    for number, spare in enumerate((0, step - 1)):
        gib = budget_for(footprint, family.keep, spare)
        result = prune(source, tmp_path / f"out{number}", budget_gib=gib, context=128)
        memory = result.summary["memory"]
        written = open_checkpoint(result.output).nbytes
        assert result.summary["experts_per_layer"] == family.keep
        assert memory["weights_bytes"] == written
        assert memory["total_bytes"] == written + sum(
            term["bytes"] for term in memory["terms"] if not term["name"].startswith("weights: ")
        )
        assert memory["total_bytes"] <= int(gib * GIB) == memory["budget_bytes"]
        assert memory["fits"] is True
        assert memory["total_bytes"] + step > int(gib * GIB)
        assert {term["kind"] for term in memory["terms"] if term["name"].startswith("weights")} == {"exact"}


def test_the_budget_gives_what_keep_gives(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    by_budget = prune(source, tmp_path / "a", budget_gib=budget_for(read_footprint(str(source)), 4), context=128)
    by_keep = prune(source, tmp_path / "b", keep=4, context=128)
    assert by_budget.layers == by_keep.layers
    for name in ("config.json", "model.safetensors.index.json"):
        assert (by_budget.output / name).read_bytes() == (by_keep.output / name).read_bytes()
    budget, keep = (json.loads((each.output / "streamprune.json").read_text()) for each in (by_budget, by_keep))
    assert budget["use"].pop("budget_bytes") == by_budget.summary["memory"]["budget_bytes"]
    assert keep["use"].pop("budget_bytes") is None
    assert budget == keep
    assert budget["use"] == {"context": 128, "batch": 1, "kv_dtype": "auto"}


def test_groups_of_experts_stay_equal(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.id == "deepseek_v3")
    source = make_model(tmp_path / "model", tiny_config(family))
    footprint = read_footprint(str(source))
    one = int(footprint.weights.sizes().expert_bytes())
    result = prune(source, tmp_path / "out", budget_gib=budget_for(footprint, 6, one), context=128)
    assert result.summary["experts_per_layer"] == 6, "7 would fit, but not in two equal groups"


@pytest.mark.parametrize(
    ("name", "schedule"),
    crossed(
        ["qwen3_moe", "gpt_oss", "deepseek_v3"], ["uniform", "linear-decrease", "linear-increase", "global"],
        usual=[("qwen3_moe", "global"), ("qwen3_moe", "linear-increase"), ("deepseek_v3", "linear-decrease"),
               ("gpt_oss", "uniform")],
    ),
)  # fmt: skip
def test_every_schedule_fills_the_budget(name: str, schedule: str, tmp_path: Path) -> None:
    """With one more expert, where the schedule would put it (uniform: in every block), it would be exceeded."""
    family = next(family for family in FAMILIES if family.id == name)
    source = make_model(tmp_path / "model", tiny_config(family))
    footprint = read_footprint(str(source))
    spec, blocks = footprint.spec, footprint.weights.sizes().expert_layers
    assert spec is not None
    # With the steep one a block keeps all.
    goal = {"uniform": {}, "linear-decrease": {"spread": 0.1}, "linear-increase": {"spread": 0.45}, "global": {}}[
        schedule
    ]

    def use(total: int) -> ServingSpec:
        if schedule == "uniform":
            return ServingSpec(context=128, keep=total // blocks)
        if schedule == "global":
            # Before the scores are known, the workspace is taken to be that of a block which keeps all its experts.
            return ServingSpec(context=128, total=total)
        counts = layer_counts(SelectionSettings(schedule=schedule, **goal), spec, blocks, total)
        return ServingSpec(context=128, total=total, widest=max(counts))

    step = spec.groups * (blocks if schedule == "uniform" else 1)
    wanted = (4 if schedule == "uniform" else 5) * blocks // step * step
    exact, next_one = (Fit(footprint, use(total), 0).total for total in (wanted, wanted + step))
    # Not a byte to spare, and just short of the next number.
    for number, budget in enumerate((exact, next_one - 1)):
        settings: dict[str, Any] = {"schedule": schedule, "context": 128, "budget_gib": budget / GIB, **goal}
        summary = prune(source, tmp_path / f"out{number}", **settings).summary
        memory = summary["memory"]
        assert memory["budget_bytes"] == budget
        assert summary["experts_in_all_layers"] == wanted
        assert memory["weights_bytes"] == open_checkpoint(tmp_path / f"out{number}").nbytes
        assert memory["fits"] is True
        assert memory["total_bytes"] <= exact
        if schedule != "global":
            assert memory["total_bytes"] == exact, "as it was planned"


def test_the_card_and_the_terminal_show_the_terms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    ids = write_token_ids(tmp_path / "ids.jsonl")
    gib = budget_for(read_footprint(str(source)), 5, 100)
    arguments = ["run", str(source), "-o", str(tmp_path / "out"), "--calibration", str(ids), "--context", "128"]
    result = CliRunner().invoke(main, [*arguments, "--budget-gib", str(gib), "--json"])
    assert result.exit_code == 0, result.output
    told = capfd.readouterr().err + result.stderr
    plan, _, rest = told.partition("layer 0/3")
    assert "keeping 5 of 8" in plan, "the plan comes first"
    assert "fits the budget" in plan
    assert "KV cache" in plan
    assert "fits the budget" in rest
    card = (tmp_path / "out" / "README.md").read_text()
    memory = json.loads(result.stdout)["memory"]
    assert "## Memory" in card
    for term in memory["terms"]:
        assert f"| {term['name']} |" in card
    assert "Pruned for a budget of" in card


def test_a_dry_run_tells_the_plan_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run reads no weights")

    monkeypatch.setattr("streamprune.streaming.layer_weights.LayerWeights.__init__", read)
    before = sorted(tmp_path.rglob("*"))
    gib = budget_for(read_footprint(str(source)), 4)
    arguments = ["run", str(source), "-o", str(tmp_path / "out"), "--context", "128", "--dry-run", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--budget-gib", str(gib)])
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["experts_per_layer"] == 4
    assert planned["memory"]["fits"] is True
    written = format_bytes(planned["memory"]["weights_bytes"])
    assert f"weights: {format_bytes(open_checkpoint(source).nbytes)} -> {written}\n" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    by_keep = json.loads(CliRunner().invoke(main, [*arguments, "--keep", "4"]).stdout)
    assert by_keep["memory"]["total_bytes"] == planned["memory"]["total_bytes"]


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "run"])
def test_a_budget_that_nothing_fits_exits_with_3(tmp_path: Path, dry: bool) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    arguments = ["run", str(source), "-o", str(tmp_path / "out"), "--budget-gib", "0.25"]
    result = CliRunner().invoke(main, [*arguments, *(["--dry-run"] if dry else [])])
    assert result.exit_code == DoesNotFitError.exit_code == 3
    assert "minimum that the router needs, 2 of 8 experts" in result.stderr
    assert not (tmp_path / "out").exists()
    # The advice is taken: 0.6 would be the rounder number, and fit the unpruned model.
    advised = re.search(r"settings that fit: --budget-gib (\S+) \(", result.stderr)
    assert advised is not None
    accepted = CliRunner().invoke(main, [*arguments[:-1], advised[1], "--dry-run", "--json"])
    assert accepted.exit_code == 0, accepted.output
    assert json.loads(accepted.stdout)["memory"]["fits"] is True


def test_a_budget_that_everything_fits_is_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    with pytest.raises(SettingsError, match=r"already fits 80\.00 GiB .*, so nothing would be removed"):
        prune(source, tmp_path / "out", budget_gib=80)


def test_a_model_without_a_known_cache_is_pruned_by_number_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*_: Any) -> None:
        raise UnsupportedModelError("its KV cache size is unknown")

    monkeypatch.setattr("streamprune.fit.structure.trace_cache", trace)
    source = make_model(tmp_path / "model", tiny_config(known_family("gpt_oss")))
    result = prune(source, tmp_path / "out", keep=4)
    assert result.summary["memory"] is None
    assert "## Memory" not in (result.output / "README.md").read_text()
    with pytest.raises(UnsupportedModelError, match="its KV cache size is unknown"):
        prune(source, tmp_path / "other", budget_gib=0.5017, context=128)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "Say in one way how far to prune"),
        ({"keep": 4, "budget_gib": 24.0}, "Say in one way"),
        ({"budget_gib": 24.0, "gpu": "rtx-3090"}, "Say in one way"),
        ({"budget_gib": 24.0, "context": 0}, "--context 0 is too small"),
        ({"budget_gib": 24.0, "batch": 0}, "--batch 0 is too small"),
    ],
)
def test_goals_that_contradict_each_other(goal: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        RunSettings(model="m", output=tmp_path / "out", **goal)


@pytest.mark.parametrize("budget", [-1.0, 0.0, float("nan"), float("inf")])
def test_budgets_that_are_no_sizes(budget: float, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    with pytest.raises(SettingsError, match="must be above 0"):
        prune(source, tmp_path / "out", budget_gib=budget)


def test_the_cache_is_planned_in_the_dtype_of_the_config(tmp_path: Path) -> None:
    # Whatever a model is scored in: `fit`, the plan of a run, the record of its result, and its report say the same.
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    expected = Estimate(read_footprint(str(source)), ServingSpec(context=256, keep=4))
    assert expected.kv_cache_bytes == 4 * 2 * 2 * 16 * 2 * 256
    result = prune(source, tmp_path / "out", keep=4, dtype="float32")
    assert result.summary["memory"]["kv_cache_bytes"] == expected.kv_cache_bytes
    memory = read_facts(result.output).memory
    assert not isinstance(memory, str)
    assert memory.after.kv_cache_bytes == expected.kv_cache_bytes
    assert read_facts(result.output).record.use == PlannedUse(context=256, batch=1, kv_dtype="auto")
