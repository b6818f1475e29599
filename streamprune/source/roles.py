"""What the tensors of a checkpoint are to the model, as pruning needs to know it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertRows:
    """The experts in a checkpoint tensor: `stride` rows of `axis` per expert, `tail` rows of no expert at the end."""

    axis: int
    stride: int
    tail: int


@dataclass(frozen=True)
class SourceRole:
    """What a checkpoint tensor is fed into. `parameter` is None where the model ignores the tensor.

    `parameter_rows` is the expert axis of the parameter it feeds (not necessarily of the tensor itself); `pattern` is
    the conversion that leads there.
    """

    block: int | None
    parameter: str | None
    pattern: str | None = None
    parameter_shape: tuple[int, ...] = ()
    parameter_rows: ExpertRows | None = None
