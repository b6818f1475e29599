"""How fast this device multiplies matrices: what the arithmetic of a model is compared with."""

from __future__ import annotations

import statistics
import time

#: Rows and columns, by kind of device: large enough that a larger one is not quicker.
SIZES = {"cpu": 2048, "cuda": 8192}
#: So long products are timed, after some that are not: a card's clock falls when it gets warm.
SECONDS = 2.0
WARMING_SECONDS = 0.5


def matrix_rate(device: str) -> float:
    """FLOP/s of a product of two square bfloat16 matrices on the device, 2 n³ each: the median over two seconds."""
    import torch

    kind = torch.device(device).type
    size = SIZES[kind]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    result = torch.empty_like(a)

    def seconds_of(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            torch.matmul(a, b, out=result)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begun) / count

    # Of a card several at a time, so that starting them and waiting for them costs nothing.
    count = 1 if kind == "cpu" else 20
    seconds: list[float] = []
    begun = time.perf_counter()
    while (passed := time.perf_counter() - begun) < WARMING_SECONDS + SECONDS or not seconds:
        each = seconds_of(count)
        if passed >= WARMING_SECONDS:
            seconds.append(each)
    return 2 * size**3 / statistics.median(seconds)
