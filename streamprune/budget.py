"""How much memory a model may take: from --budget-gib, a card's name, or the card in this machine."""

from __future__ import annotations

from dataclasses import dataclass

from streamprune.errors import SettingsError
from streamprune.gpus import known_gpu

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
    # Imported late: only a budget that is not named in GiB needs to ask for the cards.
    from streamprune.devices import budget_on_card, list_cards

    if budget_gib is not None and gpu is not None:
        raise SettingsError("Give either --budget-gib or --gpu, not both.")
    if budget_gib is not None:
        if not 0 < budget_gib < 2**20:
            raise SettingsError(f"--budget-gib {budget_gib:g} is not a size of memory. Write for example 24.")
        return Budget(int(budget_gib * GIB), f"--budget-gib {budget_gib:g}")
    if gpu is not None:
        known = known_gpu(gpu)
        nbytes, notes = budget_on_card(known, list_cards(ask_torch=False))
        return Budget(nbytes, f"--gpu {known.key}, what CUDA can use", tuple(notes))
    cards = list_cards()
    best = max(cards.cards, key=lambda card: card.usable_bytes or 0, default=None)
    if best is None or not best.usable_bytes:
        raise SettingsError(
            "No card's memory can be asked for here, so say how much there is: --budget-gib 24, or --gpu rtx-3090. "
            + " ".join(cards.notes)
        )
    return Budget(best.usable_bytes, f"card {best.index}, {best.name}: usable now", tuple(best.notes))
