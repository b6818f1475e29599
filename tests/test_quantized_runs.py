"""Quantized sources in whole commands: lists of names, uneven layers, saved scores, kills, refusals, damage."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import PruneSettings
from streamprune.errors import CheckpointError, UnsupportedModelError, VerifyError
from streamprune.output.verify import verify
from streamprune.pipeline import prune as pruning
from streamprune.pipeline import run as running
from tests import packers
from tests.faults import Injected
from tests.helpers import known_family, prune, read_tensors, tree_bytes
from tests.interruptions import breaking_at
from tests.quantized import make_quantized, write_checkpoint
from tests.test_evaluate import measured
from tests.test_quantized_sources import Case, check_layers, check_loaded, check_scores, check_tensors
from tests.thorough import mostly_thorough
from tests.tiny import write_token_ids

NAME = "model.layers.{}.mlp.experts.{}.{}_proj"
#: One projection of each layer's experts is left plain; in an order in which an expert's new number shows.
LEFT = [
    NAME.format(*where) for expert in (5, 2, 7, 0, 6, 1, 4, 3) for where in ((0, expert, "down"), (1, expert, "up"))
]

TIED = {"tie_word_embeddings": True}

Tensors = dict[str, torch.Tensor]
Section = dict[str, Any]


@pytest.fixture(autouse=True)
def modules_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy the modules of uneven outputs into this test's own folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def section_of(folder: Path, *place: str) -> Any:
    value = json.loads((folder / "config.json").read_text())
    for key in place or ("quantization_config",):
        value = value[key]
    return value


def each_of(listed: list[str] | dict[str, Any]) -> dict[str, Any]:
    """The names in a list, or the entries of a table."""
    return listed if isinstance(listed, dict) else dict.fromkeys(listed)


def renumbered(names: list[str], kept: Mapping[int, list[int]]) -> list[str]:
    """Names in a list after pruning: experts have their new numbers, those of experts that left are gone."""
    result = []
    for name in names:
        found = re.search(r"layers\.(\d+)\..*experts\.(\d+)", name)
        if found is None:
            result.append(name)
        elif int(found.group(2)) in kept[int(found.group(1))]:
            number = kept[int(found.group(1))].index(int(found.group(2)))
            result.append(name.replace(f"experts.{found.group(2)}", f"experts.{number}"))
    return result


@pytest.mark.parametrize(
    ("scheme", "key", "uneven"),
    [
        ("fp8", "modules_to_not_convert", True), ("ct-w4", "ignore", False), ("awq", "modules_to_not_convert", False),
        ("autoround", "extra_config", True),
    ],
)  # fmt: skip
def test_names_of_experts_are_renumbered(scheme: str, key: str, uneven: bool, tmp_path: Path) -> None:
    """Projections of experts that are plain are named in lists or as keys; nothing else of the section changes."""
    made = make_quantized(tmp_path, scheme, leave=LEFT)
    source = section_of(made.source)
    others = {name: value for name, value in each_of(source[key]).items() if name not in LEFT}
    named = {**others, **{name: {"bits": 16, "data_type": "fp"} for name in LEFT}}
    source[key] = named if isinstance(source[key], dict) else list(named)
    write_config(made.source, source)
    goal = {"keep": 5, **({"schedule": "linear-decrease", "spread": 0.25} if uneven else {})}
    result = prune(made.source, tmp_path / "out", **goal)
    kept = {layer.index: list(layer.kept) for layer in result.layers}
    assert (len({len(experts) for experts in kept.values()}) > 1) == uneven
    assert kept[0] != kept[1]
    found = section_of(tmp_path / "out")
    names = renumbered(list(source[key]), kept)
    assert names != list(source[key])
    assert any(".experts." in name for name in names)
    assert list(found[key]) == names
    assert {**found, key: None} == {**source, key: None}
    if scheme == "autoround":
        assert json.loads((tmp_path / "out" / "quantization_config.json").read_text()) == found
    check_tensors(made.source, tmp_path / "out", kept)
    prune(made.reference, tmp_path / "plain-out", **goal)
    check_layers(tmp_path / "out", tmp_path / "plain-out")


def test_a_section_in_the_text_part_is_renumbered_there(tmp_path: Path) -> None:
    """As of models with images: the section is nested, under either of its names, and names begin otherwise."""
    place = ("text_config", "compression_config")
    left = [name.replace("model.", "model.language_model.", 1) for name in LEFT]
    made = make_quantized(tmp_path, "ct-w4", "qwen3_5_moe", leave=left, place=place)
    source = section_of(made.source, *place)
    result = prune(made.source, tmp_path / "out")
    kept = {layer.index: list(layer.kept) for layer in result.layers}
    found = section_of(tmp_path / "out", *place)
    assert found == {**source, "ignore": renumbered(source["ignore"], kept)}
    assert found["ignore"] != source["ignore"]
    check_tensors(made.source, tmp_path / "out", kept)


@pytest.mark.parametrize("pattern", ["re:.*mlp\\.experts\\.3\\.down_proj$", "re:.*experts\\.[0-4]\\.down_proj$"])
def test_a_pattern_with_numbers_of_experts_is_refused(pattern: str, tmp_path: Path) -> None:
    made = make_quantized(tmp_path, "ct-w4", leave=LEFT)
    section = section_of(made.source)
    write_config(made.source, {**section, "ignore": [*section["ignore"], pattern]})
    with pytest.raises(UnsupportedModelError, match="experts"):
        prune(made.source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_that_are_not_stored_alike_are_refused(tmp_path: Path) -> None:
    """Engines ask one expert of a layer how all of them are stored."""
    made = make_quantized(tmp_path, "fp8", leave=[NAME.format(1, 6, "up")])
    with pytest.raises(UnsupportedModelError, match=r"experts of .*layers\.1.* are not stored alike.*plain"):
        prune(made.source, tmp_path / "out")


def test_a_router_whose_experts_share_scales_is_refused(tmp_path: Path) -> None:
    """A row for each expert, in blocks of several rows."""
    source = make_quantized(tmp_path, "fp8").source
    tensors, name = read_tensors(source), "model.layers.1.mlp.gate"
    packed = packers.fp8(tensors.pop(f"{name}.weight"), (32, 32))
    tensors |= {f"{name}.{leaf}": part for leaf, part in packed.parts.items()}
    write_checkpoint(tmp_path / "changed", tensors, json.loads((source / "config.json").read_text()))
    with pytest.raises(UnsupportedModelError, match=r"gate\.weight_scale_inv .* 8 experts .*original"):
        prune(tmp_path / "changed", tmp_path / "out")


def test_a_pattern_for_all_experts_stays(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, "ct-w4", leave=LEFT)
    section = section_of(made.source)
    plain = [name for name in section["ignore"] if ".experts." not in name]
    by_layer = ("0\\.mlp\\.experts\\.\\d+\\.down_proj$", "1\\.mlp\\.experts\\.[0-9]+\\.up_proj$")
    section["ignore"] = [*plain, *(f"re:.*layers\\.{each}" for each in by_layer)]
    write_config(made.source, section)
    prune(made.source, tmp_path / "out")
    assert section_of(tmp_path / "out") == section
    prune(made.reference, tmp_path / "plain-out")
    check_layers(tmp_path / "out", tmp_path / "plain-out")


@pytest.mark.parametrize(
    ("scheme", "family"),
    mostly_thorough(
        [("fp8", "qwen3_moe"), ("mxfp4", "gpt_oss"), ("ct-w4", "qwen3_moe"), ("kimi-k2", "deepseek_v3")],
        [("mxfp4", "gpt_oss"), ("ct-w4", "qwen3_moe")],
    ),
)
def test_layers_may_keep_different_numbers(scheme: str, family: str, tmp_path: Path) -> None:
    made = Case(scheme, family).make(tmp_path)
    # The two groups of experts keep equally many, and at least the two that the router picks of one of them.
    grouped = {"keep": 6, "spread": 0.34} if family == "deepseek_v3" else {"keep": 4, "spread": 0.25}
    goal = {"schedule": "linear-decrease", **grouped}
    result = prune(made.source, tmp_path / "out", **goal)
    prune(made.reference, tmp_path / "plain-out", **goal)
    kept = {layer.index: list(layer.kept) for layer in result.layers}
    assert len({len(experts) for experts in kept.values()}) > 1
    check_scores(tmp_path / "out", tmp_path / "plain-out")
    check_tensors(made.source, tmp_path / "out", kept)
    check_loaded(tmp_path / "out", tmp_path / "plain-out")


@pytest.mark.parametrize(
    "case",
    mostly_thorough(
        [
            Case("fp8"),
            Case("mxfp4", "gpt_oss"),
            Case("ct-w4"),
            Case("kimi-k2", "deepseek_v3"),
            Case("gptq"),
            Case("awq"),
        ],
        [Case("fp8").id, Case("mxfp4", "gpt_oss").id],
    ),
    ids=lambda case: case.id,
)  # fmt: skip
def test_killed_runs_and_pruning_from_scores_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """Whatever way the output comes about, it is to the byte that of an undisturbed run."""
    source, keep = case.make(tmp_path).source, known_family(case.family).keep
    settings: dict[str, Any] = {"keep": keep, "batch_tokens": 24, "checkpoint_every": 0.0}
    prune(source, tmp_path / "whole", **settings)
    expected = tree_bytes(tmp_path / "whole")
    with breaking_at(3), pytest.raises(Injected):
        prune(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    running.resume(tmp_path / "out.work", quiet=True)
    assert tree_bytes(tmp_path / "out") == expected
    given = PruneSettings(model=str(source), output=tmp_path / "later", scores=tmp_path / "whole", keep=keep)
    with breaking_at(3), pytest.raises(Injected):
        pruning.prune(given, quiet=True)
    pruning.resume(tmp_path / "later.work", quiet=True)
    assert tree_bytes(tmp_path / "later") == expected


def test_layers_for_multi_token_prediction_are_left_out_with_their_scales(tmp_path: Path) -> None:
    """DeepSeek-V3 has them as a layer behind the last one, quantized too, with a projection of their own."""
    made = Case("fp8", "deepseek_v3", {}).make(tmp_path)
    stored, config = read_tensors(made.source), json.loads((made.source / "config.json").read_text())
    further = {name.replace(".2.", ".3.", 1): each.clone() for name, each in stored.items() if ".layers.2." in name}
    packed = packers.fp8(torch.rand(64, 128), (32, 32))
    further |= {f"model.layers.3.eh_proj.{leaf}": part for leaf, part in packed.parts.items()}
    further |= {f"model.layers.3.{name}.weight": torch.rand(64) for name in ("enorm", "hnorm", "shared_head.norm")}
    write_checkpoint(tmp_path / "published", stored | further, config)
    result = prune(tmp_path / "published", tmp_path / "out", keep=4, mtp="drop")
    check_tensors(made.source, tmp_path / "out", {layer.index: list(layer.kept) for layer in result.layers})


@pytest.mark.parametrize(
    "case",
    mostly_thorough(
        [Case("mxfp4", "gpt_oss"), Case("ct-nvfp4"), Case("ct-w4-everywhere"), Case("ct-w4-everywhere", sizes=TIED)],
        [Case("ct-nvfp4").id, Case("ct-w4-everywhere").id],
    ),
    ids=lambda case: case.id,
)
def test_a_quantized_model_is_measured_as_the_plain_one(case: Case, tmp_path: Path) -> None:
    """Against another quantized model, of which it was made; both are decoded, embeddings and output head too."""
    made, held_out = case.make(tmp_path), write_token_ids(tmp_path / "held-out.jsonl", seed=7)
    keep = known_family(case.family).keep
    prune(made.source, tmp_path / "out", keep=keep)
    prune(made.reference, tmp_path / "plain-out", keep=keep)
    figures = measured(tmp_path / "out", made.source, held_out)["sources"]
    assert figures == measured(tmp_path / "plain-out", made.reference, held_out)["sources"]
    assert figures[0]["kl"] > 0


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_a_changed_byte_of_any_part_is_found(part: str, tmp_path: Path) -> None:
    source, output = make_quantized(tmp_path, "fp8").source, tmp_path / "out"
    prune(source, output)
    verify(output, source)
    entry = open_checkpoint(output).tensors[f"model.layers.1.mlp.experts.2.up_proj.{part}"]
    data = bytearray((output / entry.file).read_bytes())
    data[entry.begin] ^= 1
    (output / entry.file).write_bytes(data)
    with pytest.raises(VerifyError, match=re.escape(entry.name)):
        verify(output, source)


@pytest.mark.parametrize("method", ["bitsandbytes", "modelopt", "hqq", "torchao", "fbgemm_fp8"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    made = make_quantized(tmp_path, "fp8")
    write_config(made.source, {"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"{method}.*original"):
        prune(made.source, tmp_path / "out")


UP = "model.layers.1.mlp.experts.3.up_proj"


def drop(leaf: str) -> Callable[[Tensors, Section], Any]:
    """Take one tensor away."""
    return lambda tensors, section: tensors.pop(f"{UP}.{leaf}")


def add(leaf: str, tensor: torch.Tensor) -> Callable[[Tensors, Section], Any]:
    """Put a tensor beside a module's own."""
    return lambda tensors, section: tensors.update({f"{UP}.{leaf}": tensor})


