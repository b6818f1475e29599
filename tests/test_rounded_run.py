"""`run --weights w4a16`: rounded by GPTQ within the run, measured as written, resumed to the same bytes, refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import EvalSettings, RunSettings
from streamprune.demo.demo import shipped_model
from streamprune.errors import InterruptedRunError, ResourceError, SettingsError, UnsupportedModelError, VerifyError
from streamprune.evaluation.evaluate import evaluate_text, read_data
from streamprune.hardware.memory_plan import MemoryPlan
from streamprune.output.verify import verify
from streamprune.pipeline.run import run
from streamprune.progress import Progress
from streamprune.reporting.card import reproduce_command
from streamprune.reporting.record import read_record
from streamprune.streaming import layer_rounding, quantize_stage
from streamprune.streaming.quantize_stage import QuantizeStage
from streamprune.streaming.refit_stage import RefitStage
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import ForwardStage, LayerTask, PrunedForwardStage
from streamprune.streaming.written_tensors import bytes_of
from tests.faults import Case
from tests.helpers import DECODES_FLOATS, known_family, read_tensors, streamed, token_ids, tree_bytes
from tests.launching import launch
from tests.test_quantized_results import load
from tests.thorough import thorough
from tests.tiny import make_model, tiny_config, write_token_ids


def rounded_case(folder: Path, family: str = "qwen3_moe", **settings: Any) -> Case:
    """A small model, enough text for its experts, and what an undisturbed run makes of it."""
    kind = known_family(family)
    model = make_model(folder / "model", tiny_config(kind))
    (model / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    tokens = write_token_ids(folder / "ids.jsonl", sequences=30)
    given = {"keep": kind.keep, "batch_tokens": 120, "checkpoint_every": 0.0, "weights": "w4a16", **settings}
    case = Case(model, tokens, folder / "undisturbed", given, {})
    case.run()
    case.expected = tree_bytes(case.output)
    return case


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return rounded_case(tmp_path_factory.mktemp("made"))


def computed_of(case: Case) -> dict[str, dict[str, str]]:
    computed: dict[str, dict[str, str]] = json.loads(case.expected["streamprune.json"])["computed"]
    return computed


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors") and "scores" not in name}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", {}), ("deepseek_v3", {})]
    + [("qwen3_moe", {"weights": weights}) for weights in ("w8a16", "fp8", "fp8-dynamic")]
    + [("qwen3_moe", {"weights": weights, "refit": True, "anchor": "none"}) for weights in ("fp8", "fp8-dynamic")]
    + [
        pytest.param(name, {}, marks=thorough)
        for name in ("glm4_moe", "qwen2_moe", "olmoe", "mixtral", "ernie4_5_moe", "qwen3_5_moe_text")
    ],
)
def test_what_is_measured_is_what_stock_transformers_loads(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    case = rounded_case(tmp_path, family, evaluate=True, rounding="gptq", **settings)
    stages = {origin["stage"] for origin in computed_of(case).values()}
    assert stages == {"gptq"}
    # Codes alone, but scales too of what was refitted: the others are made again from the source.
    scales = [name for name in computed_of(case) if name.endswith(("_scale", "_scale_inv"))]
    assert all(".down_proj." in name for name in scales)
    assert bool(scales) is ("refit" in settings)
    assert verify(case.output, case.model).computed == len(computed_of(case)) > 50
    [stated] = [json.loads(data) for name, data in case.expected.items() if name.endswith("text.json")]
    recipe = case.output.with_name("undisturbed.held-out") / "recipe.json"
    given = EvalSettings(model=str(case.output), against=str(case.model), device="cpu", data=(str(recipe),))
    with Progress(0, quiet=True) as progress:
        measured = evaluate_text(given, read_data(given), progress)
    assert measured.result["all"]["kl"] == pytest.approx(stated["all"]["kl"], rel=1e-3)
    ids = token_ids()
    logits, _ = streamed(case.output, ids, torch.float32)
    with torch.no_grad():
        if DECODES_FLOATS or settings.get("weights") != "fp8-dynamic":
            torch.testing.assert_close(load(case.output)(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_gptq_does_less_damage_than_rounding_to_nearest(made: Case, tmp_path: Path) -> None:
    """Of a layer's matrices, on the text that they were rounded by."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "say", lambda self, text, *_: said.append(text))
        case = made.at(tmp_path / "out")
        case.run()
    case.check()
    found = [line.partition("output ")[2].partition(";")[0].split(" -> ") for line in said if ": rounded, " in line]
    ratios = [float(after) / float(before) for before, after in found]
    assert len(ratios) == 4
    assert max(ratios) < 0.9
    assert sum(ratios) / 4 < 0.7


