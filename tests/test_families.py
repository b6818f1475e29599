"""Every family: streaming equals the whole model bit for bit, and pruning equals pruning in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamprune.errors import UnsupportedModelError
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
from tests.thorough import DISTINCT, mostly_thorough
from tests.tiny import FAMILIES, REFUSED, Family, make_model, tiny_config

pytestmark = pytest.mark.families


@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        *((torch.float32, family) for family in FAMILIES),
        *mostly_thorough(
            ((torch.bfloat16, family) for family in FAMILIES),
            [(torch.bfloat16, family) for family in FAMILIES if family.id in DISTINCT],
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
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
