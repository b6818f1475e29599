"""How much memory a model may take: from --budget-gib, a card's name, or the card in this machine."""

from __future__ import annotations

from dataclasses import dataclass

from streamprune.cards.known import known_gpu
from streamprune.cards.nvml import Cards, budget_on_card, list_cards
from streamprune.errors import SettingsError
from streamprune.machine import format_bytes

GIB = 1024**3


@dataclass(frozen=True)
class Budget:
    """`nbytes` that a model and all that serves it may take; `label` says where the figure comes from."""

    nbytes: int
    label: str
    notes: tuple[str, ...] = ()


def resolve_budget(budget_gib: float | None, gpu: str | None) -> Budget:
    """The budget that the user named, else what is usable on this machine's card (the roomiest of several).

    Raises SettingsError for a budget that is no positive size, for both at once, for an unknown card, and when nothing
    is named and no card can be asked.
    """
    if budget_gib is not None and gpu is not None:
        raise SettingsError("Give either --budget-gib or --gpu, not both.")
    if budget_gib is not None:
        if not 0 < budget_gib < 2**20:
            raise SettingsError(f"--budget-gib {budget_gib:g} is not a size of memory. Write for example 24.")
        nbytes = int(budget_gib * GIB)
        return Budget(nbytes, f"--budget-gib {budget_gib:g}", _less_here(nbytes, list_cards(ask_torch=False)))
    if gpu is not None:
        known = known_gpu(gpu)
        nbytes, notes = budget_on_card(known, list_cards(ask_torch=False))
        return Budget(nbytes, f"--gpu {known.key}, what CUDA can use", tuple(notes))
    cards = list_cards()
    best = max(cards.cards, key=lambda card: card.usable_bytes or 0, default=None)
    if best is None or not best.usable_bytes:
        raise SettingsError(
            "No budget is given, and no card can be asked for one: name a card, such as --gpu rtx-3090, or give "
            f"--budget-gib. {' '.join(cards.notes)}"
        )
    return Budget(best.usable_bytes, f"card {best.index}, {best.name}: usable now", tuple(best.notes))


def _less_here(nbytes: int, cards: Cards) -> tuple[str, ...]:
    """A sentence where cards are here and none of them has as much to give as the budget names."""
    usable = max((card.usable_bytes or 0 for card in cards.cards), default=nbytes)
    if usable >= nbytes:
        return ()
    return (
        f"This machine's card can give {format_bytes(usable)} at present, less than the budget: `streamprune devices` "
        "shows what holds the rest.",
    )
