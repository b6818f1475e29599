"""Where a run that rounds by GPTQ spends its time: its Hessians, their factors, and the rounding of columns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

#: Functions by what they are counted for. Factors are made within the rounding of columns.
PARTS = {
    "hessians": (
        "streamprune.streaming.layer_inputs.InputSums.add",
        "streamprune.streaming.layer_inputs.RoutedInputs.products",
    ),
    "factors": ("streamprune.quantize.gptq._factors",),
    "columns": ("streamprune.quantize.gptq._codes",),
}


@contextmanager
def timed_parts(device: str) -> Iterator[Counter[str]]:
    """Within the context, seconds by part are added up, each call waited for. `columns` then includes `factors`."""
    seconds: Counter[str] = Counter()

    def wait() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    def timed(part: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            wait()
            begun = time.perf_counter()
            result = usual(*given, **named)
            wait()
            seconds[part] += time.perf_counter() - begun
            return result

        return call

    patches = []
    for part, names in PARTS.items():
        for name in names:
            owner, _, attribute = name.rpartition(".")
            found = patch(name, timed(part, getattr(_named(owner), attribute)))
            patches.append(found)
    for each in patches:
        each.start()
    try:
        yield seconds
    finally:
        for each in patches:
            each.stop()


def shares(seconds: Counter[str], whole: float) -> dict[str, float]:
    """The shares of `whole` seconds that the parts took."""
    alone = {**seconds, "columns": seconds["columns"] - seconds["factors"]}
    return {part: round(alone[part] / whole, 3) for part in ("hessians", "factors", "columns")}


def _named(name: str) -> Any:
    import importlib

    module, _, leaf = name.rpartition(".")
    if leaf[:1].isupper():
        return getattr(importlib.import_module(module), leaf)
    return importlib.import_module(name)
