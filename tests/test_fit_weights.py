"""Weights told apart by name and by role, and what stays of them, against what `run` really writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.checkpoint.index import open_checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.fit.estimate import Fit
from streamprune.fit.footprint import read_footprint
from streamprune.fit.structure import weights_of_checkpoint
from streamprune.fit.weights import WeightFact, Weights, weights_by_name
from streamprune.models.config_json import ExpertSpec, stated_experts
from streamprune.models.open import load_config
from streamprune.models.skeleton import build_skeleton
from streamprune.targets import ServingSpec
from tests.fit_families import CACHED
from tests.full_size import Tensors, write_sparse
from tests.helpers import prune
from tests.mtp import add_mtp
from tests.thorough import DISTINCT, by_family
from tests.tiny import FAMILIES, Family, make_model, tiny_config

#: Families whose names do not tell everything: the model is asked instead.
BY_ROLE = {
    "ernie4_5_moe", "granitemoe", "granitemoeshared", "granitemoehybrid", "nemotron_h", "gemma4_text", "dbrx",
    "inkling_text", "muse_spark", "step3p7",
}  # fmt: skip
GIB = 1024**3


@by_family({*DISTINCT, "dbrx", "granitemoehybrid", "qwen3_vl_moe"})
def test_names_and_roles_agree(family: Family, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model", tiny_config(family)))
    skeleton = build_skeleton(load_config(checkpoint.folder), torch.float32)
    by_role = weights_of_checkpoint(checkpoint.config, skeleton, checkpoint.tensors)
    assert sum(by_role.sizes().bytes_by_category(8).values()) == checkpoint.nbytes == by_role.nbytes
    assert by_role.sizes().expert_layers == len(skeleton.experts)

    by_name = weights_by_name(checkpoint.tensors, checkpoint.config, stated_experts(checkpoint.config))
    assert (by_name is None) == (family.id in BY_ROLE)
    if by_name is None:
        return
    for one, other in zip(by_name.facts, by_role.facts, strict=True):
        if one.category in ("vision", "MTP"):
            one, other = replace(one, layer=None), replace(other, layer=None)
        assert one == other


@by_family({*DISTINCT, "dbrx", "kimi_linear", "qwen3_vl_moe"}, CACHED)
def test_config_alone_gives_the_same_parts(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    tiny_config(family).save_pretrained(tmp_path / "config")
    alone = read_footprint(str(tmp_path / "config"))
    files = read_footprint(str(make_model(tmp_path / "model", tiny_config(family))))
    for keep in (8, family.keep):
        assert alone.weights.sizes().bytes_by_category(keep) == files.weights.sizes().bytes_by_category(keep)
    assert not alone.weights.measured
    assert files.weights.measured
    assert (alone.cache, alone.itemsize, alone.max_positions) == (files.cache, files.itemsize, files.max_positions)
    assert alone.shape == files.shape
    assert alone.spec is not None
    assert files.spec is not None
    assert replace(alone.spec, attribute="", path=()) == replace(files.spec, attribute="", path=())


def category_bytes(folder: Path) -> Counter[str]:
    """Bytes by category of a checkpoint's files, as the model that transformers builds uses them."""
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(load_config(folder), torch.float32)
    weights = weights_of_checkpoint(checkpoint.config, skeleton, checkpoint.tensors)
    sizes = Counter[str]()
    for fact in weights.facts:
        sizes[fact.category] += fact.nbytes
    return sizes


LAYOUTS = [family for family in FAMILIES if family.id in (
    "qwen3_moe", "mixtral", "gpt_oss", "dbrx", "granitemoe", "deepseek_v3", "ernie4_5_moe", "qwen3_vl_moe", "llama4",
    "nemotron_h", "gemma4_text", "qwen3_next",
)]  # fmt: skip


@by_family({"qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"}, LAYOUTS)
def test_pruned_sizes_are_those_of_the_written_files(family: Family, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(family))
    result = prune(source, tmp_path / "pruned", keep=family.keep)
    fit = Fit(read_footprint(str(source)), ServingSpec(keep=family.keep), GIB)
    assert fit.weights_bytes == result.summary["output_bytes"] == open_checkpoint(tmp_path / "pruned").nbytes
    predicted = fit.footprint.weights.sizes().bytes_by_category(family.keep)
    assert predicted == category_bytes(tmp_path / "pruned")
    # And the pruned model, asked about as a whole, has the same parts.
    again = Fit(read_footprint(str(tmp_path / "pruned")), ServingSpec(), GIB)
    assert again.footprint.weights.sizes().bytes_by_category(family.keep) == predicted
    assert again.total == fit.total


