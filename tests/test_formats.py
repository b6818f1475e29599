"""Storage formats and origins: a format that is not plain goes through every room; computed tensors are proved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import PruneSettings
from streamprune.errors import VerifyError
from streamprune.formats import pick
from streamprune.formats.base import Format, KeptExperts, decode_tensors
from streamprune.formats.quantization import Module, Quantization, Recognized
from streamprune.models.open import open_moe
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.output.plan import OutputSource, PrunePlan, make_plan
from streamprune.output.tensors import ComputedTensors, StageTensor, output_tensors
from streamprune.output.verify import prove_tensors
from streamprune.output.writer import OutputWriter
from streamprune.work.folder import WorkFolder
from streamprune.work.layer_records import Computed, StageResults
from streamprune.work.records import converted
from tests.helpers import known_family
from tests.tiny import make_model, tiny_config


@dataclass(frozen=True)
class HalvedFormat(Format):
    """For these tests: a weight is stored as whole numbers beside a `weight_step` to multiply them with."""

    name = "halved"

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (parts[""].float() * parts["step"]).to(dtype)

    def stored_as(self, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {"": ("I8", shape), "step": ("F32", (1,))}

    def plain_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[""]


HALVED = HalvedFormat()


def recognize(module: Module, stated: Quantization) -> Recognized | None:
    if "weight_step" not in module.tensors:
        return None
    return Recognized(HALVED, {"weight": ("weight", ""), "weight_step": ("weight", "step")})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")), max_shard_size="1GB")


def halve_experts(model: Path) -> dict[str, torch.Tensor]:
    """Store the experts in the other format; returns the tensors as they were, as far as they can be told again."""
    path = model / "model.safetensors"
    plain, stored = load_file(path), {}
    for name, tensor in list(plain.items()):
        if ".experts." in name:
            step = tensor.abs().max().reshape(1) / 127
            stored |= {name: (tensor / step).round().to(torch.int8), f"{name}_step": step}
            plain[name] = stored[name] * step
        else:
            stored[name] = tensor
    save_file(stored, path, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "halved"}}))
    return plain


def planned(model: Path, kept: int = 5) -> tuple[PrunePlan, Any]:
    checkpoint = open_checkpoint(model)
    opened = open_moe(checkpoint)
    loading = find_loading_facts(checkpoint.config, opened.config, opened.skeleton)
    counts = dict.fromkeys(opened.layout.expert_layers, kept)
    return make_plan(OutputSource(checkpoint, opened.layout, loading), counts, 10**9), opened


def test_a_module_s_companions_are_one_parameter(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the module's own tensors: the experts are in the other format, everything else is plain."""
    monkeypatch.setattr(pick, "RECOGNIZERS", (recognize,))
    expected = halve_experts(model)
    checkpoint = open_checkpoint(model)
    stored = pick.pick_formats(checkpoint.tensors, checkpoint.config)
    assert {each.format.name for name, each in stored.items() if ".experts." in name} == {"halved"}
    assert {each.format.name for name, each in stored.items() if ".experts." not in name} == {"plain"}
    raw = load_file(model / "model.safetensors")
    decoded = decode_tensors(raw, stored, torch.float32)
    assert not raw, "decoded tensors are taken out, so that their memory is free"
    assert decoded.keys() == expected.keys()
    assert all(torch.equal(decoded[name], tensor) for name, tensor in expected.items())


def test_companions_are_cut_and_renumbered_with_their_experts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick, "RECOGNIZERS", (recognize,))
    halve_experts(model)
    plan, opened = planned(model)
    names = {tensor.name: tensor for tensor in plan.tensors}
    name = "model.layers.1.mlp.experts.{}.up_proj.weight_step"
    assert name.format(4) in names
    assert name.format(5) not in names
    kept = (0, 2, 3, 5, 7)
    origin, source = names[name.format(3)].slice_of(KeptExperts(kept)), opened.checkpoint.tensors[name.format(5)]
    assert origin.experts == (5,)
    assert [(part.begin, part.end, part.take) for part in origin.parts] == [(source.begin, source.end, None)]


