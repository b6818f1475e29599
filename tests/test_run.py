"""The command as users run it: what it writes, what it says, and what it refuses before reading a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune.checkpoint import reader
from streamprune.cli import main
from streamprune.errors import NonFiniteError, OutputError, ResourceError
from streamprune.hardware.memory import format_bytes
from streamprune.output.writer import OutputWriter
from streamprune.saliency.scores_file import read_scores
from tests.helpers import check_bytes, known_family, prune, read_tensors, tree_bytes
from tests.tiny import FAMILIES, Family, make_model, tiny_config, write_token_ids
from tests.tokenizer import save_tokenizer

QWEN, DEEPSEEK_V3, GPT_OSS, MIXTRAL = (
    next(family for family in FAMILIES if family.id == name)
    for name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral")
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tiny_config(QWEN))


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return write_token_ids(tmp_path / "ids.jsonl")


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(result: Result, words: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1


def kept_of(output: Path) -> dict[int, list[int]]:
    return {layer["index"]: layer["kept"] for layer in json.loads((output / "streamprune.json").read_text())["layers"]}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a weight is read."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(reader.ShardReader, "start", fail)


def test_run_writes_a_standard_checkpoint_and_tells_about_it(model: Path, ids: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(model)
    (model / "LICENSE").write_text("do as you like")
    output = tmp_path / "pruned"
    result = invoke("run", model, "-o", output, "--keep", 5, "--calibration", ids)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("layer ")]
    assert [line.split(":")[0] for line in lines] == [f"layer {number}/3" for number in range(4)]
    assert all(word in lines[0] for word in ("kept 5/8", "fewest tokens", " s, ", "peak", "left"))
    assert result.stdout == ""
    scores = output / "scores" / "scores.safetensors"
    assert f"scores, for `streamprune prune`: {scores}, {format_bytes(scores.stat().st_size)}\n" in result.stderr
    # Four layers of eight experts with 32 channels in float32.
    assert "of these, the scores of channels take 4.00 KiB (--no-channels: none)" in result.stderr

    assert AutoModelForCausalLM.from_pretrained(output).config.num_experts == 5
    reloaded = AutoTokenizer.from_pretrained(output)
    assert reloaded("hello").input_ids == tokenizer("hello").input_ids
    assert reloaded.chat_template == tokenizer.chat_template
    assert (output / "LICENSE").read_text() == "do as you like"
    assert (output / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()
    assert not (tmp_path / "pruned.work").exists()


@pytest.mark.parametrize("command", ["run", "score"])
def test_channels_are_scored_unless_told_otherwise(model: Path, ids: Path, tmp_path: Path, command: str) -> None:
    layers = {}
    for option in ("--channels", "--no-channels"):
        words = [command, model, "-o", tmp_path / option, "--calibration", ids, option]
        result = invoke(*words, *(["--keep", 5] if command == "run" else []))
        assert result.exit_code == 0, result.output
        assert ("the scores of channels take" in result.stderr) == (option == "--channels")
        layers[option] = read_scores(tmp_path / option).layers
    for with_channels, without in zip(layers["--channels"], layers["--no-channels"], strict=True):
        assert with_channels.channels is not None
        assert without.channels is None
        assert with_channels.values.tobytes() == without.values.tobytes()


def test_models_whose_channels_cannot_be_told_apart_are_scored_without(ids: Path, tmp_path: Path) -> None:
    for name in ("llama4_text", "dbrx"):
        model = make_model(tmp_path / name, tiny_config(known_family(name)))
        result = invoke("score", model, "-o", tmp_path / f"{name}.safetensors", "--calibration", ids)
        assert result.exit_code == 0, result.output
        assert "scores of channels" not in result.stderr
        assert all(layer.channels is None for layer in read_scores(tmp_path / f"{name}.safetensors").layers)


def test_report_holds_scores_counts_and_provenance_and_nothing_that_varies(
    model: Path, ids: Path, tmp_path: Path
) -> None:
    invoke("run", model, "-o", tmp_path / "a", "--ratio", 0.5, "--calibration", ids, "--quiet")
    report = json.loads((tmp_path / "a" / "streamprune.json").read_text())
    assert report["settings"]["keep"] == 4
    assert set(report["versions"]) == {"streamprune", "torch", "transformers", "safetensors", "python"}
    assert len(report["source"]["fingerprint"]) == len(report["calibration"]["fingerprint"]) == 64
    for index, layer in enumerate(report["layers"]):
        assert layer["index"] == index
        assert layer["kept"] == sorted(layer["kept"])
        assert sum(layer["counts"]) == 4 * 24 * 2
        assert len(layer["scores"]) == len(layer["counts"]) == 8
        lowest_kept = min(layer["scores"][expert] for expert in layer["kept"])
        assert all(layer["scores"][expert] <= lowest_kept for expert in set(range(8)) - set(layer["kept"]))

    shutil.copytree(model, tmp_path / "elsewhere" / "model")
    invoke("run", tmp_path / "elsewhere" / "model", "-o", tmp_path / "b", "--ratio", 0.5, "--calibration", ids)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_what_varies_goes_to_a_log_beside_the_output(model: Path, ids: Path, tmp_path: Path) -> None:
    invoke("run", model, "-o", tmp_path / "out", "--keep", 4, "--calibration", ids)
    events = [json.loads(line) for line in (tmp_path / "out.streamprune.log").read_text().splitlines()]
    assert [event["event"] for event in events] == ["block"] * 4 + ["summary"]
    assert all(event["seconds"] > 0 and event["peak_bytes"] > 0 for event in events[:4])
    assert events[-1]["host"]


def test_json_summary_on_stdout_and_quiet(model: Path, ids: Path, tmp_path: Path) -> None:
    result = invoke("run", model, "-o", tmp_path / "o", "--keep", 4, "--calibration", ids, "--quiet", "--json")
    summary = json.loads(result.stdout)
    assert result.stderr == ""
    assert summary["experts_per_layer"] == 4
    assert summary["output_bytes"] == sum(t.nbytes for t in read_tensors(tmp_path / "o").values())
    assert summary["source_bytes"] == sum(t.nbytes for t in read_tensors(model).values())


def test_model_card_has_hub_metadata(model: Path, ids: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n# Source\n")
    invoke("run", model, "-o", tmp_path / "out", "--keep", 4, "--calibration", ids)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "transformers"
    assert "4 of 8 experts" in card.text


def test_single_file_source_and_small_shards(ids: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "single", tiny_config(MIXTRAL), max_shard_size="1GB")
    assert (source / "model.safetensors").exists()
    output = tmp_path / "out"
    invoke("run", source, "-o", output, "--keep", 3, "--calibration", ids, "--max-shard-size", "30KB")
    check_bytes(source, output, kept_of(output))
    limit = 30_000 + 20_000  # the header comes on top
    largest_tensor = max(tensor.nbytes for tensor in read_tensors(output).values())
    assert all(path.stat().st_size <= max(limit, largest_tensor + 20_000) for path in output.glob("*.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(output).config.num_local_experts == 3


def test_experts_fused_in_the_source_stay_fused(model: Path, ids: Path, tmp_path: Path) -> None:
    """The same model once with one tensor per expert, once with 3-D tensors: same experts kept, same logits."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    fused = tmp_path / "fused"
    fused.mkdir()
    shutil.copy(model / "config.json", fused)
    save_file({n: t.contiguous() for n, t in whole.state_dict().items()}, fused / "model.safetensors", {"format": "pt"})
    for source, output in ((model, tmp_path / "a"), (fused, tmp_path / "b")):
        assert invoke("run", source, "-o", output, "--keep", 3, "--calibration", ids).exit_code == 0
    assert kept_of(tmp_path / "a") == kept_of(tmp_path / "b")
    tensors = read_tensors(tmp_path / "b")
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 3
    check_bytes(fused, tmp_path / "b", kept_of(tmp_path / "b"))
    tokens = torch.arange(3, 30)[None]
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in "ab")
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_aliases_and_nested_counts_are_rewritten_and_nothing_else(model: Path, ids: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"num_experts": 8, "n_routed_experts": 8, "decoder_sparse_step": 1, "num_experts_note": 8, "x": {"y": 8}}
    (model / "config.json").write_text(json.dumps(config))
    invoke("run", model, "-o", tmp_path / "out", "--keep", 5, "--calibration", ids)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {key: written[key] for key in written if written[key] != config[key]}
    assert changed == {"num_local_experts": 5, "num_experts": 5, "n_routed_experts": 5}
    assert list(written) == list(config)


