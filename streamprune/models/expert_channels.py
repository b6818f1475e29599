"""Where the channels of the experts are: the model is built once more, with experts of another width.

Channel j of an expert is row j of its gate and up projection, and column j of its down projection. Experts can be made
narrower if the config states their width, no other part of the model has that width too, and every activation depends
on the rows of its own channel alone. All three are found from the model's code, without a table of models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from streamprune.formats.base import ChannelRows, ExpertRows
from streamprune.models.config_json import EXPERT_WIDTH_NAMES, SHARED_COUNT_NAME, WidthSpec
from streamprune.models.skeleton import Skeleton, build_model, dispatches_experts

#: How the parameters of an experts module are named that transformers' experts interface runs.
_PROJECTIONS = {
    "gate_up_proj": "gate_up",
    "gate_up_proj_bias": "gate_up",
    "up_proj": "up",
    "up_proj_bias": "up",
    "down_proj": "down",
}
#: Channels of the small expert whose activation is tried out.
_TRIED = 4


class _FixedWidthError(Exception):
    """The experts cannot be made narrower; the text says why."""


def find_channels(
    config: PreTrainedConfig, skeleton: Skeleton, dtype: torch.dtype, trust_remote_code: bool = False
) -> Skeleton:
    """The skeleton with the width of its experts and where their channels are, or why they cannot be made narrower."""
    try:
        layouts = _projection_layouts(skeleton)
        width, channels = _find_width(config, skeleton, dtype, trust_remote_code)
        for name, rows in channels.items():
            layout = layouts[_PROJECTIONS[name.rpartition(".")[2]]]
            if rows.repeats != layout.repeats * layout.step:
                raise _FixedWidthError(f"{name} has {rows.repeats} rows for each channel")
            channels[name] = replace(layout, axis=rows.axis)
    except _FixedWidthError as problem:
        return replace(skeleton, fixed_width=str(problem))
    return replace(skeleton, width=width, channels=channels)


def with_width(config: PreTrainedConfig, spec: WidthSpec, width: int) -> PreTrainedConfig:
    """A copy of `config` that states `width` channels for each expert; shared experts keep theirs.

    `width` must be one that `spec.shared_with` allows.
    """
    changed = copy.deepcopy(config)
    part = _part_of(changed, spec.path)
    setattr(part, spec.names[0], width)
    if spec.shared:
        setattr(part, spec.shared, spec.shared_with(width))
    return changed


def _part_of(config: PreTrainedConfig, path: tuple[str, ...]) -> Any:
    part: Any = config
    for name in path:
        # The config of a model that was built from its text config alone has no such part.
        part = getattr(part, name, part)
    return part


def _projection_layouts(skeleton: Skeleton) -> dict[str, ChannelRows]:
    """How the channels lie in each projection of the experts; the axis is not known yet.

    Raises _FixedWidthError unless all experts modules have the interface and an activation that treats channels alike.
    """
    found: list[dict[str, ChannelRows]] = []
    for layer, path in skeleton.experts.items():
        module: Any = skeleton.layers[layer].get_submodule(path)
        if not dispatches_experts(module):
            raise _FixedWidthError(f"{type(module).__name__} has code of its own in place of the usual projections")
        apply: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if module.has_gate else module.act_fn
        layout = _activation_layout(type(module).__name__, apply, 2 if module.has_gate else 1)
        single = ChannelRows(0)
        found.append({"gate_up": layout, "up": layout, "down": single})
    if any(each != found[0] for each in found):
        raise _FixedWidthError("its layers have experts of different kinds")
    return found[0]


def _activation_layout(name: str, apply: Callable[[torch.Tensor], torch.Tensor], inputs: int) -> ChannelRows:
    """Which of an activation's inputs belong to each output, by changing one input after the other."""
    values = torch.linspace(0.1, 0.9, inputs * _TRIED).unsqueeze(0)
    touched = []
    try:
        with torch.no_grad():
            before = apply(values.clone())
            for place in range(values.shape[1]):
                changed = values.clone()
                changed[0, place] += 0.05
                touched.append((apply(changed) != before)[0].nonzero()[:, 0].tolist())
    except Exception as error:
        # Model code may raise anything on inputs that it was not written for.
        raise _FixedWidthError(f"the activation of {name} cannot be tried out ({error})") from None
    channels = [[channel] for channel in range(_TRIED)]
    if touched == channels * inputs:
        return ChannelRows(0, repeats=inputs)
    if touched == [channel for channel in channels for _ in range(inputs)]:
        return ChannelRows(0, step=inputs)
    raise _FixedWidthError(f"in {name} an activation depends on the rows of several channels")


