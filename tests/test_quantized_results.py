"""Results that are quantized anew, beside the plain results of the same selection: values, names, config and sizes.

The values are decoded by compressed-tensors or by transformers' own arithmetic, not by the formats under test.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import NonFiniteError, SettingsError, UnsupportedModelError, VerifyError
from streamprune.output.verify import verify
from streamprune.pipeline.dry_run import print_dry_run
from streamprune.pipeline.prune import dry_run
from streamprune.pipeline.prune import prune as prune_by_scores
from streamprune.pipeline.run import run
from tests.helpers import DECODES_FLOATS, known_family, prepare_whole, prune, read_tensors, token_ids
from tests.thorough import thorough
from tests.tiny import make_model, tiny_config, write_token_ids

unpack_from_int32 = pytest.importorskip("compressed_tensors.compressors").unpack_from_int32

FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "qwen2_moe", "olmoe", "mixtral", "ernie4_5_moe", "qwen3_5_moe_text")
SCHEMES = ("fp8", "fp8-dynamic", "w8a16", "w4a16")
#: Every family in one 8-bit and one 4-bit scheme, one family in all.
CASES = [
    pytest.param(family, scheme, id=f"{family}-{scheme}", marks=() if tried else thorough)
    for family in FAMILIES
    for scheme in SCHEMES
    for tried in [scheme in ("fp8", "w4a16") or family == "qwen3_moe"]
]


def source_of(folder: Path, family: str = "qwen3_moe", **sizes: Any) -> Path:
    kind = known_family(family)
    config = tiny_config(kind)
    for name, value in sizes.items():
        setattr(config, name, value)
    return make_model(folder / "source", config)


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """The plain weights, float32, that a quantized checkpoint means, by arithmetic of its own."""
    tensors, result = read_tensors(folder), {}
    for name, tensor in tensors.items():
        stem = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            rows, columns = tensors[f"{stem}.weight_shape"].tolist()
            scale = tensors[f"{stem}.weight_scale"].float()
            bits = 32 * tensor.shape[1] // columns
            codes = unpack_from_int32(tensor, bits, torch.Size((rows, columns))).float()
            result[f"{stem}.weight"] = codes * scale.repeat_interleave(columns // scale.shape[1], dim=1)
        elif tensor.dtype == torch.float8_e4m3fn:
            scale = tensors.get(f"{stem}.weight_scale_inv", tensors.get(f"{stem}.weight_scale"))
            assert scale is not None
            high = 128 if f"{stem}.weight_scale_inv" in tensors else 1
            wide = 128 if f"{stem}.weight_scale_inv" in tensors else tensor.shape[1]
            spread = scale.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)
            result[name] = tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith(("_scale", "_scale_inv", "_shape")):
            result[name] = tensor
    return result


def load(folder: Path) -> Any:
    """The model as stock transformers decodes it, in float32; nothing may be missing or unexpected."""
    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    how: dict[str, Any] = {}
    if method == "fp8":
        how = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    elif method:
        how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_a_quantized_result_means_the_rounded_weights(family: str, scheme: str, tmp_path: Path) -> None:
    """Stock transformers reads it, with the logits of the plain model that has the rounded weights."""
    source, output = source_of(tmp_path, family), tmp_path / "out"
    keep = known_family(family).keep
    result = prune(source, output, weights=scheme, rounding="rtn", dtype="float32", keep=keep)
    prune(source, tmp_path / "plain", dtype="float32", keep=keep)
    values, plain = decoded(output), plain_tensors(tmp_path / "plain", set(decoded(output)))
    assert values.keys() == plain.keys()
    rounded = {name for name in values if not torch.equal(values[name], plain[name])}
    assert any(".experts." in name for name in rounded)
    assert any("attn" in name for name in rounded)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in rounded)
    steps = {"w4a16": 15, "w8a16": 255}
    for name in rounded:
        most = plain[name].abs().max()
        # At most half a step of a group; E4M3 has three bits behind the leading one. (And bfloat16's scales.)
        bound = most / steps[scheme] if scheme in steps else most / 16
        assert (values[name] - plain[name]).abs().max() <= 1.02 * bound
    reference = tmp_path / "reference"
    reference.mkdir()
    save_file({name: each.contiguous() for name, each in values.items()}, reference / "model.safetensors")
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    (reference / "config.json").write_text(json.dumps(config))
    ids = token_ids()
    with torch.no_grad():
        if DECODES_FLOATS or scheme != "fp8-dynamic":
            assert torch.equal(load(output)(ids).logits, load(reference)(ids).logits)
    assert "quantized tensors, identical to the source rounded again" in verify(output, source).text
    assert result.summary["output_bytes"] == open_checkpoint(output).nbytes


def plain_tensors(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of a plain output; of joined experts each by itself, as `names` have them."""
    found = {}
    for name, tensor in read_tensors(folder).items():
        if name in names:
            found[name] = tensor
            continue
        path, _, last = name.rpartition(".")
        halves = tensor.chunk(2, dim=1) if last == "gate_up_proj" else (tensor,)
        for leaf, half in zip(("gate_proj", "up_proj") if len(halves) > 1 else (last,), halves, strict=True):
            found |= {f"{path}.{expert}.{leaf}.weight": each for expert, each in enumerate(half)}
    return found