def test_a_format_that_nobody_knows_is_refused_by_its_tensors(model: Path) -> None:
    halve_experts(model)
    with pytest.raises(Exception, match=r"experts.* has the dtype I8"):
        open_moe(open_checkpoint(model))


def test_a_computed_tensor_is_written_and_proved_by_its_hash(model: Path, tmp_path: Path) -> None:
    """A stage hands a tensor to the writer: its hash is proved, a changed byte found, its origin on record."""
    plan, opened = planned(model)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    tensor = next(each for each in plan.tensors if each.name == name)
    made = StageTensor("refit", torch.rand(tensor.shape).numpy().tobytes())
    kept = dict.fromkeys(plan.counts, KeptExperts((0, 2, 3, 5, 7)))
    settings = PruneSettings(model=str(model), output=tmp_path / "out", keep_file=tmp_path / "keep.json", verify=True)
    with WorkFolder(settings.work_folder) as work:
        writer = OutputWriter(plan, opened.checkpoint, settings, work)
        for layer in (None, *range(plan.layout.layer_count)):
            stays = kept.get(layer, KeptExperts()) if layer is not None else KeptExperts()
            computed = {name: made} if layer == 1 else {}
            written = writer.write_layer(layer, stays, computed)
            origins = {each: tensor.origin for each, tensor in computed.items()}
            work.write_layer(layer, None, stays, written, StageResults(computed=origins))
            assert [shard.nbytes for shard in written] == [
                (work.staging / shard.file).stat().st_size for shard in written
            ]
        # Proved again by another process, which knows what is on record.
        again = OutputWriter(plan, opened.checkpoint, settings, work)
        record = work.read_layer(1)
        assert record is not None
        assert again.read_computed(1, record) == ComputedTensors({name: made})
        proof = again.verify(kept)
        assert (proof.tensors, proof.nbytes, proof.computed) == (len(plan.tensors), plan.output_bytes, 1)
        layers = [{"index": layer, "kept": each.experts} for layer, each in kept.items()]
        again.finish(kept, {"layers": layers, "settings": {}}, "card")
    output = settings.output
    entries = open_checkpoint(output).tensors
    recorded = json.loads((output / "streamprune.json").read_text())["computed"]
    assert recorded == {name: {"stage": "refit", "sha256": made.origin.sha256}}
    computed = {each: Computed(**origin) for each, origin in recorded.items()}
    # Messages state the stage, and the record may be someone else's.
    assert converted(recorded[name] | {"stage": "refit\x1b[2J"}, Computed) is None
    assert converted(recorded[name] | {"stage": "refit\n"}, Computed) is None
    assert converted(recorded[name], Computed) == computed[name]
    assert prove_tensors(plan.tensors, kept, computed, model, output, entries).computed == 1
    norm = "model.layers.1.input_layernorm.weight"
    with pytest.raises(VerifyError, match=rf"{norm} is on record as computed by refit, which only tensors of experts"):
        prove_tensors(plan.tensors, kept, {norm: computed[name]}, model, output, entries)
    path = output / entries[name].file
    data = bytearray(path.read_bytes())
    data[entries[name].begin + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match=rf"{name}, computed by refit, has the SHA-256"):
        prove_tensors(plan.tensors, kept, computed, model, output, entries)


def test_plain_tensors_have_slices_of_the_source_as_origins(model: Path) -> None:
    plan, opened = planned(model)
    outputs = output_tensors(opened.layout, opened.checkpoint.tensors, plan.counts)
    for tensor in outputs:
        origin = tensor.slice_of(KeptExperts((0, 2, 3, 5, 7)))
        assert sum(part.nbytes for part in origin.parts) == tensor.nbytes
