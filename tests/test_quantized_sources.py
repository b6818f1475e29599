"""Quantized checkpoints, pruned from their own bytes, beside plain ones that mean the same.

The sources are made by packers that share nothing with the decoders under test: `tests/packers.py`, compressed-tensors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.formats.fp4 import Fp4
from streamprune.formats.fp8 import Fp8
from streamprune.models.open import open_model
from streamprune.saliency.scores_file import read_scores
from streamprune.streaming.layer_weights import LayerWeights
from tests import packers
from tests.helpers import CPU, known_family, load_whole, prune, read_tensors, token_ids
from tests.quantized import Quantized, cut_experts, make_quantized
from tests.thorough import thorough

#: Sizes with which no block and no group is smaller than the others.
ALIGNED = {"deepseek_v3": {"qk_rope_head_dim": 32, "head_dim": 32}}
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
#: Rows of kv_a_proj_with_mqa as in DeepSeek-V3: 512 + 64.
REAL_ROWS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}


@dataclass(frozen=True)
class Case:
    """A way to quantize a family. `sizes` instead of those in ALIGNED.

    `reads`: whether stock transformers reads it rightly, from the version `since` on; `unread` is the end of the names
    that it then leaves out.
    """

    scheme: str
    family: str = "qwen3_moe"
    sizes: Mapping[str, Any] | None = field(default=None, hash=False)
    reads: bool = False
    unread: str = "none"
    since: str = "5.17"

    @property
    def is_read(self) -> bool:
        """Whether the installed transformers reads it."""
        return self.reads and Version(transformers.__version__) >= Version(self.since)

    @property
    def id(self) -> str:
        sizes = "".join(f"-{value}" for value in (self.sizes or {}).values())
        return f"{self.scheme}-{self.family}{sizes}"

    def make(self, folder: Path, **options: Any) -> Quantized:
        sizes = ALIGNED.get(self.family) if self.sizes is None else self.sizes
        return make_quantized(folder, self.scheme, self.family, sizes, **options)


#: Where `reads` is false, transformers refuses, fails, or is silently wrong: blocks that are no quotient of the rows,
#: scales of joined experts, zero points, global scales, several groups. Versions before 5.23 round activations to FP8.
CASES = [
    Case("fp8", reads=True),
    Case("fp8", "deepseek_v3", reads=True),
    Case("fp8", sizes={"moe_intermediate_size": 40}),
    Case("fp8", "deepseek_v3", {}),
    Case("fp8-128", "deepseek_v3", REAL_ROWS),
    Case("fp8-e8m0-scales", "glm4_moe", reads=True),
    Case("fp8-static", reads=True, since="5.23"),
    Case("fp8-tensor", "glm4_moe"),
    Case("fp8-channel"),
    Case("fp8-fused"),
    Case("deepseek-v4", "deepseek_v3", reads=True),
    Case("mxfp8", "minimax_m2", reads=True),
    Case("mxfp4", "gpt_oss", reads=True),
    Case("ct-fp8-channel", "glm4_moe", reads=True, since="5.23"),
    Case("ct-fp8-tensor", reads=True, unread="input_scale", since="5.23"),
    Case("ct-fp8-block"),
    Case("ct-w4", "minimax_m2", reads=True),
    Case("ct-w4-g128", sizes=WIDE, reads=True),
    Case("ct-w4-asymmetric"),
    Case("ct-w8", reads=True),
    Case("ct-nvfp4", "glm4_moe"),
    Case("ct-mxfp4", reads=True),
    Case("ct-int8"),
    Case("ct-two-bits"),
    Case("ct-fp8-w4", reads=True, since="5.23"),
    Case("kimi-k2", "deepseek_v3", reads=True),
    Case("gptq"),
    Case("gptq-asymmetric", "deepseek_v3"),
    Case("gptq-v2", "glm4_moe"),
    Case("gptq-8"),
    Case("gptq-act-order"),
    Case("awq"),
    Case("autoround", "minimax_m2"),
    Case("autoround-awq"),
    Case("autoround-raw"),
]
#: Others that differ little from those.
SIMILAR = [
    Case("fp8", "minimax_m2", reads=True), Case("fp8-16", "deepseek_v3", {}), Case("fp8-bf16-scales", reads=True),
    Case("fp8-u8-scales", "minimax_m2", reads=True), Case("fp8-tensor-1"), Case("ct-nvfp4a16"), Case("gptq-no-g_idx"),
]  # fmt: skip
_NAMES = {case.id for case in (*CASES, *SIMILAR)}
#: Schemes whose config names modules of some families only.
_OF_FAMILIES = {
    "fp8-fused": ("qwen3_moe",), "mxfp4": ("gpt_oss",), "ct-w4-g128": (), "ct-two-bits": ("qwen3_moe",),
    "ct-fp8-w4": ("qwen3_moe", "deepseek_v3", "glm4_moe"), "kimi-k2": ("qwen3_moe", "deepseek_v3", "glm4_moe"),
}  # fmt: skip
#: All other crossings of schemes and families.
MORE = SIMILAR + [
    crossed
    for scheme, first in {case.scheme: case for case in reversed((*CASES, *SIMILAR))}.items()
    for family in _OF_FAMILIES.get(scheme, ("qwen3_moe", "deepseek_v3", "minimax_m2", "glm4_moe"))
    if (crossed := Case(scheme, family, None, first.reads, first.unread, first.since)).id not in _NAMES
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=thorough) for case in MORE)], ids=lambda case: case.id
)
def test_pruned_like_the_plain_model(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Each layer by itself, the scores, the bytes of the output and the model that it loads as."""
    # The README's table of formats is made from these.
    for name in ("scheme", "family", "reads"):
        record_property(name, getattr(case, name))
    made, keep = case.make(tmp_path), known_family(case.family).keep
    assert made.parts
    check_layers(made.source, made.reference)
    result = prune(made.source, tmp_path / "out", keep=keep)
    prune(made.reference, tmp_path / "plain-out", keep=keep)
    check_scores(tmp_path / "out", tmp_path / "plain-out")
    kept = {layer.index: list(layer.kept) for layer in result.layers}
    check_tensors(made.source, tmp_path / "out", kept)
    if case.is_read:
        check_loaded(tmp_path / "out", tmp_path / "plain-out", case.unread)
    else:
        check_layers(tmp_path / "out", tmp_path / "plain-out")


