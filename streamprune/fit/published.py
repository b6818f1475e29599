"""The tensors of a checkpoint of which only the config is known: names, shapes, and how quantized ones are stored.

Its model is built on the meta device, and its parameters are taken back through transformers' own conversion, to the
names and shapes under which checkpoints are published: most have every projection of every expert by itself. Which of
these are quantized, and what they then take, the storage formats tell from config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from streamprune.checkpoint.reader import DTYPES
from streamprune.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry
from streamprune.errors import UnsupportedModelError
from streamprune.fit.weights import WeightFact, category_of, is_vision
from streamprune.formats.base import ExpertRows, Format
from streamprune.formats.pick import is_read, stated_format
from streamprune.formats.quantization import Quantization, any_name_matches, without_sections
from streamprune.models.expert_layout import Target
from streamprune.models.skeleton import Decoder, Skeleton, map_checkpoint

#: Names in a safetensors header by dtype.
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: The bias of the router's choice is published in float32, also where transformers loads all in 16 bits (MiniMax-M2).
_CORRECTION = "correction_bias"
#: Where the experts are in a tensor that holds them one after the other, and nothing else.
_ALL = ExpertRows(0, 1, 0)


@dataclass(frozen=True)
class _Published:
    """A tensor of the checkpoint as it would be without quantization, and what it feeds.

    `experts` is None outside the experts modules. Inside, the tensor holds that many experts along its first axis, or,
    with `single`, only the first one of them; it then stands for the tensors of the others too. `channel_axis`: its
    size is proportional to the experts' width.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    target: Target
    channel_axis: int | None = None
    experts: int | None = None
    single: bool = False

    @property
    def path(self) -> str:
        """The module of the checkpoint in which the tensor lies."""
        return self.name.rpartition(".")[0]

    def fact(self, dtype: str, shape: tuple[int, ...], part: str = "", **stored: Any) -> WeightFact:
        """The tensor, or a part of it when it is quantized, as the checkpoint has it."""
        rows = self.target.rows if self.experts is None else _ALL
        if self.single:
            shape = (self.experts or 1, *shape)
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        category = category_of(self.target.name or self.name, rows is not None, self.target.layer)
        name = f"{self.name}_{part}" if part else self.name
        return WeightFact(
            name, dtype, shape, nbytes, category, self.target.layer, rows=rows, channel_axis=self.channel_axis, **stored
        )


