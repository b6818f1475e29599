"""Quantizing what is written: every plain matrix that is chosen for it becomes the parts of a scheme.

Rounded to nearest, the parts are a function of the plain bytes: they are made while they are written, and made again to
verify them. Needs torch only when bytes are encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import SettingsError
from streamprune.formats.fp8 import Fp8
from streamprune.models.expert_layout import Cut, Layout
from streamprune.output.tensors import EncodedPart, OutputTensor
from streamprune.quantize.schemes import Scheme, scheme_of
from streamprune.targets import Storage

if TYPE_CHECKING:
    from streamprune.models.linear_weights import LinearWeights

#: In the name of a tensor of experts.
_LIST = ".experts."
#: The part that holds the shape of a matrix, whatever its values.
SHAPE = "shape"
#: The part that holds the scales, which follow from the plain values alone, however the codes are rounded.
SCALE = "scale"


@dataclass(frozen=True)
class Encoding:
    """What is quantized of a plain checkpoint, in the scheme `weights`: the experts and others of its `matrices`.

    Of those that engines join, all are quantized, or none. Engines that serve the output on `ranks` GPUs divide the
    split ones among these. `dtype` is the experts' own, which scales get that are not float32. `mtp_experts` are the
    paths of the lists of experts in layers for multi-token prediction, which stay plain.
    """

    weights: str
    dtype: str
    matrices: LinearWeights = field(repr=False)
    ranks: int = 1
    mtp_experts: tuple[str, ...] = ()

    @classmethod
    def of(cls, storage: Storage, found: LinearWeights, tensors: Mapping[str, TensorEntry], layout: Layout) -> Encoding:
        """What is quantized of the matrices `found` among the plain `tensors`, which are cut by `layout`."""
        dtype = Counter(tensors[name].dtype for name in found.experts).most_common(1)[0][0]
        others, plain = found.others, dict(found.plain)
        if storage.quantize == "experts":
            others, plain = frozenset(), plain | dict.fromkeys(others, "all but experts (--quantize experts)")
        # Published builds mostly leave these layers plain, and by a wrong draft no token is wrong.
        plain |= {name: "layers for multi-token prediction" for name in layout.mtp if name in plain}
        lists = (name.partition(_LIST)[0] + _LIST[:-1] for name in layout.mtp_experts if _LIST in name)
        matrices = replace(found, others=others, plain=plain)
        return cls(storage.weights, dtype, matrices, storage.tensor_parallel, tuple(dict.fromkeys(lists)))

    def scheme(self, tensors: Iterable[TensorEntry | OutputTensor]) -> Scheme:
        """The scheme for a checkpoint with these plain tensors.

        The experts decide how large groups are. Raises SettingsError if it cannot store them, or a program that reads
        it would misread them.
        """
        names = self.matrices.split
        experts = [each for each in tensors if each.name in self.matrices.experts]
        split = {each.shape[1] for each in experts if each.name in names}
        whole = {each.shape[1] for each in experts if each.name not in names}
        scheme = scheme_of(self.weights, whole, split, tensor_parallel=self.ranks, dtype=self.dtype)
        kinds = {(each.shape, each.name in names): each.name for each in experts}
        for (shape, _), name in sorted(kinds.items()):
            problem = self._misfit(name, shape, scheme)
            if problem is not None:
                raise SettingsError(
                    f"--weights {self.weights} is not possible for experts of {list(shape)}: {problem}. Use another "
                    "--weights: fp8-dynamic takes any shape."
                )
        return scheme

    def why_plain(self, name: str, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Why a tensor of this name and shape stays plain; None if it is quantized."""
        found = self.matrices
        if name in found.experts:
            return None
        if name not in found.others:
            return found.plain.get(name, "")
        for rows in (shape[0], *found.rows[name]):
            problem = self._misfit(name, (rows, shape[1]), scheme)
            if problem is not None:
                joined = "" if rows == shape[0] else " (of a matrix that engines join with them)"
                return f"matrices that {self.weights} cannot store: {problem}{joined}"
        return None

    def _misfit(self, name: str, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Why a matrix of this shape cannot be stored by the scheme, or not be divided among the GPUs."""
        axis = 1 if name in self.matrices.split else 0
        own = tuple(size // self.ranks if place == axis == 1 else size for place, size in enumerate(shape))
        blocks = isinstance(scheme.format, Fp8) and scheme.format.block is not None
        if self.ranks > 1 and blocks and shape[axis] % (scheme.block(shape)[axis] * self.ranks):
            size, what = scheme.block(shape)[axis], "columns" if axis else "rows"
            return f"its {shape[axis]} {what}, over {self.ranks} GPUs, are no whole blocks of {size}"
        return scheme.problem(own if shape[1] % self.ranks == 0 else shape) or scheme.caution(shape)

    def config_section(self, tensors: Sequence[OutputTensor], scheme: Scheme) -> dict[str, Any]:
        """The `quantization_config` of the output's config.json, which lists every module that stays plain."""
        head, modules = self.matrices.head, self.matrices.modules
        names = {head} if head is not None else set()
        for tensor in tensors:
            if tensor.encoded is None and tensor.name in modules:
                # Under both names: transformers goes by those of its modules, engines by the checkpoint's.
                names |= {tensor.name.removesuffix(".weight"), modules[tensor.name]}
        # (Each of these stands for all experts of a list.)
        names = {name for name in names if not name.startswith(tuple(f"{each}." for each in self.mtp_experts))}
        names |= {scheme.pattern_of_experts(each) for each in self.mtp_experts}
        return scheme.config_section(sorted(names))

    def left_plain(self, tensors: Sequence[OutputTensor], scheme: Scheme) -> dict[str, int]:
        """How many matrices of the output stay plain, by the reason; first the one with most bytes."""
        counts, sizes = Counter[str](), Counter[str]()
        for tensor in tensors:
            reason = self.why_plain(tensor.name, tensor.shape, scheme) if tensor.encoded is None else None
            if reason:
                counts[reason] += 1
                sizes[reason] += tensor.nbytes
        return {reason: counts[reason] for reason, _ in sizes.most_common()}


def encode_tensors(tensors: Iterable[OutputTensor], encoding: Encoding, scheme: Scheme) -> list[OutputTensor]:
    """The plain tensors with the parts of those that are quantized in their place."""
    result: list[OutputTensor] = []
    for tensor in tensors:
        if encoding.why_plain(tensor.name, tensor.shape, scheme) is None:
            result += parts_of(tensor, scheme)
        else:
            result.append(tensor)
    return result


def parts_of(tensor: OutputTensor, scheme: Scheme) -> Iterator[OutputTensor]:
    """The parts, as tensors of the output, of a plain matrix that is quantized."""
    for part, (dtype, shape) in scheme.stored(tensor.shape).items():
        encoded = EncodedPart(tensor, part, scheme)
        yield replace(
            tensor, name=part_name(tensor.name, part, scheme), dtype=dtype, shape=shape, channels=None, encoded=encoded
        )


def part_name(name: str, part: str, scheme: Scheme) -> str:
    """The name of a part of the matrix `name` (`….weight`)."""
    return f"{name.removesuffix('weight')}{scheme.leaves[part]}"


def encoded_layout(layout: Layout, tensors: Iterable[OutputTensor]) -> Layout:
    """`layout` for the names of the output's tensors: those of the parts in place of the quantized matrices'."""
    cuts: dict[str, Cut] = {}
    for tensor in tensors:
        plain = tensor.encoded.plain.name if tensor.encoded is not None else tensor.name
        cut = layout.cuts[plain]
        if tensor.encoded is not None and cut.family is not None:
            family = part_name(cut.family, tensor.encoded.part, tensor.encoded.scheme)
            cut = replace(cut, family=family, channels=None)
        cuts[tensor.name] = cut
    return replace(layout, cuts=cuts)


def encoded_bytes(encoded: EncodedPart, plain: bytearray) -> memoryview:
    """The bytes of a part of a matrix with these plain bytes, rounded to nearest. Needs torch.

    Each part is made by itself, and scales without rounding. Memory: some eight times the matrix in float32. Raises
    NonFiniteError for NaN and infinity.
    """
    import torch

    from streamprune.checkpoint.reader import DTYPES

    matrix = encoded.plain
    if encoded.part == SHAPE:
        return memoryview(torch.tensor(matrix.shape).numpy().tobytes())
    weight = torch.frombuffer(plain, dtype=DTYPES[matrix.dtype]).reshape(matrix.shape).float()
    if encoded.part == SCALE:
        return tensor_bytes(encoded.scheme.scales(weight))
    return tensor_bytes(encoded.scheme.encode(weight)[encoded.part])


def tensor_bytes(tensor: Any) -> memoryview:
    """The bytes of a torch tensor, as they lie in a file."""
    import torch

    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)
