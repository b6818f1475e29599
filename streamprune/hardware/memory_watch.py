"""The watch over memory while a run goes on: what the run itself takes against its caps, and what others take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from streamprune.hardware import device as devices
from streamprune.hardware import memory as machine
from streamprune.hardware.device import gpu_index, is_gpu
from streamprune.hardware.gpus import Card, CardProcess, other_processes
from streamprune.hardware.memory import format_bytes

#: What CUDA itself is taken to need on a card when NVML does not tell: kernels and the driver's data for this process.
USUAL_CONTEXT = 512 * 1024**2
#: Processes come and go with less than this without doing harm.
NOTABLE_GROWTH = 64 * 1024**2


class MemoryCaps(Protocol):
    """What a run may take, as the user says it; None for what there is."""

    @property
    def vram_gib(self) -> float | None: ...
    @property
    def ram_gib(self) -> float | None: ...
    @property
    def vram_bytes(self) -> int | None: ...
    @property
    def ram_bytes(self) -> int | None: ...


class MemoryWatch:
    """Keeps a run within --vram-gib and --ram-gib, and names the processes that take memory on its card meanwhile."""

    def __init__(self, settings: MemoryCaps, device: torch.device, say: Callable[[str], None]) -> None:
        self._settings, self._device, self._say = settings, device, say
        card = _card(device)
        self._others = {process.pid: process.used_bytes or 0 for process in other_processes(card)} if card else {}
        self._limit_card(card)

    def excess(self) -> str | None:
        """Says by how much resident memory is above --ram-gib, with freed memory given back; None if it is not."""
        cap = self._settings.ram_bytes
        if cap is None or machine.resident_bytes() <= cap:
            return None
        devices.free_after_failure(self._device)
        resident = machine.resident_bytes()
        if resident <= cap:
            return None
        return f"{format_bytes(resident)} are resident, with --ram-gib {self._settings.ram_gib:g} ({format_bytes(cap)})"

    def between_blocks(self) -> None:
        """Look who else takes memory on the card, say so, and keep what CUDA itself takes within --vram-gib."""
        card = _card(self._device)
        if card is None:
            return
        now = other_processes(card)
        for process in newcomers(self._others, now):
            self._say(
                f"note: {process}, took memory on {self._device} while this run goes on; "
                f"{format_bytes(devices.free_device_bytes(self._device))} are free there for it."
            )
        # A process that left is forgotten; one that was told of is told of again only if it grows further.
        self._others = {process.pid: process.used_bytes or 0 for process in now}
        self._limit_card(card)

    def holders(self) -> str:
        """A sentence on who else holds memory on the card, for messages; empty if nobody is known to."""
        card = _card(self._device)
        others = other_processes(card)[:3] if card else ()
        return f" Others hold memory there too: {'; '.join(map(str, others))}." if others else ""

    def _limit_card(self, card: Card | None) -> None:
        if self._settings.vram_bytes is not None and is_gpu(self._device):
            devices.limit_device_bytes(
                self._device, self._settings.vram_bytes - _context(card, devices.reserved_device_bytes(self._device))
            )


def newcomers(before: dict[int, int], now: Sequence[CardProcess]) -> list[CardProcess]:
    """The processes that are new on a card or hold notably more than `before` (bytes by pid) says."""
    return [
        process
        for process in now
        if process.pid not in before or (process.used_bytes or 0) - before[process.pid] >= NOTABLE_GROWTH
    ]


def context_bytes(device: torch.device) -> int:
    """What CUDA itself takes on a card for this process, beside what torch's allocator holds."""
    return _context(_card(device), devices.reserved_device_bytes(device))


def _context(card: Card | None, reserved: int) -> int:
    own = [process.used_bytes for process in card.processes or () if process.pid == os.getpid()] if card else []
    if not own or own[0] is None or own[0] <= reserved:
        return USUAL_CONTEXT
    return own[0] - reserved


def _card(device: torch.device) -> Card | None:
    """The card that the run computes on; None on the CPU, and where it cannot be told."""
    if not is_gpu(device):
        return None
    from streamprune.hardware.nvml import card_of

    return card_of(gpu_index(device))
