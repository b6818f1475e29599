"""The JSON of a layout, which is kept with the scores: it describes tensors by patterns of their names. No torch.

    {"model.layers.{block}.mlp.gate.weight": [0, 1, 0],            experts along axis 0, 1 row each, 0 rows of no expert
     "model.layers.{block}.mlp.experts.{expert}.up_proj.weight": null,   one tensor for each expert
     "model.layers.{block}.input_layernorm.weight": null}          copied, with its layer

and in the same way where a single expert's channels are in it:

    {"model.layers.{block}.mlp.experts.{expert}.up_proj.weight": [0, 1, 1]}     along axis 0, once, 1 row each

Tensors of layers for multi-token prediction are listed under `mtp`. Those of their experts fit patterns with their own
layer's number in them, in `mtp_patterns` and `mtp_channels`. `mtp_form` says how such a layer is computed, where that
is known: then its experts can have scores of their own.

A tensor that fits no pattern lies outside the layers and is copied. If its name begins like those of a layer's tensors
(rotary frequencies, which no model reads), it must be listed under `outside`: otherwise a pattern is missing, and the
layout is refused.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Annotated, Any

import msgspec

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError
from streamprune.files.json_text import show
from streamprune.formats.base import ChannelRows, ExpertRows
from streamprune.models.config_json import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_WIDTH,
    SHARED_COUNT_NAME,
    ExpertSpec,
    WidthSpec,
)
from streamprune.models.expert_layout import EXPERT, LAYER, Cut, Layout, MtpForm
from streamprune.models.mtp import OF_EXPERTS, may_be_mtp

#: Numbers in a name that may be the layer's or the expert's; real names have three. A name with more fits no pattern.
_MOST_NUMBERS = 8

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Rows = tuple[_Size, _Size, _Size]


class _LayoutJson(msgspec.Struct):
    layer_count: Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)] = msgspec.field(name="blocks")
    expert_layers: Annotated[list[_Size], msgspec.Meta(min_length=1)] = msgspec.field(name="moe_blocks")
    count_names: list[str]
    dropped: list[str]
    outside: list[str]
    patterns: dict[str, _Rows | None]
    channels: dict[str, _Rows] = {}
    # Missing in scores of earlier versions, which dropped these tensors.
    mtp: list[str] = []
    mtp_problem: str = ""
    ignored: list[str] = []
    mtp_patterns: dict[str, _Rows | None] = {}
    mtp_channels: dict[str, _Rows] = {}
    # Missing in scores of versions that scored nothing in such layers.
    mtp_form: MtpForm | None = None
    mtp_unscored: str = ""


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


def layout_as_json(layout: Layout) -> dict[str, Any] | None:
    """The layout as JSON, without the spec; None if patterns cannot describe it."""
    patterns: dict[str, list[int] | None] = {}
    channels: dict[str, list[int]] = {}
    own = layout.without_mtp()
    for name, cut in own.cuts.items():
        if cut.layer is None:
            continue
        pattern = (cut.family or name).replace(f".{cut.layer}.", f".{LAYER}.", 1)
        rows = list(astuple(cut.rows)) if cut.rows else None
        if LAYER not in pattern or patterns.setdefault(pattern, rows) != rows:
            return None
        if cut.channels is not None:
            channels[pattern] = list(astuple(cut.channels))
    mtp = {cut.family or name: cut for name, cut in layout.mtp_experts.items()}
    found = {
        "blocks": layout.layer_count,
        "moe_blocks": list(layout.expert_layers),
        "count_names": list(layout.count_names),
        "dropped": list(layout.dropped),
        "outside": _doubtful(own.cuts, patterns),
        "patterns": patterns,
        "channels": channels,
        "width": asdict(layout.width) if layout.width is not None else None,
        "fixed_width": layout.fixed_width,
        "mtp": list(layout.mtp),
        "mtp_problem": layout.mtp_problem,
        "ignored": list(layout.ignored),
        "mtp_patterns": {name: list(astuple(cut.rows)) if cut.rows else None for name, cut in mtp.items()},
        "mtp_channels": {name: list(astuple(cut.channels)) for name, cut in mtp.items() if cut.channels is not None},
        **({"mtp_form": asdict(layout.mtp_form)} if layout.mtp_form is not None else {}),
        **({"mtp_unscored": layout.mtp_unscored} if layout.mtp_unscored else {}),
    }
    # A run that reads this builds no model: the patterns alone must give the same cuts.
    again = _all_cuts(msgspec.convert(found, _LayoutJson), [*layout.cuts, *layout.dropped, *layout.ignored])
    return found if again == layout.cuts else None


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
        mtp = [*found.dropped, *found.mtp]
        wrong = next((name for name in mtp if not may_be_mtp(name, found.layer_count)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is of no multi-token-prediction layer")
        beyond = [name for name in found.ignored if not may_be_mtp(name, found.layer_count)]
        _check_ignored(beyond, found.patterns, tensors, spec.count)
        cuts = _all_cuts(found, tensors)
        layout = Layout(
            spec, found.layer_count, tuple(found.expert_layers), tuple(found.count_names), tuple(found.dropped), cuts,
            width_spec, "" if width_spec is not None else fixed or _OLD_SCORES,
            tuple(name for name in found.mtp if name in cuts), found.mtp_problem, tuple(found.ignored),
            found.mtp_form, found.mtp_unscored,
        )  # fmt: skip
        _check(layout, tensors, layout.with_mtp(counts or dict.fromkeys(found.expert_layers, spec.count)))
        _check_channels(layout, tensors, width)
        odd = next((name for name in layout.mtp if OF_EXPERTS.search(name) and name not in layout.mtp_experts), None)
        if odd is not None:
            raise ValueError(f"nothing says where the experts of {odd} are")
        known = {*found.outside, *found.mtp}
        unlisted = [name for name in _doubtful(cuts, found.patterns) if name not in known]
        if unlisted:
            raise ValueError(f"nothing says where {unlisted[0]} belongs")
    except ValueError as error:
        raise CheckpointError(
            f"The tensors that the scores describe are not those of the checkpoint ({error}). Score the model again."
        ) from None
    return layout


def _check_ignored(
    ignored: Sequence[str], patterns: Mapping[str, Any], tensors: Mapping[str, TensorEntry], count: int
) -> None:
    """Raise ValueError unless what is left out lies in modules of single experts, and not all `count` experts have it:
    then it is nothing that a model needs."""
    modules = {pattern.rpartition(".")[0] for pattern in patterns if EXPERT in pattern}
    there = {*ignored, *tensors}
    for name in ignored:
        families = [family for family, pattern in _families(name) if pattern.rpartition(".")[0] in modules]
        if not families or all(
            family.replace(EXPERT, str(number)) in there for family in families for number in range(count)
        ):
            raise ValueError(f"{name} is of a layer, and no tensor that can be ignored")


def _families(name: str) -> Iterator[tuple[str, str]]:
    """What a tensor's family and pattern may be: its name without the number of an expert, and of a layer."""
    segments = name.split(".")
    numbers = [place for place, segment in enumerate(segments) if segment.isdecimal()][:_MOST_NUMBERS]
    for layer, expert in itertools.permutations(numbers, 2):
        family = [EXPERT if place == expert else segment for place, segment in enumerate(segments)]
        pattern = [LAYER if place == layer else segment for place, segment in enumerate(family)]
        yield ".".join(family), ".".join(pattern)