def test_code_that_is_not_there_is_not_named(model: Path, ids: Path, tmp_path: Path) -> None:
    """Models that transformers knows often name Python files that nobody needs; without them the name must go."""
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "configuration_own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    invoke("run", model, "-o", tmp_path / "without", "--keep", 4, "--calibration", ids)
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "without", trust_remote_code=True).config.num_experts == 4
    (model / "configuration_own.py").write_text("# never run\n")
    invoke("run", model, "-o", tmp_path / "with", "--keep", 4, "--calibration", ids)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"] == config["auto_map"]
    assert (tmp_path / "with" / "configuration_own.py").read_text() == "# never run\n"


def test_experts_never_routed_to_are_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"input_ids": [7]}\n')
    result = invoke("run", model, "-o", tmp_path / "out", "--keep", 4, "--calibration", path, "--json")
    never = json.loads(result.stdout)["never_routed"]
    assert never == [{"layer": layer, "experts": 6} for layer in range(4)]
    assert "layer 0: 6, layer 1: 6" in result.stderr
    assert "Calibrate on more or on other text" in result.stderr


def test_non_finite_activations_stop_the_run_naming_the_place(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(QWEN), max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"Layer 2 of the original model, micro-batch 0: 96 of 96 tokens"):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work").exists(), "two layers are finished, and kept"


