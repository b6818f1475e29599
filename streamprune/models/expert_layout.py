"""Where the experts are in a checkpoint: all that is needed to prune a model without building it.

Found once from the model's structure (`skeleton.survey`), and kept with the scores (`layout_json`), so that a later run
that only writes needs neither torch nor transformers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import WAY_OUT, ChannelRows, ExpertRows, Format, StoredTensor
from streamprune.models.config_json import ExpertSpec, WidthSpec

#: Stand for a layer's and an expert's number in a pattern.
LAYER, EXPERT = "{block}", "{expert}"

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What a checkpoint tensor feeds: a parameter or buffer `name` of the model, None where the model ignores it.

    `stored` says which part of a stored parameter the tensor is; `pattern` is the source pattern of the conversion that
    leads to the parameter, if any. If the conversion splits the tensor, `also` names the other parameters that it
    feeds. `layer` is None outside the layers. `rows` is where the experts are in the parameter, not necessarily in the
    tensor itself; `channels` is where each expert's channels are in what the conversion gets, without the axis of the
    experts (None for a parameter without channels, or where the conversion may move them). `place` is the offset of
    the tensor in its parameter, in bytes of the dtype stored, if the conversion only joins tensors of one dtype to it.
    """

    stored: StoredTensor
    name: str | None = None
    pattern: str | None = None
    also: tuple[str, ...] = ()
    layer: int | None = None
    rows: ExpertRows | None = None
    channels: ChannelRows | None = None
    place: int | None = None


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
class MtpForm:
    """How a layer for multi-token prediction (MTP) is computed, by the names of its tensors: a decoder layer on

        projection · [embedding_norm(embedding of the next token); hidden_norm(the model's normed last hidden state)]

    `path` is the layer's, such as `model.layers.61` or `mtp.layers.0`; `like` is that of the layer of the model whose
    class it is: the last one with experts.
    """

    path: str
    like: str
    embedding_norm: str
    hidden_norm: str
    projection: str


@dataclass(frozen=True)
class Layout:
    """What pruning needs of a model: its routed experts, the layers that have some, and how each tensor can be cut.

    `count_names` are the keys under which its config may state the number of experts, in addition to the usual ones.
    `width` is None for experts that cannot be made narrower; `fixed_width` says why.

    `mtp` are the tensors of layers for multi-token prediction (MTP). Where it is known how their one layer is computed,
    `mtp_form` says it: its experts can be scored, and `cuts` counts them to a further layer, `mtp_layer`. Elsewhere
    they keep those numbers that the layer `mtp_source` keeps, and are counted to that; `mtp_unscored` says why (empty
    without experts). Either way they are as many as those of that layer. `dropped` are those tensors if they are left
    out instead; `mtp_problem` says why, unless that was wished. `ignored` are other tensors that are left out: of
    layers beyond those of the config, and of experts where the model does not use them and other experts lack them.
    """

    spec: ExpertSpec
    layer_count: int
    expert_layers: tuple[int, ...]
    count_names: tuple[str, ...]
    dropped: tuple[str, ...]
    cuts: Mapping[str, Cut] = field(repr=False)
    width: WidthSpec | None = None
    fixed_width: str = ""
    mtp: tuple[str, ...] = ()
    mtp_problem: str = ""
    ignored: tuple[str, ...] = ()
    mtp_form: MtpForm | None = None
    mtp_unscored: str = ""

    @property
    def mtp_source(self) -> int:
        """The layer that MTP layers follow, in number of experts or in the experts themselves: the last with some."""
        return self.expert_layers[-1]

    @property
    def mtp_layer(self) -> int | None:
        """The index of the MTP layer whose experts can be scored, behind all layers; None if there is none."""
        return self.layer_count if self.mtp_form is not None else None

    @property
    def written_layers(self) -> range:
        """The indices of all layers, that of the MTP layer included."""
        return range(self.layer_count + (self.mtp_form is not None))

    def with_mtp(self, by_layer: Mapping[int, T]) -> Mapping[int, T]:
        """What is given by layer, also for the MTP layer: unless it has its own, that of the layer `mtp_source`."""
        if self.mtp_layer is None or self.mtp_layer in by_layer or self.mtp_source not in by_layer:
            return by_layer
        return {**by_layer, self.mtp_layer: by_layer[self.mtp_source]}

    @cached_property
    def mtp_experts(self) -> Mapping[str, Cut]:
        """The cuts of the tensors of experts in MTP layers, routers included."""
        cuts = {name: self.cuts[name] for name in self.mtp}
        return {name: cut for name, cut in cuts.items() if cut.family is not None or cut.rows is not None}

    def without_mtp_scores(self, why: str) -> Layout:
        """The same with an MTP layer that follows the last layer with experts, for the reason `why`."""
        if self.mtp_form is None:
            return self
        own = {name: replace(cut, layer=self.mtp_source) for name, cut in self.mtp_experts.items()}
        return replace(self, cuts={**self.cuts, **own}, mtp_form=None, mtp_unscored=why)

    def without_mtp(self) -> Layout:
        """The same with all MTP layers dropped."""
        if not self.mtp:
            return self
        names = set(self.mtp)
        cuts = {name: cut for name, cut in self.cuts.items() if name not in names}
        return replace(self, cuts=cuts, mtp=(), dropped=(*self.dropped, *self.mtp), mtp_form=None)


