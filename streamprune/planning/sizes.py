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
from streamprune.fit.weights import CATEGORIES, WeightSizes, category_of
from streamprune.models.expert_layout import Layout
from streamprune.output.encoded import Encoding, encode_tensors
from streamprune.output.tensors import OutputTensor, output_tensors
from streamprune.quantize.schemes import SCHEMES

NOT_NARROWER = "The experts of this model cannot be made narrower: {}."


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
            raise UnsupportedModelError(NOT_NARROWER.format(layout.fixed_width))
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
