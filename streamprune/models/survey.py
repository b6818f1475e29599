"""How the tensors of a checkpoint can be cut: by what each feeds in the model, or, in layers for multi-token prediction
(MTP), by what it would feed in the last layer with experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.formats.base import plain_shapes
from streamprune.formats.plain import PLAIN
from streamprune.models.config_json import mtp_layers
from streamprune.models.expert_layout import Cut, Layout, MtpForm, Target, find_cuts
from streamprune.models.mtp import OF_EXPERTS, by_mtp_layer, find_form, find_mtp_tensors, further_layers
from streamprune.models.skeleton import Skeleton, count_names, map_checkpoint


def survey(
    config: Mapping[str, Any],
    skeleton: Skeleton,
    tensors: Mapping[str, TensorEntry],
    targets: Mapping[str, Target] | None = None,
    counts: Mapping[int, int] | None = None,
) -> Layout:
    """How the tensors of a checkpoint with this raw config can be cut; `targets` if they have been mapped already.

    `counts` are the experts by layer; None where each has as many as the skeleton.
    Raises CheckpointError when experts are missing, UnsupportedModelError when a layout cannot be sliced. MTP layers
    whose experts cannot be found are dropped.
    """
    targets = targets or map_checkpoint(skeleton, tensors, config)
    beyond = find_mtp_tensors(targets, skeleton.layer_count)
    further = set(further_layers(beyond, skeleton.layer_count, mtp_layers(config)))
    mtp = [name for name in beyond if name not in further]
    counts = counts or dict.fromkeys(skeleton.experts, skeleton.spec.count)
    width, problem = skeleton.width, skeleton.fixed_width
    cuts = find_cuts(tensors, targets, beyond, counts, width.width if width is not None else None)
    unknown = [name for name, cut in cuts.items() if targets[name].name in skeleton.channels and cut.channels is None]
    if unknown:
        storage = targets[unknown[0]].stored.format
        problem = f"its checkpoint stores {unknown[0]} in a layout in which channels cannot be found"
        if storage is not PLAIN:
            problem = f"its checkpoint stores them as {storage.name}, where several channels share a scale or a byte"
        width = None
        cuts = {name: replace(cut, channels=None) for name, cut in cuts.items()}
    unused = next((name for name, cut in cuts.items() if cut.family is not None and targets[name].name is None), None)
    if unused is not None and width is not None:
        width, problem = None, f"its experts have tensors that the model does not use, such as {unused}"
        cuts = {name: replace(cut, channels=None) for name, cut in cuts.items()}
    names, cut_or_mtp = count_names(skeleton.model.config, skeleton.spec), {*cuts, *mtp}
    layout = Layout(skeleton.spec, skeleton.layer_count, tuple(skeleton.experts), names, (), cuts, width, problem)
    layout = replace(layout, ignored=tuple(name for name in tensors if name not in cut_or_mtp))
    if not mtp:
        return layout
    return _with_mtp(layout, mtp, _MtpExperts(config, skeleton, tensors, targets, counts[layout.mtp_source]))


def _with_mtp(layout: Layout, names: Sequence[str], experts: _MtpExperts) -> Layout:
    """The layout with the tensors `names` of MTP layers: with their cuts, or dropped where these cannot be found."""
    width = layout.width.width if layout.width is not None else None
    try:
        mtp = {
            name: cut
            for path, members in by_mtp_layer(names).items()
            for name, cut in experts.cuts(path, members, width)
        }
    except (CheckpointError, UnsupportedModelError) as error:
        return replace(layout, dropped=tuple(names), mtp_problem=str(error).partition(". ")[0].rstrip("."))
    form = experts.form(names) if mtp else ""
    if isinstance(form, MtpForm):
        mtp = {name: replace(cut, layer=layout.layer_count) for name, cut in mtp.items()}
        layout = replace(layout, mtp_form=form)
    else:
        layout = replace(layout, mtp_unscored=form)
    cuts = {**layout.cuts, **{name: mtp.get(name, Cut(None)) for name in names}}
    # In the source's order.
    order = [name for name in experts.tensors if name in cuts]
    return replace(layout, cuts={name: cuts[name] for name in order}, mtp=tuple(names))


class _MtpExperts:
    """Finds the experts of MTP layers, which are stored as a layer of the model stores its own."""

    def __init__(
        self,
        config: Mapping[str, Any],
        skeleton: Skeleton,
        tensors: Mapping[str, TensorEntry],
        targets: Mapping[str, Target],
        count: int,
    ) -> None:
        """`count` is the number of experts of the last layer with some, and of every MTP layer with some."""
        self.tensors, self._config, self._skeleton, self._count = tensors, config, skeleton, count
        self._layer = max(skeleton.experts)
        own = {name: target for name, target in targets.items() if target.layer == self._layer and target.rows}
        self._parameters = {target.name for target in own.values()}
        #: The path of the layer in the checkpoint, such as `model.layers.60`. (Of damaged files it may be missing.)
        self._path = next(iter(own), "").partition(f".{self._layer}.")[0] + f".{self._layer}"

    def cuts(self, path: str, names: Iterable[str], width: int | None) -> Iterable[tuple[str, Cut]]:
        """The cuts of the tensors of experts in the MTP layer at `path`, which has the tensors `names`.

        They keep what the last layer with experts keeps. `width` is the number of channels per expert, None if that
        cannot change. Raises CheckpointError and UnsupportedModelError if some are not found as in that layer.
        """
        entries = {name: self.tensors[name] for name in names}
        targets = mtp_targets(self._skeleton, entries, self._config, path, self._path)
        found = {
            name: cut
            for name, cut in find_cuts(entries, targets, (), {self._layer: self._count}, width).items()
            if cut.family is not None or cut.rows is not None
        }
        odd = next((name for name in entries if name not in found and OF_EXPERTS.search(name)), None)
        if odd is not None:
            raise UnsupportedModelError(f"{odd} is not stored as layer {self._layer} stores its experts")
        missing = self._parameters - {targets[name].name for name in found}
        if found and missing:
            raise UnsupportedModelError(f"{path} has experts, but nothing like {min(map(str, missing))}")
        channels = (name for name in found if targets[name].name in self._skeleton.channels)
        fixed = next((name for name in channels if width is not None and found[name].channels is None), None)
        if fixed is not None:
            raise UnsupportedModelError(f"{fixed} does not have the {width} channels per expert of the layers")
        return found.items()

    def form(self, names: Sequence[str]) -> MtpForm | str:
        """How the one MTP layer is computed, of all MTP tensors `names`; or why that is not known."""
        layers = by_mtp_layer(names)
        if len(layers) > 1:
            return f"there are {len(layers)} such layers, each of which needs what the one before it gives"
        if self._layer == 0:
            return "no layer is before the first, whose class it has"
        if final_norm(self._skeleton) is None:
            return "the model has no single norm behind its layers"
        [(path, members)] = layers.items()
        entries = {name: self.tensors[name] for name in members}
        targets = mtp_targets(self._skeleton, entries, self._config, path, self._path)
        own = f"{self._skeleton.layers_path}.{self._layer}."
        expected = {name: tuple(each.shape) for name, each in self._skeleton.model.state_dict().items()}
        fed = {each for target in targets.values() if target.name is not None for each in (target.name, *target.also)}
        missing = {name for name in expected if name.startswith(own)} - fed
        if missing:
            return f"it has nothing like {min(missing)}"
        stored = {name: target.stored for name, target in targets.items()}
        plain = plain_shapes({name: entry.shape for name, entry in entries.items()}, stored)
        for name, target in targets.items():
            if target.name is None or target.pattern is not None:
                continue
            if target.rows is None and plain[target.stored.parameter] != expected[target.name]:
                return f"{name} has another shape than in layer {self._layer}"
        rest = [name for name in names if name not in targets or targets[name].name is None]
        return find_form(path, self._path, rest, self.tensors)


def mtp_targets(
    skeleton: Skeleton, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], path: str, like: str
) -> dict[str, Target]:
    """What the tensors of the MTP layer at `path` would feed in the model's layer at `like`."""
    return map_checkpoint(skeleton, tensors, config, lambda name: like + name.removeprefix(path))


def final_norm(skeleton: Skeleton) -> str | None:
    """The path of the norm behind the layers: beside them the only module with one weight for each hidden value.

    None if there is none, or more than one.
    """
    decoder = skeleton.layers_path.rpartition(".")[0]
    width = skeleton.model.get_input_embeddings().weight.shape[1]
    found = [
        f"{decoder}.{name}".lstrip(".")
        for name, module in skeleton.model.get_submodule(decoder).named_children()
        if {key: tuple(each.shape) for key, each in module.named_parameters()} == {"weight": (width,)}
    ]
    return found[0] if len(found) == 1 else None
