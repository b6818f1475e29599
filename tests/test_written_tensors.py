"""What is written of a layer, loaded into a pruned one: unchanged, rounded, computed; for many families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamprune.config import RunSettings
from streamprune.formats.base import KeptExperts
from streamprune.models.separate_experts import with_separate_experts
from streamprune.models.skeleton import map_checkpoint
from streamprune.models.survey import survey
from streamprune.output.encoded import SCALE, parts_of
from streamprune.output.tensors import ComputedTensors, OutputTensor, StageTensor, output_tensors
from streamprune.planning.prepare import PreparedModel
from streamprune.quantize.schemes import Scheme, scheme_of
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.written_tensors import WrittenTensors, bytes_of
from tests.helpers import CPU, known_family, prepare_whole
from tests.tiny import make_model, tiny_config

FAMILIES = [
    "qwen3_moe", "deepseek_v3", "glm4_moe", "qwen2_moe", "olmoe", "mixtral", "ernie4_5_moe", "qwen3_5_moe_text",
    "minimax_m2", "dbrx", "gpt_oss",
]  # fmt: skip
#: Families whose checkpoints have all experts in one tensor, which cannot be taken apart.
JOINED = {"dbrx", "gpt_oss"}


@dataclass
class Opened:
    prepared: PreparedModel
    weights: LayerWeights
    written: WrittenTensors

    @contextmanager
    def pruned(self, layer: int) -> Iterator[tuple[nn.Module, KeptExperts]]:
        """A pruned layer with the source's values, and what stays in it."""
        prepared = self.prepared
        count = (prepared.counts or {}).get(layer, 0)
        kept = KeptExperts(tuple(range(1, 1 + count)))
        with self.weights.layer(layer) as source:
            pruned = prepared.pruned_layer(layer, kept)
            with self.weights.pruned_layer(layer, source, pruned, kept) as module:
                yield module, kept


def open_tiny(folder: Path, family: str, scheme: Scheme | None = None, dtype: str = "auto", **sizes: Any) -> Opened:
    """A tiny model prepared for pruning; with a scheme, all matrices of its layers that it can store are rounded."""
    kind = known_family(family)
    config = tiny_config(kind)
    for name, size in sizes.items():
        setattr(config, name, size)
    model = make_model(folder / "model", config)
    settings = RunSettings(model=str(model), output=folder / "out", keep=kind.keep, dtype=dtype, device="cpu")
    prepared = prepare_whole(settings)
    entries = prepared.checkpoint.tensors
    layout, raw = prepared.layout, prepared.checkpoint.config
    if family not in JOINED:
        entries = with_separate_experts(prepared.skeleton, prepared.targets, entries)
        layout = survey(raw, prepared.skeleton, entries, map_checkpoint(prepared.skeleton, entries, raw))
    tensors = output_tensors(layout, entries, prepared.counts or {})
    if scheme is not None:
        tensors = [part for tensor in tensors for part in rounded(tensor, scheme)]

    def of_layer(layer: int) -> list[OutputTensor]:
        return [tensor for tensor in tensors if tensor.layer == layer]

    written = WrittenTensors(prepared, of_layer, raw, prepared.model_of, CPU)
    return Opened(prepared, LayerWeights(prepared, CPU), written)


def rounded(tensor: OutputTensor, scheme: Scheme) -> list[OutputTensor]:
    fits = tensor.layer is not None and tensor.name.endswith(".weight") and scheme.problem(tensor.shape) is None
    stays = tensor.name.endswith(("gate.weight", "shared_expert_gate.weight")) or tensor.rows is not None
    return list(parts_of(tensor, scheme)) if fits and not stays else [tensor]


def state_of(module: nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_values_make_the_layer_that_is_cut_from_the_source(family: str, tmp_path: Path) -> None:
    opened = open_tiny(tmp_path, family)
    loaded = 0
    for layer in range(2):
        with opened.pruned(layer) as (module, kept):
            before = state_of(module)
            parameters = {each.parameter for each in opened.written.of_layer(layer)}
            opened.written.load(layer, kept, NOTHING, parameters)
            after = state_of(module)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor, after[name]), (layer, name)
        loaded += len(parameters)
    assert loaded > 8


NOTHING = ComputedTensors()
SCHEMES = {
    "w4a16": scheme_of("w4a16", [32], dtype="F32"),
    "w8a16": scheme_of("w8a16", [32], dtype="F32"),
    "fp8": scheme_of("fp8"),
    "fp8-dynamic": scheme_of("fp8-dynamic", dtype="F32"),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_values_are_what_the_parts_decode_to(name: str, dtype: str, tmp_path: Path) -> None:
    opened = open_tiny(tmp_path, "qwen3_moe", SCHEMES[name], dtype)
    with opened.pruned(0) as (module, kept):
        before = state_of(module)
        opened.written.load(0, kept, NOTHING)
        after = state_of(module)
        found = 0
        for each in opened.written.of_layer(0):
            if each.scheme is None:
                continue
            weight = opened.written.plain_values(each.plain, kept, NOTHING)
            parts = each.scheme.encode(weight.float())
            computed = ComputedTensors(parts=each.stage_tensors(parts, "gptq"))
            wanted = opened.written.values(each, kept, NOTHING)
            assert torch.equal(opened.written.values(each, kept, computed), wanted)
            # Scales that are not computed are those of the source.
            del parts[SCALE]
            codes = ComputedTensors(parts=each.stage_tensors(parts, "gptq"))
            assert torch.equal(opened.written.values(each, kept, codes), wanted)
            found += 1
    assert found > 12
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.o_proj.weight"} <= changed
    assert not any("norm" in key or key.startswith("mlp.gate") for key in changed)
    for key in changed:
        torch.testing.assert_close(after[key], before[key], rtol=0.3, atol=0.05)


@pytest.mark.parametrize("scheme", ["w4a16", "fp8"])
def test_computed_values_come_before_the_sources(scheme: str, tmp_path: Path) -> None:
    opened = open_tiny(tmp_path, "qwen3_moe", SCHEMES[scheme])
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    with opened.pruned(1) as (module, kept):
        tensor = next(each for each in opened.written.of_layer(1) if each.name == name)
        assert tensor.scheme is not None
        # What a refit has computed is rounded like the source's values ...
        refitted = torch.randn(tensor.plain.shape, generator=torch.Generator().manual_seed(0))
        computed = ComputedTensors({name: StageTensor("refit", bytes_of(refitted))})
        opened.written.load(1, kept, computed, ["model.layers.1.mlp.experts.down_proj"])
        found = module.get_parameter("mlp.experts.down_proj")[2].detach().clone()
        codes = tensor.scheme.round(refitted, tensor.scheme.scales(refitted))
        torch.testing.assert_close(found, tensor.scheme.rounded(codes, tensor.scheme.scales(refitted)), rtol=0, atol=0)
        # ... and parts that were computed are taken as they are.
        parts = tensor.stage_tensors(tensor.scheme.encode(-refitted), "gptq")
        computed = ComputedTensors(computed.plain, parts)
        opened.written.load(1, kept, computed, ["model.layers.1.mlp.experts.down_proj"])
        assert not torch.equal(module.get_parameter("mlp.experts.down_proj")[2], found)
    assert opened.written.is_changed(1, NOTHING)