def test_gptq_leaves_less_than_0_6_of_the_divergence_that_rounding_to_nearest_makes(tmp_path: Path) -> None:
    """Of the demo's trained model with all experts, on text that was not used."""
    demo = shipped_model(tmp_path / "demo", echo=lambda _: None)
    calibration = []
    for domain, rows in demo.calibration.items():
        path = tmp_path / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows[:16]))
        calibration.append(str(path))
    whole = AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32).eval()
    ids = torch.cat([rows[:6] for rows in demo.held_out.values()])
    found = {}
    for rounding in ("rtn", "gptq"):
        output = tmp_path / rounding
        settings = RunSettings(
            model=str(demo.folder), output=output, calibration=tuple(calibration), weights="w4a16", rounding=rounding
        )
        run(settings, quiet=True)
        with torch.no_grad():
            wanted, given = (model(ids).logits.log_softmax(-1) for model in (whole, load(output)))
        found[rounding] = float((wanted.exp() * (wanted - given)).sum(-1).mean())
    assert found["gptq"] < 0.6 * found["rtn"]


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("every", [0.0, 1e6], ids=["states saved", "all recomputed"])
def test_a_rounding_that_ended_in_any_layer_goes_on(made: Case, tmp_path: Path, block: int, every: float) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=block, checkpoint_every=every)
    case.resume()
    case.check()


