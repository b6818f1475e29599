"""Where in a checkpoint the experts lie: all that has to be known of a model to prune it without building it.

Found once from the model's structure (`skeleton.survey`), and kept with the scores as JSON, so that a later run that
only writes needs neither torch nor transformers. The JSON describes tensors by patterns of their names:

    {"model.layers.{block}.mlp.gate.weight": [0, 1, 0],            experts along axis 0, 1 row each, 0 rows of no expert
     "model.layers.{block}.mlp.experts.{expert}.up_proj.weight": null,   one tensor for each expert
     "model.layers.{block}.input_layernorm.weight": null}          copied, with its layer

A tensor that fits no pattern lies outside the layers and is copied. Those of them that are named as if they were in a
layer (rotary frequencies, which no model reads) are listed, so that nothing is copied because a pattern is missing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import ExpertRows, StoredTensor
from streamprune.formats.plain import PLAIN
from streamprune.models.config_json import MOST_LAYERS, ExpertSpec

#: Stand for a layer's and an expert's number in a pattern.
LAYER, EXPERT = "{block}", "{expert}"


@dataclass(frozen=True)
class Cut:
    """What becomes of a checkpoint tensor when experts go. `layer` is None for what lies outside the decoder's layers.

    A tensor of one expert has that `expert`'s number, and as `family` its name with EXPERT in the number's place. One
    that holds all experts has `rows`. Any other is copied.
    """

    layer: int | None
    family: str | None = None
    expert: int | None = None
    rows: ExpertRows | None = None


@dataclass(frozen=True)
class Layout:
    """A model as pruning sees it: its routed experts, the layers that have some, and how each tensor can be cut.

    `count_names` are the keys under which its config may state the number of experts, beside the usual ones. `dropped`
    are the tensors of multi-token prediction (MTP), which are left out.
    """

    spec: ExpertSpec
    layer_count: int
    expert_layers: tuple[int, ...]
    count_names: tuple[str, ...]
    dropped: tuple[str, ...]
    cuts: Mapping[str, Cut] = field(repr=False)

    def as_json(self) -> dict[str, Any] | None:
        """The layout as JSON, less the spec; None where patterns cannot describe it."""
        patterns: dict[str, list[int] | None] = {}
        for name, cut in self.cuts.items():
            if cut.layer is None:
                continue
            pattern = _pattern(cut.family or name, cut.layer)
            rows = [cut.rows.axis, cut.rows.stride, cut.rows.tail] if cut.rows else None
            if pattern is None or patterns.setdefault(pattern, rows) != rows:
                return None
        found = {
            "blocks": self.layer_count,
            "moe_blocks": list(self.expert_layers),
            "count_names": list(self.count_names),
            "dropped": list(self.dropped),
            "outside": _doubtful(self.cuts, patterns),
            "patterns": patterns,
        }
        # Whoever reads it has nothing else to go by.
        return found if _cuts(patterns, [*self.cuts, *self.dropped], self.dropped) == self.cuts else None


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _LayoutJson(msgspec.Struct):
    layer_count: Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)] = msgspec.field(name="blocks")
    expert_layers: Annotated[list[_Size], msgspec.Meta(min_length=1)] = msgspec.field(name="moe_blocks")
    count_names: list[str]
    dropped: list[str]
    outside: list[str]
    patterns: dict[str, tuple[_Size, _Size, _Size] | None]


def layout_from_json(
    value: Any, spec: ExpertSpec, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int] | None = None
) -> Layout:
    """The layout that `as_json` described, for the checkpoint with these tensors: the source's, or those of an output.

    `counts` are the experts by layer of an output; None for the source, whose layers all have those of the spec.
    Raises CheckpointError where it is none, or does not go with the tensors: it may come from a stranger.
    """
    try:
        found = msgspec.convert(value, _LayoutJson)
        last = found.expert_layers[-1]
        if found.expert_layers != sorted(set(found.expert_layers)) or last >= found.layer_count:
            raise ValueError("its layers with experts are not ascending, or beyond the last layer")
        wrong = next((name for name in found.dropped if not may_be_mtp(name, found.layer_count)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is of no multi-token-prediction layer")
        cuts = _cuts(found.patterns, tensors, found.dropped)
        layout = Layout(
            spec, found.layer_count, tuple(found.expert_layers), tuple(found.count_names), tuple(found.dropped), cuts
        )
        _check(layout, tensors, counts or dict.fromkeys(found.expert_layers, spec.count))
        unlisted = [name for name in _doubtful(cuts, found.patterns) if name not in found.outside]
        if unlisted:
            raise ValueError(f"nothing says where {unlisted[0]} belongs")
    except ValueError as error:
        raise CheckpointError(
            f"What the scores say of the checkpoint's tensors does not go with it ({error}). Score the model again."
        ) from None
    return layout


def _check(layout: Layout, tensors: Mapping[str, TensorEntry], counts: Mapping[int, int]) -> None:
    families: dict[tuple[str, int], set[int | None]] = defaultdict(set)
    found = set()
    for name, cut in layout.cuts.items():
        if cut.layer is not None and cut.layer >= layout.layer_count:
            raise ValueError(f"{name} is of layer {cut.layer}, but there are {layout.layer_count}")
        # 0 for a tensor of experts where none should be.
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


def _doubtful(cuts: Mapping[str, Cut], patterns: Iterable[str]) -> list[str]:
    """Tensors outside the layers whose names begin as those of the layers do."""
    prefixes = tuple({pattern.partition(LAYER)[0] for pattern in patterns})
    return [name for name, cut in cuts.items() if cut.layer is None and name.startswith(prefixes)]


def _pattern(name: str, layer: int) -> str | None:
    segments = name.split(".")
    if str(layer) not in segments:
        return None
    segments[segments.index(str(layer))] = LAYER
    return ".".join(segments)


def _cuts(patterns: Mapping[str, Sequence[int] | None], names: Iterable[str], dropped: Sequence[str]) -> dict[str, Cut]:
    """The cut of every name that is not dropped, by the one pattern that fits it."""
    matchers: dict[str, list[tuple[re.Pattern[str], bool, ExpertRows | None]]] = defaultdict(list)
    for pattern, numbers in patterns.items():
        segments = pattern.split(".")
        if segments.count(LAYER) != 1 or segments.count(EXPERT) > 1:
            raise ValueError("a pattern without one layer")
        parts = [
            {LAYER: r"(?P<layer>\d+)", EXPERT: r"(?P<expert>\d+)"}.get(segment) or re.escape(segment)
            for segment in segments
        ]
        rows = ExpertRows(*numbers) if numbers is not None else None
        key = pattern.replace(LAYER, "0").replace(EXPERT, "0")
        matchers[_without_numbers(key)].append((re.compile(r"\.".join(parts)), EXPERT in pattern, rows))
    result = {}
    left_out = set(dropped)
    for name in names:
        if name in left_out:
            continue
        result[name] = Cut(None)
        for matcher, numbered, rows in matchers.get(_without_numbers(name), ()):
            match = matcher.fullmatch(name)
            if match is None:
                continue
            family = expert = None
            if numbered:
                expert = int(match["expert"])
                family = f"{name[: match.start('expert')]}{EXPERT}{name[match.end('expert') :]}"
            result[name] = Cut(int(match["layer"]), family, expert, rows)
    return result


def _without_numbers(name: str) -> str:
    """A name with every number in it replaced by one sign, so that few patterns have to be tried for each name."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


