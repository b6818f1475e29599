"""GPTQ: against the paper's recursion written as plainly as possible, and what it is for."""

from __future__ import annotations

import pytest
import torch

from streamprune.errors import NonFiniteError
from streamprune.formats.fp8 import Fp8
from streamprune.formats.integers import PackedIntegers
from streamprune.quantize.gptq import BLOCK, DAMPING, gptq, memory_bytes
from streamprune.quantize.schemes import SCHEMES, Scheme, scheme_of
from tests.peak import Peak

ROWS, COLUMNS = 10, 2 * BLOCK + 32


def scheme(name: str, columns: int = COLUMNS) -> Scheme:
    return scheme_of(name, [columns])


def problem(
    experts: int, seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, tokens: int = 600
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (K, R, C), and Hessians of correlated inputs, some of which are much larger than others."""
    make = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, rows, columns, generator=make)
    common = torch.randn(tokens, columns // 4, generator=make) @ torch.randn(columns // 4, columns, generator=make)
    inputs = common / (columns // 4) ** 0.5 + 0.3 * torch.randn(experts, tokens, columns, generator=make)
    inputs *= torch.rand(columns, generator=make) ** 3 * 10 + 0.1
    return weights, inputs.mT @ inputs


def by_the_paper(weight: torch.Tensor, hessian: torch.Tensor, made: Scheme) -> torch.Tensor:
    """One expert by algorithm 1 of arXiv:2210.17323 in float64, without blocks of columns: what its codes mean."""
    scales = made.scales(weight)
    ones = torch.ones(weight.shape).to(made.code_dtype)
    each = made.rounded(ones, scales).double()
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double()[order][:, order]
    damped += DAMPING * damped.diagonal().mean() * torch.eye(len(order))
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, result = weight.double()[:, order], torch.empty_like(weight, dtype=torch.float64)
    for k, column in enumerate(order.tolist()):
        wanted = (left[:, k] / each[:, column]).float()
        if isinstance(made.format, Fp8):
            codes = wanted.clamp(-448, 448).to(torch.float8_e4m3fn).double()
        else:
            half = 1 << (made.bits - 1)
            codes = wanted.double().round().clamp(-half, half - 1)
        result[:, column] = codes * each[:, column]
        run = result[:, column] if isinstance(made.format, Fp8) else result[:, column].bfloat16().double()
        error = (left[:, k] - run) / inverse[k, k]
        left[:, k:] -= error[:, None] * inverse[k, k:]
    return result


def loss(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor, made: Scheme) -> float:
    """tr(E H Eᵀ): the squared error of the outputs of a model in bfloat16, to which integers are decoded."""
    error = weight.double() - (values if isinstance(made.format, Fp8) else values.bfloat16()).double()
    return float(((error @ hessian.double()) * error).sum())


def nearest(weights: torch.Tensor, made: Scheme) -> torch.Tensor:
    scales = made.scales(weights)
    return made.rounded(made.round(weights, scales), scales)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_the_papers_recursion(name: str) -> None:
    weights, hessians = problem(2)
    found = gptq(weights, hessians, scheme(name))
    assert not found.failed
    for expert in range(2):
        wanted = by_the_paper(weights[expert], hessians[expert], scheme(name))
        same = torch.isclose(found.values[expert].double(), wanted, rtol=1e-6).double().mean()
        # Where a value lies in the middle of two codes, float32 may take the other one, and what follows changes too.
        assert same > 0.99
        ours, theirs = (
            loss(weights[expert], each, hessians[expert], scheme(name)) for each in (found.values[expert], wanted)
        )
        assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_are_the_schemes_own(name: str) -> None:
    weights, hessians = problem(2)
    made = scheme(name)
    found = gptq(weights, hessians, made)
    assert found.codes.dtype == made.code_dtype
    assert torch.equal(found.scales, made.scales(weights))
    assert torch.equal(found.values, made.rounded(found.codes, found.scales))
    if isinstance(made.format, PackedIntegers):
        pytest.importorskip("compressed_tensors")
    parts = made.pack(found.codes[1], found.scales[1])
    assert torch.equal(made.format.decode(parts, torch.float32), found.values[1])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [40, 3000])
def test_outputs_are_much_closer_than_rounded_to_nearest(name: str, tokens: int) -> None:
    weights, hessians = problem(3, seed=1, tokens=tokens)
    values = gptq(weights, hessians, scheme(name)).values
    for weight, value, near, hessian in zip(weights, values, nearest(weights, scheme(name)), hessians, strict=True):
        assert loss(weight, value, hessian, scheme(name)) < 0.4 * loss(weight, near, hessian, scheme(name))


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_together_are_rounded_as_each_alone(name: str) -> None:
    weights, hessians = problem(5, seed=2)
    together, again = (gptq(weights, hessians, scheme(name)) for _ in range(2))
    assert torch.equal(together.codes.view(torch.int8), again.codes.view(torch.int8))
    for expert in range(5):
        alone = gptq(weights[expert : expert + 1], hessians[expert : expert + 1], scheme(name))
        assert torch.equal(alone.codes[0].view(torch.int8), together.codes[expert].view(torch.int8))
        assert torch.equal(alone.values[0], together.values[expert])


def test_weights_with_the_same_inputs_can_be_joined() -> None:
    gates, hessians = problem(2, seed=3)
    ups, _ = problem(2, seed=4)
    joined = gptq(torch.cat([gates, ups], 1), hessians, scheme("w4a16")).values
    apart = [gptq(each, hessians, scheme("w4a16")).values for each in (gates, ups)]
    # Products of other shapes may be summed in another order.
    assert torch.isclose(joined, torch.cat(apart, 1)).float().mean() > 0.98


def test_nothing_given_is_changed_and_multiples_do_not_matter() -> None:
    weights, hessians = problem(2)
    before = weights.clone(), hessians.clone()
    found = gptq(weights, hessians, scheme("w4a16"))
    assert torch.equal(weights, before[0])
    assert torch.equal(hessians, before[1])
    assert torch.equal(found.codes, gptq(weights, hessians / 1024, scheme("w4a16")).codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_never_seen_are_rounded_to_nearest_and_change_nothing(name: str) -> None:
    weights, hessians = problem(1)
    dead, live = torch.arange(COLUMNS).split([40, COLUMNS - 40])
    hessians[:, dead], hessians[:, :, dead] = 0, 0
    # Too small to be what scales come from.
    weights[..., dead] *= 0.01
    weights[..., live[0]] = 4
    values = gptq(weights, hessians, scheme(name)).values
    assert torch.equal(values[..., dead], nearest(weights, scheme(name))[..., dead])
    other = weights.clone()
    other[..., dead[::2]] *= 0.5
    assert torch.equal(gptq(other, hessians, scheme(name)).values[..., live], values[..., live])


@pytest.mark.parametrize("name", ["fp8", "w4a16"])
def test_an_expert_without_a_factor_is_rounded_to_nearest(name: str) -> None:
    weights, hessians = problem(5)
    whole = gptq(weights, hessians, scheme(name))
    hessians[0] = 0
    hessians[2, 3, 3] = float("nan")
    hessians[3] *= -1
    hessians[4, 7, 7] = float("inf")
    found = gptq(weights, hessians, scheme(name))
    assert found.failed == (0, 2, 3, 4)
    near = nearest(weights, scheme(name))
    for expert in range(5):
        wanted = near if expert in found.failed else whole.values
        assert torch.equal(found.values[expert], wanted[expert])


def test_weights_that_are_not_finite_are_refused() -> None:
    weights, hessians = problem(2)
    weights[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"\[2, 10, 288\] hold NaN"):
        gptq(weights, hessians, scheme("w4a16"))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 130), (130, 5), (7, 300)])
@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic"])
def test_matrices_need_not_be_whole_blocks(name: str, rows: int, columns: int) -> None:
    weights, hessians = (
        problem(2, rows=rows, columns=columns) if columns > 3 else (torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    )
    found = gptq(weights, hessians, scheme(name))
    assert found.values.shape == weights.shape
    for expert in range(2):
        wanted = by_the_paper(weights[expert], hessians[expert], scheme(name))
        assert torch.isclose(found.values[expert].double(), wanted, rtol=1e-6).double().mean() > 0.95


@pytest.mark.parametrize(
    ("name", "experts", "rows", "columns"),
    [("w4a16", 6, 96, 256), ("w4a16", 1, 64, 512), ("fp8", 4, 200, 200), ("w8a16", 8, 400, 64), ("fp8", 3, 500, 70)],
)
def test_memory_is_as_stated(name: str, experts: int, rows: int, columns: int) -> None:
    weights, hessians = problem(experts, rows=rows, columns=columns, tokens=64)
    made = scheme(name, columns)
    with Peak() as peak:
        result = gptq(weights, hessians, made)
    given = weights.nbytes + hessians.nbytes
    stated = memory_bytes(experts, rows, columns)
    assert result.values.isfinite().all()
    assert 0.6 * stated < peak.nbytes - given <= stated


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_rounds_experts_alone_as_together_and_as_well_as_a_cpu(name: str) -> None:
    weights, hessians = problem(20, seed=5)
    on_gpu = gptq(weights.cuda(), hessians.cuda(), scheme(name))
    assert on_gpu.codes.is_cuda
    for begin, end in [(0, 1), (7, 8), (3, 19)]:
        part = gptq(weights[begin:end].cuda(), hessians[begin:end].cuda(), scheme(name))
        assert torch.equal(part.codes.view(torch.int8), on_gpu.codes[begin:end].view(torch.int8))
    on_cpu = gptq(weights, hessians, scheme(name))
    for weight, hessian, here, there in zip(weights, hessians, on_cpu.values, on_gpu.values.cpu(), strict=True):
        ours, theirs = (loss(weight, each, hessian, scheme(name)) for each in (here, there))
        assert ours == pytest.approx(theirs, rel=0.02)
