"""The workspace formulas against what torch's own allocator hands out during a forward on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from streamprune.fit.cache import (
    Recording,
    layer_workspace_bytes,
    prefill_workspace_bytes,
    scoring_workspace_bytes,
)
from streamprune.models.config_json import ModelShape, stated_shape
from streamprune.models.skeleton import dispatches_experts
from streamprune.saliency.channels import channel_count
from streamprune.saliency.hooks import tap_experts
from streamprune.saliency.statistics import ExpertStatistics
from tests.helpers import CPU
from tests.thorough import thorough
from tests.tiny import FAMILIES, tiny_config

SHAPE = ModelShape(
    hidden=2048, attention=4096, linear=0, expert=768, top_k=8, experts=128, dense=6144, vocabulary=151936
)


def config_of(name: str, **sizes: Any) -> Any:
    """Wide enough that a block's own tensors outweigh masks and positions."""
    wide = {"hidden_size": 512, "vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    wide |= {"max_position_embeddings": 4096, "num_experts_per_tok": 4, "intermediate_size": 1024}
    experts = "num_local_experts" if name == "mixtral" else "num_experts"
    if "n_routed_experts" in sizes:
        experts = "n_routed_experts"
    family = next(family for family in FAMILIES if family.id == name)
    config = tiny_config(replace(family, sizes=family.sizes | wide | {experts: 16} | sizes))
    config.dtype = torch.bfloat16
    return config


def measured_peak(config: Any, batch: int, length: int, recorded: bool = False) -> int:
    """The most bytes that a forward of the decoder holds at a time beyond its weights; with `recorded` experts."""
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval().get_decoder()
    ids = torch.randint(0, 200, (batch, length))
    with torch.no_grad(), recording_experts(model) if recorded else nullcontext():
        model(input_ids=ids, use_cache=False)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(input_ids=ids, use_cache=False)
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


@contextmanager
def recording_experts(decoder: Any) -> Iterator[None]:
    """What goes through the experts of all layers is recorded, channels included."""
    modules = {
        index: experts
        for index, layer in enumerate(decoder.layers)
        for experts in layer.modules()
        if dispatches_experts(experts)
    }
    next(iter(modules.values())).config._experts_implementation = "grouped_mm"
    with ExitStack() as stack:
        for index, tap in tap_experts(modules).items():
            experts = modules[index]
            assert tap.grouped
            stack.enter_context(tap.listening(decoder.layers[index]))
            tap.statistics = ExpertStatistics(experts.num_experts, CPU, width=channel_count(experts))
        yield


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3_moe", {"moe_intermediate_size": 256}),
        pytest.param("mixtral", {}, marks=thorough),
        pytest.param(
            "qwen2_moe", {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}, marks=thorough
        ),
        ("qwen3_5_moe_text", {
            "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "linear_num_key_heads": 4,
            "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        }),
        ("glm4_moe", {"moe_intermediate_size": 256, "n_routed_experts": 16}),
        pytest.param("solar_open", {"moe_intermediate_size": 256, "n_routed_experts": 16}, marks=thorough),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("batch", "length"), [(1, 512), (4, 512)])
def test_block_against_the_allocator(name: str, sizes: dict[str, Any], batch: int, length: int) -> None:
    config = config_of(name, **sizes)
    shape = stated_shape(config.to_dict())
    assert shape is not None
    measured = measured_peak(config, batch, length)
    assert measured > 10_000 * batch * length
    assert 1.0 <= layer_workspace_bytes(shape, batch * length, 2) / measured <= 1.3


@pytest.mark.parametrize("values", [1 << 15, 1 << 19])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3_moe", {"moe_intermediate_size": 256}),
        # Wide experts: what is made of gate and up counts more than the input.
        pytest.param("qwen3_moe", {"moe_intermediate_size": 1024}, id="wide"),
        ("qwen3_5_moe_text", {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}),
        ("glm4_moe", {"moe_intermediate_size": 256, "n_routed_experts": 16}),
        pytest.param("mixtral", {}, marks=thorough),
    ],
)
def test_recording_against_the_allocator(
    name: str, sizes: dict[str, Any], values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where nothing is padded. It takes less than transformers' own forward of the same experts."""
    monkeypatch.setattr("streamprune.saliency.statistics.CPU_PART_VALUES", values)
    config, tokens = config_of(name, **sizes), 1024
    config.dtype = torch.float32
    shape = stated_shape(config.to_dict())
    assert shape is not None
    measured = measured_peak(config, 2, tokens // 2, recorded=True)
    planned = scoring_workspace_bytes(shape, tokens, tokens // 2, 4, Recording(values, 0.0))
    assert 1.0 <= planned / measured <= 1.3
    assert planned < scoring_workspace_bytes(shape, tokens, tokens // 2, 4)


def test_recording_as_it_was_measured_on_a_gpu() -> None:
    """One H200, in bfloat16 (tools/results/2026-11-28-h200.json and -more.json): the scoring pass with hidden states on
    the GPU, in RAM, and a whole run each left so much beside states, weights and embeddings."""
    shape = replace(SHAPE, dense=0)
    planned = scoring_workspace_bytes(shape, 32768, 2048, 2, Recording(1 << 24, 0.0))
    for allocated, states, moving in ((13.08, 8.0, 0.0), (7.08, 2.0, 0.0), (5.33, 0.0, 0.25)):
        measured = (allocated - states - moving - 2 * 1.16 - 0.58) * 2**30
        assert 1.0 <= planned / measured <= 1.25


def test_block_takes_as_much_per_token_and_value() -> None:
    one = layer_workspace_bytes(SHAPE, 1, 2)
    assert layer_workspace_bytes(SHAPE, 5000, 2) == 5000 * one
    assert one < layer_workspace_bytes(SHAPE, 1, 4) < 2 * one
    assert layer_workspace_bytes(replace(SHAPE, wide_routing=True), 1, 2) == one + 8 * 2048 * 4
    for name in ("hidden", "attention", "linear", "expert", "top_k", "experts", "dense"):
        grown = replace(SHAPE, **{name: 20 * getattr(SHAPE, name) + 20_000})
        assert layer_workspace_bytes(grown, 1, 2) > one, name


def test_attention_and_experts_share_the_workspace() -> None:
    attention = layer_workspace_bytes(replace(SHAPE, expert=0, top_k=0, experts=0, dense=0), 1, 2)
    experts = layer_workspace_bytes(replace(SHAPE, attention=0, dense=0), 1, 2)
    assert layer_workspace_bytes(SHAPE, 1, 2) == max(attention, experts)


def test_prefill_is_a_chunk_of_every_sequence() -> None:
    block = layer_workspace_bytes(SHAPE, 2048, 2)
    assert prefill_workspace_bytes(SHAPE, 2048, 32768, 1, 2) == block + 2048 * 32768
    assert prefill_workspace_bytes(SHAPE, 2048, 32768, 4, 2) == 4 * (block + 2048 * 32768)
    # A context shorter than the chunk is all there is to compute.
    assert prefill_workspace_bytes(SHAPE, 2048, 100, 1, 2) == layer_workspace_bytes(SHAPE, 100, 2) + 100 * 100
    # Of a single token, the logits are the most.
    assert prefill_workspace_bytes(SHAPE, 2048, 1, 64, 2) == 64 * 151936 * 6


def test_scoring_needs_more_than_a_forward() -> None:
    forward = layer_workspace_bytes(SHAPE, 1024, 2)
    scoring = scoring_workspace_bytes(SHAPE, 1024, 256, 2)
    assert scoring - forward == 1024 * (129 * 18 + 8 * 2048 * 4) + 256**2
