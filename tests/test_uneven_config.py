"""Config, module and stored facts of outputs with different numbers of experts per layer."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

from streamprune.config import RunSettings
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.models.per_layer_experts import (
    OWN_TABLE,
    STANDARD_TABLE,
    check_per_layer_experts,
    config_of_per_layer_experts,
    engines_note,
    loading_facts_from_json,
    modeling_source,
)
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.models.skeleton import build_skeleton
from streamprune.pipeline.run import run
from streamprune.saliency.scores_file import read_scores
from tests.helpers import known_family
from tests.tiny import EXPERTS, make_model, tiny_config, write_token_ids
from tests.uneven import facts_of


def test_equal_counts_leave_the_config_as_it_is() -> None:
    facts, config = facts_of(), tiny_config(known_family("qwen3_moe")).to_dict()
    assert config_of_per_layer_experts(config, facts, dict.fromkeys(range(4), EXPERTS)) == config
    broken = msgspec.structs.replace(facts, problem="it is broken.")
    assert config_of_per_layer_experts(config, broken, dict.fromkeys(range(4), EXPERTS)) == config


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
    config = config_of_per_layer_experts(source, facts_of(), {0: 6, 1: 4, 2: 6, 3: 2})
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
    many = msgspec.structs.replace(facts_of(), layer_count=100)
    assert list(config_of_per_layer_experts(source, many, {2: 5, 10: 6, 99: 4})[STANDARD_TABLE]) == ["02", "99"]


@pytest.mark.parametrize(
    ("config", "counts", "error", "words"),
    [
        ({"num_experts": 8}, {0: 6, 1: 4}, SettingsError, "num_experts = 8, but its widest layer keeps 6"),
        ({"num_experts": "x" * 9000}, {0: 6, 1: 4}, SettingsError, "widest layer keeps 6"),
        ({"num_experts": 10**300}, {0: 6, 1: 4}, SettingsError, "widest layer keeps 6"),
        ({"num_experts": 6}, {0: 6, 7: 4}, SettingsError, "layer 7, but the model has 4 layers"),
        ({"num_experts": 6}, {0: 6, 1: 0}, SettingsError, "0 experts cannot be kept"),
        ({"num_experts": 6, "per_layer_config": {"0": {"a": 1}}}, {0: 6, 1: 4}, UnsupportedModelError, "of its own"),
    ],
)
def test_what_does_not_go_together_is_refused(
    config: dict[str, Any], counts: dict[int, int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        config_of_per_layer_experts(config, facts_of(), counts)
    assert len(str(caught.value)) < 400


def test_config_of_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no part text_config"):
        config_of_per_layer_experts({"num_experts": 6, "text_config": [1]}, facts_of("qwen3_vl_moe"), {0: 6, 1: 4})


def test_models_that_cannot_be_loaded_so_are_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(known_family("qwen3_moe"))
    raw, skeleton = config.to_dict(), build_skeleton(config, torch.float32)

    class Own(Qwen3MoeForCausalLM):
        pass

    with torch.device("meta"):
        own = find_loading_facts(raw, config, replace(skeleton, model=Own(config)))
    assert "comes with the model" in own.problem
    assert loading_facts_from_json(msgspec.to_builtins(own)) == own
    check_per_layer_experts(own, {0: 4, 1: 4})
    with pytest.raises(UnsupportedModelError, match=r"2 to 4.*qwen3_moe: its code.*--schedule uniform"):
        check_per_layer_experts(own, {0: 4, 1: 2})
    with pytest.raises(UnsupportedModelError, match="--schedule uniform"):
        config_of_per_layer_experts({"num_experts": 4}, own, {0: 4, 1: 2})
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
    code = (
        "import sys, streamprune.models.per_layer_experts; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
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
    told = json.loads(json.dumps(msgspec.to_builtins(facts_of())))
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


def test_scoring_in_bfloat16_keeps_what_per_layer_experts_need(tmp_path: Path) -> None:
    """The facts are found before a weight is loaded: loading makes DeepSeek-V3's correction biases float32."""
    source = make_model(tmp_path / "model", tiny_config(known_family("deepseek_v3")))
    text, scores = write_token_ids(tmp_path / "text.jsonl", sequences=1, length=16), tmp_path / "scores.safetensors"
    settings = RunSettings(
        model=str(source), output=scores, only_score=True, calibration=(str(text),), dtype="bfloat16", device="cpu"
    )
    run(settings, quiet=True)
    layout = read_scores(scores).layout
    assert layout is not None
    assert layout["loading"]["problem"] == ""
