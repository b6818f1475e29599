"""The inverse: what is said to fit does fit, and the next larger does not; over many budgets and kinds of models."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import SettingsError
from streamprune.fit.answer import CONTEXTS, RATIOS, table
from streamprune.fit.cache import CacheSizes, LayerCache, prefill_workspace_bytes
from streamprune.fit.estimate import (
    ALLOCATOR_SHARE,
    CUDA_CONTEXT,
    PREFILL_CHUNK,
    WORKSPACE_SHARE,
    Fit,
    Footprint,
    check_keep,
)
from streamprune.fit.footprint import read_footprint
from streamprune.fit.nearest import nearest
from streamprune.fit.weights import WeightFact, Weights, WeightSizes
from streamprune.formats.base import ExpertRows
from streamprune.models.config_json import ExpertSpec, ModelShape, minimum_keep
from streamprune.planning.counts import ExpertCounts
from streamprune.targets import PruningTarget, ServingSpec
from tests.full_size import config_only

MIB, GIB = 1024**2, 1024**3
BLOCKS = 6
#: Values of one expert's matrix in the models below.
EXPERT = 4096 * 256
MTP = 4096 * 4096 * 2


class Scaled:
    """Other forms of weights, as if everything were quantized."""

    def __init__(self, weights: Weights) -> None:
        self._plain = weights.sizes()

    def sizes(self, weights: str, width: int | None) -> WeightSizes:
        share = {"fp8": 0.5, "w4a16": 0.26}[weights]
        plain = self._plain
        fixed, each = ({name: size * share for name, size in of.items()} for of in (plain.fixed, plain.per_expert))
        return replace(plain, fixed=fixed, per_expert=each)


def made_up(
    count: int = 32, top_k: int = 4, groups: int = 1, topk_groups: int = 1, predicting: int = 0, **changed: Any
) -> Footprint:
    """A model of six blocks with one joined tensor of experts each, a router, dense parts, and MTP, of which
    `predicting` blocks have experts too."""
    facts = [
        WeightFact("embed", "BF16", (8000, 4096), 8000 * 4096 * 2, "embeddings"),
        WeightFact("mtp", "BF16", (4096, 4096), MTP, "MTP", BLOCKS),
    ]
    for block in range(BLOCKS):
        facts.append(WeightFact(f"q{block}", "BF16", (4096, 4096), 4096 * 4096 * 2, "attention", block))
        if count:
            rows = ExpertRows(0, 1, 0)
            shape = (count, 4096, 256)
            facts.append(WeightFact(f"e{block}", "BF16", shape, count * EXPERT * 2, "experts", block, rows=rows))
            facts.append(WeightFact(f"r{block}", "BF16", (count, 4096), count * 8192, "router", block, rows=rows))
    for block in range(predicting):
        facts.append(
            WeightFact(f"p{block}", "BF16", (count, 9), count * EXPERT, "MTP", BLOCKS - 1, rows=ExpertRows(0, 1, 0))
        )
    cache = CacheSizes((LayerCache(1024), LayerCache(1024, 4095), LayerCache(0, None, 500_000)) * 2, 2)
    spec = ExpertSpec((), "num_experts", count, top_k, groups, topk_groups) if count else None
    shape = ModelShape(4096, 4096, 0, 256 if count else 0, top_k if count else 0, count, 8192, 8000)
    weights = Weights(tuple(facts), count, True)
    known = Footprint("made-up", weights, spec, cache, shape, 2, 200_000, forms=Scaled(weights))
    return replace(known, **changed)


MODELS = {
    "plain": made_up(),
    "groups": made_up(count=32, top_k=4, groups=8, topk_groups=4),
    "wide groups": made_up(count=24, top_k=6, groups=4, topk_groups=2),
    "top of all": made_up(count=4, top_k=4),
    "experts that predict": made_up(predicting=2),
    "without a limit": made_up(max_positions=None),
}
by_model = pytest.mark.parametrize("footprint", MODELS.values(), ids=MODELS.keys())


def total(footprint: Footprint, **use: Any) -> int:
    return Fit(footprint, ServingSpec(**use), 0).total


def budgets(footprint: Footprint, **use: Any) -> list[int]:
    """Sizes from nothing to more than enough, at random and on both sides of every step."""
    spec = footprint.spec
    least = minimum_keep(spec) if spec else None
    exact = [total(footprint, keep=keep, **use) for keep in range(least, spec.count + 1)] if spec and least else []
    exact.append(total(footprint, **use))
    chosen = random.Random(1)
    some = [chosen.randrange(0, exact[-1] * 5 // 4) for _ in range(40)]
    return sorted({budget + step for budget in exact for step in (-1, 0, 1)} | set(some))


@by_model
def test_most_experts(footprint: Footprint) -> None:
    spec = footprint.spec
    assert spec is not None
    steps = range(minimum_keep(spec), spec.count + 1, spec.groups)
    before = 0
    for budget in budgets(footprint, context=5000):
        fit = Fit(footprint, ServingSpec(context=5000), budget)
        fitting = [keep for keep in steps if total(footprint, context=5000, keep=keep) <= budget]
        assert fit.max_experts == max(fitting, default=None)
        assert (fit.max_experts or 0) >= before
        before = fit.max_experts or 0
        if fit.max_experts is not None:
            check_keep(footprint, fit.max_experts)
            assert Fit(footprint, ServingSpec(context=5000, keep=fit.max_experts), budget).fits


@by_model
def test_most_experts_of_all_blocks(footprint: Footprint) -> None:
    """The total of a schedule that keeps different numbers per block, added up by hand."""
    spec = footprint.spec
    assert spec is not None
    each = EXPERT * 2 + 8192
    rest = total(footprint, context=5000) - BLOCKS * spec.count * each
    least, every = BLOCKS * minimum_keep(spec), BLOCKS * spec.count
    for budget in budgets(footprint, context=5000):
        fit = Fit(footprint, ServingSpec(context=5000), budget)
        # (In layers that predict, all experts count: how many stay follows from a layer that may keep all.)
        fitting = [kept for kept in range(least, every) if rest + kept * each <= budget]
        expected = every if total(footprint, context=5000) <= budget else max(fitting, default=0)
        # Equally few experts everywhere need less workspace in the router, which may make up for an expert.
        assert (fit.max_total_experts or 0) == max(expected, BLOCKS * (fit.max_experts or 0))
        if footprint is not MODELS["experts that predict"]:
            assert (fit.max_total_experts or 0) - (expected or least) in (0, 1, -least)


@pytest.mark.parametrize("batch", [1, 7])
@by_model
def test_longest_context(footprint: Footprint, batch: int) -> None:
    limit = footprint.max_positions or 2**20
    before = 0
    for share in (0.1, 0.9, 1.0, 1.02, 1.1, 1.3, 2, 100):
        fit = Fit(
            footprint, ServingSpec(batch=batch, context=4000), int(total(footprint, batch=batch, context=1) * share)
        )
        longest = fit.max_context
        assert before <= longest <= limit
        before = longest
        if longest:
            assert Fit(footprint, replace(fit.use, context=longest), fit.budget).fits
        if longest < limit:
            assert not Fit(footprint, replace(fit.use, context=longest + 1), fit.budget).fits
    assert before == limit


def test_total_grows_with_everything() -> None:
    footprint = MODELS["plain"]
    for name, values in {
        "context": [1, 2, 100, 4095, 4096, 5000, 100_000, 10**6],
        "batch": [1, 2, 3, 50],
        "keep": [4, 5, 20, 31, 32],
        "kv_dtype": ["fp8", "bf16"],
        "weights": ["w4a16", "fp8", "source"],
    }.items():
        totals = [total(footprint, **{name: value}) for value in values]
        assert all(one < other for one, other in pairwise(totals)), name


@by_model
def test_nearest_settings_do_fit(footprint: Footprint) -> None:
    seen = set()
    for budget in [*budgets(footprint)[::5], 2 * GIB]:
        fit = Fit(footprint, ServingSpec(), budget)
        options = nearest(fit)
        assert bool(options) != fit.fits
        for option in options:
            words = option.settings.split()
            named = dict(zip(words[::2], words[1::2], strict=True))
            use, held = ServingSpec(), budget
            for name, value in named.items():
                field = name.removeprefix("--").replace("-", "_")
                if field == "budget_gib":
                    held = int(float(value) * GIB)
                else:
                    use = replace(use, **{field: value if field in ("kv_dtype", "weights") else int(value)})
            seen.add(tuple(named))
            if use.keep is not None:
                check_keep(footprint, use.keep)
            assert Fit(footprint, use, held).fits, option
    kinds = {("--budget-gib",), ("--weights",)}
    if footprint is MODELS["plain"]:
        kinds |= {("--keep",), ("--context",), ("--kv-dtype",), ("--weights", "--keep")}
    assert kinds <= seen


def test_table_holds_what_fit_says() -> None:
    for footprint in MODELS.values():
        fit = Fit(footprint, ServingSpec(context=1000, batch=2), 200 * MIB + 900 * MIB)
        cells = table(fit)
        spec = footprint.spec
        assert spec is not None
        for cell in cells:
            same = Fit(
                footprint,
                replace(fit.use, keep=cell.experts, weights=cell.weights, context=cell.context),
                fit.budget,
            )
            assert (cell.total_bytes, cell.fits) == (same.total, same.fits)
            check_keep(footprint, cell.experts)
            assert 0 <= cell.experts - (1 - cell.ratio) * spec.count < spec.groups
        assert {cell.context for cell in cells} == {1000, *CONTEXTS}
        assert {cell.weights for cell in cells} == {"source", "fp8", "w4a16"}
        assert {cell.ratio for cell in cells} <= set(RATIOS)
        assert len({(cell.ratio, cell.weights, cell.context) for cell in cells}) == len(cells)


def test_terms_are_what_they_say() -> None:
    footprint = made_up()
    fit = Fit(footprint, ServingSpec(context=10_000, batch=3, keep=16), 8 * GIB)
    terms = {term.name: term for term in fit.terms}
    kv_bytes = 3 * 2 * 1024 * 2 * (10_000 + 4095)
    workspace = prefill_workspace_bytes(replace(footprint.shape, experts=16), PREFILL_CHUNK, 10_000, 3, 2)
    assert {name: term.bytes for name, term in terms.items()} == {
        "weights: experts": BLOCKS * 16 * EXPERT * 2,
        "weights: router": BLOCKS * 16 * 8192,
        "weights: attention": BLOCKS * 4096 * 4096 * 2,
        "weights: embeddings": 8000 * 4096 * 2,
        "weights: MTP": MTP,
        "KV cache": kv_bytes,
        "recurrent state": 3_000_000,
        "prefill workspace": workspace,
        "CUDA context": CUDA_CONTEXT[1],
        "allocator margin": round((kv_bytes + 3_000_000 + workspace) * ALLOCATOR_SHARE[1]),
    }
    assert fit.total == sum(term.bytes for term in fit.terms)
    assert fit.weights_bytes == sum(term.bytes for name, term in terms.items() if name.startswith("weights"))
    assert fit.interval == (sum(term.low for term in fit.terms), sum(term.high for term in fit.terms))
    assert all(term.low <= term.bytes <= term.high for term in fit.terms)
    assert {name for name, term in terms.items() if term.kind == "exact"} == set(list(terms)[:7])
    assert all(term.low == term.high for term in fit.terms if term.kind == "exact")
    assert terms["prefill workspace"].high == workspace * WORKSPACE_SHARE[2]


def test_layers_that_keep_different_numbers() -> None:
    """Blocks that predict have as many experts as the last; what would fit instead does not depend on what is asked."""
    footprint = MODELS["experts that predict"]
    decided = ExpertCounts(86, BLOCKS, False, dict(enumerate((32, 6, 9, 20, 11, 8))))
    found = [
        counts.estimate(PruningTarget(context=5000), footprint)
        for counts in (decided, replace(decided, per_layer=None))
    ]
    terms = [next(term for term in each.terms if term.name == "weights: MTP") for each in found]
    nbytes = {count: MTP + 2 * count * EXPERT for count in (4, 8, 32)}
    assert [(term.kind, term.low, term.bytes, term.high) for term in terms] == [
        ("exact", nbytes[8], nbytes[8], nbytes[8]),
        ("modelled", nbytes[4], nbytes[32], nbytes[32]),
    ]
    budget = total(footprint, context=5000, keep=10)
    most = Fit(footprint, ServingSpec(context=5000), budget)
    for each in found:
        fit = Fit(footprint, each.use, budget)
        assert (fit.max_experts, fit.max_total_experts) == (10, most.max_total_experts)


def test_model_without_experts() -> None:
    footprint = made_up(count=0)
    for budget in (GIB // 2, 8 * GIB):
        fit = Fit(footprint, ServingSpec(), budget)
        assert (fit.max_experts, fit.max_total_experts, fit.experts) == (None, None, 0)
        assert fit.fits == (budget > GIB)
        assert {cell.ratio for cell in table(fit)} == {0.0}
        assert not [option for option in nearest(fit) if "--keep" in option.settings]
    with pytest.raises(SettingsError, match="--keep 4: made-up has no experts"):
        check_keep(footprint, 4)


@pytest.mark.parametrize(("batch", "limit"), [(2**22, None), (2**40, 5000), (3, 10**30), (1, 10**30)])
def test_extreme_uses_have_an_answer(batch: int, limit: int | None) -> None:
    fit = Fit(made_up(max_positions=limit), ServingSpec(context=1, batch=batch), 24 * GIB)
    assert fit.max_context >= 0
    assert fit.fits == (fit.max_context > 0)
    assert all(cell.context * batch <= 2**40 for cell in table(fit))
    assert bool(nearest(fit)) != fit.fits


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"context": 0}, "--context 0 is too small: at least 1"),
        ({"context": -5}, "--context -5 is too small"),
        ({"batch": 0}, "--batch 0 is too small: at least 1"),
        ({"context": 2**40, "batch": 2}, "more than any GPU could hold"),
    ],
)
def test_impossible_uses(use: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ServingSpec(**use)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "message"),
    [(4, "choose from 8 to 24 in steps of 4"), (25, "choose from 8 to 24"), (10, "steps of 4"), (-8, "8 to 24")],
)
def test_impossible_numbers_of_experts(keep: int, message: str) -> None:
    footprint = made_up(count=24, top_k=4, groups=4, topk_groups=2)
    with pytest.raises(SettingsError, match=rf"--keep {keep} is not possible: .*{message}"):
        check_keep(footprint, keep)
    for possible in (8, 12, 24):
        check_keep(footprint, possible)


def test_qwen3_on_24_gib(tmp_path: Path) -> None:
    """The question that the command was made for: a published model from its config, and the card most people have."""
    footprint = read_footprint(str(config_only("qwen3-30b-a3b", tmp_path / "model")))
    fit = Fit(footprint, ServingSpec(), 24 * GIB)
    keep = fit.max_experts
    assert keep is not None
    assert 36 < keep < 44
    assert Fit(footprint, ServingSpec(keep=keep), 24 * GIB).fits
    assert not Fit(footprint, ServingSpec(keep=keep + 1), 24 * GIB).fits
    assert 48 * keep <= (fit.max_total_experts or 0) < 48 * (keep + 1)
    assert Fit(footprint, ServingSpec(keep=keep), 24 * GIB).max_context >= 32768
    assert fit.max_context == 0
