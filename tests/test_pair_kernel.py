"""The kernel that combines experts: what it computes, by Triton's interpreter where there is no GPU; for which GPUs it
compiles; and when it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from tests.helpers import TRITON

sys.path.append(TRITON)
pytest.importorskip("triton")

from streamprune.models.skeleton import dispatches_experts
from streamprune.saliency import combine as combining
from streamprune.saliency import pair_kernel
from streamprune.saliency.combine import Combined, by_kernel, by_torch, combine, gated_sums, try_kernel
from streamprune.saliency.hooks import forward_in_parts, forward_with_pairs
from streamprune.saliency.pair_kernel import combine_tokens, sizes_for
from tests.helpers import known_family
from tests.tiny import tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def outputs(tokens: int, chosen: int, hidden: int, dtype: torch.dtype, gates: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Outputs of experts, with rows that belong to no pair; the rows of all pairs, and their gates."""
    generator = torch.Generator().manual_seed(tokens + chosen + hidden)
    rows = tokens * chosen + 3
    output_RH = torch.randn(rows, hidden, generator=generator) * torch.logspace(-3, 3, rows).unsqueeze(1)
    row_TK = torch.randperm(rows, generator=generator)[: tokens * chosen].view(tokens, chosen)
    gates_TK = torch.rand(tokens, chosen, generator=generator)
    return output_RH.to(DEVICE, dtype), row_TK.to(DEVICE), gates_TK.to(DEVICE, gates)


