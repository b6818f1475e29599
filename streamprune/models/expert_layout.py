"""Where the experts are in a checkpoint: all that is needed to prune a model without building it.

Found once from the model's structure (`skeleton.survey`), and kept with the scores as JSON, so that a later run that
only writes needs neither torch nor transformers. The JSON describes tensors by patterns of their names:

    {"model.layers.{block}.mlp.gate.weight": [0, 1, 0],            experts along axis 0, 1 row each, 0 rows of no expert
     "model.layers.{block}.mlp.experts.{expert}.up_proj.weight": null,   one tensor for each expert
     "model.layers.{block}.input_layernorm.weight": null}          copied, with its layer

and in the same way where a single expert's channels are in it:

    {"model.layers.{block}.mlp.experts.{expert}.up_proj.weight": [0, 1, 1]}     along axis 0, once, 1 row each

A tensor that fits no pattern lies outside the layers and is copied. If its name begins like those of a layer's tensors
(rotary frequencies, which no model reads), it must be listed under `outside`: otherwise a pattern is missing, and the
layout is refused.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Annotated, Any

import msgspec

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.files.json_text import show
from streamprune.formats.base import ChannelRows, ExpertRows, Format, StoredTensor
from streamprune.models.config_json import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_WIDTH,
    SHARED_COUNT_NAME,
    ExpertSpec,
    WidthSpec,
)

#: Stand for a layer's and an expert's number in a pattern.
LAYER, EXPERT = "{block}", "{expert}"
#: Numbers in a name that may be the layer's or the expert's; real names have three. A name with more fits no pattern.
_MOST_NUMBERS = 8


@dataclass(frozen=True)
class Target:
    """What a checkpoint tensor feeds: a parameter or buffer `name` of the model, None where the model ignores it.

    `stored` says which part of a stored parameter the tensor is; `pattern` is the source pattern of the conversion that
    leads to the parameter, if any. If the conversion splits the tensor, `also` names the other parameters that it
    feeds. `layer` is None outside the layers. `rows` is where the experts are in the parameter, not necessarily in the
    tensor itself; `channels` is where each expert's channels are in what the conversion gets, without the axis of the
    experts (None for a parameter without channels, or where the conversion may move them).
    """

    stored: StoredTensor
    name: str | None = None
    pattern: str | None = None
    also: tuple[str, ...] = ()
    layer: int | None = None
    rows: ExpertRows | None = None
    channels: ChannelRows | None = None


@dataclass(frozen=True)
class Cut:
    """How a checkpoint tensor changes when experts are removed. `layer` is None outside the decoder's layers.

    For a tensor of one expert, `expert` is the expert's number, and `family` the tensor's name with EXPERT in place of
    that number. For a tensor that holds all experts, `rows` says where they are. Any other tensor is copied. `channels`
    says where the channels are in the tensor of one expert, without the axis of the experts.
    """

    layer: int | None
    family: str | None = None
    expert: int | None = None
    rows: ExpertRows | None = None
    channels: ChannelRows | None = None


@dataclass(frozen=True)
class Layout:
    """What pruning needs of a model: its routed experts, the layers that have some, and how each tensor can be cut.

    `count_names` are the keys under which its config may state the number of experts, in addition to the usual ones.
    `dropped` are the tensors of multi-token prediction (MTP), which are left out. `width` is None for experts that
    cannot be made narrower; `fixed_width` says why.
    """

    spec: ExpertSpec
    layer_count: int
    expert_layers: tuple[int, ...]
    count_names: tuple[str, ...]
    dropped: tuple[str, ...]
    cuts: Mapping[str, Cut] = field(repr=False)
    width: WidthSpec | None = None
    fixed_width: str = ""

    def as_json(self) -> dict[str, Any] | None:
        """The layout as JSON, without the spec; None if patterns cannot describe it."""
        patterns: dict[str, list[int] | None] = {}
        channels: dict[str, list[int]] = {}
        for name, cut in self.cuts.items():
            if cut.layer is None:
                continue
            pattern = (cut.family or name).replace(f".{cut.layer}.", f".{LAYER}.", 1)
            rows = list(astuple(cut.rows)) if cut.rows else None
            if LAYER not in pattern or patterns.setdefault(pattern, rows) != rows:
                return None
            if cut.channels is not None:
                channels[pattern] = list(astuple(cut.channels))
        found = {
            "blocks": self.layer_count,
            "moe_blocks": list(self.expert_layers),
            "count_names": list(self.count_names),
            "dropped": list(self.dropped),
            "outside": _doubtful(self.cuts, patterns),
            "patterns": patterns,
            "channels": channels,
            "width": asdict(self.width) if self.width is not None else None,
            "fixed_width": self.fixed_width,
        }
        # A run that reads this builds no model: the patterns alone must give the same cuts.
        return found if _cuts(patterns, channels, [*self.cuts, *self.dropped], self.dropped) == self.cuts else None


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _LayoutJson(msgspec.Struct):
    layer_count: Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)] = msgspec.field(name="blocks")
    expert_layers: Annotated[list[_Size], msgspec.Meta(min_length=1)] = msgspec.field(name="moe_blocks")
    count_names: list[str]
    dropped: list[str]
    outside: list[str]
    patterns: dict[str, tuple[_Size, _Size, _Size] | None]
    channels: dict[str, tuple[_Size, _Size, _Size]] = {}


#: Why a width cannot be changed by scores of formats 1 and 2.
_OLD_SCORES = "its scores were made by an earlier version; score the model again"


class _WidthJson(msgspec.Struct):
    width: WidthSpec | None = None
    fixed_width: str = ""

    def __post_init__(self) -> None:
        spec = self.width
        if spec is None:
            return
        named = spec.names and all(name.isidentifier() and name.endswith("_size") for name in spec.names)
        shared = not spec.shared or (SHARED_COUNT_NAME.match(spec.shared) and 0 < spec.shared_count <= MOST_EXPERTS)
        if not named or not shared or not 1 < spec.width <= MOST_WIDTH:
            raise ValueError(f"no width of experts: {show(asdict(spec))}")


def width_from_json(value: Any) -> tuple[WidthSpec | None, str]:
    """The width of the experts from the JSON of `as_json`; None with the reason where they cannot be made narrower.

    The reason is empty in JSON of an earlier version. Raises ValueError for anything else: the JSON may be untrusted.
    """
    found = msgspec.convert(value, _WidthJson)
    return found.width, found.fixed_width


def layout_from_json(
    value: Any,
    spec: ExpertSpec,
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int] | None = None,
    width: int | None = None,
) -> Layout:
    """The layout from the JSON of `as_json`, for the checkpoint with these tensors: the source's, or an output's.

    `counts` are the experts by layer of an output; None for the source, whose layers all have those of the spec.
    `width` are the channels of an output's experts; None if they have as many as the source's.
    Raises CheckpointError for anything else, or a layout of other tensors: the JSON may be untrusted.
    """
    try:
        found, (width_spec, fixed) = msgspec.convert(value, _LayoutJson), width_from_json(value)
        last = found.expert_layers[-1]
        if found.expert_layers != sorted(set(found.expert_layers)) or last >= found.layer_count:
            raise ValueError("its layers with experts are not ascending, or beyond the last layer")
        wrong = next((name for name in found.dropped if not may_be_mtp(name, found.layer_count)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is of no multi-token-prediction layer")
        cuts = _cuts(found.patterns, found.channels, tensors, found.dropped)
        layout = Layout(
            spec, found.layer_count, tuple(found.expert_layers), tuple(found.count_names), tuple(found.dropped), cuts,
            width_spec, "" if width_spec is not None else fixed or _OLD_SCORES,
        )  # fmt: skip
        _check(layout, tensors, counts or dict.fromkeys(found.expert_layers, spec.count))
        _check_channels(layout, tensors, width)
        unlisted = [name for name in _doubtful(cuts, found.patterns) if name not in found.outside]
        if unlisted:
            raise ValueError(f"nothing says where {unlisted[0]} belongs")
    except ValueError as error:
        raise CheckpointError(
            f"The tensors that the scores describe are not those of the checkpoint ({error}). Score the model again."
        ) from None
    return layout


def _check(layout: Layout, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int]) -> None:
    """Raise ValueError unless the tensors hold exactly `counts` experts, by layer."""
    families: dict[tuple[str, int], set[int | None]] = defaultdict(set)
    found = set()
    for name, cut in layout.cuts.items():
        if cut.layer is not None and cut.layer >= layout.layer_count:
            raise ValueError(f"{name} is of layer {cut.layer}, but there are {layout.layer_count}")
        # With 0 for a layer that should have no experts, a tensor of experts in it is refused below.
        count = counts.get(cut.layer, 0) if cut.layer is not None else 0
        if cut.family is not None:
            families[cut.family, count].add(cut.expert)
        if cut.rows is not None:
            shape, axis = tensors[name].shape, cut.rows.axis
            if axis >= len(shape) or shape[axis] != cut.rows.size(count):
                raise ValueError(f"{name} has no {count} experts along axis {axis}")
        if cut.family is not None or cut.rows is not None:
            found.add(cut.layer)
    missing = any(numbers != set(range(count)) for (_, count), numbers in families.items())
    if missing or found != set(layout.expert_layers):
        raise ValueError("experts are missing")


def _check_channels(layout: Layout, tensors: Mapping[str, TensorEntry], width: int | None) -> None:
    """Raise ValueError unless the tensors hold as many channels per expert as the layout or `width` says."""
    for name, cut in layout.cuts.items():
        if cut.channels is None:
            # The matrices of experts; a router has one row for each of them.
            axes = len(tensors[name].shape) - (cut.rows is not None)
            if layout.width is not None and axes > 1 and (cut.family is not None or cut.rows is not None):
                raise ValueError(f"nothing says where the channels of {name} are")
            continue
        rows, of_experts = cut.channels, tensors[name].shape[cut.rows is not None :]
        wanted = width if width is not None else layout.width.width if layout.width is not None else 0
        whole = cut.rows is None or (cut.rows.axis, cut.rows.stride, cut.rows.tail) == (0, 1, 0)
        length = of_experts[rows.axis] if rows.axis < len(of_experts) else 0
        if not whole or not wanted or length != rows.repeats * rows.step * wanted:
            raise ValueError(f"{name} has no {wanted} channels for each expert")


def _doubtful(cuts: Mapping[str, Cut], patterns: Iterable[str]) -> list[str]:
    """Tensors outside the layers whose names begin as those of the layers do."""
    prefixes = tuple({pattern.partition(LAYER)[0] for pattern in patterns})
    return [name for name, cut in cuts.items() if cut.layer is None and name.startswith(prefixes)]


def _cuts(
    patterns: Mapping[str, Sequence[int] | None],
    channels: Mapping[str, Sequence[int]],
    names: Iterable[str],
    dropped: Sequence[str],
) -> dict[str, Cut]:
    """The cut of every name that is not dropped, by the one pattern that fits it."""
    for pattern in patterns:
        segments = pattern.split(".")
        if segments.count(LAYER) != 1 or segments.count(EXPERT) > 1:
            raise ValueError("a pattern without one layer")
    left_out = set(dropped)
    return {name: _cut(patterns, channels, name) for name in names if name not in left_out}


def _cut(patterns: Mapping[str, Sequence[int] | None], channels: Mapping[str, Sequence[int]], name: str) -> Cut:
    segments = name.split(".")
    numbers = [place for place, segment in enumerate(segments) if segment.isdecimal()]
    if len(numbers) > _MOST_NUMBERS:
        return Cut(None)
    for layer, expert in itertools.product(numbers, (None, *numbers)):
        family = segments.copy()
        if expert is not None:
            family[expert] = EXPERT
        pattern = family.copy()
        pattern[layer] = LAYER
        rows = patterns.get(".".join(pattern), ())
        if rows == ():
            continue
        found = channels.get(".".join(pattern))
        within = ChannelRows(*found) if found is not None else None
        if expert is not None:
            return Cut(int(segments[layer]), ".".join(family), int(segments[expert]), channels=within)
        return Cut(int(segments[layer]), rows=ExpertRows(*rows) if rows is not None else None, channels=within)
    return Cut(None)


def find_cuts(
    tensors: Mapping[str, TensorEntry],
    targets: Mapping[str, Target],
    dropped: Iterable[str],
    counts: Mapping[int, int],
    width: int | None = None,
) -> dict[str, Cut]:
    """How every tensor except the `dropped` ones can be cut, in the source's order. `counts` are the model's experts by
    layer, `width` the channels of each (None if they cannot be cut).

    Raises CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced.
    """
    groups: dict[tuple[str | None, str | None, str], list[str]] = defaultdict(list)
    for name, target in targets.items():
        if target.rows is not None:
            # Also by part: the experts' values are one family, their scales another.
            groups[target.name, target.pattern, target.stored.part].append(name)
    numbered: dict[str, tuple[str, int]] = {}
    _check_alike(targets, groups)
    for (parameter, *_), names in groups.items():
        if len(names) > 1:
            family, ordered = _by_expert(str(parameter), names, _experts_in(targets[names[0]], counts))
            if len({(tensors[name].dtype, tensors[name].shape) for name in ordered}) > 1:
                raise UnsupportedModelError(f"The experts of {parameter} differ in shape or dtype in the checkpoint.")
            numbered |= {name: (family, expert) for expert, name in enumerate(ordered)}
    result, left_out = {}, set(dropped)
    for name, entry in tensors.items():
        target = targets[name]
        if name in left_out:
            continue
        rows, stored = target.rows, target.stored
        if rows is not None and name not in numbered:
            rows = stored.format.expert_rows(entry, stored.part, rows, _experts_in(target, counts))
        channels = None
        if width is not None and target.channels is not None:
            shape = entry.shape if name in numbered else entry.shape[1:]
            channels = stored.format.channel_rows(shape, stored.part, target.channels, width)
        if name in numbered:
            result[name] = Cut(target.layer, *numbered[name], channels=channels)
        else:
            result[name] = Cut(target.layer, rows=rows, channels=channels)
    return result


def _check_alike(
    targets: Mapping[str, Target], groups: Mapping[tuple[str | None, str | None, str], Sequence[str]]
) -> None:
    """Raise UnsupportedModelError if some experts of a parameter are quantized, and others not or in another way.

    `groups` are the tensors by parameter, pattern and part. Cut, their tensors would differ by which experts stay.
    """
    firsts: dict[tuple[str | None, str | None], tuple[str, Format]] = {}
    for (parameter, pattern, _), names in groups.items():
        for name in names:
            storage = targets[name].stored.format
            first, other = firsts.setdefault((parameter, pattern), (name, storage))
            if storage != other:
                raise UnsupportedModelError(
                    f"The experts of {parameter} are not stored alike: {first} as {other.name}, {name} as "
                    f"{storage.name}. Prune the bfloat16 or float16 original instead, and quantize the result."
                )


def _experts_in(target: Target, counts: Mapping[int, int]) -> int:
    # Whatever depends on the number of experts lies in a layer.
    assert target.layer is not None
    return counts[target.layer]


def _by_expert(parameter: str, names: Sequence[str], count: int) -> tuple[str, list[str]]:
    """The family of tensors that hold one expert each, and their names in the order of the experts.

    The names differ in a single segment, the expert's number. The family is the name with EXPERT in that place.
    """
    split = [name.split(".") for name in names]
    differing = [place for place, values in enumerate(zip(*split, strict=False)) if len(set(values)) > 1]
    if len({len(parts) for parts in split}) == 1 and len(differing) == 1:
        before, after = split[0][: differing[0]], split[0][differing[0] + 1 :]
        numbers = {parts[differing[0]]: name for parts, name in zip(split, names, strict=True)}
        missing = [expert for expert in range(count) if str(expert) not in numbers]
        if not missing and len(numbers) == count:
            return ".".join((*before, EXPERT, *after)), [numbers[str(expert)] for expert in range(count)]
        if all(number.isdigit() for number in numbers):
            raise CheckpointError(
                f"The checkpoint has only {len(names)} of the {count} experts of {parameter}; the first missing one is "
                f"expert {missing[0]}. Complete the download."
                if missing
                else f"The checkpoint has {len(names)} experts of {parameter}, but config.json describes {count}. "
                "Config and shards do not belong together; download both again."
            )
    raise UnsupportedModelError(f"Cannot tell which expert is which among {names[0]}, {names[1]}, … for {parameter}.")


MTP_NAME = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
#: Tensors that only layers for multi-token prediction have.
MTP_ONLY = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def find_mtp_tensors(targets: Mapping[str, Target], layer_count: int, mtp_layers: int) -> list[str]:
    """Of the tensors that the model ignores, those of its multi-token-prediction (MTP) layers.

    Checkpoints name them `mtp` or `nextn`, or number them as further decoder layers: as many as the config says
    (`mtp_layers`), or layers with tensors that only MTP layers have. Raises CheckpointError for any other further
    layer: it is one of the model's own, and the config is wrong.
    """
    matches = {name: _NUMBERED.match(name) for name in targets}
    lists = {match.group(1) for name, match in matches.items() if match and targets[name].layer is not None}
    found = set()
    further: dict[int, list[str]] = defaultdict(list)
    for name, match in matches.items():
        if targets[name].name is not None:
            continue
        if match is not None and match.group(1) in lists and int(match.group(2)) >= layer_count:
            further[int(match.group(2))].append(name)
        elif MTP_NAME.search(name):
            found.add(name)
    for number, names in further.items():
        if number >= layer_count + mtp_layers and not any(MTP_ONLY.search(name) for name in names):
            raise CheckpointError(
                f"The checkpoint has {names[0]}, but config.json describes only {layer_count} layers and {mtp_layers} "
                "multi-token-prediction layers. Config and shards do not belong together; download both again."
            )
        found.update(names)
    return [name for name in targets if name in found]


def may_be_mtp(name: str, layer_count: int) -> bool:
    """Whether a tensor of this name, which the model ignores, may be found by `find_mtp_tensors`."""
    match = _NUMBERED.match(name)
    return bool(MTP_NAME.search(name)) or (match is not None and int(match.group(2)) >= layer_count)