def test_only_the_experts_are_quantized_on_request(tmp_path: Path) -> None:
    source, output = source_of(tmp_path, "deepseek_v3"), tmp_path / "out"
    prune(source, output, weights="fp8-dynamic", quantize="experts", keep=6)
    packed = {name for name, each in read_tensors(output).items() if each.dtype == torch.float8_e4m3fn}
    assert packed
    assert all(".mlp.experts." in name for name in packed)
    section = json.loads((output / "config.json").read_text())["quantization_config"]
    plain = {name.removesuffix(".weight") for name in read_tensors(output) if name.endswith("proj.weight")}
    plain -= {name.removesuffix(".weight") for name in packed}
    assert plain
    assert plain < set(section["ignore"])
    assert "lm_head" in section["ignore"]
    assert "--quantize experts" in (output / "README.md").read_text()


def test_narrow_projections_and_routers_stay_plain(tmp_path: Path) -> None:
    source, output = source_of(tmp_path, "deepseek_v3"), tmp_path / "out"
    prune(source, output, weights="fp8", keep=6)
    tensors = read_tensors(output)
    for leaf in ("q_a_proj", "kv_a_proj_with_mqa", "gate"):
        names = [name for name in tensors if name.endswith(f".{leaf}.weight")]
        assert names
        assert all(tensors[name].dtype == torch.float32 for name in names)
    record = json.loads((output / "streamprune.json").read_text())
    assert record["quantized"]["plain"] == {
        "outside the decoder's layers": 1,
        "narrow projections of multi-head latent attention": 8,
        "routers and gates": 3,
    }
    assert record["settings"]["rounding"] == "rtn"


def test_of_projections_that_engines_join_all_are_quantized_or_none(tmp_path: Path) -> None:
    """Keys and values of 192 rows cannot be read by all programs, so queries of 384 rows stay plain with them."""
    source = source_of(tmp_path, head_dim=96)
    for scheme, expected in (("fp8", {"o_proj"}), ("fp8-dynamic", {"q_proj", "k_proj", "v_proj", "o_proj"})):
        output = tmp_path / scheme
        settings = PruneSettings(model=str(source), output=output, weights=scheme)
        told = dry_run(settings, quiet=True)
        prune_by_scores(settings, quiet=True)
        tensors = read_tensors(output)
        assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (384, 64)
        packed = {name for name, each in tensors.items() if each.dtype == torch.float8_e4m3fn and "attn" in name}
        assert packed == {f"model.layers.{layer}.self_attn.{leaf}.weight" for layer in range(4) for leaf in expected}
        section = json.loads((output / "config.json").read_text())["quantization_config"]
        ignored = section.get("modules_to_not_convert", section.get("ignore"))
        assert ("model.layers.0.self_attn.q_proj" in ignored) == ("q_proj" not in expected)
        assert told["output_bytes"] == open_checkpoint(output).nbytes


@pytest.mark.parametrize("how", [{"schedule": "global", "ratio": 0.375}, {"width": 16}, {"width": 16, "keep": 5}])
def test_uneven_and_narrower_results_can_be_quantized(how: dict[str, Any], tmp_path: Path) -> None:
    source, output = source_of(tmp_path), tmp_path / "out"
    prune(source, output, weights="fp8-dynamic", **{"keep": None, **how})
    assert "quantized tensors, identical to the source rounded again" in verify(output, source).text
    values = decoded(output)
    down = next(each for name, each in values.items() if name.endswith("experts.0.down_proj.weight"))
    assert down.shape[1] == how.get("width", 32)
    model = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, trust_remote_code=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )  # fmt: skip
    assert torch.isfinite(model(token_ids()).logits).all()


