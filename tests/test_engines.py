"""What engines take: the rules at their edges, refusals before a weight is read, and rounding to good numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec import structs

from streamprune.cli import main
from streamprune.errors import DoesNotFitError, SettingsError
from streamprune.fit.answer import Budget, fit_text
from streamprune.fit.engine_rules import NAMES, RULES, Served
from streamprune.fit.engines import check_served, engine_notes, findings, good_count
from streamprune.fit.estimate import Fit, Footprint
from streamprune.models.config_json import ExpertSpec, WidthSpec
from streamprune.planning.candidates import Searchable, lay_out
from streamprune.planning.counts import ExpertCounts, Prunable, plan_counts
from streamprune.reporting.card import reproduce_command
from streamprune.reporting.record import read_record
from streamprune.targets import ENGINES, PruningTarget, ServingSpec
from tests.helpers import prune
from tests.test_fit import made_up

SOFTPLUS = {"scoring_func": "sqrtsoftplus"}
FP8 = {"quantization_config": {"quant_method": "fp8"}}


def packed(form: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": form}}


def served(*counts: int, groups: int = 1, topk_groups: int = 1, of: int = 2048, **given: Any) -> Served:
    """A result whose layers keep these numbers of experts, of `of` in the source."""
    return Served(ExpertSpec((), "num_experts", of, 4, groups, topk_groups), counts, **given)


def verdict(result: Served, engine: str, about: str = "count") -> str:
    """What the rules of an engine about one thing say: it refuses a result, is slow with it, or neither."""
    found = [
        each.rule
        for each in findings(result, engine)
        if each.rule.about == about and (each.rule.rounds or about != "count")
    ]
    return "refuses" if any(rule.refuses for rule in found) else "slow" if found else "takes"


def test_quantized_for_llama_cpp_its_converter_still_reads_the_source() -> None:
    footprint = replace(made_up(), config={"quantization_config": {"quant_method": "awq"}})
    for weights in ("source", "Q4_K_M"):
        found = footprint.served(ServingSpec(weights=weights))
        assert found is not None
        with pytest.raises(SettingsError, match="does not read weights stored as awq"):
            check_served(found, "llama.cpp")


def test_every_rule_names_its_engine_and_its_source() -> None:
    assert {rule.engine for rule in RULES} == set(ENGINES) == set(NAMES)
    assert all("/" in rule.source and rule.checked in ("read", "run") for rule in RULES)
    for rule in RULES:
        # Every field of a sentence is known, and none ends with a full stop.
        text = next((each.text for each in findings(_unmet(rule.about), rule.engine)), "")
        assert "{" not in text
        assert not rule.says.endswith(".")


def _unmet(about: str) -> Served:
    config = packed("another") if about == "stored" else {}
    return served(
        37, 38, groups=4, topk_groups=4, width=20, weights="fp8" if about == "width" else "source", config=config
    )


@pytest.mark.parametrize(
    ("engine", "takes", "slow"),
    [
        ("vllm", (1, 128, 192, 256, 320, 384, 448, 512, 576), (3, 37, 96, 160, 640, 1024)),
        ("llama.cpp", (128, 288, 512, 576), (37, 192, 384, 1024)),
        ("sglang", (64, 1024), (37, 192, 384)),
        ("tensorrt-llm", (8, 60, 84), (4, 37, 62)),
        ("transformers", (37, 1500), ()),
    ],
)
def test_numbers_of_experts_at_the_edges(engine: str, takes: tuple[int, ...], slow: tuple[int, ...]) -> None:
    assert {count: verdict(served(count), engine) for count in takes} == dict.fromkeys(takes, "takes")
    assert {count: verdict(served(count), engine) for count in slow} == dict.fromkeys(slow, "slow")


@pytest.mark.parametrize(
    ("engine", "result", "expected"),
    [
        # vLLM's router for DeepSeek-V4 has no slower way.
        ("vllm", served(160, config=SOFTPLUS), "refuses"),
        ("vllm", served(192, config=SOFTPLUS), "takes"),
        ("vllm", served(160, config={"model_type": "deepseek_v4"}), "refuses"),
        # On Blackwell its FP8 kernels end at 512, which others do not.
        ("vllm", served(576, config=FP8), "slow"),
        ("vllm", served(576, weights="fp8"), "slow"),
        ("vllm", served(576, config=FP8, weights="bf16"), "takes"),
        # Groups: more experts than groups, and equally many in each.
        ("vllm", served(64, groups=8, topk_groups=4), "takes"),
        ("vllm", served(8, groups=8, topk_groups=4), "refuses"),
        ("vllm", served(192, groups=5, topk_groups=2), "refuses"),
        ("llama.cpp", served(64, groups=8, topk_groups=4), "takes"),
        ("llama.cpp", served(8, groups=8, topk_groups=4), "refuses"),
        ("llama.cpp", served(1025), "refuses"),
    ],
)
def test_numbers_that_an_engine_cannot_take(engine: str, result: Served, expected: str) -> None:
    assert verdict(result, engine) == expected


@pytest.mark.parametrize(
    ("engine", "about", "result", "expected"),
    [
        *((engine, "layers", served(4, 8), "refuses") for engine in ENGINES if engine != "transformers"),
        ("transformers", "layers", served(4, 8), "slow"),
        *((engine, "layers", served(8), "takes") for engine in ENGINES),
        ("llama.cpp", "router", served(8, groups=2, topk_groups=2), "refuses"),
        ("llama.cpp", "router", served(8, groups=2, topk_groups=1), "takes"),
        ("vllm", "width", served(8, width=48, weights="fp8"), "refuses"),
        ("vllm", "width", served(8, width=96, weights="fp8"), "slow"),
        ("vllm", "width", served(8, width=128, weights="fp8"), "takes"),
        ("vllm", "width", served(8, width=20), "takes"),
        ("tensorrt-llm", "width", served(8, width=96, weights="fp8"), "slow"),
        ("llama.cpp", "width", served(8, width=512), "takes"),
        ("llama.cpp", "width", served(8, width=384), "slow"),
        ("llama.cpp", "width", served(8, width=20), "slow"),
        ("transformers", "width", served(8, width=20), "slow"),
        ("transformers", "width", served(8, width=20, itemsize=4), "takes"),
        ("vllm", "stored", served(8, weights="w4a16", config={"hidden_size": 192}), "slow"),
        ("vllm", "stored", served(8, weights="w4a16", config={"hidden_size": 256}), "takes"),
        ("llama.cpp", "stored", served(8, config={"quantization_config": {"quant_method": "awq"}}), "refuses"),
        ("llama.cpp", "stored", served(8, config=packed("pack-quantized")), "takes"),
        ("llama.cpp", "stored", served(8, config=packed("mxfp4-pack-quantized")), "refuses"),
        ("llama.cpp", "stored", served(8, config=packed("mxfp4-pack-quantized"), weights="bf16"), "takes"),
        ("transformers", "stored", served(8, config=packed("int-quantized")), "slow"),
        ("transformers", "stored", served(8, config=FP8), "takes"),
    ],
)  # fmt: skip
def test_layers_widths_and_formats(engine: str, about: str, result: Served, expected: str) -> None:
    assert verdict(result, engine, about) == expected


def test_experts_divide_among_gpus_where_loads_are_balanced() -> None:
    texts = {
        count: [each.text for each in findings(served(count), "vllm") if "GPUs" in each.text] for count in (37, 60, 64)
    }
    assert texts[37][0].endswith("divides 37: not 2, 4 or 8")
    assert texts[60][0].endswith("divides 60: 2 or 4, not 8")
    assert not texts[64]


def test_good_numbers_are_the_next_ones_below_that_the_router_can_work_with() -> None:
    assert [good_count(served(83), engine) for engine in ("vllm", "tensorrt-llm", "sglang", "transformers", None)] == [
        64, 80, 64, 83, 64,
    ]  # fmt: skip
    assert good_count(served(200), "vllm") == 192
    assert good_count(served(300), "llama.cpp") == 288
    assert good_count(served(64), None) == 64
    # Of groups, whole ones: 190 is in no group of 8.
    assert good_count(served(248, groups=8, topk_groups=4), "vllm") == 192
    # From the four that the router needs: three are not enough.
    assert good_count(served(7, of=16), "sglang") == 4
    assert good_count(served(7, groups=3, topk_groups=2), "sglang") is None


def test_without_an_engine_only_what_pruning_changed_is_said() -> None:
    notes = list(engine_notes(served(37, of=128), None, 2.0**30))
    assert "37 experts per layer run without the fastest kernels of vLLM, llama.cpp, TensorRT-LLM, SGLang" in notes[0]
    assert notes[1] == "32 experts are good for all engines: 5 fewer in every layer, 5.00 GiB in all (--round-for)"
    # A source of 60 experts is as slow, but for 37's indivisibility by 4.
    assert "kernels of TensorRT-LLM (" in next(engine_notes(served(37, of=60), None, None))
    assert not list(engine_notes(served(64, of=128), None, None))
    assert not list(engine_notes(served(4, 37, of=128), None, None))
    assert not list(
        engine_notes(served(64, of=128, config={"quantization_config": {"quant_method": "awq"}}), None, None)
    )
    refused = list(engine_notes(served(160, of=256, config=SOFTPLUS), None, None))
    assert "takes, on GPUs, no 160 experts" in refused[0]


def test_a_named_engine_refuses_with_its_reason_its_source_and_what_to_do() -> None:
    check_served(served(160, config=SOFTPLUS), None)
    check_served(served(160, config=SOFTPLUS), "llama.cpp")
    with pytest.raises(SettingsError) as refused:
        check_served(served(160, config=SOFTPLUS), "vllm")
    said = str(refused.value)
    assert said.startswith(
        "--for vllm: vLLM's router for DeepSeek-V4 takes, on GPUs, no 160 experts: only powers of two"
    )
    assert "Keep 128 experts, or use --round-for vllm." in said
    assert "topk_softplus_sqrt_kernels.cu of vLLM's repository" in said


def planned(**target: Any) -> ExpertCounts:
    """What stays in a model of 128 experts (top-8) with 768 channels, in 4 layers."""
    model = Prunable(ExpertSpec((), "num_experts", 128, 8), (0, 1, 2, 3), WidthSpec((), ("x",), 768), "")

    def footprint() -> Footprint:
        raise AssertionError("no budget was given")

    return plan_counts(PruningTarget(**target), model, footprint)


def test_the_number_that_a_ratio_gives_is_rounded_down_and_keep_only_if_asked() -> None:
    assert planned(ratio=0.35).keep == 84
    rounded = planned(ratio=0.35, round_for="vllm")
    assert (rounded.keep, rounded.unrounded, rounded.total) == (64, 84, 256)
    assert rounded.per_layer == dict.fromkeys(range(4), 64)
    notes = list(rounded.engine_notes(PruningTarget(ratio=0.35, round_for="vllm"), None))
    assert notes == ["rounded for vLLM: 64 experts instead of 84, 20 fewer in every layer"]
    assert (planned(keep=84).keep, planned(keep=84, for_engine="vllm").keep) == (84, 84)
    assert planned(keep=84, round_for="vllm").keep == 64
    # The share that a note tells is the one after rounding: 64 of 128 experts, each with 640 of 768 channels.
    both = planned(ratio=0.35, by="both", round_for="vllm")
    assert (both.keep, both.width) == (64, 640)
    assert both.notes == (
        "58.3% of the experts' weights are removed instead of 35.0%, because widths are multiples of 128 "
        "(--width-multiple), and --round-for vllm keeps fewer experts.",
    )
    # All experts are the source's number, whatever is narrower.
    assert planned(width=384, round_for="vllm").keep == 128
    with pytest.raises(SettingsError, match="rounds the one number of experts of all layers, but --schedule global"):
        planned(keep=84, round_for="vllm", schedule="global")


def test_layers_that_differ_are_refused_for_what_reads_one_number() -> None:
    for schedule in ("linear-decrease", "global"):
        with pytest.raises(SettingsError, match=r"--for llama.cpp: llama.cpp reads one number.*--schedule uniform"):
            planned(keep=64, schedule=schedule, for_engine="llama.cpp")
        assert planned(keep=64, schedule=schedule, for_engine="transformers").total == 256


def test_that_no_number_which_fits_is_good_is_no_lack_of_memory() -> None:
    # Six are the fewest of its router, and no power of two up to seven.
    unpruned = made_up(count=24, top_k=6)
    budget = Budget(Fit(unpruned, ServingSpec(keep=7), 0).total, "--budget-gib 1")
    told = fit_text(Fit(unpruned, ServingSpec(round_for="sglang"), budget.nbytes), budget)
    assert "note: No number of experts up to the 7 that fit is good for SGLang." in told
    assert "Not even the fewest experts" not in told


def test_a_search_lays_out_rounded_numbers_and_leaves_out_what_has_none() -> None:
    unpruned = made_up()
    budget = Fit(unpruned, ServingSpec(keep=13), 0).total

    def laid_out(round_for: str | None) -> list[int]:
        fit = Fit(unpruned, ServingSpec(round_for=round_for), budget)
        found = lay_out(Searchable(ExpertSpec((), "num_experts", 32, 4), None, {"source": fit}, "fixed", "none"))
        return [candidate.keep for candidate in found.candidates]

    assert laid_out(None) == [13]
    assert laid_out("sglang") == [8]
    # Six are the fewest of its router, and no power of two up to seven.
    few = Fit(
        made_up(count=24, top_k=6),
        ServingSpec(round_for="sglang"),
        Fit(made_up(count=24, top_k=6), ServingSpec(keep=7), 0).total,
    )
    with pytest.raises(DoesNotFitError, match="no number of experts that fits is good for the engine of --round-for"):
        lay_out(Searchable(ExpertSpec((), "num_experts", 24, 6), None, {"source": few}, "fixed", "none"))


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_a_run_refuses_what_the_named_engine_cannot_take_before_a_weight_is_read(model: Path, tmp_path: Path) -> None:
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    uneven = ("run", model, "-o", tmp_path / "out", "--keep", "4", "--schedule", "linear-decrease")
    refused = command(*uneven, "--for", "vllm")
    assert refused.exit_code == 2, refused.output
    assert refused.stderr.startswith(
        "Error: --for vllm: vLLM reads one number of experts for all layers, and they keep "
    )
    assert not (tmp_path / "out.work").exists()
    assert command(*uneven, "--round-for", "vllm").exit_code == 2


def test_what_rounding_changed_is_said_and_recorded(model: Path, tmp_path: Path) -> None:
    out = prune(model, tmp_path / "out", ratio=0.25, round_for="sglang").output
    settings = read_record(out).settings
    assert (settings.keep, settings.rounded_for, settings.rounded_from) == (4, "sglang", 6)
    record = read_record(out)
    assert record.use is not None
    assert "--round-for" not in reproduce_command(record), "the number was rounded already"
    # A budget has room for more than was kept.
    budget = structs.replace(record, use=structs.replace(record.use, budget_bytes=2**30))
    assert "--budget-gib 1 --round-for sglang " in reproduce_command(budget)


def test_fit_rounds_and_says_what_engines_make_of_the_answer(model: Path) -> None:
    def answer(*options: str) -> dict[str, Any]:
        found = json.loads(command("fit", model, "--budget-gib", "24", "--json", *options).stdout)
        assert isinstance(found, dict)
        return found

    rounded = answer("--keep", "7", "--round-for", "sglang")
    assert rounded["experts_per_layer"] == 4
    assert any(note.startswith("rounded for SGLang: 4 experts instead of 7, 3 fewer") for note in rounded["notes"])
    assert any("7 experts per layer run without" in note for note in answer("--keep", "7")["notes"])
    assert not any("SGLang" in note for note in answer()["notes"])
    # Of a tiny budget, what fits is rounded, too.
    total = answer("--keep", "7", "--context", "64")["total_bytes"]
    small = command("fit", model, "--budget-gib", str(total / 2**30), "--context", "64", "--round-for", "sglang")
    assert small.exit_code == 3
    assert "--keep 4 " in small.stdout
    assert "rounded for SGLang: 4 experts instead of 7" in small.stdout
    unfit = command("fit", model, "--budget-gib", "24", "--keep", "7", "--for", "llama.cpp")
    assert unfit.exit_code == 0
    assert "does not fuse the routing of 7 experts" in unfit.stdout
