"""Where tensors of a checkpoint lie in a parameter that transformers' conversion only joins from them.

Most checkpoints have the projections of each expert as tensors of their own, which the conversion stacks and
concatenates to one parameter for all experts. Read to their places in it, they need no conversion, except to the
dtype in which they are computed, where they are stored in another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, dot_natural_key

from streamprune.checkpoint.reader import DTYPES
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.formats.plain import PLAIN
from streamprune.models.expert_layout import Target


def find_places(
    targets: Mapping[str, Target],
    tensors: Mapping[str, TensorEntry],
    parameters: Mapping[str, torch.Tensor],
    converters: Mapping[str, WeightConverter],
) -> dict[str, dict[str, int]]:
    """By parameter the places in it, offsets in bytes, of the tensors of which the conversion only joins it.

    The bytes are those of the stored dtype, whatever dtype the parameter has. `converters` are by source pattern.
    Left out are other parameters, quantized ones, those stored in several dtypes, and those that the checkpoint has
    joined as well: it is up to transformers which of the two is taken.
    """
    fed = Counter(target.name for target in targets.values())
    groups: dict[str, dict[str, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(targets, key=dot_natural_key):  # transformers' order of the experts
        target = targets[name]
        if target.name is not None and target.pattern is not None and target.stored.format is PLAIN:
            groups[target.name][target.pattern].append(tensors[name])
    found = {}
    for parameter, parts in groups.items():
        places = _places(parameters[parameter], converters[next(iter(parts))], parts)
        if places and len(places) == fed[parameter]:
            found[parameter] = places
    return found


def _places(
    parameter: torch.Tensor, converter: WeightConverter, parts: Mapping[str, Sequence[TensorEntry]]
) -> dict[str, int]:
    """The place of each tensor in `parameter` (E, rows, ...); empty if `converter` does anything but join the `parts`.

    These are its tensors by the source pattern that each matches, those of one pattern in the order of the experts. An
    expert's projections lie behind each other in the order of the patterns.
    """
    stacks = [parts.get(pattern, ()) for pattern in converter.source_patterns]
    if not _only_joins(converter) or any(len(stack) != len(parameter) for stack in stacks):
        return {}
    dtypes = {DTYPES.get(entry.dtype) for stack in stacks for entry in stack}
    shapes = [{entry.shape for entry in stack} for stack in stacks]
    if len(dtypes) > 1 or None in dtypes or any(len(each) > 1 or () in each for each in shapes):
        return {}
    rows = sum(shape[0] for (shape,) in shapes)
    if any((rows, *shape[1:]) != parameter.shape[1:] for (shape,) in shapes):
        return {}
    places, end = {}, 0
    for projections in zip(*stacks, strict=True):
        for entry in projections:
            places[entry.name], end = end, end + entry.nbytes
    return places


def _only_joins(converter: WeightConverter) -> bool:
    """Whether a conversion stacks the experts of each projection, and then joins the projections if there are several.

    (One for which transformers wants the CPU's memory is left to it.)
    """
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    stack, join = (MergeModulelist, 0), (Concatenate, 1)
    wanted = [stack] if len(converter.source_patterns) == 1 else [stack, join]
    return steps == wanted and len(converter.target_patterns) == 1 and not converter.force_cpu