@dataclass(frozen=True)
class SourceRole:
    """What a checkpoint tensor is fed into. `parameter` is None where the model ignores the tensor.

    `rows` is the expert axis of the parameter that it feeds (not necessarily of the tensor itself); `pattern` is the
    conversion that leads there; `stored` says which part of a stored parameter it is, None if it is the plain one.
    """

    layer: int | None
    parameter: str | None
    pattern: str | None = None
    rows: ExpertRows | None = None
    stored: StoredTensor | None = None


def find_cuts(
    tensors: Mapping[str, TensorEntry],
    roles: Mapping[str, SourceRole],
    dropped: Iterable[str],
    counts: Mapping[int, int],
) -> dict[str, Cut]:
    """How every tensor but the `dropped` ones can be cut, in the source's order, in a model of `counts` experts, by
    layer.

    Raises CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced.
    """
    groups: dict[tuple[str, str | None, str], list[str]] = defaultdict(list)
    for name, role in roles.items():
        if role.parameter is not None and role.rows is not None:
            # The scales of all experts are a family of their own.
            groups[role.parameter, role.pattern, role.stored.part if role.stored else ""].append(name)
    numbered: dict[str, tuple[str, int]] = {}
    for (parameter, *_), names in groups.items():
        if len(names) > 1:
            family, ordered = _by_expert(parameter, names, _experts_in(roles[names[0]], counts))
            if len({(tensors[name].dtype, tensors[name].shape) for name in ordered}) > 1:
                raise UnsupportedModelError(f"The experts of {parameter} differ in shape or dtype in the checkpoint.")
            numbered.update({name: (family, expert) for expert, name in enumerate(ordered)})
    result, left_out = {}, set(dropped)
    for name, entry in tensors.items():
        role = roles[name]
        if name in left_out:
            continue
        if name in numbered:
            result[name] = Cut(role.layer, *numbered[name])
        elif role.rows is not None:
            count = _experts_in(role, counts)
            storage, part = (role.stored.format, role.stored.part) if role.stored else (PLAIN, "")
            result[name] = Cut(role.layer, rows=storage.expert_rows(entry, part, role.rows, count))
        else:
            result[name] = Cut(role.layer)
    return result


