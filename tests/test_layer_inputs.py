"""Sums over what enters Linear modules: by hand, in micro-batches of any size, after failures, by several processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from streamprune.distributed.processes import ALONE
from streamprune.errors import UnsupportedModelError
from streamprune.streaming.layer_inputs import LinearInputs
from tests.helpers import CPU


class Block(nn.Module):
    """Two projections of one tensor, one of their sum, flattened as an MLP behind a router gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.query(states) + self.key(input=states)
        return self.out(mixed.reshape(-1, 5))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


TEXT = torch.randn(7, 9, 6, generator=torch.Generator().manual_seed(1))


def collect(block: nn.Module, sizes: list[int], products: bool = True) -> LinearInputs:
    inputs = LinearInputs(["query", "key", "out", "unused"], CPU, products)
    for part in torch.split(TEXT, sizes):
        with torch.no_grad(), inputs.listening(block, len(part)):
            block(part)
        inputs.commit(len(part))
    return inputs


def test_sums_are_those_of_all_inputs(block: Block) -> None:
    sums = collect(block, [3, 4]).sums(ALONE)
    states = TEXT.reshape(-1, 6).double()
    mixed = (block.query(TEXT) + block.key(TEXT)).detach().reshape(-1, 5).double()
    assert sums.keys() == {"query", "key", "out"}
    assert sums["query"] is sums["key"]
    for name, rows in (("query", states), ("out", mixed)):
        assert sums[name].tokens == 63
        torch.testing.assert_close(sums[name].squares, rows.square().sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums[name].products, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_squares_alone_need_no_products(block: Block) -> None:
    sums = collect(block, [7], products=False).sums(ALONE)
    assert sums["out"].products is None
    assert torch.equal(sums["out"].squares, collect(block, [7]).sums(ALONE)["out"].squares)


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 5], [7]])
def test_the_size_of_micro_batches_changes_no_bit(sizes: list[int], block: Block) -> None:
    for name, sums in collect(block, [3, 4]).sums(ALONE).items():
        same = collect(block, sizes).sums(ALONE)[name]
        assert sums.tokens == same.tokens
        # (The first modules round differently for other sizes, so only what enters them is the same.)
        exact = 0.0 if name in ("query", "key") else 1e-6
        torch.testing.assert_close(same.products, sums.products, rtol=exact, atol=exact)


def test_a_micro_batch_that_is_repeated_in_parts_counts_once(block: Block) -> None:
    inputs = LinearInputs(["query", "key", "out"], CPU, True)
    failures = iter([torch.OutOfMemoryError("once")])

    def fail(*_: Any) -> None:
        for failure in failures:
            raise failure

    block.out.register_forward_pre_hook(fail, prepend=True)
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError), inputs.listening(block, 7):
            block(TEXT)
        for part in torch.split(TEXT, [3, 4]):
            with inputs.listening(block, len(part)):
                block(part)
            inputs.commit(len(part))
    for name, sums in collect(block, [3, 4]).sums(ALONE).items():
        found = inputs.sums(ALONE)[name]
        assert found.tokens == sums.tokens
        assert torch.equal(found.squares, sums.squares)


def test_modules_that_share_their_input_only_sometimes_are_refused(block: Block) -> None:
    inputs = LinearInputs(["query", "key"], CPU, True)
    with torch.no_grad(), inputs.listening(block, 7):
        block(TEXT)
    inputs.commit(7)
    with inputs.listening(block, 7), pytest.raises(UnsupportedModelError, match=r"key .*--rounding rtn"):
        block.key(TEXT.clone())


def test_a_tensor_that_changed_in_between_is_another_input(block: Block) -> None:
    inputs = LinearInputs(["query", "key"], CPU, True)
    states = TEXT.clone()
    with torch.no_grad(), inputs.listening(block, 7):
        block.query(states)
        states.mul_(2)
        block.key(states)
    inputs.commit(7)
    sums = inputs.sums(ALONE)
    torch.testing.assert_close(sums["key"].squares, 4 * sums["query"].squares)
