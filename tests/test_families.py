"""Every family: streaming equals the whole model bit for bit, and pruning equals pruning in memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from streamprune.errors import UnsupportedModelError
from streamprune.models.skeleton import UNSUPPORTED_EXPERTS, build_model
from tests.helpers import (
    check_bytes,
    field_of,
    load_as_declared,
    load_whole,
    prune,
    prune_in_memory,
    streamed,
    token_ids,
)
from tests.thorough import DISTINCT, by_family, mostly_thorough
from tests.tiny import ALIASES, ALL_FAMILIES, ALL_REFUSED, FAMILIES, REFUSED, USUAL, Family, make_model, tiny_config

pytestmark = pytest.mark.families


@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        *mostly_thorough(
            product([torch.float32, torch.bfloat16], FAMILIES),
            [
                *((torch.float32, family) for family in FAMILIES if family.id in USUAL),
                *((torch.bfloat16, family) for family in FAMILIES if family.id in DISTINCT),
            ],
        ),
    ],
    ids=lambda value: value.id if isinstance(value, Family) else str(value).removeprefix("torch."),
)
def test_streamed_logits_equal_whole_model(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tiny_config(family))
    ids = token_ids()
    logits, statistics = streamed(folder, ids, dtype)
    whole = load_whole(folder, dtype=dtype)
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
    assert expected.abs().max() > 0.05, "a model that says nothing proves nothing"
    assert torch.equal(logits, expected)
    assert statistics
    for layer in statistics.values():
        assert sum(field_of(layer, "tokens")) == ids.numel() * 2


@by_family(USUAL)
def test_pruned_model_equals_pruning_in_memory(family: Family, tmp_path: Path) -> None:
    source, output = make_model(tmp_path / "model", tiny_config(family)), tmp_path / "pruned"
    result = prune(source, output, keep=family.keep)
    kept = {layer.index: list(layer.kept) for layer in result.layers}
    assert all(len(experts) == family.keep for experts in kept.values())

    _, info = load_as_declared(output)
    assert not {key: value for key, value in info.items() if value}, "the result must load clean"
    ids = token_ids()
    with torch.no_grad():
        expected = prune_in_memory(source, output, kept)(input_ids=ids, use_cache=False).logits
        assert torch.equal(load_whole(output)(input_ids=ids, use_cache=False).logits, expected)
    assert check_bytes(source, output, kept) > 0
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.summary["output_bytes"]


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=lambda value: value.id if isinstance(value, Family) else "")
def test_refused_by_name_with_the_reason(family: Family, reason: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    source = make_model(tmp_path / "model", config)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        prune(source, tmp_path / "pruned")
    assert type(config).__name__.removesuffix("Config").lower()[:4] in str(caught.value).lower()
    assert not (tmp_path / "pruned").exists()


#: A class of routed experts in the code of a family. (JetMoe's and Doge's have other names.)
EXPERTS_CLASS = re.compile(r"^class (?!\w*Shared)\w*(Experts\w*|CDMoE)\(", re.MULTILINE)


def test_every_model_of_transformers_with_experts_is_sorted() -> None:
    """Each type of which transformers builds a model for text is tested, has the code of one that is, or is refused."""
    sorted_types = {each.name for each in (*ALL_FAMILIES, *(family for family, _ in ALL_REFUSED))} | ALIASES.keys()
    for_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    models, found = Path(transformers.__file__).parent / "models", set()
    for name in for_text & CONFIG_MAPPING_NAMES.keys():
        code = models / model_type_to_module_name(name) / f"modeling_{model_type_to_module_name(name)}.py"
        if code.is_file() and EXPERTS_CLASS.search(code.read_text(encoding="utf-8")):
            found.add(name)
    assert len(found) > 40
    assert found - sorted_types == set(), "put these into tests/tiny.py: FAMILIES, ALIASES or REFUSED"
    assert set(ALIASES.values()) <= sorted_types - ALIASES.keys()


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe", "openai_privacy_filter", "qwen3_omni_moe"])
def test_models_that_generate_no_text_are_refused(name: str) -> None:
    """Their experts are in encoders, or in parts that transformers builds no model for text of."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {name}")
    config = CONFIG_MAPPING[name]()
    with pytest.raises(UnsupportedModelError, match=f"{name}|encoder-decoder"):
        build_model(config, torch.float32)


def test_a_layer_that_needs_more_than_the_layer_before_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a model that nobody knows: its logits would be wrong without a word."""
    family = next((each for each, _ in REFUSED if each.id == "inkling2_text"), None)
    if family is None:
        pytest.skip("the installed transformers does not know inkling2_text")
    monkeypatch.delitem(UNSUPPORTED_EXPERTS, "Inkling2Experts")
    few = replace(family, sizes={**family.sizes, "n_layers_per_attn_res_block": 2})
    folder = make_model(tmp_path / "model", tiny_config(few))
    with pytest.raises(UnsupportedModelError, match="layer 3 gets outputs of several earlier layers"):
        streamed(folder, token_ids(), torch.float32)