def state(**values: Any) -> Callable[[Tensors, Section], Any]:
    """Say something else of the weights."""
    return lambda tensors, section: section.update(values)


def other_shape(tensors: Tensors, section: Section) -> None:
    """Keys get the tensors of queries, which are twice as many."""
    path = "model.layers.1.self_attn.{}_proj."
    for name in [name for name in tensors if name.startswith(path.format("q"))]:
        tensors[name.replace(path.format("q"), path.format("k"))] = tensors[name].clone()


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("fp8", state(quant_method="mxfp4"), "quantized by mxfp4, which stores them in another way"),
        ("fp8", state(quant_method="gptq"), "quantized by gptq, which stores them in another way"),
        ("awq", state(quant_method="fp8"), "config.json"),
        ("gptq", other_shape, "k_proj.weight is [64, 64], but config.json describes"),
        ("ct-w4", other_shape, "k_proj.weight is [64, 64], but config.json describes"),
        ("fp8", drop("weight_scale_inv"), UP),
        ("fp8", add("weight_scale_2", torch.ones(1)), UP),
        ("fp8", state(weight_block_size=[64, 64]), "weight_block_size"),
        ("fp8", lambda tensors, section: section.clear(), "config.json does not state"),
        ("deepseek-v4", drop("scale"), UP),
        ("ct-w4", drop("weight_scale"), UP),
        ("ct-w4", add("weight_g_idx", torch.zeros(64, dtype=torch.int32)), UP),
        ("ct-two-bits", lambda tensors, section: section["config_groups"].pop("group_1"), "32 columns of 8 bits"),
        ("ct-nvfp4", drop("weight_global_scale"), UP),
        ("gptq", drop("qzeros"), UP),
        ("autoround", state(packing_format="auto_round:unheard_of"), "unheard_of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(
    scheme: str, change: Callable[[Tensors, Section], Any], words: str, tmp_path: Path
) -> None:
    """A companion that is missing, or that nobody reads, and a config that says something else than the tensors: each
    of these gives wrong weights where it is not noticed. (More of them: `test_packed_refusals.py`.)"""
    source = Case(scheme, "deepseek_v3" if scheme == "deepseek-v4" else "qwen3_moe").make(tmp_path).source
    config, tensors = json.loads((source / "config.json").read_text()), read_tensors(source)
    change(tensors, config["quantization_config"])
    write_checkpoint(tmp_path / "changed", tensors, config)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(words)):
        prune(tmp_path / "changed", tmp_path / "out", keep=4)
    assert not (tmp_path / "out").exists()


def write_config(folder: Path, section: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