def find_cuts(
    tensors: Mapping[str, TensorEntry],
    targets: Mapping[str, Target],
    dropped: Iterable[str],
    counts: Mapping[int, int],
    width: int | None = None,
) -> dict[str, Cut]:
    """How every tensor except the `dropped` ones can be cut, in the source's order. `counts` are the model's experts by
    layer, `width` the channels of each (None if they cannot be cut).

    A tensor that lies with an expert, that the model does not use, and that other experts lack has no cut. Raises
    CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced.
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
    result: dict[str, Cut] = {}
    left_out = set(dropped)
    unused = _unused_of_experts([name for name in targets if name not in left_out], targets, numbered, counts)
    for name, entry in tensors.items():
        target = targets[name]
        if name in left_out:
            continue
        if name in unused:
            cut = unused[name]
            result |= {name: cut} if cut is not None else {}
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


def _unused_of_experts(
    names: Iterable[str],
    targets: Mapping[str, Target],
    numbered: Mapping[str, tuple[str, int]],
    counts: Mapping[int, int],
) -> dict[str, Cut | None]:
    """The cuts of tensors that the model does not use, but that lie in the module of one expert, as some converters
    write biases of zeros: they stay or leave with their expert. None for those that some experts lack.

    `numbered` has the family and the number of the tensors of one expert.
    """
    modules = {
        name.rpartition(".")[0]: (family.rpartition(".")[0], expert, targets[name].layer)
        for name, (family, expert) in numbered.items()
    }
    cuts: dict[str, Cut] = {}
    found: dict[str | None, set[int | None]] = defaultdict(set)
    for name in names:
        path, _, leaf = name.rpartition(".")
        if targets[name].name is not None or path not in modules:
            continue
        family, expert, layer = modules[path]
        assert layer is not None
        cuts[name] = Cut(layer, f"{family}.{leaf}", expert)
        found[f"{family}.{leaf}"].add(expert)
    return {
        name: cut if cut.layer is not None and found[cut.family] == set(range(counts[cut.layer])) else None
        for name, cut in cuts.items()
    }


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
                    f"{storage.name}. {WAY_OUT}"
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
                f"expert {missing[0]}, {'.'.join((*before, str(missing[0]), *after))}. Complete the download."
                if missing
                else f"The checkpoint has {len(names)} experts of {parameter}, but config.json describes {count}. "
                "Config and shards do not belong together; download both again."
            )
    raise UnsupportedModelError(f"Cannot tell which expert is which among {names[0]}, {names[1]}, … for {parameter}.")
