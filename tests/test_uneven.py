"""Outputs with different numbers of experts per layer: they load, and equal models cut and put together by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from streamprune.errors import UnsupportedModelError
from streamprune.models.open import load_config
from streamprune.models.per_layer_experts import STANDARD_TABLE, modeling_source
from tests.helpers import known_family, load_whole, prune, read_tensors, token_ids
from tests.thorough import by_family
from tests.tiny import FAMILIES, Family, make_model, tiny_config
from tests.uneven import Uneven, in_memory, make_uneven, stock_model

#: One of each kind: per-expert tensors, groups and dense layers, packed experts, a part of the config, per_layer_config
#: used for something else, images, and hybrids that keep state by layer.
SOME = ("qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "gemma4_text", "qwen3_5_moe", "granitemoehybrid")

#: Families whose tiny models have experts in one layer only, so that no two layers can differ.
ONE_LAYER = ("beam", "glm5_next")
#: Families of which transformers finds tensors by the name of the class, which that of an output would not have.
BY_CLASS = ("dots3_note_text", "qwen3_omni_moe_thinker")


@pytest.fixture(autouse=True)
def modules_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy the outputs' modules into this test's own folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module", params=SOME)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    return make_uneven(known_family(request.param), tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def reference(made: Uneven) -> Any:
    """The same model cut in memory, which tests leave as it is."""
    return in_memory(made, load_whole(made.source))


def load(made: Uneven, auto: str | None = None, **options: Any) -> Any:
    kind = getattr(transformers, auto or made.facts.classes[0].auto)
    return kind.from_pretrained(made.output, trust_remote_code=True, **options)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_logits(made: Uneven, reference: Any) -> None:
    """Assert that the output computes what the model cut in memory does, and something else than the source."""
    assert len(set(made.counts.values())) > 1
    ids = token_ids(batch=1, length=24)
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
        model = load_whole(made.output, trust_remote_code=True)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        whole = load_whole(made.source)(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(whole, expected, atol=1e-3), "experts that make no difference prove nothing"
    assert type(model).__name__ in {each.name for each in made.facts.classes}


def test_logits_equal_a_model_cut_by_hand(made: Uneven, reference: Any) -> None:
    check_logits(made, reference)


@by_family({"qwen3_next", "llama4"}, [each for each in FAMILIES if each.id not in (*SOME, *ONE_LAYER, *BY_CLASS)])
def test_logits_of_other_families_equal_a_model_cut_by_hand(family: Family, tmp_path: Path) -> None:
    made = make_uneven(family, tmp_path)
    check_logits(made, in_memory(made, load_whole(made.source)))


@pytest.mark.parametrize("name", BY_CLASS)
def test_families_that_no_module_can_load_are_refused(name: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", tiny_config(known_family(name)))
    with pytest.raises(
        UnsupportedModelError, match=r"knows the names of its tensors by its class, .*\(--schedule uniform\)"
    ):
        prune(source, tmp_path / "out", schedule="global")


@pytest.mark.parametrize(
    ("family", "alias"), [("qwen3_moe", "num_experts"), ("mixtral", "num_experts"), ("dots1", "num_local_experts")]
)
def test_config_may_state_the_number_under_another_name(family: str, alias: str, tmp_path: Path) -> None:
    made = make_uneven(known_family(family), tmp_path, alias)
    told = json.loads((made.output / "config.json").read_text())
    assert {name for values in told[STANDARD_TABLE].values() for name in values} == {alias}
    ids = token_ids(batch=1)
    with torch.no_grad():
        expected = in_memory(made, load_whole(made.source))(input_ids=ids, use_cache=False).logits
        assert torch.equal(load_whole(made.output, trust_remote_code=True)(input_ids=ids).logits, expected)


def test_every_class_loads_clean(made: Uneven, reference: Any) -> None:
    expected = reference.get_submodule(made.skeleton.layers_path)
    assert {each.auto for each in made.facts.classes} >= {"AutoModelForCausalLM", "AutoModel"}
    for each in made.facts.classes:
        model, info = load(made, each.auto, output_loading_info=True)
        assert type(model).__name__ == each.name
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        if each.auto != "AutoModel":  # which leaves the head out
            assert not info["unexpected_keys"]
        assert same_weights(model.get_submodule(each.layers), expected)


def test_generate_and_save_round_trip(made: Uneven, reference: Any, tmp_path: Path) -> None:
    model = load(made)
    ids = token_ids(length=8)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **greedy), reference.generate(ids, **greedy))
    if made.facts.classes[0].whole:  # the text part, saved as a model of its own
        part = tmp_path / "uneven-part"
        model.save_pretrained(part)
        assert same_weights(AutoModelForCausalLM.from_pretrained(part, trust_remote_code=True), model)

    auto = made.facts.classes[-2].auto  # for a model with images the one that has all of it
    model = load(made, auto)
    saved = tmp_path / "uneven-saved"
    model.save_pretrained(saved)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made.output, saved))
    for name in made.facts.path:
        assert before["auto_map"] == after["auto_map"]
        assert before["architectures"] == after["architectures"]
        before, after = before[name], after[name]
    assert before[made.facts.table] == after[made.facts.table]
    assert (saved / made.facts.file_name).read_text() == modeling_source(made.facts)
    tensors = read_tensors(saved)
    assert tensors.keys() == read_tensors(made.output).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in read_tensors(made.output).items())
    assert same_weights(getattr(transformers, auto).from_pretrained(saved, trust_remote_code=True), model)


def test_settings_reach_the_replaced_layers(made: Uneven) -> None:
    model = load(made, dtype=torch.bfloat16)
    layers = model.get_submodule(made.facts.classes[0].layers)
    assert {parameter.dtype for parameter in layers.parameters()} <= {torch.bfloat16, torch.float32}
    assert sum(parameter.dtype == torch.bfloat16 for parameter in layers.parameters()) > 20
    model.set_attn_implementation("eager")
    configs = [module.config for module in layers.modules() if hasattr(module, "config")]
    assert all(config._attn_implementation == "eager" for config in configs)
    model = load(made, attn_implementation="eager").train()
    layers = model.get_submodule(made.facts.classes[0].layers)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(any(weight.grad is not None for weight in layers[block].parameters()) for block in made.counts)


def test_new_models_are_initialized_throughout(made: Uneven) -> None:
    config = AutoConfig.from_pretrained(made.output)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    fresh = stock_model(load_config(made.source)).get_submodule(made.skeleton.layers_path)
    for block, layer in enumerate(model.get_submodule(made.facts.classes[0].layers)):
        expected = dict(fresh[block].named_parameters())
        for name, weight in layer.named_parameters():
            if weight.numel() > 1000:
                assert weight.std().item() == pytest.approx(expected[name].std().item(), rel=0.2), f"{block}: {name}"


def test_loads_onto_devices_by_itself(made: Uneven) -> None:
    pytest.importorskip("accelerate")
    model = load(made, device_map="auto", low_cpu_mem_usage=True)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load(made)(input_ids=ids).logits)
    stock = {type(layer).__name__ for layer in model.get_submodule(made.facts.classes[0].layers)}
    assert stock & set(model._no_split_modules), "a layer must not be divided among devices"


def test_without_trust_the_config_loads_and_the_model_is_refused(made: Uneven) -> None:
    config = AutoConfig.from_pretrained(made.output).get_text_config(decoder=True)
    name = made.facts.names[0]
    if made.facts.table == STANDARD_TABLE and made.facts.inner is None:
        counts = {block: getattr(config.per_layer_config[block], name) for block in made.counts}
        assert counts == made.counts
    told = getattr(config, made.facts.inner) if made.facts.inner else config
    assert getattr(told, name) == max(made.counts.values())
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(made.output)
