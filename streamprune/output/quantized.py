"""What an output of a quantized source needs beyond its tensors: its formats, and JSON that names experts. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, read_json
from streamprune.formats.base import KeptExperts, StoredTensor
from streamprune.formats.pick import format_names, pick_formats
from streamprune.formats.quantization import Quantization, sections_of, with_sections
from streamprune.formats.renumber import BESIDE, ExpertNames, check_names, partly_plain, renumber
from streamprune.models.expert_layout import EXPERT, Layout
from streamprune.models.per_layer_experts import has_per_layer_experts

#: What may be an expert's number in the name of a tensor.
_EXPERT_NUMBER = re.compile(r".*?\.experts\.\d+(?=\.)")
#: The methods whose experts transformers 5.23 builds anew on a GPU, by the model's config rather than the layer's, and
#: the class of config that lets it decode them instead (`replace_with_fp8_linear`, `replace_with_mxfp4_linear`).
_WITHOUT_UNEVEN = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


@dataclass(frozen=True)
class QuantizedSource:
    """A quantized checkpoint: how it names experts, and the files beside its config.json that name some, by name."""

    checkpoint: Checkpoint
    names: ExpertNames = field(repr=False)
    beside: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout) -> QuantizedSource | None:
        """None if the config.json says that the weights are plain.

        Raises UnsupportedModelError if JSON names experts in a way that cannot be renumbered.
        """
        if not Quantization.of(checkpoint.config).method:
            return None
        names = expert_names(layout, checkpoint)
        for path, section in sections_of(checkpoint.config):
            check_names(section, names, _where(checkpoint.folder, path))
        beside = {}
        for name in BESIDE:
            if Path(name) in checkpoint.small_files():
                value = read_json(checkpoint.folder / name)
                if check_names(value, names, f"{checkpoint.folder / name}"):
                    beside[name] = value
        return cls(checkpoint, names, beside)

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """How every tensor is stored."""
        return pick_formats(self.checkpoint.tensors, self.checkpoint.config)

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The formats of the quantized tensors, for people, first the one of most bytes."""
        return format_names(self.checkpoint.tensors, self.stored)

    def config_for(self, config: Mapping[str, Any], kept: Mapping[int, KeptExperts]) -> dict[str, Any]:
        """A config.json of the output, with the experts that its quantization section names renumbered."""
        change = partial(renumber, names=self.names, kept=_numbers(kept), where=CONFIG_NAME)
        return with_sections(config, change)

    def files_for(self, kept: Mapping[int, KeptExperts]) -> dict[str, bytes]:
        """The files beside config.json that name experts, renumbered."""
        found = {}
        for name, value in self.beside.items():
            changed = renumber(value, self.names, _numbers(kept), name)
            found[name] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
        return found

    def notes_for(self, config: Mapping[str, Any], kept: Mapping[int, KeptExperts]) -> list[str]:
        """What to know before an output with this config is served."""
        counts = {layer: len(each.experts) for layer, each in kept.items()}
        sections = (section for _, section in sections_of(config))
        layers = sorted({layer for section in sections for layer in partly_plain(section, self.names, counts)})
        notes, loader = [], _WITHOUT_UNEVEN.get(Quantization.of(config).method)
        if loader is not None and has_per_layer_experts(counts):
            notes.append(
                "On a GPU, transformers gives all layers the same number of quantized experts. There, load this model "
                f"with quantization_config={loader}(dequantize=True), which takes the memory of 16-bit weights."
            )
        if not layers:
            return notes
        listed = ", ".join(map(str, layers[:5])) + (", …" if len(layers) > 5 else "")
        return [
            *notes,
            f"In {'layer' if len(layers) == 1 else 'layers'} {listed}, {CONFIG_NAME} calls some experts not quantized, "
            "but not all, as that of the source does. vLLM takes all experts of a layer for unquantized as soon as one "
            "is in such a list, so it may refuse this model.",
        ]


def _where(folder: Path, path: Sequence[str]) -> str:
    return f"{'.'.join(path)} in {folder / CONFIG_NAME}"


def _numbers(kept: Mapping[int, KeptExperts]) -> dict[int, Sequence[int]]:
    return {layer: each.experts for layer, each in kept.items()}


def expert_names(layout: Layout, checkpoint: Checkpoint) -> ExpertNames:
    """How a checkpoint names the modules of its routed experts."""
    lists: set[str] = set()
    projections: dict[int, dict[tuple[str, str], None]] = {layer: {} for layer in layout.expert_layers}
    mtp: dict[tuple[str, str], None] = {}
    others = set()
    for name in checkpoint.tensors:
        cut = layout.cuts.get(name)
        if name in layout.mtp_experts and cut is not None:
            if cut.family is not None:
                before, _, behind = cut.family.partition(f".{EXPERT}.")
                mtp[before, behind.rpartition(".")[0]] = None
            continue
        if cut is None or cut.layer is None:
            match = _EXPERT_NUMBER.match(name)
            others |= {match.group()} if match else set()
            continue
        lists.add(name.partition(f".{cut.layer}.")[0])
        if cut.family is not None:
            before, _, behind = cut.family.partition(f".{EXPERT}.")
            projections[cut.layer][before, behind.rpartition(".")[0]] = None
    by_layer = {layer: tuple(found) for layer, found in projections.items()}
    mtp_layer = layout.mtp_layer if layout.mtp_layer is not None else layout.mtp_source
    return ExpertNames(layout.spec.count, frozenset(lists), by_layer, frozenset(others), tuple(mtp), mtp_layer)