def test_prediction_layers_by_name_and_by_the_model(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.id == "glm4_moe")
    source = make_model(tmp_path / "model", tiny_config(family))
    path = add_mtp(source)
    footprint, checkpoint = read_footprint(str(source)), open_checkpoint(source)
    mtp = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if name.startswith(f"{path}."))
    whole = Fit(footprint, ServingSpec(), GIB)
    assert {term.name: term.bytes for term in whole.terms}["weights: MTP"] == mtp
    assert whole.weights_bytes == checkpoint.nbytes
    skeleton = build_skeleton(load_config(source), torch.float32)
    by_model = weights_of_checkpoint(checkpoint.config, skeleton, checkpoint.tensors)
    for keep in (5, 8):
        assert by_model.sizes().bytes_by_category(keep) == footprint.weights.sizes().bytes_by_category(keep)
    # Some experts fewer: the names leave a doubt, and the model says that it is dropped.
    lost = f"{path}.mlp.experts.7.up_proj.weight"
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name != lost}
    assert weights_by_name(tensors, checkpoint.config, skeleton.spec) is None
    few = weights_of_checkpoint(checkpoint.config, skeleton, tensors)
    terms = Fit(replace(footprint, weights=few), ServingSpec(keep=5), GIB).terms
    assert not [term for term in terms if term.name == "weights: MTP"]


CONFIG = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
SPEC = ExpertSpec((), "num_experts", 4, 2)
MOE = "model.layers.0.mlp."


def block(**changed: tuple[int, ...] | None) -> dict[str, TensorEntry]:
    """The tensors of one small MoE block, with changes to their shapes (None: left out)."""
    shapes: dict[str, tuple[int, ...] | None] = {"gate.weight": (4, 16), "shared_expert.up_proj.weight": (8, 16)}
    shapes |= {f"experts.{expert}.{kind}_proj.weight": (8, 16) for expert in range(4) for kind in ("gate", "up")}
    shapes |= {name.replace("__", "."): shape for name, shape in changed.items()}
    return {
        MOE + name: TensorEntry(MOE + name, "model.safetensors", "BF16", shape, 0, 2 * torch.Size(shape).numel())
        for name, shape in shapes.items()
        if shape is not None
    }


def test_names_that_are_certain() -> None:
    weights = weights_by_name(block(), CONFIG, SPEC)
    assert weights is not None
    assert weights.sizes().bytes_by_category(3) == {"experts": 3 * 512, "router": 96, "shared/dense": 256}
    joined = {f"experts__{expert}__{kind}_proj__weight": None for expert in range(4) for kind in ("gate", "up")}
    weights = weights_by_name(block(**joined, experts__gate_up_proj=(4, 16, 16)), CONFIG, SPEC)
    assert weights is not None
    assert weights.sizes().bytes_by_category(3) == {"experts": 3 * 512, "router": 96, "shared/dense": 256}


@pytest.mark.parametrize(
    "changed",
    [
        {"experts__2__up_proj__weight": None},
        {"experts__4__up_proj__weight": (8, 16)},
        {"experts__2__up_proj__weight": (9, 16)},
        {"gate__weight": None},
        {"gate__weight": (5, 16)},
        {"gate__weight": (16, 4)},
        {"router__weight": (4, 16)},
        {"experts__gate_up_proj": (8, 16, 4)},
        {"experts__gate_up_proj": (4 * 16, 16)},
        {"something__weight": (4, 16)},
    ],
    ids=lambda changed: str(changed),
)
def test_doubtful_names_are_left_to_the_model(changed: dict[str, Any]) -> None:
    assert weights_by_name(block(**changed), CONFIG, SPEC) is None


