"""`--weights bf16`: a plain output of a quantized source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from streamprune.cli import main
from streamprune.config import PruneSettings
from streamprune.errors import SettingsError, VerifyError
from streamprune.output.verify import verify
from streamprune.pipeline.prune import prune as prune_from_scores
from tests.helpers import known_family, load_as_declared, prune, read_tensors
from tests.quantized import Quantized, make_quantized
from tests.tiny import make_model, tiny_config


def same_as_pruned_reference(output: Path, reference: Path) -> None:
    """The same tensors as those of the pruned reference, in bfloat16 where they were quantized."""
    found, wanted = read_tensors(output), read_tensors(reference)
    assert found.keys() == wanted.keys()
    assert any(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in wanted.items())


@pytest.fixture
def fp8(tmp_path: Path) -> Quantized:
    return make_quantized(tmp_path, "fp8")


@pytest.mark.parametrize(
    ("scheme", "family"), [("fp8", "deepseek_v3"), ("fp8-fused", "qwen3_moe"), ("mxfp4", "gpt_oss")]
)
def test_the_output_is_the_pruned_plain_model(scheme: str, family: str, tmp_path: Path) -> None:
    made, keep = make_quantized(tmp_path, scheme, family), known_family(family).keep
    (made.source / "quantize_config.json").write_text('{"bits": 8}')
    result = prune(made.source, tmp_path / "out", keep=keep, weights="bf16")
    assert prune(made.reference, tmp_path / "wanted", keep=keep).layers == result.layers
    same_as_pruned_reference(tmp_path / "out", tmp_path / "wanted")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    _, info = load_as_declared(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    proof = verify(tmp_path / "out", made.source)
    assert 0 < proof.decoded < proof.tensors


def test_no_section_is_left(tmp_path: Path) -> None:
    """Of a config.json that has the section under both of its names."""
    made = make_quantized(tmp_path, "ct-w4")
    path = made.source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "compression_config": config["quantization_config"]}))
    prune(made.source, tmp_path / "out", weights="bf16")
    assert not [name for name in json.loads((tmp_path / "out" / "config.json").read_text()) if "tion_config" in name]
    _, info = load_as_declared(tmp_path / "out")
    assert not info["missing_keys"]


def test_prune_from_scores_writes_the_same(fp8: Quantized, tmp_path: Path) -> None:
    prune(fp8.source, tmp_path / "out", weights="bf16")
    scores = tmp_path / "out" / "scores"
    prune_from_scores(
        PruneSettings(model=str(fp8.source), output=tmp_path / "again", scores=scores, keep=5, weights="bf16"),
        quiet=True,
    )
    first, second = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_changed_value_is_found(fp8: Quantized, tmp_path: Path) -> None:
    prune(fp8.source, tmp_path / "out", weights="bf16")
    path, name = next(
        (path, name)
        for path in sorted((tmp_path / "out").glob("*.safetensors"))
        for name in load_file(path)
        if ".experts.2.up_proj" in name
    )
    tensors = load_file(path)
    tensors[name][3, 5] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerifyError, match=r"experts\.2\.up_proj\.weight differs from what .*source decodes to"):
        verify(tmp_path / "out", fp8.source)


def test_a_budget_counts_the_plain_weights(fp8: Quantized, tmp_path: Path) -> None:
    """The predicted size is that of the written weights, either way."""
    sizes = {}
    for weights in ("source", "bf16"):
        output = tmp_path / f"out-{weights}"
        words = ["run", str(fp8.source), "-o", str(output), "--keep", "4", "--weights", weights]
        planned = CliRunner().invoke(main, [*words, "--calibration", "builtin", "--dry-run", "--json"])
        assert planned.exit_code == 0, planned.output
        sizes[weights] = json.loads(planned.stdout)["memory"]["weights_bytes"]
        prune(fp8.source, output, keep=4, weights=weights)
        assert sum(tensor.nbytes for tensor in read_tensors(output).values()) == sizes[weights]
    assert sizes["source"] < sizes["bf16"]


def test_a_plain_source_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    with pytest.raises(SettingsError, match=r"--weights bf16 decodes .* of .*model are plain already"):
        prune(model, tmp_path / "out", weights="bf16")


def test_the_commands_for_the_same_model_say_so(fp8: Quantized, tmp_path: Path) -> None:
    prune(fp8.source, tmp_path / "out", weights="bf16")
    assert json.loads((tmp_path / "out" / "streamprune.json").read_text())["settings"]["weights"] == "bf16"
    assert "--weights bf16" in (tmp_path / "out" / "README.md").read_text()
    again = CliRunner().invoke(main, ["report", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
