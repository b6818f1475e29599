"""Which known GPUs a model fits, where no budget is given. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from streamprune.fit.estimate import Estimate, Fit
from streamprune.fit.nearest import COMPARED, most_experts
from streamprune.hardware.gpus import GPUS
from streamprune.hardware.memory import format_bytes
from streamprune.tables import Table


@dataclass(frozen=True)
class Card:
    """What fits a known GPU (`gpu` is its name for --gpu) of which CUDA can use `usable_bytes`.

    `fits`: the model as it is asked for. `max_experts` are the most per layer, by form of the weights, None where not
    even the fewest fit; without experts to remove there are none. `max_context` are tokens, 0 if none fit.
    """

    gpu: str
    usable_bytes: int
    fits: bool
    max_experts: dict[str, int | None]
    max_context: int

    @property
    def same(self) -> tuple[Any, ...]:
        """What cards of one row of the table have in common."""
        return self.fits, tuple(self.max_experts.items())


def cards(estimate: Estimate) -> list[Card]:
    """What fits each known GPU, the smallest first."""
    footprint, asked = estimate.footprint, estimate.use.weights
    forms = [asked, *(form for form in ("source", *COMPARED) if form != asked)]
    possible = [form for form in forms if footprint.why_not(form, estimate.use.width) is None]
    found = []
    for gpu in sorted(GPUS, key=lambda gpu: gpu.usable_bytes):
        fit = Fit(footprint, estimate.use, gpu.usable_bytes)
        experts = {form: most_experts(fit, form) for form in possible} if footprint.spec is not None else {}
        found.append(Card(gpu.key, gpu.usable_bytes, fit.fits, experts, fit.max_context))
    return found


def cards_object(found: Sequence[Card]) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [asdict(card) for card in found]


def cards_lines(estimate: Estimate, found: Sequence[Card]) -> Iterator[str]:
    """The same for a terminal: a sentence, and a row for the cards on which the same fits."""
    fitting = [card.gpu for card in found if card.fits]
    if fitting:
        yield f"No budget was given. Of the GPUs known by name it fits: {', '.join(fitting)}."
    else:
        yield f"No budget was given. It fits none of the GPUs known by name, of which {found[-1].gpu} is the largest."
    if estimate.footprint.spec is None:
        return
    count, rows = estimate.footprint.spec.count, []
    for _, group in groupby(found, key=lambda card: card.same):
        same = list(group)
        first, last = format_bytes(same[0].usable_bytes), format_bytes(same[-1].usable_bytes)
        experts = ("none" if most is None else "all" if most == count else str(most) for most in _most(same[0]))
        sizes = first if first == last else f"{first} to {last}"
        rows.append((sizes, *experts, ", ".join(card.gpu for card in same)))
    forms = found[0].max_experts
    columns = ("CUDA can use", *(f"weights {form}" for form in forms), "--gpu")
    title = f"Most of the {count} experts per layer that fit a GPU, by form of the weights (--weights):"
    yield from Table(title, columns, rows, align="l" + "r" * len(forms) + "l").text()


def _most(card: Card) -> Iterator[int | None]:
    yield from card.max_experts.values()