def test_prune_makes_the_same_bytes_and_all_experts_may_stay(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    prune(source, tmp_path / "run", weights="w8a16")
    settings = {"model": str(source), "weights": "w8a16", "scores": tmp_path / "run", "keep": 5}
    prune_by_scores(PruneSettings(output=tmp_path / "pruned", **settings), quiet=True)
    for shard in sorted((tmp_path / "run").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "pruned" / shard.name).read_bytes()
    every = PruneSettings(model=str(source), output=tmp_path / "all", weights="w8a16")
    told = dry_run(every, quiet=True)
    prune_by_scores(every, quiet=True)
    assert open_checkpoint(tmp_path / "all").nbytes == told["output_bytes"]
    record = json.loads((tmp_path / "all" / "streamprune.json").read_text())
    assert [len(layer["kept"]) for layer in record["layers"]] == [8] * 4
    assert "all 8 experts" in (tmp_path / "all" / "README.md").read_text()
    assert len(verify(tmp_path / "all", source).text)


def test_a_budget_counts_the_quantized_bytes(tmp_path: Path) -> None:
    """What is predicted before a weight is read are the bytes that are written."""
    source = source_of(tmp_path)
    for scheme in SCHEMES:
        settings = RunSettings(
            model=str(source), output=tmp_path / scheme, weights=scheme, keep=5, rounding="rtn", context=64
        )
        footprint = prepare_whole(settings).plan.footprint
        estimate = print_dry_run(settings, quiet=True)["memory"]
        every = PruneSettings(model=str(source), output=tmp_path / "all" / scheme, weights=scheme, rounding="rtn")
        prune_by_scores(every, quiet=True)
        assert footprint is not None
        whole = sum(footprint.sizes(scheme).bytes_by_category(8).values())
        assert whole == open_checkpoint(every.output).nbytes
        prune(source, settings.output, weights=scheme, rounding="rtn", context=64)
        assert estimate["weights_bytes"] == open_checkpoint(settings.output).nbytes


def test_a_changed_byte_or_setting_is_found(tmp_path: Path) -> None:
    source, output = source_of(tmp_path), tmp_path / "out"
    prune(source, output, weights="w4a16", rounding="rtn")
    record = output / "streamprune.json"
    text = record.read_text()
    record.write_text(text.replace('"weights": "w4a16"', '"weights": "w8a16"'))
    with pytest.raises(VerifyError):
        verify(output, source)
    record.write_text(text)
    shard = sorted(output.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerifyError, match="rounded to as w4a16"):
        verify(output, source)


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    fused = make_model(tmp_path / "fused", tiny_config(known_family("gpt_oss")))
    with pytest.raises(UnsupportedModelError, match="does not read quantized ones"):
        prune(fused, tmp_path / "out", weights="fp8")
    odd = source_of(tmp_path, moe_intermediate_size=48)
    with pytest.raises(SettingsError, match="48"):
        prune(odd, tmp_path / "out", weights="w4a16", rounding="rtn")
    prune(odd, tmp_path / "first", weights="fp8-dynamic")
    with pytest.raises(SettingsError, match="stored as FP8 already"):
        prune(tmp_path / "first", tmp_path / "out", weights="fp8-dynamic", keep=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "bf16", "quantize": "experts"}, "--quantize is for weights that are quantized anew"),
        ({"rounding": "gptq"}, "--rounding is for weights"),
        ({"weights": "w4a16"}, "needs text"),
        ({"weights": "fp8", "tensor_parallel": 0}, "--tensor-parallel 0 is too small"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        PruneSettings(model="model", output=tmp_path / "out", scores=tmp_path / "scores", keep=5, **given)


def test_too_little_text_to_round_by_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path)
    few, enough = (write_token_ids(tmp_path / f"{number}.jsonl", number) for number in (2, 40))
    for text, told in ((few, True), (enough, False)):
        settings = RunSettings(
            model=str(source), output=tmp_path / text.stem, keep=5, weights="w4a16", calibration=(str(text),)
        )
        run(settings)
        said = capsys.readouterr().err
        assert "rounding: GPTQ by" in said
        assert ("warning: that is less than 1 for each column" in said) == told


