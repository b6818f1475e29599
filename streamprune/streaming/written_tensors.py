"""What is written of each layer, as weights: read from the source or computed, rounded, and loaded into a pruned layer.

A matrix of the output is plain, or it is rounded and stored in the parts of a scheme. Its values are those that its
bytes decode to, and they reach the model through transformers' own conversion: as they will when the output is loaded.

Shapes: a matrix is (R, C) = (out, in).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from streamprune.checkpoint.reader import DTYPES
from streamprune.files.page_cache import Stretch, cache_unchanged
from streamprune.formats.base import KeptExperts
from streamprune.models.expert_layout import Layout
from streamprune.models.open import OpenedMoE
from streamprune.models.skeleton import map_checkpoint
from streamprune.output.encoded import SCALE, SHAPE, encode_tensors
from streamprune.output.source_bytes import source_bytes, stretches
from streamprune.output.tensors import ComputedTensors, OutputTensor, StageTensor, output_tensors
from streamprune.planning.prepare import PreparedModel
from streamprune.quantize.schemes import Scheme
from streamprune.streaming.conversion import Conversion


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the output as a plain checkpoint would have it (`plain`), and the `parameter` that it feeds.

    If it is rounded, `scheme` says how, and `parts` are its tensors in the output, by their names in the format.
    """

    plain: OutputTensor
    parameter: str
    scheme: Scheme | None = None
    parts: Mapping[str, OutputTensor] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The name of the plain tensor."""
        return self.plain.name

    def is_changed(self, computed: ComputedTensors) -> bool:
        """Whether its values are not simply the source's."""
        return self.scheme is not None or self.name in computed.plain

    def has_parts(self, computed: ComputedTensors) -> bool:
        """Whether parts of it are computed."""
        return any(part.name in computed.parts for part in self.parts.values())

    def stage_tensors(self, parts: Mapping[str, torch.Tensor], stage: str) -> dict[str, StageTensor]:
        """Its tensors in the output, of the parts that a stage has computed; its shape is not among them."""
        return {
            self.parts[part].name: StageTensor(stage, bytes_of(values))
            for part, values in parts.items()
            if part != SHAPE
        }


class WrittenTensors:
    """The tensors of an output of the model `opened`, one layer at a time, and the pruned layers that they make.

    `tensors_of` returns those of a layer, and `config` is the config.json of the plain checkpoint that they are, or are
    rounded from. `make_model` returns the pruned model, on meta, whose layers keep what is given.
    """

    def __init__(
        self,
        opened: OpenedMoE,
        tensors_of: Callable[[int], Iterable[OutputTensor]],
        config: Mapping[str, Any],
        make_model: Callable[[KeptExperts], PreTrainedModel],
        device: torch.device,
    ) -> None:
        self.dtype, self.device = opened.dtype, device
        self._skeleton, self._folder = opened.skeleton, opened.checkpoint.folder
        self._tensors_of, self._config, self._make_model = tensors_of, config, make_model
        #: The last layer asked for, and its tensors by the parameter they feed. (Those of all layers would take 30 MB
        #: for Qwen3-30B, and a search has one such object for each candidate.)
        self._current: tuple[int, Mapping[str, Sequence[WrittenTensor]]] | None = None

    def of_layer(self, layer: int) -> list[WrittenTensor]:
        """All tensors that feed a layer."""
        return [each for feeding in self._by_parameter(layer).values() for each in feeding]

    def feeding(self, parameter: str, layer: int) -> Sequence[WrittenTensor]:
        """The tensors that feed a parameter, by its full name."""
        return self._by_parameter(layer).get(parameter, ())

    def _by_parameter(self, layer: int) -> Mapping[str, Sequence[WrittenTensor]]:
        if self._current is not None and self._current[0] == layer:
            return self._current[1]
        # Let go of the last layer's before this one's are made.
        self._current = None
        found = _plain_tensors(self._tensors_of(layer))
        entries = {plain.name: plain.sources[plain.slot or 0] for plain, _ in found}
        targets = map_checkpoint(self._skeleton, entries, self._config)
        feeding: dict[str, list[WrittenTensor]] = defaultdict(list)
        for plain, encoded in found:
            parameter = targets[plain.name].name
            if parameter is None:
                continue
            parts = {each.encoded.part: each for each in encoded if each.encoded is not None}
            scheme = next((each.encoded.scheme for each in encoded if each.encoded is not None), None)
            feeding[parameter].append(WrittenTensor(plain, parameter, scheme, parts))
        self._current = layer, feeding
        return feeding

    def is_changed(self, layer: int, computed: ComputedTensors) -> bool:
        """Whether anything in a layer is not simply the source's values."""
        return any(each.is_changed(computed) for each in self.of_layer(layer))

    def plain_values(self, tensor: OutputTensor, kept: KeptExperts, computed: ComputedTensors) -> torch.Tensor:
        """A plain tensor as a stage has computed it, else as the source has it, decoded or cut; on the CPU."""
        data: bytes | bytearray
        if tensor.name in computed.plain:
            data = computed.plain[tensor.name].data
        else:
            data = bytearray().join(source_bytes(tensor, kept, self._folder))
        return tensor_of(tensor, data)

    def values(self, written: WrittenTensor, kept: KeptExperts, computed: ComputedTensors) -> torch.Tensor:
        """What a tensor of the output means.

        That is what its parts decode to, in the model's dtype on the device: computed ones, or those of its plain
        values rounded to nearest; computed codes may have the scales of the plain values. If it is not rounded, it
        means its plain values.
        """
        scheme, parts = written.scheme, written.parts
        if scheme is None:
            return self.plain_values(written.plain, kept, computed)
        found = {
            name: tensor_of(part, computed.parts[part.name].data).to(self.device)
            for name, part in parts.items()
            if part.name in computed.parts
        }
        if found and SHAPE in parts:
            found[SHAPE] = torch.tensor(written.plain.shape)
        if SCALE in found:
            return scheme.format.decode(found, self.dtype)
        weight = self.plain_values(written.plain, kept, computed).to(self.device).float()
        scales = scheme.scales(weight)
        if found:
            return scheme.format.decode(found | {SCALE: scales}, self.dtype)
        # (The same values as the decoded parts have, but not packed on the way.)
        return scheme.rounded(scheme.round(weight, scales), scales).to(self.dtype)

    def load(
        self, layer: int, kept: KeptExperts, computed: ComputedTensors, parameters: Collection[str] | None = None
    ) -> None:
        """Put what is written into the loaded, pruned layer: into `parameters`, by default all that are changed.

        Memory on top of the layer: the largest parameter's tensors. Raises CheckpointError, and MemoryError or
        torch's error if memory runs out.
        """
        changed = {each.parameter for each in self.of_layer(layer) if each.is_changed(computed)}
        self._load(layer, kept, computed, changed if parameters is None else parameters, self.values)

    def load_plain(self, layer: int, kept: KeptExperts, computed: ComputedTensors) -> None:
        """Put what a refit has computed into the loaded, pruned layer, before anything is rounded. Raises as `load`."""
        changed = {each.parameter for each in self.of_layer(layer) if each.name in computed.plain}
        self._load(layer, kept, computed, changed, lambda each, *given: self.plain_values(each.plain, *given))

    def _load(
        self,
        layer: int,
        kept: KeptExperts,
        computed: ComputedTensors,
        parameters: Collection[str],
        values: Callable[[WrittenTensor, KeptExperts, ComputedTensors], torch.Tensor],
    ) -> None:
        model = self._make_model(kept)
        conversion = Conversion(model, self.dtype, self.device, self._folder)
        for parameter in sorted(parameters):
            feeding = self.feeding(parameter, layer)
            _free(model, parameter)
            with self.reading(feeding, kept, computed):
                conversion.load({each.name: values(each, kept, computed).to(self.device) for each in feeding})

    @contextmanager
    def reading(self, written: Iterable[WrittenTensor], kept: KeptExperts, computed: ComputedTensors) -> Iterator[None]:
        """Within the context the plain values of these tensors may be read; it leaves the page cache as it was."""
        sources: dict[Path, list[Stretch]] = defaultdict(list)
        for each in written:
            if each.name not in computed.plain:
                for file, begin, end in stretches(each.plain, kept):
                    sources[self._folder / file].append((begin, end - begin))
        with cache_unchanged(sources):
            yield


