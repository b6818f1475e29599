"""Cards as torch sees them, for where NVML does not answer. torch is imported only when something is asked of it."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from streamprune.cards.facts import ASK_BUDGET, Card, Cards, MemoryFigures


def torch_cards(reason: str) -> Cards:
    """The cards that torch sees, with a note that NVML failed for `reason`; none if torch sees none either."""
    notes = [f"NVML cannot be used: {reason}."]
    torch, refusal = _torch_cuda()
    if torch is None:
        return Cards((), (notes[0], f"{refusal}. {ASK_BUDGET}"))
    notes.append(
        "The figures are torch's, of what CUDA can see: what the driver reserves, its version, which processes hold "
        "memory, whether a display is attached and whether MIG is on are not known."
    )
    cards = []
    for index in range(torch.cuda.device_count()):
        try:
            memory = _figures(torch, index)
            name = str(torch.cuda.get_device_name(index))
        except Exception as error:
            notes.append(f"Card {index} is left out, because its memory cannot be known: {error}. {ASK_BUDGET}")
            continue
        cards.append(
            Card(
                index=index,
                name=name,
                total_bytes=memory.total,
                reserved_bytes=None,
                free_bytes=memory.free,
                used_bytes=memory.used,
                processes=None,
                driver=None,
                display=None,
                mig=None,
                source="torch",
                notes=(),
                uuid=torch_uuid(index),
            )
        )
    return Cards(tuple(cards), tuple(notes))


def torch_memory(uuid: str | None) -> MemoryFigures | None:
    """CUDA's figures for the card with this UUID, or None if torch does not see it."""
    torch, _ = _torch_cuda()
    if torch is None or uuid is None:
        return None
    try:
        for index in range(torch.cuda.device_count()):
            if torch_uuid(index) == uuid.removeprefix("GPU-"):
                return _figures(torch, index)
    except Exception:
        pass
    return None


def torch_uuid(index: int) -> str | None:
    """The UUID of what torch calls cuda:`index`, without the GPU- that NVML puts before it.

    None unless torch is loaded and sees the card.
    """
    torch: Any = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available():
            return None
        return str(torch.cuda.get_device_properties(index).uuid)
    # torch built for other cards has no UUIDs, and CUDA can fail in many ways; without it there is still the index.
    except Exception:
        return None


def _figures(torch: Any, index: int) -> MemoryFigures:
    free, total = torch.cuda.mem_get_info(index)
    return MemoryFigures(total, None, free, total - free, "torch")


def _torch_cuda() -> tuple[Any, str | None]:
    """torch and None, or None and why it cannot help."""
    try:
        import torch
    except Exception as error:
        return None, f"torch cannot be imported ({error})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return torch, None
    # torch warns here when it finds a card that it cannot use, say because the driver is too old.
    said = f" ({str(caught[-1].message).splitlines()[0]})" if caught else ""
    return None, f"torch {torch.__version__} sees no CUDA card either{said}"