def test_dense_models_are_refused(ids: Path, tmp_path: Path, no_weights: None) -> None:
    source = make_model(tmp_path / "dense", tiny_config(Family("qwen3")))
    result = invoke("run", source, "-o", tmp_path / "out", "--keep", 4, "--calibration", ids)
    refused(result, "qwen3 has no Mixture-of-Experts layer")


def test_settings_are_refused_before_any_weight_is_read(
    model: Path, ids: Path, tmp_path: Path, no_weights: None
) -> None:
    def run(*options: object) -> Result:
        return invoke("run", model, "-o", tmp_path / "out", "--calibration", ids, *options)

    refused(run("--keep", 1), "the router picks 2 experts per token. Keep at least 2", status=2)
    refused(run("--keep", 8), "nothing would be removed", status=2)
    refused(run(), "Say in one way how far to prune", status=2)
    refused(run("--keep", 4, "--device", "cuda:7"), "CUDA devices here", status=2)
    refused(run("--keep", 4, "--max-shard-size", "big"), "is not a size", status=2)
    assert not (tmp_path / "out").exists()
    grouped = make_model(tmp_path / "grouped", tiny_config(DEEPSEEK_V3))
    refused(invoke("run", grouped, "-o", tmp_path / "out", "--keep", 5), "not a multiple of 2. Use --keep 4 or 6", 2)


