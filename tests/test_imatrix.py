"""An importance matrix for llama.cpp: the names of its weights, its file, and experts without tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.models.skeleton import build_skeleton
from streamprune.quantize.imatrix import ARCHITECTURES, GgufNames, Imatrix, ImatrixText, InputSquares
from tests.helpers import known_family
from tests.tiny import tiny_config

EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight")


def squares(*rows: list[float], counts: list[int]) -> InputSquares:
    return InputSquares(np.array(rows, dtype=np.float32), np.array(counts))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_linear_module_has_a_name_that_the_architecture_knows(family: str) -> None:
    skeleton = build_skeleton(tiny_config(known_family(family)), torch.float32)
    names = GgufNames(family, skeleton.layer_count, skeleton.experts)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    known = {f"{gguf.TENSOR_NAMES[kind]}.weight" for kind in gguf.MODEL_TENSORS[number]}
    found, unnamed = [], set()
    for layer, module in enumerate(skeleton.layers):
        paths = [path for path, each in module.named_modules() if isinstance(each, nn.Linear)]
        if layer in skeleton.experts:
            paths += [f"{skeleton.experts[layer]}.gate_up_proj", f"{skeleton.experts[layer]}.down_proj"]
        for path in paths:
            own = names.of(layer, path)
            assert {name.replace(f"blk.{layer}.", "blk.{bid}.") for name in own} <= known
            found += own
            unnamed |= set() if own else {path.rpartition(".")[2]}
    assert len(found) == len(set(found)) >= 7 * skeleton.layer_count
    assert {f"blk.{layer}.ffn_down_exps.weight" for layer in skeleton.experts} <= set(found)
    assert unnamed == ({"kv_b_proj"} if family.startswith("deepseek") else set())


def test_gate_and_up_projections_of_experts_share_their_inputs() -> None:
    names = GgufNames("qwen3_moe", 4, {2: "mlp.experts"})
    assert names.of(2, "mlp.experts.gate_up_proj") == tuple(f"blk.2.{name}" for name in EXPERTS)
    assert names.of(1, "mlp.experts.gate_up_proj") == ()
    assert names.of(3, "self_attn.q_proj") == ("blk.3.attn_q.weight",)


def test_a_model_that_llama_cpp_names_otherwise_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a jamba model as llama\.cpp does.* qwen3_moe"):
        GgufNames("jamba", 4, {})


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'streamprune\[imatrix\]'"):
        GgufNames("qwen3_moe", 4, {})


def test_an_expert_without_tokens_gets_the_mean_over_all_tokens_of_the_others() -> None:
    found = squares([8.0, 2.0], [0.0, 0.0], [4.0, 1.0], counts=[3, 0, 1])
    assert found.is_partial
    filled = found.filled()
    assert filled.squares.tolist() == [[8, 2], [3, 0.75], [4, 1]]
    assert filled.counts.tolist() == [3, 1, 1]
    assert squares([0.0], [0.0], counts=[0, 0]).filled().counts.tolist() == [0, 0]


def test_the_file_is_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    names = GgufNames("deepseek_v3", 2, {1: "mlp.experts"})
    routed = squares([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], counts=[7, 8])
    layers = {
        1: {"mlp.experts.gate_up_proj": routed, "self_attn.kv_b_proj": squares([1.0], counts=[9])},
        0: {"self_attn.o_proj": squares([0.5, 0.25], counts=[9])},
    }
    matrix = Imatrix.of(names, layers)
    assert matrix.unnamed == ("self_attn.kv_b_proj",)
    assert "--tensor-type 'attn_(k|v)_b=q8_0'" in matrix.notes[0]
    assert Imatrix.of(names, {0: layers[0]}).notes == ()
    for name in ("a.gguf", "b.gguf"):
        matrix.write(tmp_path / name, ImatrixText(["code", "prose"], 12, 512))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["code", "prose"],
        "imatrix.chunk_count": 12,
        "imatrix.chunk_size": 512,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 6
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in tensors.values())
    for name in EXPERTS:
        assert np.array_equal(tensors[f"blk.1.{name}.in_sum2"].data, routed.squares)
        assert tensors[f"blk.1.{name}.counts"].data.tolist() == [[7], [8]]
        # (Of the innermost axis first, as llama.cpp counts.)
        assert tensors[f"blk.1.{name}.counts"].shape.tolist() == [1, 2]
    assert tensors["blk.0.attn_output.weight.in_sum2"].data.tolist() == [[0.5, 0.25]]
