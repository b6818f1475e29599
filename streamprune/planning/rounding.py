"""What GPTQ needs, decided before a weight is read: that it is possible, how much text, and how much memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from streamprune.calibration.refit_text import RoundingDemand
from streamprune.errors import UnsupportedModelError
from streamprune.hardware.memory_plan import RoundingNeeds
from streamprune.models.skeleton import Skeleton
from streamprune.output.tensors import OutputTensor
from streamprune.planning.counts import ExpertCounts
from streamprune.quantize.gptq import memory_bytes
from streamprune.refit.activations import down_sizes, why_unseen


def rounding_demand(skeleton: Skeleton, counts: ExpertCounts) -> RoundingDemand:
    """What rounding the layer that keeps most experts needs. Raises UnsupportedModelError if it cannot be done.

    Before that is known, a layer may keep all.
    """
    columns = []
    for layer, path in skeleton.experts.items():
        module = skeleton.layers[layer].get_submodule(path)
        problem = why_unseen(module)
        if problem is not None:
            raise UnsupportedModelError(
                f"GPTQ cannot round the experts of layer {layer}: {problem}. Round to nearest with --rounding rtn."
            )
        inner, hidden = down_sizes(module)
        columns.append(max(counts.width or inner, hidden))
    most = max(counts.per_layer.values()) if counts.per_layer is not None else skeleton.spec.count
    return RoundingDemand(most, max(columns), skeleton.spec.top_k)


def rounding_needs(
    tensors: Iterable[OutputTensor], kept: int, top_k: int, hidden: int, tokens: int, itemsize: int
) -> RoundingNeeds:
    """The memory of rounding the largest layer of an output with these tensors, by what enters it on so many tokens.

    `kept` experts stay there, of inputs with `hidden` columns, `top_k` for each token; `itemsize` is the bytes of a
    value of the model.
    """
    layers: dict[int, dict[str, OutputTensor]] = defaultdict(dict)
    encoded: dict[int, int] = defaultdict(int)
    for tensor in tensors:
        if tensor.encoded is not None and tensor.layer is not None:
            layers[tensor.layer][tensor.encoded.plain.name] = tensor.encoded.plain
            encoded[tensor.layer] += tensor.nbytes
    sums, single, copy, one, all_of_them = 0, 0, 0, 0, 0
    for found in layers.values():
        linears = [plain.shape for plain in found.values() if plain.slot is None]
        sums = max(sums, sum(8 * columns**2 for _, columns in linears))
        copy = max(copy, itemsize * sum(rows * columns for rows, columns in linears))
        single = max(single, *(rounding_bytes(1, rows, columns) for rows, columns in _joined(linears)), 0)
        experts = [plain.shape for plain in found.values() if plain.slot == 0]
        one = max(one, *(rounding_bytes(1, rows, columns) for rows, columns in _joined(experts)), 0)
        all_of_them = max(all_of_them, *(rounding_bytes(kept, *sizes) for sizes in _joined(experts)), 0)
    largest = max((values for found in layers.values() for values in _parameters(found).values()), default=0)
    return RoundingNeeds(
        collected=tokens * (hidden * itemsize + 4 * top_k),
        tokens=tokens,
        sums=sums,
        single=max(single, one),
        # (It grows at most evenly from one expert to all.)
        each=-(-(all_of_them - one) // max(1, kept - 1)) if kept > 1 else one,
        experts=kept,
        # What a parameter is converted from, and to.
        copy=copy + 2 * itemsize * largest,
        # Those of the layer before may still be written.
        encoded=2 * max(encoded.values(), default=0),
    )


def rounding_bytes(experts: int, rows: int, columns: int) -> int:
    """The most bytes on the device while matrices (R, C) of so many experts are rounded, their Hessians included."""
    values, square = experts * rows * columns, columns**2
    # XᵀX in float64 and float32, while that of one expert is summed up; then in float32, with the weights, what
    # rounding to nearest gives, and an error with its product with a Hessian.
    summing = 12 * experts * square + 16 * square
    return max(summing, memory_bytes(experts, rows, columns) + 4 * experts * square + 8 * values + 12 * rows * columns)


def _joined(shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Matrices with as many columns as one: at most these have the same input, and are rounded together."""
    rows: dict[int, int] = defaultdict(int)
    for shape in shapes:
        rows[shape[1]] += shape[0]
    return [(count, columns) for columns, count in rows.items()]


def _parameters(tensors: Mapping[str, OutputTensor]) -> dict[str, int]:
    """Values of the matrices that feed a parameter, about: those of all experts with the same name."""
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0]
        key = name if tensor.slot is None else path.rpartition(".")[2]
        sizes[key] += tensor.shape[0] * tensor.shape[1]
    return sizes