def test_more_blocks_than_the_config_states() -> None:
    """Behind the last block lies multi-token prediction if it looks like it; else the config may be wrong."""
    further = {name.replace("layers.0", "layers.1"): entry for name, entry in block().items()}
    further = {name: replace(entry, name=name) for name, entry in further.items()}
    assert weights_by_name(block() | further, CONFIG, SPEC) is None
    joint = TensorEntry("model.layers.1.eh_proj.weight", "model.safetensors", "BF16", (8, 16), 0, 256)
    weights = weights_by_name(block() | further | {joint.name: joint}, CONFIG, SPEC)
    assert weights is not None
    sizes = weights.sizes().bytes_by_category(4)
    assert sizes.pop("MTP") == 256 + sum(sizes.values())
    assert weights.sizes(with_mtp=False).bytes_by_category(4) == sizes


def test_names_need_a_number_of_blocks_and_experts() -> None:
    assert weights_by_name(block(), {}, SPEC) is None
    assert weights_by_name(block(), CONFIG, None) is None
    dense = {name: entry for name, entry in block().items() if "expert" not in name}
    weights = weights_by_name(dense, CONFIG, None)
    assert weights is not None
    assert (weights.count, weights.nbytes) == (0, 128)


def quantized_model(folder: Path, kind: str) -> Path:
    """A checkpoint as DeepSeek-V3 (8 bits, a scale per 128 × 128) or gpt-oss (4 bits in blocks of 32) have it."""
    folder.mkdir()
    name = {"fp8": "deepseek_v3", "mxfp4": "gpt_oss"}[kind]
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
    family = next(family for family in FAMILIES if family.id == name)
    config = tiny_config(replace(family, sizes=family.sizes | sizes))
    config.dtype = torch.bfloat16
    config.quantization_config = {"quant_method": kind, "weight_block_size": [128, 128]}
    config.save_pretrained(folder)
    skeleton = build_skeleton(config, torch.bfloat16)
    tensors: Tensors = {}
    for name, tensor in skeleton.model.state_dict().items():
        shape = tuple(tensor.shape)
        moe, _, part = name.rpartition(".experts.")
        if kind == "mxfp4" and part in ("gate_up_proj", "down_proj"):
            tensors[f"{name}_blocks"] = ("U8", (8, shape[2], shape[1] // 32, 16))
            tensors[f"{name}_scales"] = ("U8", (8, shape[2], shape[1] // 32))
        elif kind == "fp8" and part in ("gate_up_proj", "down_proj"):
            matrices = {"down_proj": shape[1:]}
            if part == "gate_up_proj":
                matrices = dict.fromkeys(("gate_proj", "up_proj"), (shape[1] // 2, shape[2]))
            for expert in range(8):
                for matrix, (rows, columns) in matrices.items():
                    tensors[f"{moe}.experts.{expert}.{matrix}.weight"] = ("F8_E4M3", (rows, columns))
                    scales = (-(-rows // 128), -(-columns // 128))
                    tensors[f"{moe}.experts.{expert}.{matrix}.weight_scale_inv"] = ("F32", scales)
        else:
            tensors[name] = ("BF16", shape)
    return write_sparse(folder, tensors)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantized_checkpoint(kind: str, tmp_path: Path) -> None:
    folder = quantized_model(tmp_path / "model", kind)
    checkpoint = open_checkpoint(folder)
    footprint = read_footprint(str(folder))
    assert Fit(footprint, ServingSpec(), GIB).weights_bytes == checkpoint.nbytes
    experts = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if ".mlp.experts." in name)
    gates = sum(
        entry.nbytes
        for name, entry in checkpoint.tensors.items()
        if ".mlp.router." in name or (".mlp.gate." in name and "layers.0" not in name)
    )
    kept = Fit(footprint, ServingSpec(keep=4), GIB)
    assert checkpoint.nbytes - kept.weights_bytes == (experts + gates) // 2
    assert {term.kind for term in kept.terms if term.name.startswith("weights")} == {"exact"}
    assert kept.kv_cache_bytes > 0
    assert Fit(footprint, ServingSpec(kv_dtype="bf16"), GIB).kv_cache_bytes == kept.kv_cache_bytes


def test_model_is_quantized_when_most_bytes_are() -> None:
    facts = (WeightFact("a", "BF16", (10,), 20, "head"), WeightFact("b", "U8", (19,), 19, "experts"))
    assert not Weights(facts, 0, True).quantized
    assert Weights((*facts, WeightFact("c", "I32", (1,), 4, "experts")), 0, True).quantized
