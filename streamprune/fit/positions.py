"""The longest context that a model is made for, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamprune.models.config_json import first_number, text_part

_LENGTH_NAMES = (
    "max_position_embeddings", "max_seq_len", "n_positions", "max_sequence_length", "model_max_length", "seq_length",
)  # fmt: skip


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The longest context that the config allows, in tokens; None if it names none.

    Where YaRN extends a model, some configs still name the length before it, and engines multiply it.
    """
    text = text_part(config)[1]
    longest = first_number((text, config), _LENGTH_NAMES)
    extended = [_extended(part.get(name)) for part in (text, config) for name in ("rope_scaling", "rope_parameters")]
    return max([longest, *extended]) if longest is not None else None


def _extended(rope: Any) -> int:
    """The context in tokens that YaRN's settings, or the largest of those by kind of layer, extend to; 0 without it."""
    if not isinstance(rope, Mapping):
        return 0
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return max(map(_extended, rope.values()), default=0)
    before, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if not isinstance(before, int) or not isinstance(factor, int | float):
        return 0
    return round(before * factor) if 0 < factor < 2**20 and 0 < before < 2**40 else 0