def written_tensors(prepared: PreparedModel, device: torch.device) -> WrittenTensors:
    """The tensors of the output of a run, loaded on `device`.

    As long as it is unknown how many experts stay in each layer, all do.
    """
    planned, layout = prepared.plan.counts, prepared.layout
    assert planned is not None
    counts = planned.per_layer or dict.fromkeys(layout.expert_layers, layout.spec.count)
    source, width = prepared.written, planned.width

    def plain_of(layout: Layout) -> list[OutputTensor]:
        return output_tensors(layout, source.checkpoint.tensors, counts, width)

    # The experts of all layers decide how large groups are.
    scheme = source.encoding.scheme(plain_of(source.layout)) if source.encoding is not None else None

    def tensors_of(layer: int) -> Iterable[OutputTensor]:
        cuts = {name: cut for name, cut in source.layout.cuts.items() if cut.layer == layer}
        plain = plain_of(replace(source.layout, cuts=cuts))
        return plain if source.encoding is None or scheme is None else encode_tensors(plain, source.encoding, scheme)

    return WrittenTensors(prepared, tensors_of, source.checkpoint.config, prepared.model_of, device)


def tensor_of(tensor: OutputTensor, data: bytes | bytearray | memoryview) -> torch.Tensor:
    """The values of a tensor of the output with these bytes, on the CPU."""
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    writable = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(writable, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def bytes_of(values: torch.Tensor) -> bytes:
    """The bytes of a tensor as they are written."""
    array: Any = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    data: bytes = array.tobytes()
    return data


def _plain_tensors(tensors: Iterable[OutputTensor]) -> list[tuple[OutputTensor, list[OutputTensor]]]:
    """The plain tensors of an output, each with the tensors that have its parts: none if it is not rounded."""
    found: dict[str, tuple[OutputTensor, list[OutputTensor]]] = {}
    for tensor in tensors:
        plain = tensor if tensor.encoded is None else tensor.encoded.plain
        parts = found.setdefault(plain.name, (plain, []))[1]
        if tensor.encoded is not None:
            parts.append(tensor)
    return list(found.values())


def _free(model: nn.Module, parameter: str) -> None:
    """Free a parameter of a pruned layer that is about to be set anew."""
    path, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(leaf)
    if old is not None:
        owner._parameters[leaf] = nn.Parameter(old.to("meta"), requires_grad=False)
