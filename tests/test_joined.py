"""Experts' tensors are read to where they lie in the parameter that transformers' conversion would make of them."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from streamprune.checkpoint.index import open_checkpoint
from streamprune.checkpoint.reader import Reading
from streamprune.models.open import OpenedMoE, open_moe
from streamprune.streaming.conversion import Conversion
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.mtp_layer import MtpLayer
from tests.helpers import CPU, known_family
from tests.mtp import add_mtp
from tests.quantized import make_quantized
from tests.thorough import by_family
from tests.tiny import USUAL, Family, make_model, tiny_config


def open_tiny(name: str, folder: Path) -> OpenedMoE:
    return open_moe(open_checkpoint(make_model(folder, tiny_config(known_family(name)))))


def joined(opened: OpenedMoE) -> set[str | None]:
    """The parameters that are read as they are."""
    return {target.name for target in opened.targets.values() if target.place is not None}


def of_several(opened: OpenedMoE) -> set[str]:
    """The parameters of experts that are made of a tensor for each expert."""
    counts = Counter(target.name for target in opened.targets.values())
    return {name for name in opened.skeleton.expert_rows if counts[name] >= opened.skeleton.spec.count}


def parameters(opened: OpenedMoE, mtp: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of all layers, as they are loaded."""
    found = {}
    with closing(LayerWeights(opened, CPU, mtp=MtpLayer(opened) if mtp else None)) as weights:
        for index in range(opened.skeleton.layer_count + mtp):
            with weights.loaded(index) as layer:
                found |= {f"{index}.{name}": each.detach().clone() for name, each in _tensors(layer).items()}
    return found


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def same(opened: OpenedMoE, mtp: bool = False) -> bool:
    """Whether all layers are loaded bit for bit as by transformers' conversion alone."""
    targets = {name: replace(target, place=None) for name, target in opened.targets.items()}
    wanted, found = parameters(replace(opened, targets=targets), mtp), parameters(opened, mtp)
    assert wanted.keys() == found.keys()
    return all(
        each.dtype == found[name].dtype and each.shape == found[name].shape and torch.equal(each, found[name])
        for name, each in wanted.items()
    )


@by_family(USUAL)
def test_every_family_is_loaded_as_by_its_conversion(family: Family, tmp_path: Path) -> None:
    opened = open_moe(open_checkpoint(make_model(tmp_path / "model", tiny_config(family))))
    assert joined(opened) == of_several(opened)
    assert same(opened)


def test_most_families_need_no_conversion(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    for name in ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "minimax_m2"):
        assert len(joined(open_tiny(name, tmp_path / name))) >= 6


def test_a_layer_for_multi_token_prediction_is_loaded_as_the_others(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family("deepseek_v3")))
    add_mtp(model, "further", known=True)
    opened = open_moe(open_checkpoint(model))
    mtp = MtpLayer(opened)
    assert sum(target.place is not None for target in mtp.tensors.values()) == 3 * opened.skeleton.spec.count
    plain = {name: replace(target, place=None) for name, target in mtp.tensors.items()}
    assert same(opened, mtp=True)
    with closing(LayerWeights(opened, CPU, mtp=mtp)) as weights, weights.loaded(mtp.index) as layer:
        found = {name: each.detach().clone() for name, each in _tensors(layer).items()}
    mtp.tensors = plain
    with closing(LayerWeights(opened, CPU, mtp=mtp)) as weights, weights.loaded(mtp.index) as layer:
        assert all(torch.equal(found[name], each) for name, each in _tensors(layer).items())


def test_what_is_read_is_the_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied: the parameter lies in the memory that was read to."""
    opened, memory = open_tiny("qwen3_moe", tmp_path / "model"), dict[str, int]()
    plain = Reading.wait

    def wait(self: Reading) -> None:
        memory.update({group: tensor.data_ptr() for group, tensor in self.memory.items()})
        plain(self)

    monkeypatch.setattr(Reading, "wait", wait)
    with closing(LayerWeights(opened, CPU)) as weights, weights.loaded(1):
        experts = [name for name in opened.skeleton.expert_rows if ".1.mlp.experts." in name]
        assert len(experts) == 2
        for name in experts:
            assert opened.skeleton.model.get_parameter(name).data_ptr() == memory[name]


@pytest.mark.parametrize("name", ["fp8", "kimi-k2"])
def test_quantized_experts_are_decoded_and_converted(name: str, tmp_path: Path) -> None:
    opened = open_moe(open_checkpoint(make_quantized(tmp_path, name, "deepseek_v3").source))
    assert joined(opened) == set()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_experts_computed_in_another_dtype_are_read_joined(stored: torch.dtype, tmp_path: Path) -> None:
    made = tiny_config(known_family("qwen3_moe"))
    made.dtype = stored
    model = make_model(tmp_path / "model", made)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace(f'"{str(stored).removeprefix("torch.")}"', '"float16"'))
    opened = open_moe(open_checkpoint(model))
    assert opened.dtype == torch.float16
    assert joined(opened) == of_several(opened)
    assert same(opened)


def test_projections_of_two_dtypes_are_converted(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")), max_shard_size="1GB")
    path = model / "model.safetensors"
    tensors = load_file(path)
    other = {name for name in tensors if ".layers.1." in name and name.endswith(".up_proj.weight")}
    narrower = {name: tensors[name].to(torch.bfloat16) for name in other}
    save_file({**tensors, **narrower}, path, {"format": "pt"})
    opened = open_moe(open_checkpoint(model))
    assert of_several(opened) - joined(opened) == {"model.layers.1.mlp.experts.gate_up_proj"}
    assert same(opened)


def test_conversions_see_no_other_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers goes through all tensors of the model for each; afterwards the model has all its layers again."""
    opened, seen, plain = open_tiny("qwen3_moe", tmp_path / "model"), list[set[int | None]](), Conversion.load
    before = set(opened.skeleton.model.state_dict())

    def load(self: Conversion, tensors: Any) -> None:
        seen.append({opened.skeleton.layer_of(name) for name in self.model.state_dict()} - {None})
        plain(self, tensors)

    monkeypatch.setattr(Conversion, "load", load)
    with closing(LayerWeights(opened, CPU)) as weights:
        for index in range(opened.skeleton.layer_count):
            with weights.loaded(index):
                assert set(opened.skeleton.model.state_dict()) == before
                assert seen
                assert all(layers == {index} for layers in seen)
            seen.clear()
