"""Whether a checkpoint and a config belong together, and the config of an output with what is sliced for it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import transformers
from transformers import PreTrainedModel

from streamprune.checkpoint.index import Checkpoint
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import plain_shapes
from streamprune.formats.pick import check_stated, refuse_unread
from streamprune.models.expert_layout import Target
from streamprune.models.skeleton import Decoder, Skeleton


def check_fit(
    decoder: Decoder,
    targets: Mapping[str, Target],
    checkpoint: Checkpoint,
    counts: Mapping[int, int] | None = None,
) -> None:
    """Raise unless the checkpoint's tensors feed the whole decoder, in a format that is read.

    `counts` are the experts by layer of the checkpoint; None where they are the decoder's own.
    CheckpointError: tensors are missing or have shapes that the config does not describe (those that are converted on
    the way are checked by the conversion itself). UnsupportedModelError: weights are quantized, or a layer's routing
    rests on expert numbers that are stored as data.
    """
    tensors = checkpoint.tensors
    missing = _unfed(decoder, targets)
    if missing:
        _refuse_experts_apart(decoder, targets, missing[0])
        lacks = f"The checkpoint lacks the tensors for {len(missing)} parameters that config.json describes, first "
        raise CheckpointError(" ".join((f"{lacks}{missing[0]}. Complete the download.", *checkpoint.notes)))
    if isinstance(decoder, Skeleton):
        _check_stored_numbers(decoder)
    parameters = decoder.model.state_dict()
    stored = {name: target.stored for name, target in targets.items()}
    plain = plain_shapes({name: entry.shape for name, entry in tensors.items()}, stored)
    fed = {target.stored.parameter for target in targets.values() if target.name is not None}
    used = fed | {name.rpartition(".")[0] for name in fed}
    for name, target in targets.items():
        parameter = parameters[target.name] if target.name is not None else None
        floats = parameter.is_floating_point() if parameter is not None else None
        refuse_unread(tensors[name], target.stored, floats, used)
        if parameter is None or target.pattern is not None:
            continue
        shape, rows = tuple(parameter.shape), target.rows
        if rows is not None and counts is not None and target.layer is not None:
            shape = rows.resized(shape, counts[target.layer])
        found = plain[target.stored.parameter]
        if found != shape:
            raise CheckpointError(
                f"The checkpoint's {target.stored.parameter} is {list(found)}, but config.json describes {target.name} "
                f"as {list(shape)}. Config and shards do not belong together; download both again."
            )
    used_tensors = [target.stored for target in targets.values() if target.name is not None]
    check_stated(checkpoint.config, used_tensors, stored.values(), checkpoint.folder)


def _unfed(decoder: Decoder, targets: Mapping[str, Target]) -> list[str]:
    """Parameters and persistent buffers of decoder and head that no tensor feeds, tied ones taken together."""
    fed = {name for target in targets.values() for name in (target.name, *target.also)}
    tied: dict[str, str] = getattr(decoder.model, "all_tied_weights_keys", None) or {}
    for one, other in tied.items():
        if one in fed or other in fed:
            fed |= {one, other}
    inside = decoder.layers_path.rpartition(".")[0] + "."
    outputs = decoder.model.get_output_embeddings()
    head = {id(parameter) for parameter in outputs.parameters()} if outputs is not None else set()
    return [
        name
        for name, tensor in decoder.model.state_dict(keep_vars=True).items()
        if (name.startswith(inside) or id(tensor) in head) and name not in fed
    ]


def _refuse_experts_apart(decoder: Decoder, targets: Mapping[str, Target], missing: str) -> None:
    """Raise UnsupportedModelError if a `missing` parameter of all experts is there in another form: one tensor each.

    Programs that quantize Llama 4, gpt-oss or Qwen3-VL divide the tensors of their experts, and transformers does not
    join them again.
    """
    layer, parts = decoder.layer_of(missing), missing.split(".")
    numbered = re.compile(rf"\.{layer}\.(.+\.)?experts\.\d+\.")
    apart = next((name for name, each in targets.items() if each.name is None and numbered.search(name)), None)
    if "experts" in parts and apart is not None:
        raise UnsupportedModelError(
            f"The checkpoint has the tensors of every expert apart ({apart}), but transformers "
            f"{transformers.__version__} reads those of {type(decoder.model).__name__} only where one tensor has all "
            f"experts ({missing}). Prune the original, from which this one was made."
        )


def _check_stored_numbers(skeleton: Skeleton) -> None:
    """Refuse models with integer tensors in an MoE block: they may be expert indices, which pruning makes wrong."""
    # The prefixes of the modules that contain the experts modules (`model.layers.3.mlp.`).
    blocks = tuple(
        f"{skeleton.layers_path}.{layer}.{path.removesuffix(path.rpartition('.')[2])}"
        for layer, path in skeleton.experts.items()
    )
    for name, tensor in skeleton.model.state_dict().items():
        if not tensor.is_floating_point() and name.startswith(blocks):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: {name} holds whole numbers in a layer with experts, as routers do "
                "that look their choice up in a table of expert numbers. Those cannot be pruned."
            )


def check_pruned(skeleton: Skeleton, pruned: PreTrainedModel, keep: int, width: int | None = None) -> None:
    """Raise UnsupportedModelError unless the model of the rewritten config has exactly the sliced shapes.

    It has `keep` experts per layer, with `width` channels each (None: as many as before).
    """
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    for name, rows in skeleton.expert_rows.items():
        expected[name] = rows.resized(expected[name], keep)
    if width is not None and skeleton.width is not None:
        for name, channels in skeleton.channels.items():
            of_expert = channels.resized(expected[name][1:], skeleton.width.width, width)
            expected[name] = (expected[name][0], *of_expert)
    actual = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    differing = [name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)]
    if differing:
        name = min(differing)
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: with {keep} experts{f' of {width} channels' if width else ''} in its "
            f"config, the model would have {name} as "
            f"{actual.get(name)}, but the pruned checkpoint would hold {expected.get(name)}."
        )
