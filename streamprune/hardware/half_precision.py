"""bfloat16 and float16 on a CPU: some have arithmetic for them, others convert values and take many times as long."""

from __future__ import annotations

import time
from functools import cache

import torch

HALF = (torch.bfloat16, torch.float16)
#: From here on a dtype counts as slow. CPUs without arithmetic for bfloat16 were seen to take 7 to 20 times as long as
#: in float32, those with it less than once: noise does not decide.
SLOW = 2.0
#: Rows, columns and depth of the product that is timed.
_SIZES = (128, 512, 512)


def quicker_dtype(dtype: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """float32 in place of a half-precision `dtype` that is slow on the CPU; any other dtype or device keeps its own.

    Every value of such a dtype is one of float32 too, so that only sums round otherwise. A `device` of None is unknown.
    """
    is_cpu = device is not None and device.type == "cpu"
    return torch.float32 if is_cpu and dtype in HALF and slowdown(dtype) > SLOW else dtype


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a matrix product takes in `dtype` on this CPU.

    By the fastest of three each, in turn; all take about a tenth of a second.
    """
    best = {dtype: float("inf"), torch.float32: float("inf")}
    rows, columns, depth = _SIZES
    for _ in range(3):
        for kind in best:
            one, two = torch.ones(rows, depth, dtype=kind), torch.ones(columns, depth, dtype=kind)
            began = time.perf_counter()
            torch.mm(one, two.T)
            best[kind] = min(best[kind], time.perf_counter() - began)
    return best[dtype] / best[torch.float32]