def published_facts(
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    skeleton: Skeleton | None = None,
    counts: Mapping[int, int] | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[WeightFact]:
    """The tensors that a checkpoint with the config.json `raw` has of a model on the meta device; tied ones count once.

    With a skeleton, whose model it is, `counts` are the experts by layer. `wanted` chooses parameters by name. What the
    model does not have is missing, such as layers for multi-token prediction. Weights in a format that is not read here
    are counted as plain. Raises UnsupportedModelError where transformers cannot take the parameters back.
    """
    raw = raw if is_read(raw) else without_sections(raw)
    facts: list[WeightFact] = []
    for tensor in _published(model, raw, skeleton, counts or {}, wanted):
        # A section in the text part of the config says nothing of other towers (Kimi-K2.5).
        plain = len(Quantization.of(raw).path) > 1 and is_vision(tensor.name)
        for storage, one in [(None, tensor)] if plain else _stored(tensor, model, raw):
            facts += [one.fact(one.dtype, one.shape)] if storage is None else _parts(one, storage)
    if any(fact.format and fact.of_experts for fact in facts):
        # Several channels share a scale or a byte of a quantized expert, so that none can be removed.
        facts = [replace(fact, channel_axis=None) for fact in facts]
    return facts


def _published(
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    skeleton: Skeleton | None,
    counts: Mapping[int, int],
    wanted: Callable[[str], bool],
) -> Iterator[_Published]:
    """The tensors of the checkpoint without quantization; of tensors that hold one expert only the first."""
    # By identity, so that tied parameters count once; kept in a dict, since identities of freed objects return.
    tied = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    state = {name: tensor.detach() for name, tensor in reversed(tied.values()) if wanted(name)}
    inside = _inside_experts(skeleton) if skeleton is not None else {}
    # One expert is enough: the others have the same shapes.
    tensors = _as_saved(model, raw, {name: each[:1] if name in inside else each for name, each in state.items()})
    entries = {
        name: TensorEntry(name, "", DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    in_float32 = build_glob_alternation([*model._get_dtype_plan(model.dtype), _CORRECTION])[0]
    for name, target in map_checkpoint(skeleton or Decoder(model, "", {}), entries, {}).items():
        entry, shape = entries[name], entries[name].shape
        kept = tensors[name].is_floating_point() and in_float32.search(target.name or name)
        channels = target.channels if skeleton is not None and target.name in skeleton.channels else None
        result = _Published(name, "F32" if kept else entry.dtype, shape, target, channels.axis if channels else None)
        if target.name in inside and target.layer is not None:
            single = len(shape) < state[target.name].dim()
            experts = counts[target.layer]
            result = replace(result, experts=experts, single=single, shape=shape if single else (experts, *shape[1:]))
        elif target.rows is not None and target.layer is not None:
            result = replace(result, shape=target.rows.resized(shape, counts[target.layer]))
        yield result


def _inside_experts(skeleton: Skeleton) -> set[str]:
    """The parameters of the experts modules that hold experts one after the other along their first axis."""
    prefixes = tuple(f"{skeleton.layers_path}.{layer}.{path}." for layer, path in skeleton.experts.items())
    return {name for name, rows in skeleton.expert_rows.items() if rows == _ALL and name.startswith(prefixes)}


def _as_saved(
    model: PreTrainedModel, raw: Mapping[str, Any], state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state as transformers would save it, under the names of checkpoints."""
    if raw.get("model_type") != model.config.model_type:
        # The text part of a multimodal model: otherwise transformers leaves out the prefix of its names.
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    try:
        saved: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
        return saved
    except Exception as error:
        # Conversions are written for whole tensors in memory, and may raise anything.
        raise UnsupportedModelError(
            f"The sizes of this {model.config.model_type} model are unknown, since transformers cannot tell how it is "
            f"saved ({type(error).__name__}: {error}). Name its checkpoint, whose headers say it."
        ) from error
    finally:
        vars(model).pop("_weight_conversions", None)


def _stored(
    tensor: _Published, model: PreTrainedModel, raw: Mapping[str, Any]
) -> Iterator[tuple[Format | None, _Published]]:
    """How a tensor is stored (None: plain). Experts of one tensor become several if its format has them so."""
    module = model.get_submodule(str(tensor.target.name).rpartition(".")[0]) if tensor.target.name else None
    axes = len(tensor.shape) + tensor.single
    if tensor.experts is not None and axes == 3:
        storage = stated_format(tensor.path, raw)
        if tensor.single or (storage is not None and storage.joins_experts):
            yield storage, _out_in(tensor, module)
            return
        split = [(stated_format(one.path, raw), one) for one in _split(_out_in(tensor, module))]
        yield from split if any(storage for storage, _ in split) else [(None, tensor)]
    elif tensor.target.rows not in (None, _ALL) and stated_format(tensor.path, raw) is not None:
        raise UnsupportedModelError(
            f"The sizes of this quantized {model.config.model_type} model are unknown: the experts in {tensor.name} "
            "have no axis of their own. Name its checkpoint, whose headers say it."
        )
    elif isinstance(module, nn.Linear) and axes == 2 and tensor.target.rows is None and not _in_float32(tensor, model):
        yield stated_format(tensor.path, raw), tensor
    else:
        yield None, tensor


def _in_float32(tensor: _Published, model: PreTrainedModel) -> bool:
    """Whether the module is one of those that transformers never quantizes because they need precision."""
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return any_name_matches(str(tensor.target.name).rpartition(".")[0], names)


def _out_in(tensor: _Published, module: nn.Module | None) -> _Published:
    """A tensor of all experts, with the inputs of each matrix along the last axis."""
    if tensor.single or not getattr(module, "is_transposed", False):
        return tensor
    experts, inputs, outputs = tensor.shape
    return replace(tensor, shape=(experts, outputs, inputs))


def _split(tensor: _Published) -> Iterator[_Published]:
    """Every projection of an expert by itself, from a tensor (experts, out, in) that holds all of them."""
    _, outputs, inputs = tensor.shape
    last = tensor.name.rpartition(".")[2]
    names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    for name in names:
        yield replace(tensor, name=f"{tensor.path}.0.{name}.weight", shape=(outputs // len(names), inputs), single=True)


def _parts(tensor: _Published, storage: Format) -> Iterator[WeightFact]:
    """The stored tensors of a quantized weight."""
    parts = storage.stored_as(tensor.shape)
    decoded: tuple[int, ...] | None = storage.plain_shape({part: shape for part, (_, shape) in parts.items()})
    if tensor.single and decoded is not None:
        decoded = (tensor.experts or 1, *decoded)
    sizes = {part: math.prod(shape) * DTYPE_BITS[dtype] for part, (dtype, shape) in parts.items()}
    largest = max(sizes, key=lambda part: sizes[part])
    for part, (dtype, shape) in parts.items():
        yield tensor.fact(dtype, shape, part, format=storage.name, decoded_shape=decoded if part == largest else None)