def _check(layout: Layout, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int]) -> None:
    """Raise ValueError unless the tensors hold exactly `counts` experts, by layer."""
    families: dict[tuple[str, int], set[int | None]] = defaultdict(set)
    found, mtp = set(), set(layout.mtp)
    for name, cut in layout.cuts.items():
        if cut.layer is not None and cut.layer >= layout.layer_count and name not in mtp:
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
    if missing or found != {*layout.expert_layers, *({layout.mtp_layer} - {None})}:
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


def _all_cuts(found: _LayoutJson, names: Iterable[str]) -> dict[str, Cut]:
    """The cut of every name that is not dropped, by the one pattern that fits it."""
    for pattern in found.patterns:
        segments = pattern.split(".")
        if segments.count(LAYER) != 1 or segments.count(EXPERT) > 1:
            raise ValueError("a pattern without one layer")
    left_out, mtp = {*found.dropped, *found.ignored}, set(found.mtp)
    return {
        name: _mtp_cut(found, name) if name in mtp else _cut(found.patterns, found.channels, name)
        for name in names
        if name not in left_out
    }


def _mtp_cut(found: _LayoutJson, name: str) -> Cut:
    """The cut of a tensor of a layer for multi-token prediction."""
    segments, layer = name.split("."), found.expert_layers[-1] if found.mtp_form is None else found.layer_count
    numbers = [place for place, segment in enumerate(segments) if segment.isdecimal()]
    for place in (None, *numbers[:_MOST_NUMBERS]):
        family = segments if place is None else [*segments[:place], EXPERT, *segments[place + 1 :]]
        pattern = ".".join(family)
        if pattern not in found.mtp_patterns:
            continue
        rows, channels = found.mtp_patterns[pattern], found.mtp_channels.get(pattern)
        within = ChannelRows(*channels) if channels is not None else None
        if place is not None:
            return Cut(layer, pattern, int(segments[place]), channels=within)
        return Cut(layer, rows=ExpertRows(*rows) if rows is not None else None, channels=within)
    return Cut(None)


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
