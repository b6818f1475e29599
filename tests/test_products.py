"""The ways of a grouped product that tools/gpu_check times: all of them compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import TRITON

sys.path.append(TRITON)
pytest.importorskip("triton")

from measuring.grouped_kernel import grouped_product
from measuring.products import WAYS, measure_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Rows of each expert: none, one, a tile less one, a tile, more than two.
COUNTS = [0, 1, 15, 16, 0, 37]


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(COUNTS), 40, generator=generator)
    weights = torch.randn(len(COUNTS), 24, 40, generator=generator)
    return inputs.to(DEVICE), weights.to(DEVICE), torch.tensor(COUNTS).cumsum(0).int().to(DEVICE)


def expected() -> torch.Tensor:
    inputs, weights, _ = (each.cpu() for each in given())
    return torch.cat([part @ weight.T for part, weight in zip(inputs.split(COUNTS), weights, strict=True)])


@pytest.mark.parametrize("way", ["library", "per_expert", "padded"])
def test_each_way_multiplies_each_row_with_its_experts_matrix(way: str) -> None:
    torch.testing.assert_close(WAYS[way](*given()).cpu(), expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [(16, 16, 16), (32, 32, 64)])
def test_the_kernel_multiplies_each_row_with_its_experts_matrix(block: tuple[int, int, int]) -> None:
    inputs, weights, ends = given()
    found = grouped_product(inputs, weights, ends, block)
    # (A GPU multiplies float32 with fewer bits.)
    torch.testing.assert_close(found.cpu(), expected(), rtol=1e-2, atol=0.05)


def test_every_way_is_timed_and_one_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(WAYS, "padded", failing)
    found = measure_products(*given(), (torch.float32,))
    assert found["rows"] == sum(COUNTS)
    ways = found["float32"]
    assert list(ways) == ["library", "per_expert", "padded", "triton"]
    assert ways.pop("padded") == {"error": "RuntimeError: no such kernel"}
    assert all(way["ms"] > 0 and way["max_difference_over_max"] < 1e-2 for way in ways.values())


COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from measuring import grouped_kernel as own
sizes = dict(E=128, N=1536, I=2048, E_ROUNDED=128, BLOCK_R=own.ROWS, BLOCK_N=own.OUTPUTS, BLOCK_I=own.INPUTS)
pointers = dict.fromkeys(("input_RI", "weight_ENI", "output_RN"), "*bf16") | {"ends_E": "*i32", "tiles_E": "*i32"}
source = ASTSource(own._products, pointers | dict.fromkeys(sizes, "constexpr"), sizes)
options = {"num_warps": own.WARPS, "num_stages": own.STAGES}
print(json.dumps([triton.compile(source, target=GPUTarget("cuda", int(each), 32), options=options).metadata.shared
                  for each in sys.argv[1:]]))
"""


def test_the_kernel_compiles_and_fits_into_shared_memory() -> None:
    """RTX 3090 and 4090 have 99 KiB of it for a program, and the 5090 too."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", COMPILE, "86", "89", "90", "120"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(0 < shared <= 99 * 1024 for shared in json.loads(done.stdout))
