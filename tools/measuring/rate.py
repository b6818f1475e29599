"""How fast this device multiplies matrices and moves bytes: what the figures of a model are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

#: Rows and columns, by kind of device. A GPU needs large products to be quick; a CPU without units for bfloat16 would
#: be busy with a large one for half a minute.
SIZES = {"cpu": 512, "cuda": 8192}
#: Seconds of products that are not timed, and of those that are: a GPU's clock falls when it gets warm.
SECONDS = {"cpu": (0.1, 0.5), "cuda": (0.5, 1.5)}
#: Products at a time: of a GPU several, so that starting them and waiting for them costs nothing.
AT_A_TIME = {"cpu": 1, "cuda": 20}
#: Bytes that are copied to see how fast a device moves them.
COPY_BYTES = {"cpu": 2**24, "cuda": 2**30}


def matrix_rate(device: str) -> dict[str, Any]:
    """FLOP/s of a product of two square matrices on the device, 2 n³ each: the median of some seconds.

    Returns `flop_per_second`, and of what: `dtype` and `size`. That is bfloat16, but float32 on a CPU that is slow in
    bfloat16, as in a run there.
    """
    import torch

    from streamprune.hardware.half_precision import quicker_dtype

    kind = torch.device(device).type
    size = SIZES[kind]
    dtype = quicker_dtype(torch.bfloat16, torch.device(device))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(a)
    seconds = _median_seconds(lambda: torch.matmul(a, b, out=result), device)
    return {"flop_per_second": 2 * size**3 / seconds, "dtype": str(dtype).removeprefix("torch."), "size": size}


def copy_rates(device: str) -> dict[str, float]:
    """Bytes per second that the device reads and writes in a copy of its own; of a GPU also to it and from it."""
    import torch

    kind = torch.device(device).type
    here = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    # A copy reads each byte and writes it.
    rates = {"copy_bytes_per_second": 2 * len(here) / _median_seconds(lambda: there.copy_(here), device)}
    if kind == "cuda":
        host = torch.empty(len(here) // 4, dtype=torch.uint8, pin_memory=True)
        part = here[: len(host)]
        rates["to_gpu_bytes_per_second"] = len(host) / _median_seconds(lambda: part.copy_(host), device)
        rates["from_gpu_bytes_per_second"] = len(host) / _median_seconds(lambda: host.copy_(part), device)
    return rates


def _median_seconds(step: Callable[[], Any], device: str) -> float:
    """Seconds of one step: the median. The time is looked at after each few steps, and one timing is the least."""
    import torch

    kind = torch.device(device).type
    warming, measuring = SECONDS[kind]
    seconds: list[float] = []
    begun = time.perf_counter()
    while True:
        before = time.perf_counter()
        for _ in range(AT_A_TIME[kind]):
            step()
        if kind == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if before - begun >= warming:
            seconds.append((now - before) / AT_A_TIME[kind])
        if seconds and now - begun >= warming + measuring:
            return statistics.median(seconds)
