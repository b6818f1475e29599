"""Rows that only fill up an expert's matrix product: where they are, and that they change nothing."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from streamprune.models.skeleton import dispatches_experts
from streamprune.saliency.channels import _in_segments, channel_count, squared_column_norms, weighted_squares
from streamprune.saliency.hooks import (
    ExpertsTap,
    bare_pairs,
    forward_in_parts,
    forward_with_pairs,
    sort_by_expert,
    tile_of,
)
from streamprune.saliency.scores import FIELDS
from streamprune.saliency.statistics import ExpertStatistics
from tests.helpers import CPU, known_family
from tests.tiny import tiny_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # without and with biases
def test_rows_that_only_fill_up_change_nothing(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough tokens that each expert's rows are filled up; two experts have none, and one has a single one."""
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config(known_family(name)), dtype=dtype)
    experts = next(m for m in whole.modules() if dispatches_experts(m))
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.2)
    hidden = torch.randn(700, 64).to(dtype)
    odds = torch.randn(700, 8)
    odds[:, [0, 5]] = -100.0
    odds[:, 3] = torch.where(torch.arange(700) == 44, 100.0, -50.0)
    gates, index = odds.softmax(-1).to(dtype).topk(2)
    tile = tile_of(hidden, index, 8)
    counts = index.flatten().bincount(minlength=8)
    assert tile == 1400 // 8 // 8
    assert counts[[0, 5]].sum() == 0
    assert counts[3] == 1
    assert (counts % tile).any(), "there is something to fill up"
    with torch.no_grad():
        output, pairs = forward_with_pairs(experts, hidden, index, gates)
        assert torch.equal(output, grouped_mm_experts_forward(experts, hidden, index, gates))
        assert torch.equal(output, forward_in_parts(experts, hidden, index, gates))
        bare = bare_pairs(ExpertsTap(grouped_mm_experts_forward, grouped=True), experts, hidden, index, gates, output)
        energies = {}
        for size in (tile, 1):
            monkeypatch.setattr("streamprune.saliency.hooks.tile_of", lambda *_, s=size: s)
            tap = ExpertsTap(grouped_mm_experts_forward, True, ExpertStatistics(8, CPU, width=channel_count(experts)))
            forward_with_pairs(experts, hidden, index, gates, tap.record_channels)
            assert tap.statistics is not None
            energies[size] = tap.statistics.channels
    torch.testing.assert_close(pairs.cosines, bare.cosines, rtol=0, atol=0.01)
    torch.testing.assert_close(energies[tile], energies[1], rtol=1e-6, atol=0.0)
    assert (energies[1] > 0).any(dim=2).tolist() == [(counts > 0).tolist()]
    found, wanted = ExpertStatistics(8, CPU), ExpertStatistics(8, CPU)
    for statistics, each in ((found, pairs), (wanted, bare)):
        statistics.add(each, torch.ones(700))
    for field, place in zip(FIELDS, range(len(FIELDS)), strict=True):
        if field != "cosines":
            torch.testing.assert_close(found.values[place], wanted.values[place], rtol=1e-6, atol=0.0, msg=field)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_product_per_expert_gives_what_the_plain_forward_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs for which torch has no fused grouped product; the same values as with it, but for their rounding."""
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config(known_family(name)), dtype=torch.float32)
    experts = next(m for m in whole.modules() if dispatches_experts(m))
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.2)
    hidden = torch.randn(100, 64)
    gates, index = torch.randn(100, 8).softmax(-1).topk(2)
    with torch.no_grad():
        fused, _ = forward_with_pairs(experts, hidden, index, gates)
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
        output, pairs = forward_with_pairs(experts, hidden, index, gates)
        assert torch.equal(output, grouped_mm_experts_forward(experts, hidden, index, gates))
        bare = bare_pairs(ExpertsTap(grouped_mm_experts_forward, grouped=True), experts, hidden, index, gates, output)
    torch.testing.assert_close(output, fused)
    for ours, other in ((pairs.norms, bare.norms), (pairs.peaks, bare.peaks), (pairs.cosines, bare.cosines)):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_the_sums_for_a_gpu_equal_those_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows in several parts, for experts with none, few, and more than a run of them; later rows do not count."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 3, 700, 0, 1, 295, 0])
    ends = counts.cumsum(0).int()
    inner, weights = torch.randn(1100, 5, generator=generator), torch.rand(1100, generator=generator)
    expected = [
        (part.double().square() * weight.double().unsqueeze(1)).sum(dim=0)
        for part, weight in zip(inner[:999].split(counts.tolist()), weights[:999].split(counts.tolist()), strict=True)
    ]
    inner[999:] = torch.nan
    for rows in (1, 256, 600, 10**6):
        monkeypatch.setattr("streamprune.saliency.statistics.CPU_PART_VALUES", 5 * rows)
        for sums in (weighted_squares(inner, weights, ends, counts.float()), _in_segments(inner, weights, ends)):
            assert sums.dtype == torch.float64
            torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_norms_of_columns(is_transposed: bool, dtype: torch.dtype) -> None:
    down = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    module = SimpleNamespace(down_proj=down.transpose(1, 2).contiguous() if is_transposed else down)
    module.is_transposed = is_transposed
    assert channel_count(module) == 5
    torch.testing.assert_close(squared_column_norms(module), down.double().square().sum(dim=1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("tile", [1, 2, 7, 64])
def test_rows_are_sorted_by_expert_and_filled_up(tile: int) -> None:
    """Of any routing, also to experts without tokens and beyond the last one, which come at the end."""
    generator = torch.Generator().manual_seed(tile)
    index = torch.randint(0, 9, (50, 3), generator=generator)
    index[index == 2] = 8
    index[7] = torch.tensor([6, 11, 40])
    rows = sort_by_expert(index, 6, tile)
    begins = [0, *rows.ends_E.tolist()]
    sizes = [end - begin for begin, end in itertools.pairwise(begins)]
    counts = [int((index == expert).sum()) for expert in range(6)]
    assert sizes == [-(-count // tile) * tile for count in counts]
    assert sizes[2] == 0
    beyond = int((index >= 6).sum())
    assert rows.counts_E.tolist() == counts
    assert len(rows.token_R) == len(rows.expert_R) == begins[-1] + beyond
    assert len(set(rows.row_TK.flatten().tolist())) == index.numel(), "each pair has a row of its own"
    assert torch.equal(rows.token_R[rows.row_TK], torch.arange(50).unsqueeze(1).expand(50, 3))
    assert torch.equal(rows.expert_R[rows.row_TK], index)
    for expert in range(6):
        places = rows.row_TK[index == expert]
        assert sorted(places.tolist()) == list(range(begins[expert], begins[expert] + counts[expert])), "pairs first"
        assert ((begins[expert] <= places) & (places < begins[expert + 1])).all()
    assert (rows.row_TK[index >= 6] >= begins[-1]).all()
    assert int(rows.token_R.max()) < 50


def test_only_half_precision_on_a_cpu_is_filled_up() -> None:
    index = torch.zeros(1024, 8, dtype=torch.long)
    tiles = {dtype: tile_of(torch.zeros(1024, 4, dtype=dtype), index, 64)
             for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}  # fmt: skip
    assert tiles == {torch.bfloat16: 16, torch.float16: 16, torch.float32: 1, torch.float64: 1}
    assert tile_of(torch.zeros(10, 4, dtype=torch.bfloat16), index[:10], 64) == 1
    assert tile_of(torch.zeros(1024, 4, dtype=torch.bfloat16, device="meta"), index, 64) == 1
