"""Looking at a run of streamprune from within its process: its plan, gaps between layers, waits for the GPU."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest.mock import patch

from measuring.shapes import ROOT

#: What torch says where the host waits for the GPU.
SYNCHRONIZING = "called a synchronizing CUDA operation"
#: Places that are listed; the count is that of all.
PLACES = 12


class SyncWarnings:
    """Counts, while entered, where torch lets the host wait for a GPU. Without one it counts nothing.

    (torch does not report waits for events, nor copies from pageable memory.)
    """

    def __init__(self, device: str) -> None:
        self._on_card, self._places, self._stack = device != "cpu", Counter[str](), ExitStack()

    def __enter__(self) -> SyncWarnings:
        if self._on_card:
            import torch

            self._stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._count  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def counts(self) -> dict[str, Any]:
        """How many there were, and how often at each place: our line, and the library's where it is another one."""
        return {"count": self._places.total(), "places": dict(self._places.most_common(PLACES))}

    def _count(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if SYNCHRONIZING not in str(message):
            return
        place, frame, ours = f"{filename}:{lineno}", sys._getframe(1), str(ROOT / "streamprune")
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(ours):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(ours):
            line = f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
            place = line if filename.startswith(ours) else f"{line} by {'/'.join(filename.split('/')[-3:])}:{lineno}"
        self._places[place] += 1


class Watch:
    """While entered, watches the run of streamprune in this process. `seen` returns what was seen.

    A gap is the time from when all micro-batches of a layer are computed (the run has waited for the GPU) until the
    first one of the next layer is begun.
    """

    def __init__(self, device: str) -> None:
        self._sync, self._stack = SyncWarnings(device), ExitStack()
        self._gaps: list[float] = []
        self._ended: float | None = None
        self._layer: int | None = None
        self._plan: Any = None

    def __enter__(self) -> Watch:
        from importlib import import_module

        from streamprune.progress import Busy
        from streamprune.streaming.batches import MicroBatches

        product: Any = import_module("streamprune.pipeline.run")
        run, synchronize, plan_memory = MicroBatches.run, Busy.synchronize, product.plan_memory

        def run_and_note(batches: Any, layer: int, *given: Any, **named: Any) -> None:
            if self._ended is not None and layer != self._layer:
                self._gaps.append(time.perf_counter() - self._ended)
            self._layer = layer
            run(batches, layer, *given, **named)

        def synchronize_and_note(busy: Any) -> None:
            synchronize(busy)
            self._ended = time.perf_counter()

        def plan_and_note(*given: Any, **named: Any) -> Any:
            self._plan = plan_memory(*given, **named)
            return self._plan

        for owner, name, instead in (
            (MicroBatches, "run", run_and_note),
            (Busy, "synchronize", synchronize_and_note),
            (product, "plan_memory", plan_and_note),
        ):
            self._stack.enter_context(patch.object(owner, name, instead))
        self._stack.enter_context(self._sync)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def seen(self) -> dict[str, Any]:
        """The gaps in seconds, the plan in words, the bytes that it allows on the device, and the sync warnings."""
        seen: dict[str, Any] = {"gaps": [round(gap, 4) for gap in self._gaps], "sync_warnings": self._sync.counts()}
        plan = self._plan
        if plan is not None:
            seen["plan_bytes"] = plan.device_bytes
            seen["plan"] = plan.describe()
        return seen
