"""Outputs of quantized sources: what JSON names, what is refused before a weight is read, and what is said of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import UnsupportedModelError, VerifyError
from streamprune.formats.base import KeptExperts
from streamprune.formats.fp8 import Fp8
from streamprune.models.open import open_moe
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.output.plan import OutputSource, PrunePlan, make_plan
from streamprune.output.verify import check_formats, verify
from streamprune.pipeline import prune as pruning
from streamprune.planning.prepare import plan_pruning
from streamprune.reporting.record import read_record
from tests.faults import Case
from tests.helpers import check_bytes, prune, tree_bytes
from tests.quantized import make_quantized
from tests.tiny import write_token_ids

NAME = "model.layers.{}.mlp.experts.{}.{}_proj"
FORMAT = "FP8 (blocks of 32 x 32)"
BESIDE = "quantize_config.json"


def edit_section(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@dataclass
class Made:
    """An FP8 source whose layer 1 has plain experts, all by name in its config.json, and outputs of it.

    The files beside it name other experts. `case` is a run whose layers keep different numbers, with an evaluation.
    """

    case: Case
    kept: dict[int, list[int]]

    @property
    def source(self) -> Path:
        return self.case.model

    @property
    def output(self) -> Path:
        return self.case.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("made")
    leave = {NAME.format(1, expert, each) for expert in range(8) for each in ("gate", "up", "down")}
    source = make_quantized(home, "fp8", leave=leave).source
    beside = {"dynamic": {NAME.format(0, expert, "up"): {"bits": expert} for expert in range(8)}, "bits": 4}
    (source / BESIDE).write_text(json.dumps(beside))
    (source / "quant_config.json").write_text('{"bits":   4}')
    settings = {
        "ratio": 0.4, "schedule": "linear-decrease", "spread": 0.25, "evaluate": True, "batch_tokens": 24,
        "checkpoint_every": 0.0,
    }  # fmt: skip
    tokens = write_token_ids(home / "ids.jsonl", sequences=8)
    case = Case(source, tokens, home / "out", settings, {})
    case.run()
    case.expected = tree_bytes(case.output)
    layers = json.loads(case.expected["streamprune.json"])["layers"]
    return Made(case, {layer["index"]: layer["kept"] for layer in layers})


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def test_json_names_the_experts_that_stay(made: Made) -> None:
    """In order, each by the numbers of its layer; all else in them is as it was."""
    assert len(set(map(len, made.kept.values()))) == 2, "the layers keep different numbers"
    check_bytes(made.source, made.output, made.kept)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made.source, made.output))
    old, new = before["quantization_config"], after["quantization_config"]
    listed = [name for name in old["modules_to_not_convert"] if ".experts." not in name]
    numbers = range(len(made.kept[1]))
    # The source lists its names in alphabetical order.
    listed += [NAME.format(1, number, each) for number in numbers for each in ("gate", "up", "down")]
    assert new == {**old, "modules_to_not_convert": sorted(listed)}
    assert list(new) == list(old)
    overrides = {NAME.format(0, new, "up"): {"bits": old} for new, old in enumerate(made.kept[0])}
    assert json.loads((made.output / BESIDE).read_text()) == {"dynamic": overrides, "bits": 4}
    # Without names it is copied as it is.
    assert (made.output / "quant_config.json").read_bytes() == (made.source / "quant_config.json").read_bytes()


def test_everything_says_how_the_weights_are_stored(made: Made, tmp_path: Path) -> None:
    record = read_record(made.output)
    assert record.source.formats == [FORMAT]
    # Its layers keep different numbers.
    assert "FineGrainedFP8Config(dequantize=True)" in (made.output / "README.md").read_text()
    assert f"| quantized weights | {FORMAT} | as in the source |" in (made.output / "README.md").read_text()
    text = write_token_ids(tmp_path / "ids.jsonl")
    report = call("report", made.output)
    assert report.exit_code == 0, report.output
    assert f"{FORMAT}, as in the source</dd>" in (made.output / "report.html").read_text()
    ran = call("run", made.source, "--keep", 5, "-o", tmp_path / "out", "--calibration", text, "--json")
    assert f"; {FORMAT}, as in the source\n" in ran.stderr
    assert "scores of channels" not in ran.stderr, "no width can be chosen by them"
    assert json.loads(ran.stdout)["formats"] == [FORMAT]
    assert "dequantize=True" not in ran.stderr
    pruned = call(
        "prune",
        made.source,
        "--scores",
        made.output,
        "--schedule",
        "linear-decrease",
        "--keep",
        4,
        "-o",
        tmp_path / "small",
    )
    assert f"; {FORMAT}, as in the source\n" in pruned.stderr
    assert "note: On a GPU, transformers gives all layers the same number of quantized experts" in pruned.stderr
    scored = call("score", made.source, "-o", tmp_path / "scores.safetensors", "--calibration", text)
    assert f" KiB; {FORMAT}\n" in scored.stderr
    measured = call("eval", made.output, "--against", made.source, "--data", text, "--trust-remote-code")
    assert measured.exit_code == 0, measured.output
    assert f"layers, {FORMAT}, 256 tokens" in measured.stderr
    # Records of earlier versions do not say it.
    earlier = msgspec.to_builtins(record)
    del earlier["source"]["formats"]
    shutil.copytree(tmp_path / "out", tmp_path / "earlier")
    (tmp_path / "earlier" / "streamprune.json").write_text(json.dumps(earlier))
    assert not read_record(tmp_path / "earlier").source.formats


def test_an_output_is_verified_with_its_json_and_can_be_pushed(made: Made, tmp_path: Path) -> None:
    output = Path(shutil.copytree(made.output, tmp_path / "out"))
    assert verify(output, made.source).tensors == len(open_checkpoint(output).tensors)
    for source in ([], ["--source", made.source]):
        result = call("push", output, "--repo-id", "me/small", "--dry-run", "--trust-remote-code", *source)
        assert result.exit_code == 0, result.output
    edit_section(output, lambda section: section["modules_to_not_convert"].pop())
    last = "quantization_config.modules_to_not_convert[33]"
    with pytest.raises(VerifyError, match=re.escape(f"'{last}' is missing, but 'model.norm' is expected")):
        verify(output, made.source)
    shutil.copy(made.output / "config.json", output)
    shutil.copy(made.source / BESIDE, output)
    with pytest.raises(VerifyError, match=f"{BESIDE} differs from the renumbered experts"):
        verify(output, made.source)


def planned(source: Path, kept: int) -> tuple[PrunePlan, dict[int, KeptExperts]]:
    checkpoint = open_checkpoint(source)
    opened = open_moe(checkpoint)
    loading = find_loading_facts(checkpoint.config, opened.config, opened.skeleton)
    counts = dict.fromkeys(opened.layout.expert_layers, kept)
    plan = make_plan(OutputSource(checkpoint, opened.layout, loading), counts, 10**9)
    return plan, {layer: KeptExperts(tuple(range(kept))) for layer in counts}


def test_equal_bytes_with_other_settings_are_no_equal_weights(tmp_path: Path) -> None:
    """Such as a block size that is lost."""
    source = make_quantized(tmp_path, "fp8").source
    plan, kept = planned(source, 8)
    checkpoint = open_checkpoint(source)
    config: dict[str, Any] = {**plan.config_for(kept)}
    check_formats(plan, kept, source, checkpoint.tensors, config)
    for block, reason in (([16, 32], "does not fit"), (None, "does not state")):
        config["quantization_config"] = {**checkpoint.config["quantization_config"], "weight_block_size": block}
        with pytest.raises(VerifyError, match=reason):
            check_formats(plan, kept, source, checkpoint.tensors, config)


@pytest.mark.parametrize(
    "changed", [{"parameter": NAME.format(0, 2, "up") + ".weight"}, {"format": Fp8((16, 32))}], ids=str
)
def test_what_would_be_decoded_otherwise_is_found(changed: dict[str, Any], tmp_path: Path) -> None:
    """A scale that belongs to another weight, a block of another size: all bytes are right, and no shape is wrong."""
    source = make_quantized(tmp_path, "fp8").source
    plan, kept = planned(source, 8)
    checkpoint = open_checkpoint(source)
    assert plan.quantized is not None
    scale = NAME.format(0, 1, "up") + ".weight_scale_inv"
    found = dict(plan.quantized.stored)
    plan.quantized.__dict__["stored"] = {**found, scale: replace(found[scale], **changed)}
    with pytest.raises(VerifyError, match="or with other settings or companions"):
        check_formats(plan, kept, source, checkpoint.tensors, checkpoint.config)


PATTERNS: list[tuple[str, str]] = [
    (r"re:.*experts\.3\.up_proj", "has a pattern with the number of an expert"),
    ("mlp.experts.3", "but not in which layer"),
]


@pytest.mark.parametrize(("entry", "reason"), PATTERNS)
@pytest.mark.parametrize("schedule", ["uniform", "global"])
def test_what_cannot_be_renumbered_is_refused_before_a_weight_is_read(
    entry: str, reason: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_quantized(tmp_path, "fp8").source
    (source / "quantization_config.json").write_text(json.dumps({"ignore": [entry]}))
    monkeypatch.setattr("streamprune.streaming.layer_weights.LayerWeights.__init__", None)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        prune(source, tmp_path / "out", ratio=0.4, schedule=schedule)
    assert str(source / "quantization_config.json") in str(caught.value)
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({"0": [0, 1], "1": [2, 3]}))
    settings = PruneSettings(model=str(source), output=tmp_path / "out", keep_file=keep)
    with pytest.raises(UnsupportedModelError, match=reason):
        pruning.prune(settings, quiet=True)
    # Nothing of it is in a plain output.
    pruning.prune(replace(settings, weights="bf16"), quiet=True)
    assert not (tmp_path / "out" / "quantization_config.json").exists()
    assert verify(tmp_path / "out", source).decoded


@pytest.mark.parametrize(
    "option", [["--width", "16"], ["--ratio", "0.4", "--by", "both"], ["--keep", "5", "--refit", "--anchor", "none"]]
)
def test_values_that_change_are_refused_by_the_config_alone(option: list[str], made: Made, tmp_path: Path) -> None:
    """Before the weights of a model on the Hub are downloaded."""
    (tmp_path / "model").mkdir()
    shutil.copy(made.source / "config.json", tmp_path / "model")
    command = ["run", tmp_path / "model", "-o", tmp_path / "out", "--calibration", made.case.tokens, *option]
    for more in ([], ["--dry-run"]):
        result = call(*command, *more)
        assert result.exit_code == 1, result.output
        assert "The model's weights are quantized (fp8), so" in result.stderr
        assert "or prune the bfloat16 or float16 original" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    with pytest.raises(UnsupportedModelError, match="cannot be made narrower"):
        plan_pruning(RunSettings(model=str(tmp_path / "model"), output=tmp_path / "out", width=16))
    if "--refit" not in option:
        pruned = call("prune", made.source, "--scores", made.output, "-o", tmp_path / "out", *option)
        assert pruned.exit_code == 1, pruned.output
        assert "where several channels share a scale or a byte. Remove experts instead" in pruned.stderr


def test_a_layer_with_some_plain_experts_is_noted(made: Made, tmp_path: Path) -> None:
    """vLLM would take all experts of the layer for plain."""
    source = Path(shutil.copytree(made.source, tmp_path / "source"))
    edit_section(source, lambda section: section["modules_to_not_convert"].append(NAME.format(0, 7, "up")))
    keep = tmp_path / "keep.json"
    said = {}
    for name, experts in (("with", [0, 7]), ("without", [0, 6])):
        keep.write_text(json.dumps({"0": experts, "1": [2, 3]}))
        result = call("prune", source, "--keep-file", keep, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        said[name] = "note: In layer 0, config.json calls some experts not quantized" in result.stderr
        assert said[name] == ("In layer 0, config.json calls some" in (tmp_path / name / "README.md").read_text())
    assert said == {"with": True, "without": False}
