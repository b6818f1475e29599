"""The checkpoint tensors of the experts' down projections: reading what stays of them, and encoding refitted ones.

A checkpoint has them as one tensor for each expert or as one for all, with rows and columns as in the model or
exchanged. Which of these it is follows from their shapes; from their values where both sizes are equal.

Shapes: K experts that stay, (A, B) one expert's down projection as the parameter has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from streamprune.errors import UnsupportedModelError
from streamprune.files.durable import reading
from streamprune.files.page_cache import Stretch, cache_unchanged
from streamprune.formats.base import KeptExperts
from streamprune.models.open import OpenedMoE
from streamprune.output.source_bytes import read_parts
from streamprune.output.tensors import OutputTensor, StageTensor
from streamprune.planning.prepare import PreparedModel
from streamprune.refit.activations import DOWN, down_sizes, why_not_linear
from streamprune.streaming.written_tensors import WrittenTensors, bytes_of, tensor_of

#: The name of the stage that computes these tensors.
REFIT = "refit"


class DownTensors:
    """The down projections, before any rounding, of all layers with experts, of which `counts` stay by layer.

    With `width` each expert keeps so many channels. Raises UnsupportedModelError if they cannot be refitted.
    """

    def __init__(
        self, opened: OpenedMoE, written: WrittenTensors, counts: Mapping[int, int], width: int | None = None
    ) -> None:
        self._folder, self._skeleton, self._written = opened.checkpoint.folder, opened.skeleton, written
        for layer, path in opened.skeleton.experts.items():
            module = opened.skeleton.layers[layer].get_submodule(path)
            problem = why_not_linear(module) or self._problem(layer, counts[layer], width, module)
            if problem is not None:
                raise UnsupportedModelError(f"--refit cannot refit the experts of layer {layer}: {problem}.")

    def original(self, layer: int, kept: KeptExperts, module: nn.Module) -> torch.Tensor:
        """The down projections (K, A, B) as they are in the source, in its dtype, on the CPU.

        `module` is the pruned experts module with its weights loaded.
        """
        with cache_unchanged(self._sources(layer, kept)):
            stored = {tensor.name: tensor_of(tensor, self._read(tensor, kept)) for tensor in self._tensors(layer)}
        return self._as_parameter(layer, stored, kept, module)

    def encode(
        self, layer: int, kept: KeptExperts, module: nn.Module, new: torch.Tensor, changed: set[int]
    ) -> dict[str, StageTensor]:
        """The tensors, by name, that `new` (K, A, B) changes: those of the `changed` experts, by their places among K.

        A tensor of all experts has the source's bytes for the other ones, as `new` has.
        """
        encoded = {}
        exchanged = self._is_exchanged(layer, kept, module)
        for tensor in self._tensors(layer):
            if not changed or (tensor.slot is not None and tensor.slot not in changed):
                continue
            values = new[tensor.slot] if tensor.slot is not None else new
            values = values.transpose(-1, -2) if exchanged else values
            encoded[tensor.name] = StageTensor(REFIT, bytes_of(values.reshape(tensor.shape)))
        return encoded

    def _tensors(self, layer: int) -> list[OutputTensor]:
        """Those of a layer, in the order of their experts: a checkpoint's names are in no certain order."""
        parameter = f"{self._skeleton.layers_path}.{layer}.{self._skeleton.experts[layer]}.{DOWN}"
        found = [each.plain for each in self._written.feeding(parameter, layer)]
        return sorted(found, key=lambda tensor: tensor.slot or 0)

    def _problem(self, layer: int, count: int, width: int | None, module: nn.Module) -> str | None:
        """Why the tensors of a layer cannot be encoded; None if they can. `module` has all experts, on meta."""
        tensors, (inner, hidden) = self._tensors(layer), down_sizes(module)
        slots = [tensor.slot for tensor in tensors]
        if slots not in ([None], list(range(count))):
            return f"the checkpoint has {len(tensors)} tensors for their down projections, not one, or one for each"
        for tensor in tensors:
            if tensor.dtype not in ("F64", "F32", "BF16", "F16"):
                return f"{tensor.name} is stored as {tensor.dtype}, so it would have to be quantized again"
            rows = tensor.rows
            joined = rows is None or (rows.axis == 0 and rows.tail == 0)
            if not joined or sorted(_expert_shape(tensor, count)) != sorted((width or inner, hidden)):
                return f"the checkpoint has {tensor.name} {list(tensor.shape)} in a layout that is not known"
        return None

    def _is_exchanged(self, layer: int, kept: KeptExperts, experts: nn.Module) -> bool:
        """Whether the checkpoint has an expert's rows where the loaded parameter has its columns."""
        parameter: torch.Tensor = getattr(experts, DOWN)
        tensor = self._tensors(layer)[0]
        shape, own = _expert_shape(tensor, len(kept.experts)), tuple(parameter.shape[1:])
        if own[0] != own[1]:
            return shape != own
        # Both sizes are equal, so look at the first expert's values, before anything is put into the parameter.
        stored = tensor_of(tensor, self._read(tensor, kept)).reshape(-1, *shape)[0].to(parameter.dtype)
        first = parameter[0].cpu()
        if torch.equal(stored, first):
            return False
        if torch.equal(stored.T, first):
            return True
        raise UnsupportedModelError(f"{tensor.name} is neither the down projection of layer {layer} nor its transpose.")

    def _as_parameter(
        self, layer: int, stored: Mapping[str, torch.Tensor], kept: KeptExperts, module: nn.Module
    ) -> torch.Tensor:
        tensors, count = self._tensors(layer), len(kept.experts)
        shape = _expert_shape(tensors[0], count)
        parts = [stored[tensor.name].reshape(-1, *shape) for tensor in tensors]
        found = torch.cat(parts)
        found = found.transpose(1, 2) if self._is_exchanged(layer, kept, module) else found
        parameter: torch.Tensor = getattr(module, DOWN)
        if not torch.equal(found[0].to(parameter.dtype), parameter[0].cpu()):
            raise UnsupportedModelError(
                f"{tensors[0].name} is not what the model computes with as the down projection of an expert of layer "
                f"{layer}, so a refitted one cannot be written."
            )
        return found

    def _sources(self, layer: int, kept: KeptExperts) -> dict[Path, list[Stretch]]:
        sources: dict[Path, list[Stretch]] = defaultdict(list)
        for tensor in self._tensors(layer):
            origin = tensor.slice_of(kept)
            sources[self._folder / origin.file] += [(part.begin, part.end - part.begin) for part in origin.parts]
        return sources

    def _read(self, tensor: OutputTensor, kept: KeptExperts) -> bytes:
        origin = tensor.slice_of(kept)
        path = self._folder / origin.file
        with reading(path), path.open("rb") as source:
            return b"".join(read_parts(source, origin.parts))


def _expert_shape(tensor: OutputTensor, count: int) -> tuple[int, ...]:
    """The shape of one expert's down projection in a checkpoint tensor of one or of all `count` experts."""
    if tensor.slot is not None:
        return tensor.shape
    return tensor.shape[1:] if len(tensor.shape) == 3 else (tensor.shape[0] // count, *tensor.shape[1:])


def down_tensors(prepared: PreparedModel, written: WrittenTensors) -> DownTensors:
    """The tensors that a refit computes. Raises UnsupportedModelError if they cannot be refitted or encoded.

    As long as it is unknown how many experts stay in each layer, all do.
    """
    planned, layout = prepared.plan.counts, prepared.layout
    assert planned is not None
    counts = planned.per_layer or dict.fromkeys(layout.expert_layers, layout.spec.count)
    return DownTensors(prepared, written, counts, planned.width)