def _experts_in(role: SourceRole, counts: Mapping[int, int]) -> int:
    # Whatever depends on the number of experts lies in a layer.
    assert role.layer is not None
    return counts[role.layer]


def _by_expert(parameter: str, names: Sequence[str], count: int) -> tuple[str, list[str]]:
    """The names of one tensor per expert by the expert's number, the one segment in which they differ.

    Before them, the name that they share, with EXPERT in the number's place.
    """
    split = [name.split(".") for name in names]
    differing = [place for place in range(len(split[0])) if len({parts[place] for parts in split}) > 1]
    if len({len(parts) for parts in split}) == 1 and len(differing) == 1:
        numbers = {parts[differing[0]]: name for parts, name in zip(split, names, strict=True)}
        missing = [expert for expert in range(count) if str(expert) not in numbers]
        if not missing and len(numbers) == count:
            family = ".".join((*split[0][: differing[0]], EXPERT, *split[0][differing[0] + 1 :]))
            return family, [numbers[str(expert)] for expert in range(count)]
        if all(number.isdigit() for number in numbers):
            raise CheckpointError(
                f"The checkpoint has only {len(names)} of the {count} experts of {parameter}; the first missing one is "
                f"expert {missing[0]}. Complete the download."
                if missing
                else f"The checkpoint has {len(names)} experts of {parameter}, but config.json describes {count}. "
                "Config and shards do not belong together; download both again."
            )
    raise UnsupportedModelError(f"Cannot tell which expert is which among {names[0]}, {names[1]}, … for {parameter}.")


_MTP_SEGMENT = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
#: Tensors that only layers for multi-token prediction have.
MTP_ONLY = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def find_mtp_tensors(roles: Mapping[str, SourceRole], layer_count: int, mtp_layers: int) -> list[str]:
    """Of the tensors that the model ignores, those of its multi-token-prediction (MTP) layers.

    Checkpoints keep them under a name of their own, or as further decoder layers after the last one: as many as the
    config says (`mtp_layers`), or such as hold tensors that only MTP layers have. Raises CheckpointError for a further
    layer that is neither: it is one of the model's own, and the config is wrong.
    """
    matches = {name: _NUMBERED.match(name) for name in roles}
    lists = {match.group(1) for name, match in matches.items() if match and roles[name].layer is not None}
    found = set()
    further: dict[int, list[str]] = defaultdict(list)
    for name, role in roles.items():
        match = matches[name]
        if role.parameter is not None:
            continue
        if match is not None and match.group(1) in lists and int(match.group(2)) >= layer_count:
            further[int(match.group(2))].append(name)
        elif _MTP_SEGMENT.search(name):
            found.add(name)
    for number, names in further.items():
        if number >= layer_count + mtp_layers and not any(MTP_ONLY.search(name) for name in names):
            raise CheckpointError(
                f"The checkpoint has {names[0]}, but config.json describes only {layer_count} layers and {mtp_layers} "
                "multi-token-prediction layers. Config and shards do not belong together; download both again."
            )
        found.update(names)
    return [name for name in roles if name in found]


def may_be_mtp(name: str, layer_count: int) -> bool:
    """Whether a tensor of this name, which the model ignores, may be found by `find_mtp_tensors`."""
    match = _NUMBERED.match(name)
    return bool(_MTP_SEGMENT.search(name)) or (match is not None and int(match.group(2)) >= layer_count)