@pytest.mark.parametrize(
    "case",
    [
        Case("fp8", "deepseek_v3", {}), Case("fp8-bf16-scales"), Case("deepseek-v4", "deepseek_v3"),
        Case("mxfp8", "minimax_m2"), Case("mxfp4", "gpt_oss"), Case("ct-fp8-channel"), Case("ct-w4-asymmetric"),
        Case("ct-nvfp4"), Case("ct-mxfp4"), Case("ct-int8"), Case("gptq-act-order"), Case("awq"),
    ],
    ids=lambda case: case.id,
)  # fmt: skip
def test_a_bfloat16_model_s_weights_are_rounded_once(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path, dtype=torch.bfloat16)
    check_layers(made.source, made.reference)


@pytest.mark.parametrize(
    "scheme",
    [
        "ct-w4-channel", "ct-w3", "ct-mxfp8", "gptq-zero", "gptq-2", "gptq-one-group", "gptq-dynamic", "autoround-8",
    ],
)  # fmt: skip
def test_settings_of_a_scheme_are_read(scheme: str, tmp_path: Path) -> None:
    """Numbers of bits, groups, and what differs for some modules: each layer is that of the plain model."""
    made = make_quantized(tmp_path, scheme)
    check_layers(made.source, made.reference)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_every_code_under_every_power_of_two_is_read() -> None:
    """E8M0's smallest powers, and most products with them, are below the normal numbers of float32."""
    powers, codes = np.arange(255), np.arange(256, dtype=np.uint8)
    scale = torch.arange(255, dtype=torch.uint8)[:, None]
    exact = 2.0 ** (powers[:, None] - 127)
    values = torch.from_numpy(codes).repeat(255, 1)
    found = Fp8((1, 32)).decode(
        {"": values.view(torch.float8_e4m3fn), "scale": scale.repeat(1, 8).view(torch.float8_e8m0fnu)}, torch.float32
    )
    numbers = (codes & 0x7F) != 0x7F
    assert np.array_equal(found.numpy()[:, numbers], (packers.E4M3 * exact).astype(np.float32)[:, numbers])
    assert bool(found[:, torch.from_numpy(~numbers)].isnan().all())
    found = Fp4().decode({"packed": values, "scale": scale.repeat(1, 16)}, torch.float32)
    pairs = np.stack([packers.E2M1[codes & 15], packers.E2M1[codes >> 4]], 1).reshape(-1)
    assert np.array_equal(found.numpy(), (pairs * exact).astype(np.float32))


