"""A checkpoint and the model that it is of, on meta: opened and understood, nothing of its weights read yet.

Do this checkpoint and this model belong together? Asked before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.models.decoder import Decoder
from streamprune.models.skeleton import Skeleton, Target


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, its model on meta, which tensor feeds which parameter, and the dtype in which it is computed."""

    checkpoint: Checkpoint
    skeleton: Decoder
    targets: Mapping[str, Target | None] = field(repr=False)
    dtype: torch.dtype


_FLOATS = {"BF16", "F16", "F32", "F64"}
_QUANTIZATION_NAME = re.compile(
    r"(scales?|scale_inv|scale_2|zero_points?|qweight|qzeros|g_idx|packed|blocks|absmax|quant_map|quant_state[\w.]*)$"
)


def check_fit(decoder: Decoder, targets: Mapping[str, Target | None], tensors: Mapping[str, TensorEntry]) -> None:
    """Raise unless the checkpoint's tensors feed the whole decoder, plainly.

    CheckpointError: tensors are missing or have shapes that the config does not describe (those that are converted on
    the way are checked by the conversion itself). UnsupportedModelError: weights are quantized, or a block's routing
    rests on expert numbers that are stored as data.
    """
    missing = _unfed(decoder, targets)
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks the tensors for {len(missing)} parameters that config.json describes, first "
            f"{missing[0]}. Complete the download."
        )
    if isinstance(decoder, Skeleton):
        _check_stored_numbers(decoder)
    parameters = decoder.model.state_dict()
    for name, target in targets.items():
        entry = tensors[name]
        if target is None:
            if _QUANTIZATION_NAME.search(name):
                raise _quantized(name, "belongs to quantized weights")
            continue
        parameter = parameters[target.name]
        if parameter.is_floating_point() and entry.dtype not in _FLOATS:
            raise _quantized(name, f"has the dtype {entry.dtype}")
        if target.pattern is None and tuple(parameter.shape) != entry.shape:
            raise CheckpointError(
                f"The checkpoint's {name} is {list(entry.shape)}, but config.json describes {target.name} as "
                f"{list(parameter.shape)}. Config and shards do not belong together; download both again."
            )


def _quantized(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The checkpoint is quantized: {name} {what}. Quantized weights cannot be streamed yet: prune the bfloat16 or "
        "float16 original and quantize the result."
    )


def _unfed(decoder: Decoder, targets: Mapping[str, Target | None]) -> list[str]:
    """Parameters and persistent buffers of decoder and head that no tensor feeds, tied ones taken together."""
    fed = {name for target in targets.values() if target is not None for name in (target.name, *target.also)}
    tied: dict[str, str] = getattr(decoder.model, "all_tied_weights_keys", None) or {}
    for one, other in tied.items():
        if one in fed or other in fed:
            fed |= {one, other}
    inside = decoder.layers_path.rpartition(".")[0] + "."
    head = _names_of_head(decoder.model)
    return [
        name for name in decoder.model.state_dict() if (name.startswith(inside) or name in head) and name not in fed
    ]


def _names_of_head(model: PreTrainedModel) -> set[str]:
    outputs = model.get_output_embeddings()
    owned = {id(parameter) for parameter in outputs.parameters()} if outputs is not None else set()
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in owned}


def _check_stored_numbers(skeleton: Skeleton) -> None:
    """Refuse tables of expert numbers beside the experts: renumbered experts would leave them pointing at others."""
    places = tuple(
        f"{skeleton.layers_path}.{block}.{path.removesuffix(path.rpartition('.')[2])}"
        for block, path in skeleton.experts.items()
    )
    for name, tensor in skeleton.model.state_dict().items():
        if not tensor.is_floating_point() and name.startswith(places):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: {name} holds whole numbers in a block with experts, as routers do "
                "that look their choice up in a table of expert numbers. Those cannot be pruned."
            )


def check_pruned(skeleton: Skeleton, pruned: PreTrainedModel, keep: int) -> None:
    """Raise UnsupportedModelError unless the model of the rewritten config has exactly the sliced shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    for name, rows in skeleton.expert_rows.items():
        shape = list(expected[name])
        shape[rows.axis] = rows.stride * keep + rows.tail
        expected[name] = tuple(shape)
    actual = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    differing = [name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)]
    if differing:
        name = min(differing)
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: with {keep} experts in its config, the model would have {name} as "
            f"{actual.get(name)}, but the pruned checkpoint would hold {expected.get(name)}."
        )
