"""The output of a run whose layers are written while they are streamed, and what stays of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamprune.formats.base import KeptExperts
from streamprune.output.writer import OutputWriter
from streamprune.saliency.scores import LayerStatistics
from streamprune.selection.select import Selector
from streamprune.streaming.forward import PRUNED


@dataclass(frozen=True)
class OutputTarget:
    """The output, if layers are written while they are streamed. Only rank 0 has a `writer`.

    What stays is decided by `selector`, from a layer's statistics; or `selection` says what stays by layer, because all
    layers have been scored before: `scored` are their statistics.
    """

    writer: OutputWriter | None
    selector: Selector
    selection: Mapping[int, KeptExperts] | None = None
    scored: Sequence[LayerStatistics] = ()

    def versions(self, layer: LayerStatistics) -> Mapping[str, KeptExperts]:
        """What stays of the experts of a layer that was just scored, by side."""
        return {PRUNED: self.kept(layer.index, layer)}

    def kept(self, index: int, layer: LayerStatistics | None) -> KeptExperts:
        """What stays of the experts of a layer; its statistics are None if it has no experts, or is not scored yet."""
        if self.selection is not None:
            return self.selection.get(index, KeptExperts())
        return self.selector.layer(layer).stays if layer is not None else KeptExperts()