def test_not_enough_disk_is_refused(
    model: Path, ids: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs .* KiB on the disk of .*, where 1000 B are free"):
        prune(model, tmp_path / "out", calibration=(str(ids),))


def test_not_enough_memory_for_the_hidden_states_is_refused(
    model: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprune.hardware.memory.available_memory_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"96 calibration tokens .* need .* only 1000 B are available"):
        prune(model, tmp_path / "out", states="ram")


def test_existing_output_is_kept_unless_told(model: Path, ids: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def run(*options: object) -> Result:
        return invoke("run", model, "-o", output, "--calibration", ids, "--keep", 4, *options)

    output.mkdir()
    assert run().exit_code == 0, "an empty folder is as good as none"
    before = tree_bytes(output)
    refused(invoke("run", model, "-o", output, "--calibration", ids, "--keep", 5), "is not empty")
    assert run().exit_code == 0, "it is what this command makes"
    assert tree_bytes(output) == before
    assert run("--overwrite").exit_code == 0
    assert tree_bytes(output) == before

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    refused(invoke("run", model, "-o", precious, "--keep", 4, "--overwrite"), "has no model")
    refused(invoke("run", model, "-o", model, "--keep", 4, "--overwrite"), "must not be")
    refused(invoke("run", model, "-o", model / "sub", "--keep", 4), "must not be")
    assert (precious / "thesis.txt").exists()


def test_a_failed_overwrite_keeps_the_old_output(model: Path, ids: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    invoke("run", model, "-o", output, "--calibration", ids, "--keep", 4)
    before = tree_bytes(output)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}")
    refused(invoke("run", model, "-o", output, "--calibration", bad, "--keep", 4, "--overwrite"), "line 1")
    assert tree_bytes(output) == before


def test_a_work_folder_that_is_not_ours_is_left_alone(model: Path, ids: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "mine").write_text("keep me")
    refused(invoke("run", model, "-o", tmp_path / "out", "--calibration", ids, "--keep", 4), "not made by streamprune")
    assert (work / "mine").read_text() == "keep me"


def test_what_appears_at_the_output_meanwhile_is_not_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    plain = OutputWriter.finish

    def finish(self: OutputWriter, *arguments: Any) -> None:
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
        plain(self, *arguments)

    monkeypatch.setattr(OutputWriter, "finish", finish)
    with pytest.raises(OutputError, match="is not empty"):
        prune(model, output)
    assert tree_bytes(output) == {"thesis.txt": b"years of work"}
    monkeypatch.undo()
    shutil.rmtree(output)
    prune(model, output)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_the_renames_loses_nothing(
    overwrite: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old output lies in the work folder then; the next run puts it back before it does anything else."""
    output = tmp_path / "out"
    prune(model, output, keep=4)
    before = tree_bytes(output)
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "streamprune.lock").touch()
    output.rename(tmp_path / "out.work" / "replaced")
    if overwrite:
        prune(model, output, keep=3, overwrite=True)
        assert json.loads((output / "config.json").read_text())["num_local_experts"] == 3
    else:
        with pytest.raises(OutputError, match="is not empty"):
            prune(model, output, keep=3)
        assert tree_bytes(output) == before
    assert not (tmp_path / "out.work").exists()


def test_the_output_needs_a_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(invoke("run", model, "-o", ".", "--keep", 4), "a named folder")
    refused(invoke("run", model, "-o", "/", "--keep", 4), "a named folder")
    refused(invoke("run", model, "-o", "/proc", "--keep", 4), "is a mount point")


def test_a_log_that_cannot_be_written_costs_a_note_not_the_result(model: Path, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "out.streamprune.log").mkdir()
    result = invoke("run", model, "-o", tmp_path / "out", "--keep", 4, "--calibration", ids)
    assert result.exit_code == 0
    assert "could not be written" in result.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_out_of_memory_names_the_place_and_the_remedy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_layer(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("streamprune.streaming.forward.LayerForward.run_layer", run_layer)
    with pytest.raises(ResourceError, match=r"layer 0, with a single sequence of 24 tokens .* --seq-len"):
        prune(model, tmp_path / "out")


def test_quantized_models_are_refused(model: Path, ids: Path, tmp_path: Path, no_weights: None) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    refused(invoke("run", model, "-o", tmp_path / "out", "--keep", 4), "is quantized (hqq)")


def test_remote_code_is_never_run_unasked(model: Path, ids: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    # (With an architecture of transformers, that would be used: see test_architecture.)
    config |= {"architectures": ["MyOwnForCausalLM"]}
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    trap = tmp_path / "trap"
    (model / "code.py").write_text(f"open({str(trap)!r}, 'w')\n")
    refused(invoke("run", model, "-o", tmp_path / "out", "--keep", 4), "--trust-remote-code")
    assert not trap.exists()


def test_unknown_and_broken_configs(model: Path, ids: Path, tmp_path: Path, no_weights: None) -> None:
    original = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"model_type": "not_a_model", "architectures": ["NotAModel"]}, "does not know the model"),
        ({"hidden_size": "many"}, "not a usable model config"),
        ({"num_attention_heads": 0}, f"cannot be built from {model}/config.json"),
        ({"hidden_size": 128}, "Config and shards do not belong together"),
        ({"num_hidden_layers": 6}, "lacks the tensors for"),
    ):
        (model / "config.json").write_text(json.dumps(original | change))
        refused(invoke("run", model, "-o", tmp_path / "out", "--keep", 4, "--calibration", ids), words)
        assert not (tmp_path / "out").exists()


def test_help_starts_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, streamprune.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "Prune MODEL" in invoke("run", "--help").output
