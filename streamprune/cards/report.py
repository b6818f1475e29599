"""What `streamprune devices` prints: the cards, the machine's RAM, and the disk of a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamprune.cards.facts import Card, Cards
from streamprune.machine import available_memory_bytes, disk_bytes, format_bytes, total_memory_bytes


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