def in_fours(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """The gated sums (T, H) in the order of torch's sums on an NVIDIA GPU."""
    gated_TKH = output_RH[row_TK] * gates_TK.unsqueeze(-1)
    sums = []
    for first in range(4):
        total = torch.zeros_like(gated_TKH[:, 0], dtype=F32)
        for choice in range(first, row_TK.shape[1], 4):
            total = total + gated_TKH[:, choice].float()
        sums.append(total)
    return (((sums[0] + sums[1]) + sums[2]) + sums[3]).to(gated_TKH.dtype)


@pytest.mark.parametrize(
    ("chosen", "hidden", "dtype", "gates"),
    [
        pytest.param(8, 300, BF16, F32, id="float32 gates, as DeepSeek's"),
        pytest.param(8, 300, BF16, BF16, id="bfloat16"),
        pytest.param(6, 64, F16, F16, id="six of float16"),
        pytest.param(10, 1100, F32, F32, id="ten of float32, more columns than one block has"),
        pytest.param(1, 129, F16, F16, id="one"),
    ],
)
def test_the_kernel_gives_what_torch_gives(chosen: int, hidden: int, dtype: torch.dtype, gates: torch.dtype) -> None:
    given = outputs(5, chosen, hidden, dtype, gates)
    ours, theirs = by_kernel(*given), by_torch(*given)
    wanted = in_fours(*given)
    assert ours.sums.dtype == wanted.dtype == theirs.sums.dtype
    if DEVICE == "cuda":
        assert torch.equal(ours.sums, theirs.sums)
    if DEVICE == "cpu" and gates == BF16:
        # The interpreter cuts off what a GPU rounds, here after each product and after the sum.
        gated = (given[0][given[1]] * given[2].unsqueeze(-1)).float().abs().sum(dim=1)
        assert ((ours.sums.float() - wanted.float()).abs() <= 2 * 2**-7 * gated).all()
    else:
        assert torch.equal(ours.sums, wanted)
        torch.testing.assert_close(ours.cosines, theirs.cosines, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-6, atol=0.0)
    assert torch.equal(ours.peaks, theirs.peaks)


def test_values_that_are_not_finite_stay_so() -> None:
    output_RH, row_TK, gates_TK = outputs(3, 4, 70, F16, F32)
    output_RH[row_TK[0, 1], 5], output_RH[row_TK[2, 3], 69] = torch.inf, torch.nan
    ours, theirs = (by(output_RH, row_TK, gates_TK) for by in (by_kernel, by_torch))
    assert torch.equal(ours.sums.isfinite(), theirs.sums.isfinite())
    assert torch.equal(ours.norms.isfinite(), theirs.norms.isfinite())
    torch.testing.assert_close(ours.norms[1], theirs.norms[1])


def test_experts_that_add_nothing_have_a_cosine_of_zero() -> None:
    output_RH, row_TK, gates_TK = outputs(2, 2, 40, F32, F32)
    output_RH[row_TK[0]] = 0.0
    gates_TK[1, 0] = 0.0
    found = by_kernel(output_RH, row_TK, gates_TK)
    assert found.cosines[0].tolist() == [0.0, 0.0]
    assert found.cosines[1].tolist() == pytest.approx([0.0, 1.0])


def test_no_tokens() -> None:
    output_RH, row_TK, gates_TK = outputs(2, 2, 40, F32, F32)
    assert combine_tokens(output_RH, row_TK[:0], gates_TK[:0])[0].shape == (0, 40)


def test_it_starts_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current GPU, which is the first one in each of several processes."""
    current, started = [0], []

    @contextmanager
    def device_index(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    def start(*_: Any, **__: Any) -> None:
        started.append(current[0])

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(pair_kernel, "_combine_tokens", {(3,): start})
    with FakeTensorMode():
        outputs, rows, gates = (torch.empty(size, device="cuda:1") for size in ((6, 8), (3, 2), (3, 2)))
        combine_tokens(outputs, rows, gates)
    assert (started, current) == ([1], [0])


@pytest.mark.parametrize("chosen", [1, 8, 22, 64, 100])
def test_sizes_that_a_program_can_hold(chosen: int) -> None:
    sizes = sizes_for(7168, chosen)
    assert sizes["K_ROUNDED"] >= chosen
    assert sizes["K_ROUNDED"] * sizes["COLUMNS"] <= 2**14
    assert 128 <= sizes["COLUMNS"] <= 1024


def test_the_kernel_compiles_for_every_kind_of_gpu() -> None:
    """RTX 3090 (8.6), 4090 (8.9), H100 (9.0) and 5090 (12.0); rounded to nearest, no sum is fused with a product."""
    kinds = ["8.6:bf16", "8.9:fp32", "9.0:bf16", "9.0:fp32", "12.0:bf16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "tests.compiled_kernel", *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kind, found in json.loads(done.stdout).items():
        assert found["bytes"] > 0
        assert found["shared"] < 48 * 1024
        assert ("cvt.rn.bf16.f32" in found["rounding"]) is kind.endswith("bf16")
        # Of 16 bits there may be: a product with -0 added, which is the product rounded once.
        assert not [word for word in found["rounding"] if word.startswith("fma.rn.f32")]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Everything is taken for a GPU, and nothing for too little."""
    monkeypatch.setattr(combining, "_choices", {})
    monkeypatch.setattr(combining, "is_gpu", lambda device: True)
    monkeypatch.setattr(combining, "FEWEST_VALUES", 0)
    return monkeypatch


def test_the_kernel_is_used_once_it_has_shown_that_it_is_the_same(tried: pytest.MonkeyPatch) -> None:
    # Two experts: their sum is the same in any order.
    given = outputs(6, 2, 50, F16, F16)
    tried.setattr(combining, "TRIAL_VALUES", 4 * 2 * 50)
    tokens: list[int] = []
    tried.setattr(combining, "by_kernel", lambda *each: tokens.append(len(each[1])) or by_kernel(*each))
    expected = by_torch(*given)
    for _ in range(2):
        found = combine(*given)
        assert torch.equal(found.sums, expected.sums)
        assert torch.equal(gated_sums(*given), expected.sums)
    assert tokens == [4, 6, 6, 6, 6], "tried once"
    (choice,) = combining.choices()
    assert choice == {
        "device": DEVICE, "dtypes": ["float16", "float16"], "hidden": 50, "chosen": 2,
        "kernel": True, "why": "the same as torch for 4 tokens",
    }  # fmt: skip


def test_each_dtype_and_size_is_tried_on_its_own(tried: pytest.MonkeyPatch) -> None:
    sorts = [(2, 50, F16, F16), (2, 50, F16, F32), (2, 50, F32, F32), (1, 50, F16, F16), (2, 51, F16, F16)]
    for _ in range(2):
        for sort in sorts:
            combine(*outputs(6, *sort))
    assert len(combining.choices()) == len(sorts)


def test_a_model_computes_the_same_with_it(tried: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(known_family("qwen3_moe")), dtype=F32)
    experts = next(module for module in model.modules() if dispatches_experts(module))
    hidden = torch.randn(9, 64)
    gates, index = torch.randn(9, 8).softmax(-1).topk(2)
    with torch.no_grad():
        output, pairs = forward_with_pairs(experts, hidden, index, gates)
        assert torch.equal(output, grouped_mm_experts_forward(experts, hidden, index, gates))
        assert torch.equal(output, forward_in_parts(experts, hidden, index, gates))
        assert combining.choices()[0]["kernel"] is True
        tried.setattr(combining, "is_gpu", lambda device: False)
        _, others = forward_with_pairs(experts, hidden, index, gates)
    for name in ("norms", "peaks", "cosines"):
        torch.testing.assert_close(getattr(pairs, name), getattr(others, name))


@pytest.mark.parametrize("field", ["sums", "norms", "peaks", "cosines"])
def test_a_kernel_that_gives_something_else_is_not_used(field: str, tried: pytest.MonkeyPatch) -> None:
    given = outputs(6, 2, 50, F16, F16)
    expected = by_torch(*given)

    def wrong(*each: torch.Tensor) -> Combined:
        found = vars(by_kernel(*each))
        # By the last bit, where the same to the bit is asked; else by more than rounding.
        near = torch.nextafter if field in ("sums", "peaks") else torch.add
        return Combined(**{**found, field: near(found[field], torch.full_like(found[field], 1e-3))})

    tried.setattr(combining, "by_kernel", wrong)
    found = combine(*given)
    assert all(torch.equal(value, getattr(expected, name)) for name, value in vars(found).items())
    assert [(choice["kernel"], choice["why"]) for choice in combining.choices()] == [
        (False, f"the kernel's {field} differ from torch's")
    ]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'triton'"), "Triton: ModuleNotFoundError: No module named 'triton'"),
        (RuntimeError("Failed to find C compiler.\nPlease set CC"), "Triton: RuntimeError: Failed to find C compiler."),
    ],
)
def test_where_triton_does_not_work_torch_does_it(error: Exception, says: str, tried: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Combined:
        raise error

    tried.setattr(combining, "by_kernel", failing)
    given = outputs(6, 2, 50, F16, F16)
    assert torch.equal(combine(*given).sums, by_torch(*given).sums)
    (choice,) = combining.choices()
    assert choice["kernel"] is False
    assert choice["why"].startswith(says)


def test_it_can_be_turned_off(tried: pytest.MonkeyPatch) -> None:
    tried.setenv("STREAMPRUNE_PAIR_KERNEL", "0")
    tried.setattr(combining, "by_kernel", lambda *_: pytest.fail("it was tried"))
    given = outputs(6, 2, 50, F16, F16)
    assert torch.equal(combine(*given).sums, by_torch(*given).sums)
    assert [choice["why"] for choice in combining.choices()] == ["STREAMPRUNE_PAIR_KERNEL=0"]


def test_without_memory_nothing_is_chosen(tried: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Combined:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tried.setattr(combining, "by_kernel", failing)
    with pytest.raises(torch.OutOfMemoryError):
        combine(*outputs(6, 2, 50, F16, F16))
    assert combining.choices() == []


@pytest.mark.parametrize("by", ["by_kernel", "by_torch"])
def test_an_error_of_the_gpu_says_how_to_leave_the_kernel_out(by: str, tried: pytest.MonkeyPatch) -> None:
    """It shows in whatever is computed next."""

    def failing(*_: Any) -> Combined:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    tried.setattr(combining, by, failing)
    with pytest.raises(torch.AcceleratorError) as raised:
        combine(*outputs(6, 2, 50, F16, F16))
    assert "STREAMPRUNE_PAIR_KERNEL=0" in "".join(raised.value.__notes__)


def test_rows_with_gaps_are_left_to_torch(tried: pytest.MonkeyPatch) -> None:
    output_RH, row_TK, gates_TK = outputs(6, 2, 50, F16, F16)
    aligned = torch.nn.functional.pad(output_RH, (0, 6))[:, :50]
    assert torch.equal(combine(aligned, row_TK, gates_TK).sums, by_torch(output_RH, row_TK, gates_TK).sums)
    assert combining.choices() == []


def test_float64_and_few_values_are_left_to_torch(tried: pytest.MonkeyPatch) -> None:
    wide = outputs(6, 2, 50, torch.float64, torch.float64)
    assert "32 bits" in try_kernel(*wide).why
    assert combine(*wide).norms.dtype == torch.float64
    combining._choices.clear()
    tried.setattr(combining, "FEWEST_VALUES", 6 * 2 * 50 + 1)
    combine(*outputs(6, 2, 50, F16, F16))
    assert combining.choices() == []