def stop_in(stage: type[ForwardStage], layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the user stop the run once, when `stage` has computed a micro-batch of a layer."""
    usual, asked = stage.compute, []

    def compute(self: Any, task: LayerTask, *arguments: Any) -> Any:
        after = usual(self, task, *arguments)
        if task.index == layer and not asked:
            asked.append(layer)
            os.kill(os.getpid(), signal.SIGTERM)
        return after

    monkeypatch.setattr(stage, "compute", compute)


def check_stop_in(stage: type[ForwardStage], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in(stage, 2, monkeypatch)
    with pytest.raises(InterruptedRunError):
        case.run(checkpoint_every=1e6)
    monkeypatch.undo()
    case.resume()
    case.check()


@pytest.mark.parametrize("stage", [ScoreStage, QuantizeStage, PrunedForwardStage])
def test_a_rounding_that_was_stopped_in_any_stage_goes_on(
    made: Case, tmp_path: Path, stage: type[ForwardStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_stop_in(stage, made.at(tmp_path / "out"), monkeypatch)


def test_damaged_shards_of_a_rounded_layer_are_made_again(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=3)
    text = (case.work / "layers" / "00001.json").read_text()
    name = next(file for file in sorted((case.work / "model").iterdir()) if file.name in text)
    data = bytearray(name.read_bytes())
    data[-3] ^= 1
    name.write_bytes(data)
    case.resume()
    case.check()


def test_no_byte_depends_on_how_many_experts_are_rounded_at_a_time(made: Case, tmp_path: Path) -> None:
    for number, changes in ((1, {}), (2, {"states": "disk"}), (3, {"from_layer": None})):
        case = made.at(tmp_path / str(number))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryPlan, "experts_at_a_time", property(lambda plan, number=number: number))
            case.run(**changes)
        assert weights_of(tree_bytes(case.output)) == weights_of(made.expected)


def test_chunks_are_halved_when_memory_runs_out(made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, sizes = layer_rounding.gptq, []

    def gptq(weights: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(weights))
        if len(weights) > 2:
            raise torch.OutOfMemoryError("no 3 GiB")
        return usual(weights, *more)

    monkeypatch.setattr(layer_rounding, "gptq", gptq)
    case = made.at(tmp_path / "out")
    case.run()
    assert {1, 2, 5} <= set(sizes)
    assert weights_of(tree_bytes(case.output)) == weights_of(made.expected)


def test_experts_with_few_tokens_are_rounded_to_nearest(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_stage, "LEAST_TOKENS", 290)
        case.interrupt(at=3)
        case.resume()
    record = read_record(case.output)
    assert record.rounding
    rounded = record.rounding.layers[1]
    thin = [place for place, tokens in enumerate(rounded.tokens) if tokens < 290]
    assert rounded.nearest == thin
    assert 0 < len(thin) < 5
    nearest = case.at(tmp_path / "nearest")
    nearest.run(rounding="rtn")
    ours, theirs = read_tensors(case.output), read_tensors(nearest.output)
    computed = json.loads((case.output / "streamprune.json").read_text())["computed"]
    for place in range(5):
        name = f"model.layers.1.mlp.experts.{place}.up_proj.weight_packed"
        assert (name in computed) is (place not in thin)
        assert torch.equal(ours[name], theirs[name]) is (place in thin)
    assert verify(case.output, case.model).computed == len(computed)
    card = (case.output / "README.md").read_text()
    assert f"as it is for {record.rounding.nearest} experts with too few of these tokens" in card


@pytest.mark.parametrize("weights", ["w4a16", "fp8-dynamic"])
def test_codes_of_exchanged_experts_do_not_fit_their_scales(weights: str, tmp_path: Path) -> None:
    """As a fault of the writer would exchange them, with the hashes that fit."""
    case = rounded_case(tmp_path, weights=weights, rounding="gptq")
    name = "model.layers.1.mlp.experts.{}.up_proj.{}"
    codes, scales = ("weight_packed", "weight_scale") if weights == "w4a16" else ("weight", "weight_scale")
    assert verify(case.output, case.model).computed
    record = json.loads((case.output / "streamprune.json").read_text())
    entries = open_checkpoint(case.output).tensors
    assert name.format(2, codes) in record["computed"]

    def exchange(part: str) -> None:
        one, two = entries[name.format(2, part)], entries[name.format(3, part)]
        data = bytearray((case.output / one.file).read_bytes())
        other = data if two.file == one.file else bytearray((case.output / two.file).read_bytes())
        first, second = data[one.begin : one.end], other[two.begin : two.end]
        data[one.begin : one.end], other[two.begin : two.end] = second, first
        (case.output / one.file).write_bytes(data)
        (case.output / two.file).write_bytes(other)

    for part in (codes, scales):
        exchange(part)
    computed = record["computed"]
    one, two = name.format(2, codes), name.format(3, codes)
    computed[one], computed[two] = computed[two], computed[one]
    (case.output / "streamprune.json").write_text(json.dumps(record))
    with pytest.raises(VerifyError, match=rf"{re.escape(name.format(2, scales))} differs from what .* is rounded to"):
        verify(case.output, case.model)
    # Nor does a record help that says that the scales were computed.
    data = read_tensors(case.output)[name.format(2, scales)]
    computed[name.format(2, scales)] = {"stage": "gptq", "sha256": hashlib.sha256(bytes_of(data)).hexdigest()}
    (case.output / "streamprune.json").write_text(json.dumps(record))
    with pytest.raises(VerifyError, match="on record as computed by gptq"):
        verify(case.output, case.model)


def test_a_stage_that_exchanges_experts_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = layer_rounding.gptq

    def gptq(*given: Any) -> Any:
        found = usual(*given)
        return replace(found, codes=found.codes.flip(0), scales=found.scales.flip(0), values=found.values.flip(0))

    monkeypatch.setattr(layer_rounding, "gptq", gptq)
    with pytest.raises(
        VerifyError, match=r"layers\.0\.mlp\.experts\..*weight_scale differs from what .* is rounded to"
    ):
        rounded_case(tmp_path)


def test_what_was_rounded_by_which_text_is_on_record(made: Case, tmp_path: Path) -> None:
    record = read_record(made.output)
    assert record.rounding
    assert [layer.index for layer in record.rounding.layers] == [0, 1, 2, 3]
    assert record.rounding.tokens == 30 * 24
    assert 0 < record.rounding.error_after < 0.7 * record.rounding.error_before
    assert record.rounding.nearest == 0
    # By the calibration that the experts were scored on.
    assert record.other_text is None
    command = reproduce_command(record)
    assert command.startswith("streamprune run ")
    assert "--weights w4a16" in command
    assert "--calibration ids.jsonl" in command
    other = write_token_ids(tmp_path / "other.jsonl", sequences=30, seed=9)
    case = made.at(tmp_path / "out")
    case.run(scores=made.output, calibration=(str(other),))
    record = read_record(case.output)
    assert record.other_text is not None
    command = reproduce_command(record)
    assert "--scores" in command
    assert "--calibration other.jsonl" in command


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_refitted_weights_are_rounded(rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = rounded_case(tmp_path, refit=True, anchor="none", rounding=rounding)
    stages = {name: origin["stage"] for name, origin in computed_of(case).items()}
    assert not any(name.endswith("weight") for name in stages)
    refitted = {name for name, stage in stages.items() if stage == "refit"}
    assert all(".down_proj." in name for name in refitted)
    assert bool(refitted) is (rounding == "rtn")
    assert verify(case.output, case.model).computed == len(stages)
    plain = case.at(tmp_path / "plain")
    plain.run(weights="source", rounding=None)
    # In the first layer, whose refit knows of no rounding.
    wanted = read_tensors(plain.output)["model.layers.0.mlp.experts.0.down_proj.weight"]
    found = load(case.output).model.layers[0].mlp.experts.down_proj[0].detach()
    assert float((found - wanted).norm() / wanted.norm()) < 0.15
    check_stop_in(RefitStage, case.at(tmp_path / "stopped"), monkeypatch)
    again = case.at(tmp_path / "again")
    again.interrupt(at=2)
    again.resume()
    again.check()


def test_a_selection_over_all_layers_is_rounded_in_a_sweep_of_its_own(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "global")
    case.run(schedule="global", evaluate=True)
    computed = json.loads((case.output / "streamprune.json").read_text())["computed"]
    assert verify(case.output, case.model).computed == len(computed) > 50
    # From saved scores it is the same.
    case.expected = tree_bytes(case.output)
    scores = case.at(tmp_path / "scores")
    scores.run(schedule="global", scores=case.output, evaluate=True)
    names = set(weights_of(tree_bytes(scores.output)))
    assert names == set(weights_of(case.expected))


def test_two_processes_round_as_one(made: Case, tmp_path: Path) -> None:
    words: list[object] = [
        "run", made.model, "-o", tmp_path / "out", "--keep", 5, "--batch-tokens", 120, "--calibration", made.tokens,
        "--weights", "w4a16", "--device", "cpu",
    ]  # fmt: skip
    ended = launch(words, [tmp_path] * 2).end()
    assert [code for code, *_ in ended] == [0, 0], ended
    before, after = read_tensors(made.output), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    differing = total = 0
    for name, tensor in before.items():
        if name.endswith("_packed"):
            # (Sums in another order may round a value that is between two codes to the other one.)
            total += tensor.numel()
            differing += int((tensor != after[name]).sum())
        else:
            assert torch.equal(tensor, after[name]), name
    assert differing <= total / 500


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"propagate": "pruned"}, "Leave out --propagate pruned, or round to nearest with --rounding rtn"),
    ],
)
def test_settings_that_exclude_rounding_by_text(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        RunSettings(**{"model": "model", "output": tmp_path / "out", "keep": 4, "weights": "w4a16", **settings})


def test_experts_that_cannot_be_seen_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family("llama4_text")))
    tokens = write_token_ids(tmp_path / "ids.jsonl")
    case = Case(model, tokens, tmp_path / "out", {"keep": 4, "weights": "w4a16"}, {})
    with pytest.raises(UnsupportedModelError, match=r"GPTQ cannot round the experts of layer 1: .* --rounding rtn"):
        case.run()


def test_too_little_memory_is_refused_with_what_rounding_needs(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.planning.memory_needs.machine.available_memory_bytes", lambda: 600 * 2**10)
        with pytest.raises(ResourceError, match="what rounding needs"):
            case.run()