def test_the_packers_tables_are_the_number_formats() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    e4m3 = codes.view(torch.float8_e4m3fn).double().numpy()
    # Torch's only codes without a number.
    assert [code for code in range(256) if np.isnan(e4m3[code])] == [0x7F, 0xFF]
    numbers = np.isfinite(e4m3)
    assert np.array_equal(packers.E4M3[numbers], e4m3[numbers])
    assert sorted(set(packers.E2M1)) == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]


def check_layers(source: Path, reference: Path) -> None:
    """Every layer, loaded by itself, is to the bit that of the plain checkpoint."""
    one, other = (open_model(open_checkpoint(folder), trust_remote_code=True) for folder in (source, reference))
    assert one.dtype == other.dtype
    mine, theirs = LayerWeights(one, CPU), LayerWeights(other, CPU)
    for index in range(one.skeleton.layer_count):
        with mine.layer(index) as layer, theirs.layer(index) as plain:
            found, expected = layer.state_dict(), plain.state_dict()
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype, name
                assert torch.equal(found[name], tensor), f"layer {index}: {name}"


def check_scores(output: Path, reference: Path) -> None:
    """Both outputs have the same scores of every expert, to the bit."""
    one, other = read_scores(output), read_scores(reference)
    assert one.layer_indices == other.layer_indices
    for layer, plain in zip(one.layers, other.layers, strict=True):
        assert plain.values.any()
        assert np.array_equal(layer.values, plain.values)


def check_tensors(source: Path, output: Path, kept: Mapping[int, list[int]]) -> None:
    """The output's tensors are the source's of the experts that stay: all of them, nothing else, every byte."""
    expected, found = cut_experts(read_tensors(source), kept), read_tensors(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def check_loaded(output: Path, reference: Path, unread: str = "none") -> None:
    """Stock transformers loads the output, and its logits are those of the pruned plain model."""
    model, info = load_dequantized(output)
    problems = {kind: [key for key in keys if not str(key).endswith(unread)] for kind, keys in info.items()}
    assert not {kind: keys for kind, keys in problems.items() if keys}
    ids = token_ids()
    with torch.no_grad():
        expected = load_whole(reference, trust_remote_code=True)(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def load_dequantized(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it from quantized weights, and its report; computed in float32.

    Some of its loaders leave experts in bfloat16, which FP4 weights fit into.
    """
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    kinds = {
        "compressed-tensors": transformers.CompressedTensorsConfig,
        "mxfp4": transformers.Mxfp4Config,
    }
    config = kinds.get(method, transformers.FineGrainedFP8Config)(dequantize=True)
    with warnings.catch_warnings():
        # That the checkpoint has a quantization_config of its own.
        warnings.simplefilter("ignore", UserWarning)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, output_loading_info=True, trust_remote_code=True
        )
    model = model.float()
    for parameter in model.parameters():
        # Matrix products of unaligned memory may round differently (see `load_whole`).
        parameter.data = parameter.data.clone()
    return model.eval(), info
