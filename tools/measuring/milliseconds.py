"""Timing a step on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

#: Repetitions of a timing, by kind of device.
TIMES = {"cpu": 2, "cuda": 9}


def milliseconds(step: Callable[[], Any], device: torch.device, times: int | None = None) -> list[float]:
    """Milliseconds of each of several steps after one that does not count: by events on a GPU, else by the clock."""
    step()
    found = []
    for _ in range(times or TIMES[device.type]):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            step()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            step()
            found.append((time.perf_counter() - begun) * 1000)
    return [round(each, 3) for each in found]