def _find_width(
    config: PreTrainedConfig, skeleton: Skeleton, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[WidthSpec, dict[str, ChannelRows]]:
    """The width that the config states, and the axis of each parameter that changes with it.

    `repeats` of the result is the number of rows for each channel. Raises _FixedWidthError if there is none.
    """
    shapes = _shapes(skeleton.model)
    problem = "its config does not state their width under a usual name"
    for spec in _width_candidates(config, skeleton):
        # Half as wide, or with a single channel, which divides the width of shared experts too.
        width = spec.width // 2 if spec.width % 2 == 0 else 1
        try:
            other = _shapes(build_model(with_width(config, spec, width), dtype, trust_remote_code))
        except Exception as error:
            # Configs check their own values, and may raise anything.
            problem = f"with another {spec.names[0]} the model cannot be built ({error})"
            continue
        if shapes.keys() != other.keys():
            problem = f"with another {spec.names[0]} the model has other parameters"
            continue
        changed = [name for name in shapes if shapes[name] != other[name]]
        outside = [name for name in changed if not _is_projection(name, skeleton)]
        if outside and len(outside) < len(changed):
            problem = f"{spec.names[0]} is also the width of {outside[0]}"
        if changed and not outside:
            return spec, {name: _changed_axis(name, shapes[name], other[name], spec.width, width) for name in changed}
    raise _FixedWidthError(problem)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _width_candidates(config: PreTrainedConfig, skeleton: Skeleton) -> Iterator[WidthSpec]:
    """Every name under which the part of the config with the experts may state their width.

    First alone, then together with the number of shared experts, whose width some models state as a multiple of it.
    """
    path = skeleton.spec.path
    part = _part_of(config, path)
    aliases: dict[str, str] = dict(getattr(part, "attribute_map", {}) or {})
    names = [name for name in EXPERT_WIDTH_NAMES if type(getattr(part, name, None)) is int and getattr(part, name) > 1]
    shared = [name for name in vars(part) if SHARED_COUNT_NAME.match(name) and type(getattr(part, name)) is int]
    for name in dict.fromkeys(aliases.get(name, name) for name in names):
        known = (name, *(alias for alias, own in aliases.items() if own == name))
        spec = WidthSpec(path, known, getattr(part, name))
        yield spec
        yield from (
            replace(spec, shared=other, shared_count=getattr(part, other)) for other in shared if getattr(part, other)
        )


def _is_projection(name: str, skeleton: Skeleton) -> bool:
    """Whether a parameter is a projection of routed experts, with the experts along its first axis."""
    layer = skeleton.layer_of(name)
    if layer is None or skeleton.expert_rows.get(name) != ExpertRows(0, 1, 0):
        return False
    prefix = f"{skeleton.layers_path}.{layer}.{skeleton.experts[layer]}."
    return name.startswith(prefix) and name.removeprefix(prefix) in _PROJECTIONS


def _changed_axis(
    name: str, before: tuple[int, ...], after: tuple[int, ...], width: int, new_width: int
) -> ChannelRows:
    """The axis that changed with the width, without that of the experts, and its rows for each channel."""
    axes = [axis for axis, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    rows, rest = divmod(before[axes[0]], width) if axes else (0, 1)
    if len(before) != len(after) or len(axes) != 1 or rest or after[axes[0]] != rows * new_width or not axes[0]:
        raise _FixedWidthError(f"{name} {list(before)} becomes {list(after)} with {new_width} channels")
    return ChannelRows(axes[0] - 1, repeats=rows)
