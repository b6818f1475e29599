"""The record of a finished layer in a work folder: its statistics, what stays of it, its shards, what was computed."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from streamprune.formats.base import KeptExperts

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class FinishedShard(Struct, frozen=True, forbid_unknown_fields=True):
    """A shard in the work folder: its name, size and SHA-256."""

    file: str
    nbytes: Count
    sha256: str


class Computed(Struct, frozen=True):
    """A written tensor that a stage of the run computed, and the SHA-256 of its bytes, in hex."""

    #: (Error messages state it, and it may come from someone else's output.)
    stage: Annotated[str, Meta(pattern=r"\A[a-z_]{1,40}\Z")]
    sha256: str


class RefittedLayer(Struct, frozen=True):
    """How the down projections of a layer's kept experts were refitted; each list has one value for each of them.

    `shares` of the fitted change were taken (0: its bytes are the source's), fitted to `tokens` routed tokens, and
    `changes` is ‖change‖ / ‖weights‖. `before` and `after` are the relative errors of the layer's output on tokens that
    were not fitted. `catch_up` is the share of the earlier layers' error that was to be mended as well.
    """

    shares: list[float]
    tokens: list[Count]
    changes: list[float]
    before: float
    after: float
    catch_up: float


class RoundedLayer(Struct, frozen=True):
    """How the matrices of a layer were rounded by GPTQ, from the text that went through the pruned layer.

    `tokens` were routed to each kept expert. `nearest` are those, by their places, of which a matrix was rounded to
    nearest, for too few tokens or a singular Hessian; `nearest_linears` are the weights of such other modules. `before`
    and `after` are the mean relative errors, over all others, of a matrix's output on that text: if it had been rounded
    to nearest, and as it is.
    """

    tokens: list[Count]
    nearest: list[Count]
    nearest_linears: list[str]
    before: float
    after: float


class WeightInputs(Struct, frozen=True):
    """What enters a weight's columns: over `tokens` of each expert that stays (or one number for another weight), the
    `squares`, float32 (experts or 1, columns), as `pack` writes them."""

    tokens: list[Count]
    squares: str


class StageResults(Struct, frozen=True, kw_only=True):
    """What the stages behind the scoring made of a layer.

    `computed` are the tensors in the shards, by name, that cannot be made from the source alone; `refit` and `rounded`
    say how they were made. `inputs` are what enters its weights, by module or parameter, for an importance matrix.
    """

    computed: dict[str, Computed] = {}
    refit: RefittedLayer | None = None
    rounded: RoundedLayer | None = None
    inputs: dict[str, WeightInputs] = {}

    @property
    def need_text(self) -> bool:
        """Whether they cannot be made again without the text and the hidden states before the layer."""
        return self.refit is not None or self.rounded is not None or bool(self.inputs)


class FinishedLayer(StageResults, frozen=True):
    """The record of a finished layer: its statistics (None without experts), what stays of them, and its shards.

    `channels` are those that the kept experts keep, as text, if they become narrower. If nothing is written while
    layers are scored, there are no kept experts and no shards yet. The statistics are as they were read and may be
    invalid.
    """

    result: dict[str, Any] | None
    kept: tuple[Count, ...]
    shards: list[FinishedShard]
    channels: str | None = None

    def is_of(self, kept: KeptExperts) -> bool:
        """Whether the layer was written with these experts and channels."""
        channels = kept.channels.as_text() if kept.channels is not None else None
        return (self.kept, self.channels) == (kept.experts, channels)
