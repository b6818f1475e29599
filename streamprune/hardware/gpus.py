"""What is known about cards, as data, and what follows from it: what can be used, who holds memory, a card's budget.

What `streamprune devices` prints: the cards, the machine's RAM, and the disk of a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from streamprune.hardware.known_gpus import Gpu, gpu_of, is_named
from streamprune.hardware.memory import available_memory_bytes, disk_bytes, format_bytes, total_memory_bytes

Source = Literal["NVML v2", "NVML v1", "torch"]
ASK_BUDGET = "Say with --budget-gib how much memory there is."


@dataclass(frozen=True)
class MemoryFigures:
    """One answer on a card's memory, in bytes. Without `reserved`, what the driver reserves is part of `used`."""

    total: int
    reserved: int | None
    free: int
    used: int
    source: Source


@dataclass(frozen=True)
class CardProcess:
    """A process that holds memory on a card. None: not known (another user's process; no figures under WSL)."""

    pid: int
    name: str | None
    used_bytes: int | None

    def __str__(self) -> str:
        held = "size unknown" if self.used_bytes is None else format_bytes(self.used_bytes)
        return f"{self.name or 'name unknown'} (pid {self.pid}), {held}"


@dataclass(frozen=True)
class MigInstance:
    """A part of a card that is divided with MIG. A process can use the memory of one part only."""

    index: int
    uuid: str | None
    total_bytes: int
    free_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Card:
    """One card. None means that it could not be known, and `notes` say why and what follows.

    What the driver reserves is part of `used_bytes` only if `reserved_bytes` is None. `instances` are the parts of a
    card that MIG divides; None where they may not be seen.
    """

    index: int
    name: str
    total_bytes: int
    reserved_bytes: int | None
    free_bytes: int
    used_bytes: int
    processes: tuple[CardProcess, ...] | None
    driver: str | None
    display: bool | None
    mig: bool | None
    source: Source
    notes: tuple[str, ...]
    uuid: str | None = None
    instances: tuple[MigInstance, ...] | None = ()

    @property
    def usable_bytes(self) -> int:
        """What a new process can have now: never more than is free, and with MIG the part with most free memory."""
        if self.mig:
            return max((instance.free_bytes for instance in self.instances or ()), default=0)
        gpu = gpu_of(self.name, self.total_bytes)
        # torch's figures are CUDA's own. Estimates stay out of it: they take off more than CUDA really keeps back.
        if gpu is None or gpu.estimated or self.source == "torch":
            return self.free_bytes
        if self.reserved_bytes is None:
            return min(self.free_bytes, gpu.usable_bytes)
        return max(0, self.free_bytes - max(0, gpu.gap_bytes - self.reserved_bytes))

    def answers_to(self, uuid: str) -> bool:
        """Whether the card, or one of its MIG parts, has this UUID, or one that begins like it."""
        # NVML says what it is the UUID of (GPU-, MIG-), torch does not.
        uuids = [self.uuid, *(instance.uuid for instance in self.instances or ())]
        return any(own is not None and _bare(own).startswith(_bare(uuid)) for own in uuids)


@dataclass(frozen=True)
class Cards:
    """The cards of this machine, and what is to be said about all of them."""

    cards: tuple[Card, ...]
    notes: tuple[str, ...]


def visible_cards(cards: tuple[Card, ...], setting: str | None) -> Iterator[Card]:
    """The cards that `setting` (CUDA_VISIBLE_DEVICES) leaves, in its order; all if it is not set (None).

    Like CUDA this stops at the first entry that is no card, or more than one.
    """
    if setting is None:
        yield from cards
        return
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            found = [card for card in cards if card.index == int(entry)]
        else:
            # GPU-<uuid>, the start of one, MIG-<uuid>, or the older MIG-GPU-<uuid>/<instance>/<instance>.
            wanted = entry.removeprefix("MIG-").split("/")[0] if entry.startswith("MIG-GPU-") else entry
            found = [card for card in cards if wanted.startswith(("GPU-", "MIG-")) and card.answers_to(wanted)]
        if len(found) != 1:
            return
        yield found[0]


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-")


def other_processes(card: Card, own_pid: int | None = None) -> tuple[CardProcess, ...]:
    """Who holds memory on the card beside this process (`own_pid`), the largest first; unknown sizes come last."""
    own_pid = os.getpid() if own_pid is None else own_pid
    others = [process for process in card.processes or () if process.pid != own_pid]
    return tuple(sorted(others, key=lambda process: -(process.used_bytes or 0)))


def budget_on_card(gpu: Gpu, cards: Cards) -> tuple[int, list[str]]:
    """What --gpu means here, in bytes, and sentences that say how it came about.

    It is what CUDA can use of such a card. If one is present, what the display and other processes hold of it now is
    taken off; of several the one that has most left counts.
    """
    notes = [f"{gpu.key}: CUDA can use {format_bytes(gpu.usable_bytes)} of {format_bytes(gpu.total_bytes)}."]
    if gpu.estimated:
        notes[0] = f"{notes[0][:-1]} (estimated: no measurement of this card is known)."
    present = [card for card in cards.cards if gpu_of(card.name, card.total_bytes) == gpu or _is_cuda_view(gpu, card)]
    if not present:
        return gpu.usable_bytes, [*notes, _absent(gpu, cards)]
    card = max(present, key=lambda card: _left(gpu, card))
    if card.mig:
        notes.append(
            f"Card {card.index} here is such a card, but divided with MIG, so that no process can use all of it. "
            "For one part give its memory with --budget-gib."
        )
        return gpu.usable_bytes, notes
    capacity, held = _capacity(gpu, card), _held_by_others(gpu, card)
    which = f"Card {card.index} here is such a card"
    if len(present) > 1:
        which = f"{len(present)} such cards are here, of which card {card.index} has most left"
    if held == 0:
        notes.append(f"{which}, and nothing else holds memory on it.")
    else:
        notes.append(f"{which}: {format_bytes(held)} are in use there now{_holders(card)}, and taken off.")
    return max(0, capacity - held), notes


