"""How long each resource of a run was at work: reading, computing, writing, moving hidden states."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: What a run waits for, as it is told.
RESOURCES = ("read", "compute", "write", "states")


class Busy:
    """A clock for each of `RESOURCES`. Several threads that use one at a time count once.

    On a card, where the host only hands out work, `on_card` measures by events; `settle` adds what has come to its end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = dict.fromkeys(RESOURCES, 0)
        self._since = dict.fromkeys(RESOURCES, 0.0)
        self._spent = dict.fromkeys(RESOURCES, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._began = time.perf_counter()

    @contextmanager
    def at(self, resource: str) -> Iterator[None]:
        """Count the time within as time in which `resource` is at work."""
        with self._lock:
            if self._users[resource] == 0:
                self._since[resource] = time.perf_counter()
            self._users[resource] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[resource] -= 1
                if self._users[resource] == 0:
                    self._spent[resource] += time.perf_counter() - self._since[resource]

    @contextmanager
    def on_card(self, resource: str, device: torch.device) -> Iterator[None]:
        """The same for work that is handed to a card's current stream; elsewhere the host itself does it."""
        if device.type != "cuda":
            with self.at(resource):
                yield
            return
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # (Without a stream it would be that of the current card, which need not be this one.)
        begin.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        self._events.append((resource, begin, end))

    def settle(self) -> None:
        """Add what was measured by events. Waits for the card; call it where the run has waited anyway."""
        events, self._events = self._events, []
        for resource, begin, end in events:
            end.synchronize()
            self._spent[resource] += begin.elapsed_time(end) / 1000

    def shares(self) -> dict[str, float]:
        """The share of the time since the beginning in which each resource was at work, and that time in seconds."""
        self.settle()
        seconds = time.perf_counter() - self._began
        return {**{name: round(min(1.0, spent / seconds), 4) for name, spent in self._spent.items()},
                "seconds": round(seconds, 3)}  # fmt: skip


def describe(shares: dict[str, float]) -> str:
    """A line for people: "busy: computing 96%, reading 9%, writing 12%, moving hidden states 0% of 13.4 s"."""
    words = {"compute": "computing", "read": "reading", "write": "writing", "states": "moving hidden states"}
    parts = ", ".join(f"{word} {shares[name]:.0%}" for name, word in words.items())
    return f"busy: {parts} of {shares['seconds']:.1f} s"
