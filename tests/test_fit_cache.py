"""Predicted caches against transformers' own cache objects after a real forward, to the byte, for every family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.fit.cache import CacheSizes, LayerCache, stated_cache
from streamprune.fit.structure import trace_cache
from streamprune.models.skeleton import build_skeleton
from tests.fit_families import CACHED
from tests.thorough import DISTINCT, by_family, mostly_thorough, thorough
from tests.tiny import FAMILIES, VOCAB, Family, tiny_config

#: Below, at, and above the windows of 16 tokens that the sliding families have, and the chunks below.
LENGTHS = (1, 5, 15, 16, 17, 40)


def traced(config: PreTrainedConfig, dtype: torch.dtype) -> CacheSizes:
    skeleton = build_skeleton(config, dtype)
    return trace_cache(skeleton.model, skeleton.experts, skeleton.layers)


def real_cache_bytes(config: PreTrainedConfig, dtype: torch.dtype, lengths: tuple[int, ...]) -> dict[Any, int]:
    """Bytes of all tensors in the cache that a forward on the CPU returns, by batch and length."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    sizes = {}
    for batch in (1, 2):
        for length in lengths:
            with torch.no_grad():
                cache = model(input_ids=torch.randint(3, VOCAB, (batch, length)), use_cache=True).past_key_values
            found = {id(tensor): tensor for tensor in _tensors(cache, set())}
            sizes[batch, length] = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    return sizes


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object reaches, but for single numbers: sliding layers count their tokens in one."""
    if id(value) in seen or isinstance(value, PreTrainedConfig):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if type(value).__module__.startswith("transformers") else []
    for part in parts:
        yield from _tensors(part, seen)


def check(config: PreTrainedConfig, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> CacheSizes:
    sizes = traced(config, dtype)
    real = real_cache_bytes(config, dtype, lengths)
    assert real == {(batch, length): sizes.kv_bytes(length, batch) + sizes.state_bytes(batch) for batch, length in real}
    assert min(real.values()) > 0
    return sizes


@by_family({*DISTINCT, "deepseek_v32", "jamba", "kimi_linear", "minimax", "unlimited_ocr"}, CACHED)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=thorough)], ids=["float32", "bfloat16"]
)
def test_cache_is_as_predicted(family: Family, dtype: torch.dtype) -> None:
    check(tiny_config(family), dtype, LENGTHS if dtype is torch.float32 else (5, 40))


def family(name: str, **sizes: Any) -> PreTrainedConfig:
    found = next(each for each in CACHED if each.id == name)
    return tiny_config(replace(found, sizes=found.sizes | sizes))


@pytest.mark.parametrize("heads", [1, 2, 4], ids=["multi-query", "grouped", "multi-head"])
def test_key_value_heads(heads: int) -> None:
    sizes = check(family("qwen3_moe", num_key_value_heads=heads), torch.float32)
    assert sizes.layers == (LayerCache(2 * heads * 16),) * 4


def test_latent_attention_keeps_the_latent_and_the_rotary_part() -> None:
    assert check(family("deepseek_v3"), torch.float32).layers == (LayerCache(32 + 8),) * 4


def test_indexer_keys_come_on_top() -> None:
    latent = 32 + 8
    # Older transformers (5.17) keep the keys and values of this family spread out over its four heads.
    spread = 4 * (16 + 8) + 4 * 16
    assert check(family("deepseek_v32"), torch.float32).layers in [
        (LayerCache(kept + 16),) * 4 for kept in (latent, spread)
    ]


def test_linear_attention_keeps_a_state_whatever_the_context() -> None:
    sizes = check(family("qwen3_next"), torch.bfloat16)
    # 4 heads of 16 × 16 in float32; 4 inputs of 3 × 64 channels in bf16. Every fourth layer has full attention.
    state = LayerCache(0, None, 4 * 16 * 16 * 4 + 4 * 3 * 64 * 2)
    assert sizes.layers == (state, state, state, LayerCache(2 * 2 * 16))
    assert sizes.kv_bytes(1000, 3) == 3 * 1000 * 64 * 2
    assert sizes.state_bytes(3) == 3 * sizes.state_bytes(1) == 9 * state.state_bytes


@pytest.mark.parametrize("window", mostly_thorough([2, 3, 4, 5, 7, 8, 9, 33], (2, 5, 8)))
def test_window_of_any_width(window: int) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = check(family("gpt_oss", sliding_window=window, layer_types=kinds), torch.float32, (1, 2, 6, 8, 9, 34, 40))
    assert [layer.window for layer in sizes.layers] == [window - 1, None] * 2
    assert {layer.values_per_token for layer in sizes.layers} == {64}


@pytest.mark.parametrize("chunk", mostly_thorough([4, 6, 16, 32], (6,)))
def test_chunked_attention(chunk: int) -> None:
    kinds = ["chunked_attention", "full_attention"] * 2
    config = family("llama4_text", attention_chunk_size=chunk, layer_types=kinds)
    assert [layer.window for layer in check(config, torch.float32).layers] == [chunk - 1, None] * 2


def test_layers_that_share_keys_and_values_keep_none() -> None:
    shared = check(family("gemma4_text"), torch.float32)
    alone = check(family("gemma4_text", num_kv_shared_layers=0), torch.float32)
    # The others are listed without anything, or (in transformers 5.17) not at all.
    assert shared.layers[:2] == alone.layers[:2]
    assert set(shared.layers[2:]) <= {LayerCache()}
    assert alone.layers == (LayerCache(64, 15), LayerCache(64)) * 2


def test_stated_cache_equals_the_traced_one() -> None:
    stated_for = set()
    for each in CACHED:
        config = tiny_config(each)
        skeleton = build_skeleton(config, torch.float32)
        tensors = entries(skeleton.model)
        raw = json.loads(config.to_json_string())
        stated = stated_cache(raw, tensors)
        if stated is None:
            continue
        stated_for.add(each.id)
        sizes = trace_cache(skeleton.model, skeleton.experts, skeleton.layers)
        assert (stated.layers, stated.itemsize) == (sizes.layers, sizes.itemsize), each.id
    # Those for which `fit` does without torch: most plain ones. None of these has anything but plain attention.
    assert stated_for >= {"qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe", "minimax_m2"}
    assert not stated_for & {
        "qwen3_next", "deepseek_v32", "gpt_oss", "llama4_text", "gemma4_text", "jamba", "minimax", "kimi_linear",
    }  # fmt: skip


def entries(model: torch.nn.Module, dtype: str = "F32") -> dict[str, TensorEntry]:
    """What the header of a checkpoint of `model` would say."""
    return {
        name: TensorEntry(name, "model.safetensors", dtype, tuple(tensor.shape), 0, tensor.numel() * 4)
        for name, tensor in model.state_dict().items()
    }


def plain_entries(**changed: Any) -> dict[str, TensorEntry]:
    names = [f"model.layers.{layer}.self_attn.{kind}.weight" for layer in range(2) for kind in ("k_proj", "v_proj")]
    made = {name: TensorEntry(name, "model.safetensors", "BF16", (32, 64), 0, 4096) for name in names}
    return made | changed


PLAIN = {"num_hidden_layers": 2, "dtype": "bfloat16"}


def test_stated_cache_of_plain_attention() -> None:
    assert stated_cache(PLAIN, plain_entries()) == CacheSizes((LayerCache(64), LayerCache(64)), 2)
    # A further block is a multi-token-prediction layer, which serving does without.
    further = TensorEntry("model.layers.2.self_attn.k_proj.weight", "", "BF16", (32, 64), 0, 4096)
    assert stated_cache(PLAIN, plain_entries(further=further)) == stated_cache(PLAIN, plain_entries())
    assert stated_cache({**PLAIN, "sliding_window": None}, plain_entries()) is not None
    assert stated_cache({**PLAIN, "sliding_window": 4096, "use_sliding_window": False}, plain_entries()) is not None


@pytest.mark.parametrize(
    "more",
    [
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"attention_chunk_size": 8192},
        {"num_kv_shared_layers": 1},
        {"full_attention_interval": 4},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": None},
    ],
    ids=str,
)
def test_stated_cache_leaves_doubts_to_the_model(more: dict[str, Any]) -> None:
    assert stated_cache({**PLAIN, **more}, plain_entries()) is None


@pytest.mark.parametrize("dtype", ["U8", "I32"])
def test_packed_projections_do_not_tell_the_cache(dtype: str) -> None:
    """bitsandbytes keeps a matrix under its usual name as one column of packed bytes: its rows mean nothing."""
    packed = {name: replace(entry, dtype=dtype, shape=(1024, 1)) for name, entry in plain_entries().items()}
    assert stated_cache(PLAIN, packed) is None


def test_eight_bit_weights_do_not_tell_the_cache_dtype() -> None:
    quantized = {name: replace(entry, dtype="F8_E4M3") for name, entry in plain_entries().items()}
    assert stated_cache(PLAIN, quantized) == CacheSizes((LayerCache(64), LayerCache(64)), 2)
    assert stated_cache({"num_hidden_layers": 2}, quantized) is None


def test_other_cache_dtypes() -> None:
    sizes = CacheSizes((LayerCache(64), LayerCache(64, 10), LayerCache(0, None, 300)), 4)
    assert sizes.kv_bytes(7, 2) == sizes.kv_bytes(7, 2, "auto") == 2 * 7 * 128 * 4
    assert sizes.kv_bytes(25, 1) == (25 + 10) * 64 * 4
    assert [sizes.kv_bytes(25, 1, dtype) for dtype in ("bf16", "fp16", "fp8", "int8")] == [4480, 4480, 2240, 2240]
    assert sizes.state_bytes(2) == 600
    with pytest.raises(SettingsError, match=r"--kv-dtype 'fp4' is unknown.*auto, bf16, fp16, fp8, int8"):
        sizes.kv_bytes(7, 2, "fp4")


@pytest.mark.parametrize("name", sorted({"kimi_linear", "bailing_hybrid"} & {each.id for each in FAMILIES}))
def test_model_that_cannot_be_run_is_named(name: str) -> None:
    """The tiny models of these families have linear attention only, which transformers' cache does not allow."""
    config = tiny_config(next(each for each in FAMILIES if each.id == name))
    with pytest.raises(UnsupportedModelError, match=r"The size of \w+'s cache is unknown: .*get_seq_length"):
        traced(config, torch.float32)


def test_model_itself_is_left_as_it_was(tmp_path: Path) -> None:
    skeleton = build_skeleton(family("qwen3_moe"), torch.float32)
    before = {name: dict(module.__dict__) for name, module in skeleton.model.named_modules()}
    trace_cache(skeleton.model, skeleton.experts, skeleton.layers)
    assert {name: dict(module.__dict__) for name, module in skeleton.model.named_modules()} == before