def _is_cuda_view(gpu: Gpu, card: Card) -> bool:
    """torch reports the card's memory without what CUDA cannot use, so that the table's total does not match."""
    gap = gpu.total_bytes - card.total_bytes
    return card.source == "torch" and is_named(gpu, card.name) and 0 <= gap <= 0.05 * gpu.total_bytes


def _capacity(gpu: Gpu, card: Card) -> int:
    """What CUDA can use of this very card when nothing runs: less than the table says if the driver reserves more."""
    return min(gpu.usable_bytes, card.total_bytes - (card.reserved_bytes or 0))


def _held_by_others(gpu: Gpu, card: Card) -> int:
    """What the display and other processes hold now: all that is in use, less this process's own part."""
    held = card.used_bytes
    if card.source == "NVML v1":
        # Here the driver's own part counts as used; it is about what CUDA cannot use, and is not to be taken off twice.
        held -= gpu.gap_bytes
    own = (process.used_bytes or 0 for process in card.processes or () if process.pid == os.getpid())
    return max(0, held - sum(own))


def _left(gpu: Gpu, card: Card) -> int:
    return _capacity(gpu, card) - _held_by_others(gpu, card)


def _holders(card: Card) -> str:
    """By whom, for a sentence: at most three processes by name, and the display."""
    holders = [str(process) for process in other_processes(card)[:3]]
    if len(other_processes(card)) > 3:
        holders.append(f"{len(other_processes(card)) - 3} more")
    if card.display:
        holders.append("a display is attached")
    return f" ({'; '.join(holders)})" if holders else ""


def _absent(gpu: Gpu, cards: Cards) -> str:
    """Why nothing is taken off: no such card here, or one of another size."""
    for card in cards.cards:
        if is_named(gpu, card.name):
            return (
                f"Card {card.index} here has that name but {format_bytes(card.total_bytes)}: nothing was taken off for "
                "what runs on it. For that card give --budget-gib."
            )
    return "No such card is to be seen here, so nothing is taken off for a display or other programs on it."


def devices_object(cards: Cards, folder: Path) -> dict[str, Any]:
    """Everything as one object for --json, in bytes; null where something is not known."""
    total, free = disk_bytes(folder)
    return {
        "cards": [{**asdict(card), "usable_bytes": card.usable_bytes} for card in cards.cards],
        "notes": list(cards.notes),
        "ram": {"total_bytes": total_memory_bytes(), "available_bytes": available_memory_bytes()},
        "disk": {"folder": str(folder.absolute()), "total_bytes": total, "free_bytes": free},
    }


def devices_text(cards: Cards, folder: Path) -> str:
    """The same for people: a paragraph per card, then RAM and disk, and what could not be known."""
    lines = []
    for card in cards.cards:
        lines += [*_card_lines(card), ""]
    if not cards.cards:
        lines += ["No NVIDIA card is to be seen.", *(f"  {note}" for note in cards.notes), ""]
    total, free = disk_bytes(folder)
    lines += [
        f"RAM: {format_bytes(total_memory_bytes())} total, {format_bytes(available_memory_bytes())} available",
        f"disk of {folder.absolute()}: {format_bytes(total)} total, {format_bytes(free)} free",
    ]
    if cards.cards:
        lines += [f"note: {note}" for note in cards.notes]
    return "\n".join(lines)


def _card_lines(card: Card) -> list[str]:
    rows = [
        ("total", format_bytes(card.total_bytes)),
        ("reserved", _known(card.reserved_bytes)),
        ("used", format_bytes(card.used_bytes)),
        ("free", format_bytes(card.free_bytes)),
        ("usable", _usable(card)),
        *_process_rows(card),
        ("driver", card.driver or "unknown"),
        ("display", _known(card.display, "attached", "none")),
        ("MIG", _known(card.mig, "on", "off")),
        *(
            (f"MIG {part.index}", f"{format_bytes(part.total_bytes)} total, {format_bytes(part.free_bytes)} free")
            for part in card.instances or ()
        ),
        ("source", card.source),
        *(("note", note) for note in card.notes),
    ]
    return [f"card {card.index}: {card.name}", *(f"  {label:<10}{value}" for label, value in rows)]


def _usable(card: Card) -> str:
    """What a new process can have, and where this differs from what is free."""
    usable = format_bytes(card.usable_bytes)
    if card.mig:
        return f"{usable} (a process can use one MIG part only)" if card.usable_bytes else "unknown"
    kept = card.free_bytes - card.usable_bytes
    return f"{usable} ({format_bytes(kept)} less than free: CUDA cannot use all of this card)" if kept else usable


def _process_rows(card: Card) -> list[tuple[str, str]]:
    """A row per process that holds memory, labelled once."""
    if card.processes is None:
        return [("processes", "unknown")]
    if not card.processes:
        return [("processes", "none")]
    return [("" if row else "processes", str(process)) for row, process in enumerate(card.processes)]


def _known(value: int | bool | None, yes: str = "", no: str = "") -> str:
    """A size or a yes or no; `unknown` for None."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return yes if value else no
    return format_bytes(value)
