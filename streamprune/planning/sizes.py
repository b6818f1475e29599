"""What a model's weights take in every form in which they can be written: counted by the code that plans outputs.

No torch before a size is asked for: what is quantized of a model follows from its modules, so that it must be built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import SettingsError, StreampruneError, UnsupportedModelError
from streamprune.fit.estimate import Footprint
from streamprune.fit.footprint import read_model
from streamprune.fit.weights import CATEGORIES, WeightSizes, category_of
from streamprune.formats.pick import refuse_quantized
from streamprune.models.expert_layout import Layout
from streamprune.models.per_layer_experts import refuse_per_layer_experts
from streamprune.output.encoded import Encoding, encode_tensors
from streamprune.output.tensors import OutputTensor, output_tensors
from streamprune.planning.counts import refuse_new_values
from streamprune.quantize.schemes import SCHEMES
from streamprune.selection.widths import check_width
from streamprune.targets import PruningTarget, Storage

_NOT_NARROWER = "The experts of this model cannot be made narrower: {}."


@dataclass(frozen=True)
class PlainTensors:
    """The tensors of a model as they would be without quantization, each expert's apart, and how they are cut.

    `encoding` says which of them a scheme quantizes. `stored` are the formats of the source's experts, for people.
    """

    tensors: Mapping[str, TensorEntry] = field(repr=False)
    layout: Layout = field(repr=False)
    encoding: Encoding = field(repr=False)
    stored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Kind:
    """Tensors that are alike, of which one stands for all: how many there are, and their category.

    `per_expert`: each belongs to one expert.
    """

    tensors: int
    category: str
    per_expert: bool


class WrittenSizes:
    """The sizes of a model's weights in any form, found when they are first asked for (see `estimate.Forms`).

    One tensor of each kind is planned as the writer plans all, so that sizes are the written ones to the byte.
    """

    def __init__(self, load: Callable[[], PlainTensors]) -> None:
        """`load` gives the tensors. It may raise SettingsError, UnsupportedModelError and CheckpointError."""
        self._load = load
        self._known: dict[tuple[str, int | None], WeightSizes | StreampruneError] = {}

    @cached_property
    def _loaded(self) -> PlainTensors | StreampruneError:
        try:
            return self._load()
        except StreampruneError as error:
            return error

    @property
    def plain(self) -> PlainTensors:
        """The plain tensors. Raises what `load` raises."""
        if isinstance(self._loaded, StreampruneError):
            raise self._loaded
        return self._loaded

    def sizes(self, weights: str, width: int | None) -> WeightSizes:
        """The sizes in one of targets.WEIGHTS, with `width` channels per expert; see `estimate.Forms`."""
        if (weights, width) not in self._known:
            try:
                self._known[weights, width] = self._counted(weights, width)
            except StreampruneError as error:
                self._known[weights, width] = error
        found = self._known[weights, width]
        if isinstance(found, StreampruneError):
            raise found
        return found

    def _counted(self, weights: str, width: int | None) -> WeightSizes:
        layout = self.plain.layout
        if width is not None and layout.width is None:
            raise UnsupportedModelError(_NOT_NARROWER.format(layout.fixed_width))
        one, two = (self._planned(weights, width, keep) for keep in (1, 2))
        fixed, per_expert = (dict.fromkeys(CATEGORIES, 0.0) for _ in range(2))
        for name, kind in self._kinds.items():
            if kind.per_expert:
                per_expert[kind.category] += one[name] * kind.tensors / layout.spec.count
            else:
                # Of tensors that hold all experts, such as routers, the size grows evenly with their number.
                each = two[name] - one[name]
                per_expert[kind.category] += each * kind.tensors
                fixed[kind.category] += (one[name] - each) * kind.tensors
        return WeightSizes(fixed, per_expert, dict.fromkeys(CATEGORIES, 0.0), len(layout.expert_layers))

    def _planned(self, weights: str, width: int | None, keep: int) -> Counter[str]:
        """Bytes of the outputs of one tensor of each kind, by its name, with `keep` experts in every layer."""
        plain = self.plain
        few = replace(plain.layout, cuts={name: plain.layout.cuts[name] for name in self._kinds})
        tensors = output_tensors(few, plain.tensors, dict.fromkeys(few.expert_layers, keep), width)
        if weights in SCHEMES:
            encoding = replace(plain.encoding, weights=weights)
            scheme = encoding.scheme(tensors)
            if scheme.format.name in plain.stored:
                raise SettingsError(
                    f"The experts are stored as {scheme.format.name} already: --weights {weights} would change nothing."
                )
            tensors = encode_tensors(tensors, encoding, scheme)
        return _bytes_by_source(tensors)

    @cached_property
    def _kinds(self) -> dict[str, _Kind]:
        """The kinds of tensors, by the name of one of each; of those of single experts, the one of expert 0."""
        plain, numbers, mtp = self.plain, Counter[Any](), set(self.plain.layout.mtp)
        names: dict[Any, str] = {}
        for name, cut in plain.layout.cuts.items():
            entry, found = plain.tensors[name], plain.encoding.matrices
            category = category_of(name, cut.rows is not None or cut.expert is not None, cut.layer)
            category = "MTP" if name in mtp else category
            # (Of equal matrices, those that engines join with others may stay plain for the others' sake.)
            quantized = name in found.experts, name in found.others, name in found.split, found.rows.get(name)
            single = cut.expert is not None
            kind = category, single, entry.dtype, entry.shape, cut.rows, cut.channels, quantized
            numbers[kind] += 1
            if not cut.expert:
                names[kind] = name
        return {name: _Kind(numbers[kind], kind[0], kind[1]) for kind, name in names.items()}


def _bytes_by_source(tensors: list[OutputTensor]) -> Counter[str]:
    found = Counter[str]()
    for tensor in tensors:
        found[tensor.encoded.plain.name if tensor.encoded is not None else tensor.name] += tensor.nbytes
    return found


def read_forms(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    storage: Storage,
    width: int | None = None,
    before_loading: Callable[[], None] | None = None,
) -> Footprint:
    """The footprint of `model` as `fit.footprint` reads it, with its size in every form; `storage` says what schemes
    quantize.

    The model is built when the first of these sizes is asked for; `before_loading` is called before that imports torch.
    Raises UnsupportedModelError or SettingsError if its experts cannot have `width` channels.
    """
    read = read_model(model, revision, trust_remote_code, before_loading)

    def load() -> PlainTensors:
        refuse_per_layer_experts(read.raw, model)
        refuse_quantized(read.raw, read.folder)
        if before_loading is not None:
            before_loading()
        # Imported only here: it imports torch and transformers, which takes seconds.
        from streamprune.models.open import describe_model
        from streamprune.planning.written import plain_tensors

        described = read.described or describe_model(read.folder, read.raw, trust_remote_code)
        return plain_tensors(storage, described.raw, described.skeleton, read.tensors, read.footprint.weights)

    forms = WrittenSizes(load)
    if width is not None:
        refuse_new_values(read.raw, PruningTarget(width=width))
        spec = forms.plain.layout.width
        if spec is None:
            raise UnsupportedModelError(_NOT_NARROWER.format(forms.plain.layout.fixed_width))
        check_width(spec, width)
    return replace(read.footprint, forms=forms, config=read.raw)
