"""A plain output of a quantized source: the checkpoint that the source decodes to, and how it is cut. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import Checkpoint
from streamprune.errors import SettingsError
from streamprune.formats.decoded import DecodedEntry, decoded_entries
from streamprune.formats.quantization import Quantization, without_sections
from streamprune.models.expert_layout import EXPERT, Cut, Layout


def refuse_plain(config: Mapping[str, Any], folder: Path) -> None:
    """Raise SettingsError for a checkpoint that is plain already, by its config.json."""
    if not Quantization.of(config).method:
        raise SettingsError(
            f"--weights bf16 decodes quantized weights, but those of {folder} are plain already. Leave it out."
        )


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The plain checkpoint that a quantized one decodes to: its tensors, in no file yet, and its config.json.

    Raises SettingsError for a checkpoint that is plain already.
    """
    refuse_plain(checkpoint.config, checkpoint.folder)
    tensors = decoded_entries(checkpoint.tensors, checkpoint.config)
    return Checkpoint(checkpoint.folder, without_sections(checkpoint.config), tensors)


def dequantized_layout(layout: Layout, plain: Checkpoint) -> Layout:
    """How the tensors of `dequantized` are cut, by the `layout` of the quantized checkpoint."""
    cuts, mtp = {}, []
    ignored: list[str] = []
    left_out: list[str] = []
    of_mtp, of_ignored = set(layout.mtp), set(layout.ignored)
    for name, entry in plain.tensors.items():
        parts = [part.name for part in entry.parts.values()] if isinstance(entry, DecodedEntry) else [name]
        of_parts = [layout.cuts[part] for part in parts if part in layout.cuts]
        if of_parts:
            cuts[name] = _plain_cut(name, of_parts)
            mtp += [name] if parts[0] in of_mtp else []
        else:
            (ignored if parts[0] in of_ignored else left_out).append(name)
    return replace(layout, cuts=cuts, dropped=tuple(left_out), mtp=tuple(mtp), ignored=tuple(ignored))


def _plain_cut(name: str, of_parts: list[Cut]) -> Cut:
    """The cut of a parameter, by those of its stored parts; a part that all experts share is not cut."""
    cut = next((each for each in of_parts if each.family is not None or each.rows is not None), of_parts[0])
    if cut.family is None:
        return cut
    # Parts lie in the same module as the parameter, so that the expert's number stands in the same place.
    segments = name.split(".")
    segments[cut.family.split(".").index(EXPERT)] = EXPERT
    return replace(cut, family=".".join(segments))
