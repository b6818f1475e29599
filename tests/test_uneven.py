"""Outputs with different numbers of experts per layer: they load, and equal models cut and put together by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.output.uneven import (
    OWN_TABLE,
    LoadingFacts,
    check_uneven,
    engines_note,
    loading_facts_from_json,
    modeling_source,
    uneven_config,
)
from streamprune.output.uneven_facts import find_loading_facts
from streamprune.output.uneven_template import STANDARD_TABLE
from streamprune.source.architecture import load_config
from streamprune.source.skeleton import build_skeleton
from tests.helpers import known_family, load_whole, read_tensors, token_ids
from tests.tiny import EXPERTS, FAMILIES, Family, tiny_config
from tests.uneven import Uneven, in_memory, make_uneven, stock_model

#: One of each kind: per-expert tensors, groups and dense layers, packed experts, a part of the config, per_layer_config
#: used for something else, images, and hybrids that keep state by layer.
SOME = ("qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "gemma4_text", "qwen3_5_moe", "granitemoehybrid")


@pytest.fixture(autouse=True)
def modules_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy the outputs' modules into this test's own folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module", params=SOME)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    return make_uneven(known_family(request.param), tmp_path_factory.mktemp("made"))


def load(made: Uneven, auto: str | None = None, **options: Any) -> Any:
    kind = getattr(transformers, auto or made.facts.classes[0].auto)
    return kind.from_pretrained(made.output, trust_remote_code=True, **options)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def facts_of(family: str = "qwen3_moe") -> LoadingFacts:
    config = tiny_config(known_family(family))
    facts = find_loading_facts(json.loads(config.to_json_string()), config, build_skeleton(config, torch.float32))
    assert not facts.problem
    return facts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_logits_equal_a_model_cut_by_hand(family: Family, tmp_path: Path) -> None:
    made = make_uneven(family, tmp_path)
    assert len(set(made.counts.values())) > 1
    ids = token_ids(batch=1, length=24)
    with torch.no_grad():
        expected = in_memory(made, load_whole(made.source))(input_ids=ids, use_cache=False).logits
        model = load_whole(made.output, trust_remote_code=True)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        whole = load_whole(made.source)(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(whole, expected, atol=1e-3), "experts that make no difference prove nothing"
    assert type(model).__name__ in {each.name for each in made.facts.classes}


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


def test_every_class_loads_clean(made: Uneven) -> None:
    reference = in_memory(made, load_whole(made.source)).get_submodule(made.skeleton.blocks_path)
    assert {each.auto for each in made.facts.classes} >= {"AutoModelForCausalLM", "AutoModel"}
    for each in made.facts.classes:
        model, info = load(made, each.auto, output_loading_info=True)
        assert type(model).__name__ == each.name
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        if each.auto != "AutoModel":  # which leaves the head out
            assert not info["unexpected_keys"]
        assert same_weights(model.get_submodule(each.layers), reference)


def test_generate_and_save_round_trip(made: Uneven, tmp_path: Path) -> None:
    model = load(made)
    reference = in_memory(made, load_whole(made.source))
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
    fresh = stock_model(load_config(made.source)).get_submodule(made.skeleton.blocks_path)
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


def test_equal_counts_leave_the_config_as_it_is() -> None:
    facts, config = facts_of(), tiny_config(known_family("qwen3_moe")).to_dict()
    assert uneven_config(config, facts, dict.fromkeys(range(4), EXPERTS)) == config
    broken = replace(facts, problem="it is broken.")
    assert uneven_config(config, broken, dict.fromkeys(range(4), EXPERTS)) == config


def test_config_keeps_the_source_s_names_and_other_code() -> None:
    auto_map = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    source = {
        "architectures": ["Qwen3MoeForCausalLM", {}],
        "auto_map": auto_map,
        "num_experts": 6,
        "hidden_size": 64,
    }
    config = uneven_config(source, facts_of(), {0: 6, 1: 4, 2: 6, 3: 2})
    assert config == {
        "architectures": ["UnevenQwen3MoeForCausalLM"],
        "auto_map": {
            "AutoTokenizer": ["tokenization_x.X", None],
            "AutoModelForCausalLM": "modeling_qwen3_moe_uneven.UnevenQwen3MoeForCausalLM",
            "AutoModel": "modeling_qwen3_moe_uneven.UnevenQwen3MoeModel",
        },
        "num_experts": 6,
        "hidden_size": 64,
        "per_layer_config": {"1": {"num_experts": 4}, "3": {"num_experts": 2}},
        "allow_global_per_layer_attribute_access": True,
    }
    many = replace(facts_of(), blocks=100)
    assert list(uneven_config(source, many, {2: 5, 10: 6, 99: 4})[STANDARD_TABLE]) == ["02", "99"]


@pytest.mark.parametrize(
    ("config", "counts", "error", "words"),
    [
        ({"num_experts": 8}, {0: 6, 1: 4}, SettingsError, "num_experts = 8, but its widest layer keeps 6"),
        ({"num_experts": "x" * 9000}, {0: 6, 1: 4}, SettingsError, "widest layer keeps 6"),
        ({"num_experts": 10**300}, {0: 6, 1: 4}, SettingsError, "widest layer keeps 6"),
        ({"num_experts": 6}, {0: 6, 7: 4}, SettingsError, "block 7, but the model has 4 blocks"),
        ({"num_experts": 6}, {0: 6, 1: 0}, SettingsError, "0 experts cannot be kept"),
        ({"num_experts": 6, "per_layer_config": {"0": {"a": 1}}}, {0: 6, 1: 4}, UnsupportedModelError, "of its own"),
    ],
)
def test_what_does_not_go_together_is_refused(
    config: dict[str, Any], counts: dict[int, int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        uneven_config(config, facts_of(), counts)
    assert len(str(caught.value)) < 400


def test_config_of_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no part text_config"):
        uneven_config({"num_experts": 6, "text_config": [1]}, facts_of("qwen3_vl_moe"), {0: 6, 1: 4})


def test_models_that_cannot_be_loaded_so_are_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(known_family("qwen3_moe"))
    raw, skeleton = config.to_dict(), build_skeleton(config, torch.float32)

    class Own(Qwen3MoeForCausalLM):
        pass

    with torch.device("meta"):
        own = find_loading_facts(raw, config, replace(skeleton, model=Own(config)))
    assert "comes with the model" in own.problem
    assert loading_facts_from_json(own.as_json()) == own
    check_uneven(own, {0: 4, 1: 4})
    with pytest.raises(UnsupportedModelError, match=r"2 to 4.*qwen3_moe: its code.*--schedule uniform"):
        check_uneven(own, {0: 4, 1: 2})
    with pytest.raises(UnsupportedModelError, match="--schedule uniform"):
        uneven_config({"num_experts": 4}, own, {0: 4, 1: 2})
    with pytest.raises(UnsupportedModelError, match="comes with the model"):
        modeling_source(own)

    uneven = {**raw, "per_layer_config": {"1": {"num_experts": 3}}}
    already = find_loading_facts(uneven, type(config)(**uneven), skeleton)
    assert "different numbers of experts already" in already.problem

    build = modeling_qwen3_moe.Qwen3MoeModel.__init__

    def marking(self: Any, config: Any) -> None:
        build(self, config)
        for index, layer in enumerate(self.layers):
            layer.first = index == 0

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeModel, "__init__", marking)
    marked = find_loading_facts(raw, config, build_skeleton(config, torch.float32))
    assert "layer 0 of its Qwen3MoeForCausalLM cannot be built from its own config alone (first" in marked.problem


def test_layers_that_read_the_whole_model_s_count_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(known_family("qwen3_moe"))

    class Reading(modeling_qwen3_moe.Qwen3MoeSparseMoeBlock):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            assert self.config.num_experts
            return super().forward(hidden_states)

    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeSparseMoeBlock", Reading)
    facts = find_loading_facts(json.loads(config.to_json_string()), config, build_skeleton(config, torch.float32))
    assert "its Reading looks up one number of experts" in facts.problem


def test_module_needs_only_transformers_and_is_small() -> None:
    for family in ("qwen3_moe", "dbrx", "gemma4_text", "llama4"):
        facts = facts_of(family)
        source = modeling_source(facts)
        tree = ast.parse(source)
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert imported <= {"transformers", "copy"}
        assert max(map(len, source.splitlines())) <= 120
        assert len(source.splitlines()) < 90
        assert facts.table == (OWN_TABLE if family == "gemma4_text" else STANDARD_TABLE)


def test_facts_and_files_need_no_torch() -> None:
    code = "import sys, streamprune.output.uneven; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "a\nimport os"),
        ("model_type", 5),
        ("path", ["text_config", "x y"]),
        ("path", "text_config"),
        ("inner", 'a"]; import os'),
        ("names", []),
        ("names", ['"}: pass']),
        ("names", ["é"]),
        ("names", [float("nan")]),
        ("blocks", True),
        ("blocks", 10**30),
        ("classes", []),
        ("classes", [None]),
        ("classes", [{}] * 1000),
        ("table", "per_layer_other"),
        ("table", {}),
        ("problem", "x" * 10_000),
        ("problem", "\x1b[2J"),
        ("auto", "AutoConfig"),
        ("stock", "X):\n    import os\nclass Y(X"),
        ("stock", "class"),
        ("module", "os"),
        ("module", "transformers; import os"),
        ("module", "transformers.class"),
        ("layers", "model.layers[0]"),
        ("layers", "model..layers"),
        ("layers", ["model"]),
        ("whole", True),
        ("whole", "X\nimport os"),
    ],
)
def test_facts_of_strangers_never_become_code(field: str, value: Any) -> None:
    told = json.loads(json.dumps(facts_of().as_json()))
    (told if field in told else told["classes"][0])[field] = value
    with pytest.raises(CheckpointError, match="Score the model again") as caught:
        loading_facts_from_json(told)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    del (told if field in told else told["classes"][0])[field]
    with pytest.raises(CheckpointError, match="Score the model again"):
        loading_facts_from_json(told)


@pytest.mark.parametrize("told", [None, [], "facts", 3, {}, {"classes": {}}])
def test_facts_that_are_none(told: Any) -> None:
    with pytest.raises(CheckpointError, match="Score the model again"):
        loading_facts_from_json(told)


def test_note_tells_which_engines_read_it() -> None:
    assert all(word in engines_note(True) for word in ("trust_remote_code=True", "vLLM", "llama.cpp", "uniform"))
    assert "every engine" in engines_note(False)