def test_another_version_of_the_library_is_no_difference(tmp_path: Path) -> None:
    """What is compared is what the config says of the weights, not which patch version wrote it."""
    source, output = source_of(tmp_path), tmp_path / "out"
    prune(source, output, weights="w8a16")
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["version"] = "0.20.99"
    (output / "config.json").write_text(json.dumps(config))
    assert verify(output, source).encoded
    config["quantization_config"]["ignore"].pop()
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="ignore"):
        verify(output, source)


def test_blocks_of_fp8_must_be_whole_on_every_gpu(tmp_path: Path) -> None:
    source = source_of(tmp_path, moe_intermediate_size=256, hidden_size=128)
    with pytest.raises(SettingsError, match=r"256 .*, over 4 GPUs, are no whole blocks of 128"):
        prune(source, tmp_path / "out", weights="fp8", tensor_parallel=4)
    prune(source, tmp_path / "out", weights="fp8", tensor_parallel=2)
    tensors = read_tensors(tmp_path / "out")
    # 64 rows of queries are no whole blocks on either GPU.
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.experts.0.down_proj.weight"].dtype == torch.float8_e4m3fn


def test_a_missing_library_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    source = source_of(tmp_path)
    for shard in source.glob("*.safetensors"):
        shard.write_bytes(b"not read")
    monkeypatch.setattr(importlib.metadata, "version", missing)
    told = r"pip install 'streamprune\[quantize\]'"
    with pytest.raises(SettingsError, match=told):
        prune(source, tmp_path / "out", weights="w4a16")
    with pytest.raises(SettingsError, match=told):
        prune_by_scores(PruneSettings(model=str(source), output=tmp_path / "out", weights="w8a16"), quiet=True)


def test_sizes_tell_equal_matrices_apart_that_are_treated_differently(tmp_path: Path) -> None:
    """Queries stay plain for the sake of their keys of 192 rows; the output projection has their shape."""
    source = source_of(tmp_path, hidden_size=384, head_dim=96, moe_intermediate_size=128)
    settings = RunSettings(model=str(source), output=tmp_path / "out", weights="fp8", keep=5)
    told = print_dry_run(settings, quiet=True)["memory"]
    prune(source, settings.output, weights="fp8")
    tensors = read_tensors(settings.output)
    query, out = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in ("q", "o"))
    assert (query.shape, query.dtype) == (out.shape, torch.float32)
    assert out.dtype == torch.float8_e4m3fn
    assert told["weights_bytes"] == open_checkpoint(settings.output).nbytes


def test_the_card_of_a_quantized_result_is_plain_markdown(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    text = write_token_ids(tmp_path / "ids.jsonl", 40)
    prune(source, tmp_path / "out", weights="w4a16", calibration=(str(text),))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rounded by GPTQ ([arXiv:2210.17323](https://arxiv.org/abs/2210.17323))" in card
    assert "with transformers, which needs `pip install 'compressed-tensors>=0.20,<0.21'`:" in card


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source, name = source_of(tmp_path), "model.layers.1.mlp.experts.5.up_proj.weight"
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][3, 4] = float("nan")
            save_file(tensors, shard, {"format": "pt"})
    settings = PruneSettings(model=str(source), output=tmp_path / "out", weights="fp8")
    with pytest.raises(NonFiniteError, match=re.escape(name)):
        prune_by_scores(settings, quiet=True)


def test_the_width_that_stays_decides_what_gpus_can_divide(tmp_path: Path) -> None:
    # 96 columns over 2 GPUs are no whole groups of 32, but 64 are: advice goes by what stays.
    config = tiny_config(known_family("qwen3_moe"))
    config.moe_intermediate_size, config.num_hidden_layers = 96, 2
    source = make_model(tmp_path / "model", config)
    settings: dict[str, Any] = {"weights": "w8a16", "rounding": "rtn", "width": 64}
    assert verify(prune(source, tmp_path / "out", tensor_parallel=2, **settings).output, source).encoded
    with pytest.raises(SettingsError, match=r"divides 64 columns over 4 ranks\. .* or --tensor-parallel 1 or 2\."):
        prune(source, tmp_path / "other", tensor_parallel=4, **settings)
    # As well where `prune` finds that width itself.
    found = dry_run(
        PruneSettings(
            model=str(source), output=tmp_path / "found", scores=tmp_path / "out", weights="w8a16", by="channels",
            ratio=0.3, width_multiple=32, tensor_parallel=2,
        ),
        quiet=True,
    )  # fmt: skip
    assert found["width"] == 64
