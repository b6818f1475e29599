"""`run --refit`: what it wins and changes, that it resumes to the same bytes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamprune.calibration.builtin_text import DOMAINS
from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import EvalSettings, RunSettings
from streamprune.demo.demo import DemoModel, shipped_model
from streamprune.errors import (
    CalibrationError,
    InterruptedRunError,
    NonFiniteError,
    ResourceError,
    SettingsError,
    UnsupportedModelError,
)
from streamprune.evaluation.evaluate import evaluate_text, read_data
from streamprune.output.verify import verify
from streamprune.pipeline.run import run
from streamprune.progress import Progress
from streamprune.refit.least_squares import Changes, Fit, RoutedTokens
from streamprune.streaming import refit_target
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.refit_stage import RefitStage
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import ForwardStage, LayerTask, PrunedForwardStage
from streamprune.work.records import read_run
from tests.faults import Case
from tests.helpers import known_family, tree_bytes
from tests.launching import launch
from tests.thorough import crossed, mostly_thorough, thorough
from tests.tiny import make_model, tiny_config, write_token_ids


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoModel:
    return shipped_model(tmp_path_factory.mktemp("demo"), echo=lambda _: None)


def write_domains(folder: Path, text: Mapping[str, torch.Tensor], sequences: int) -> tuple[str, ...]:
    """A file of token ids for each domain, as `--calibration` takes them."""
    names = []
    for domain, rows in text.items():
        path = folder / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows[:sequences]))
        names.append(str(path))
    return tuple(names)


def prune(model: Path, output: Path, calibration: tuple[str, ...], **settings: Any) -> Path:
    run(RunSettings(model=str(model), output=output, calibration=calibration, **settings), quiet=True)
    return output


def divergence(demo: DemoModel, output: Path) -> float:
    """Mean KL to the unpruned model over the held-out domains, nats per token."""
    whole, pruned = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (demo.folder, output)
    )
    found = []
    with torch.no_grad():
        for ids in demo.held_out.values():
            wanted, given = (model(input_ids=ids[:12]).logits.log_softmax(-1) for model in (whole, pruned))
            found.append(float((wanted.exp() * (wanted - given)).sum(-1).mean()))
    return sum(found) / len(found)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in open_checkpoint(folder).files for name, tensor in load_file(folder / file).items()}


def test_a_refit_halves_the_damage_and_changes_only_down_projections(demo: DemoModel, tmp_path: Path) -> None:
    text = write_domains(tmp_path, demo.calibration, 24)
    plain = prune(demo.folder, tmp_path / "plain", text, ratio=0.5)
    refitted = prune(demo.folder, tmp_path / "refitted", text, ratio=0.5, refit=True)
    assert divergence(demo, refitted) < 0.5 * divergence(demo, plain)
    before, after = tensors_of(plain), tensors_of(refitted)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    record = json.loads((refitted / "streamprune.json").read_text())
    assert changed == record["computed"].keys()
    assert all(name.endswith("down_proj.weight") for name in changed)
    assert len(changed) > 50
    proof = verify(refitted, demo.folder)
    assert (proof.tensors, proof.computed) == (len(before), len(changed))
    # What stays is the same: scores are those of the original model.
    kept = [layer["kept"] for layer in record["layers"]]
    assert kept == [layer["kept"] for layer in json.loads((plain / "streamprune.json").read_text())["layers"]]


def small_case(folder: Path, family: str = "qwen3_moe", **settings: Any) -> Case:
    """A small model whose experts get enough tokens, and what an undisturbed refit makes of it."""
    kind = known_family(family)
    model = make_model(folder / "model", tiny_config(kind))
    (model / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    tokens = write_token_ids(folder / "ids.jsonl", sequences=30)
    given = {"keep": kind.keep, "batch_tokens": 120, "checkpoint_every": 0.0, "refit": True, "anchor": "none"}
    case = Case(model, tokens, folder / "undisturbed", {**given, **settings}, {})
    case.run()
    case.expected = tree_bytes(case.output)
    assert json.loads(case.expected["streamprune.json"])["computed"]
    return case


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return small_case(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(("block", "every"), crossed([1, 3], [0.0, 1e6], usual=[(1, 0.0), (3, 1e6)]))
def test_a_refit_that_ended_in_any_layer_goes_on(made: Case, tmp_path: Path, block: int, every: float) -> None:
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
    """A run that is stopped in a stage of layer 2 resumes to the same bytes."""
    stop_in(stage, 2, monkeypatch)
    with pytest.raises(InterruptedRunError):
        case.run(checkpoint_every=1e6)
    monkeypatch.undo()
    case.resume()
    case.check()


@pytest.mark.parametrize("stage", [ScoreStage, RefitStage, PrunedForwardStage])
def test_a_refit_that_was_stopped_in_any_stage_goes_on(
    made: Case, tmp_path: Path, stage: type[ForwardStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_stop_in(stage, made.at(tmp_path / "out"), monkeypatch)


def test_a_refit_that_changed_nothing_is_on_record_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    tokens = write_token_ids(tmp_path / "ids.jsonl", sequences=2)
    settings = {"keep": 5, "batch_tokens": 24, "refit": True, "anchor": "none", "checkpoint_every": 1e6}
    case = Case(model, tokens, tmp_path / "undisturbed", settings, {})
    case.run()
    case.expected = tree_bytes(case.output)
    record = json.loads(case.expected["streamprune.json"])
    assert not any(share for layer in record["refit"]["layers"] for share in layer["shares"])
    case = case.at(tmp_path / "out")
    stop_in(PrunedForwardStage, 2, monkeypatch)
    with pytest.raises(InterruptedRunError):
        case.run()
    monkeypatch.undo()
    case.resume()
    case.check()


@pytest.mark.parametrize(
    ("problem", "error", "said"),
    [
        (
            torch.OutOfMemoryError("no 3 GiB"),
            ResourceError,
            r"refit of layer 2, .* \(no 3 GiB\)\. Use fewer --s",
        ),
        (torch.linalg.LinAlgError("not positive"), NonFiniteError, "Layer 2 cannot be refitted.*Try --dtype float32"),
    ],
)
def test_a_fit_that_fails_says_why_even_after_a_resume(
    problem: Exception, error: type[Exception], said: str, made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made.at(tmp_path / "out")
    stop_in(RefitStage, 2, monkeypatch)
    with pytest.raises(InterruptedRunError):
        case.run(checkpoint_every=1e6)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "changes", Mock(side_effect=problem))
        with pytest.raises(error, match=said):
            case.resume()
    # If hidden states or prefetched weights can leave the memory, the layer is fitted again.
    usual = Fit.changes
    with monkeypatch.context() as patch:
        patch.setattr(MicroBatches, "offload_states", lambda *_: True)
        outcomes = iter([torch.OutOfMemoryError("once")])

        def changes(fit: Fit, tokens: RoutedTokens) -> Changes:
            for outcome in outcomes:
                raise outcome
            return usual(fit, tokens)

        patch.setattr(Fit, "changes", changes)
        case.resume()
    case.check()


def test_damaged_shards_of_a_refitted_layer_are_made_again(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=3)
    record = json.loads((case.work / "layers" / "00001.json").read_text())
    text = json.dumps(record)
    name = next(file for file in sorted((case.work / "model").iterdir()) if file.name in text)
    data = bytearray(name.read_bytes())
    data[-3] ^= 1
    name.write_bytes(data)
    case.resume()
    case.check()


def test_held_out_text_goes_through_the_refitted_layers(tmp_path: Path) -> None:
    case = small_case(tmp_path, evaluate=True)
    [result] = [json.loads(data) for name, data in case.expected.items() if name.endswith("text.json")]
    stated = result["all"]["kl"]
    recipe = case.output.with_name("undisturbed.held-out") / "recipe.json"
    settings = EvalSettings(model=str(case.output), against=str(case.model), device="cpu", data=(str(recipe),))
    with Progress(0, quiet=True) as progress:
        measured = evaluate_text(settings, read_data(settings), progress)
    assert measured.result["all"]["kl"] == pytest.approx(stated, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "catch_up"),
    [
        ("gpt_oss", 1),
        ("minimax", 1),
        ("granitemoe", 1),
        ("deepseek_v3", 1),
        # A norm behind the experts: what they give is carried to the refit.
        ("gemma4_text", 0),
        pytest.param("flex_olmo", 0, marks=thorough),
        pytest.param("qwen4_exp_text", 0, marks=thorough),
        pytest.param("mixtral", 1, marks=thorough),
        pytest.param("qwen3_5_moe_text", 1, marks=thorough),
    ],
)
def test_other_families_are_refitted(
    family: str, catch_up: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small_case(tmp_path, family)
    record = json.loads(case.expected["streamprune.json"])
    assert verify(case.output, case.model).computed == len(record["computed"])
    for layer in record["refit"]["layers"]:
        assert layer["after"] < layer["before"]
        assert layer["catch_up"] == catch_up
    case = case.at(tmp_path / "out")
    stop_in(RefitStage, 1, monkeypatch)
    with pytest.raises(InterruptedRunError):
        case.run()
    monkeypatch.undo()
    case.resume()
    case.check()


@pytest.mark.parametrize("seed", mostly_thorough(range(3), (0,)))
def test_how_experts_reach_the_output_is_decided_once_in_a_layer(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(known_family("granitemoe"))
    # In half precision a small factor is measured with large errors.
    config.dtype, config.residual_multiplier, config.num_hidden_layers = torch.bfloat16, 0.22, 2
    model = make_model(tmp_path / "model", config, seed=seed)
    tokens = write_token_ids(tmp_path / "ids.jsonl", sequences=30, seed=seed)
    measure, found = refit_target.measured_factor, []

    def measured(*given: Any) -> float | None:
        found.append(measure(*given))
        return found[-1]

    monkeypatch.setattr(refit_target, "measured_factor", measured)
    settings = {"keep": 5, "refit": True, "anchor": "none", "dtype": "auto"}
    case = Case(model, tokens, tmp_path / "one", {**settings, "batch_tokens": 120}, {})
    case.run()
    assert found == pytest.approx([0.22, 0.22], rel=0.02)
    record = json.loads((case.output / "streamprune.json").read_text())
    assert [layer["catch_up"] for layer in record["refit"]["layers"]] == [1, 1]
    # The same for other micro-batches and after a stop, where it is not measured again.
    case = Case(model, tokens, tmp_path / "two", {**settings, "batch_tokens": 48}, {})
    stop_in(RefitStage, 1, monkeypatch)
    with pytest.raises(InterruptedRunError):
        case.run()
    case.resume()
    assert found[2:] == pytest.approx(found[:2], rel=0.01)


def test_a_factor_that_rounding_hides_is_none() -> None:
    output = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    for dtype, factor, known in (
        (torch.float32, 0.22, True),
        (torch.float32, 1e-3, True),
        (torch.bfloat16, 0.22, True),
        (torch.bfloat16, 0.05, True),
        (torch.bfloat16, 1e-3, False),
        (torch.float32, 0.0, False),
    ):
        rest = output.to(dtype)
        shift = refit_target.shift_for(rest)
        found = refit_target.factor_of(rest, (rest + factor * shift).to(dtype), shift)
        assert found == (pytest.approx(factor, rel=0.02) if known else None), (dtype, factor)
    # Behind a norm there is no factor.
    shift = refit_target.shift_for(output)
    given = [each / each.norm(dim=-1, keepdim=True) for each in (output, output + shift)]
    assert refit_target.factor_of(*given, shift) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"propagate": "pruned"}, "Leave out --propagate pruned"),
        ({"only_score": True, "keep": None}, "scoring alone makes none"),
        ({"refit": False, "anchor": "builtin"}, "--anchor builtin is the text that --refit also fits to"),
    ],
)
def test_settings_that_exclude_a_refit(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        RunSettings(**{"model": "model", "output": tmp_path / "out", "keep": 4, "refit": True, **settings})


@pytest.mark.parametrize(
    ("family", "said"),
    [("llama4_text", "layer 1: Llama4TextExperts does not run through transformers' experts interface")],
)
def test_models_that_cannot_be_refitted(family: str, said: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family(family)))
    tokens = write_token_ids(tmp_path / "ids.jsonl", sequences=30)
    with pytest.raises(UnsupportedModelError, match=said):
        prune(model, tmp_path / "out", (str(tokens),), keep=4, refit=True, anchor="none")


def test_two_processes_refit_what_one_does(made: Case, tmp_path: Path) -> None:
    words: list[object] = [
        "run", made.model, "-o", tmp_path / "out", "--keep", 5, "--batch-tokens", 120, "--calibration", made.tokens,
        "--refit", "--anchor", "none", "--device", "cpu",
    ]  # fmt: skip
    assert [code for code, *_ in launch(words, [tmp_path] * 2).end()] == [0, 0]
    one, two = (json.loads((folder / "streamprune.json").read_text()) for folder in (made.output, tmp_path / "out"))
    assert one["computed"].keys() == two["computed"].keys()
    before, after = tensors_of(made.output), tensors_of(tmp_path / "out")
    for name, tensor in before.items():
        if name in one["computed"]:
            # The same sums over tokens, added up in another order.
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().amax()))
        else:
            assert torch.equal(after[name], tensor)
    assert verify(tmp_path / "out", made.model).computed == len(one["computed"])


def test_general_text_in_the_fit_protects_what_the_calibration_lacks(demo: DemoModel, tmp_path: Path) -> None:
    code = write_domains(tmp_path, {"code": demo.calibration["code"]}, 96)
    (tmp_path / "general").mkdir()
    others = {domain: rows for domain, rows in demo.calibration.items() if domain != "code"}
    write_domains(tmp_path / "general", others, 12)
    plain = divergence(demo, prune(demo.folder, tmp_path / "plain", code, ratio=0.5))
    alone = divergence(demo, prune(demo.folder, tmp_path / "alone", code, ratio=0.5, refit=True, anchor="none"))
    anchor = str(tmp_path / "general")
    output = prune(demo.folder, tmp_path / "anchored", code, ratio=0.5, refit=True, anchor=anchor)
    anchored = divergence(demo, output)
    # Without general text, a fit to code alone mends nothing in the mean over the domains.
    assert alone > 0.9 * plain
    assert anchored < 0.5 * plain
    refit = json.loads((output / "streamprune.json").read_text())["refit"]
    text = refit["anchor"]
    assert text["name"] == "general"
    assert text["tokens"] >= 0.25 * (refit["fitted_tokens"] + refit["judging_tokens"])
    assert "--refit --anchor general" in (output / "README.md").read_text()


def test_a_single_source_is_anchored_on_built_in_text_by_default(demo: DemoModel, tmp_path: Path) -> None:
    code = write_domains(tmp_path, {"code": demo.calibration["code"]}, 16)
    case = Case(demo.folder, Path(code[0]), tmp_path / "out", {"ratio": 0.5, "refit": True}, {})
    case.interrupt(at=2)
    # Resuming reads the tokens that are on record, not the text.
    Path(code[0]).unlink()
    case.resume()
    anchor = json.loads((case.output / "streamprune.json").read_text())["refit"]["anchor"]
    assert anchor["name"] == "builtin"
    assert [source["name"] for source in anchor["sources"]] == list(DOMAINS)


def test_the_anchor_has_nothing_of_the_calibration(demo: DemoModel, tmp_path: Path) -> None:
    settings = {"ratio": 0.5, "refit": True, "evaluate": True, "samples": 60, "seq_len": 64}
    case = Case(demo.folder, tmp_path, tmp_path / "out", {**settings, "calibration": ("builtin:code",)}, {})
    case.interrupt(at=1)
    recorded = read_run(case.work)
    assert recorded is not None
    assert recorded.anchor is not None
    assert recorded.anchor.sources == [domain for domain in DOMAINS if domain != "code"]
    with pytest.raises(CalibrationError, match="has only text that the calibration has too"):
        case.at(tmp_path / "none").run(anchor="builtin:code")


def test_sequences_of_the_calibration_are_left_out_of_a_users_anchor(made: Case, tmp_path: Path) -> None:
    lines = made.tokens.read_text().splitlines(keepends=True)
    part, anchor = tmp_path / "part.jsonl", tmp_path / "anchor.jsonl"
    part.write_text("".join(lines[:20]))
    anchor.write_text("".join(lines))
    case = Case(made.model, part, tmp_path / "out", {**made.settings, "anchor": str(anchor)}, {})
    case.run()
    refit = json.loads((case.output / "streamprune.json").read_text())["refit"]
    assert 0 < refit["anchor"]["sequences"] <= 10
    assert refit["anchor"]["name"] == "anchor.jsonl"


def test_the_cost_is_told_before_anything_is_read(demo: DemoModel, tmp_path: Path) -> None:
    words = ["run", demo.folder, "-o", tmp_path / "out", "--ratio", 0.5, "--refit", "--dry-run", "--json"]
    told = CliRunner().invoke(main, list(map(str, words)))
    assert told.exit_code == 0, told.stderr
    refit = json.loads(told.stdout)["refit"]
    # 48 routed tokens for each of 16 x 32 units, 4 experts for each token, and a quarter more that judge.
    assert refit["tokens"] == 48 * 16 * 32 // 4 * 5 // 4
    assert "refit: 7,680 tokens; in each of 4 layers" in told.stderr
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("family", "computed_in"),
    [("qwen3_moe", "float32"), pytest.param("qwen3_moe", "auto", marks=thorough), ("gpt_oss", "float32")],
)
def test_half_precision_is_refitted_from_the_sources_own_values(family: str, computed_in: str, tmp_path: Path) -> None:
    kind = known_family(family)
    config = tiny_config(kind)
    config.dtype = torch.bfloat16
    model = make_model(tmp_path / "model", config)
    tokens = (str(write_token_ids(tmp_path / "ids.jsonl", sequences=30)),)
    settings = {"keep": kind.keep, "dtype": computed_in}
    plain = prune(model, tmp_path / "plain", tokens, **settings)
    refitted = prune(model, tmp_path / "refitted", tokens, refit=True, anchor="none", **settings)
    record = json.loads((refitted / "streamprune.json").read_text())
    assert verify(refitted, model).computed == len(record["computed"]) > 0
    before, after = tensors_of(plain), tensors_of(refitted)
    for layer in record["refit"]["layers"]:
        changes = []
        for name in (name for name in before if f"layers.{layer['index']}." in name and name in record["computed"]):
            assert after[name].dtype == before[name].dtype == torch.bfloat16
            fused = before[name].dim() == 3
            for old, new in zip(
                *((each if fused else each[None]) for each in (before[name], after[name])), strict=True
            ):
                changes.append(float((new.float() - old.float()).norm() / old.float().norm()))
        # The recorded changes are those of the rounded weights.
        stated = [change for change in layer["changes"] if change > 0]
        assert sorted(change for change in changes if change > 0) == pytest.approx(sorted(stated), rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_narrower_experts_are_refitted(family: str, tmp_path: Path) -> None:
    kind = known_family(family)
    model = make_model(tmp_path / "model", tiny_config(kind))
    tokens = (str(write_token_ids(tmp_path / "ids.jsonl", sequences=30)),)
    plain = prune(model, tmp_path / "plain", tokens, width=16, keep=6)
    refitted = prune(model, tmp_path / "refitted", tokens, width=16, keep=6, refit=True, anchor="none")
    record = json.loads((refitted / "streamprune.json").read_text())
    before, after = tensors_of(plain), tensors_of(refitted)
    assert {name for name in before if not torch.equal(before[name], after[name])} == record["computed"].keys()
    assert all(layer["after"] < layer["before"] for layer in record["refit"]["layers"])
    assert verify(refitted, model).computed == len(record["computed"])


def test_text_without_a_second_sequence_is_refused(made: Case, tmp_path: Path) -> None:
    tokens = (str(write_token_ids(tmp_path / "ids.jsonl", sequences=1)),)
    with pytest.raises(CalibrationError, match="judges the fit by others, but no source has two"):
        prune(made.model, tmp_path / "out", tokens, keep=5, refit=True, anchor="none")
