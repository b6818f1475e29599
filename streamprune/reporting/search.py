"""The result of a search, `search.json`: which candidates are on the Pareto front, and its tables. No torch.

Next to the head of an evaluation (`reporting.evaluations`) it has the budget and `candidates`, best first. Each has its
settings, `weights_bytes`, `total_bytes` (memory for the planned use), `max_context` (tokens that fit the budget),
`bytes_per_token`, and the figures of an evaluation, `sources` and `all`; or `given_up` instead of these, if it was
hopeless. `notes` say what the figures leave out. `on_front`: no other candidate takes as little memory and
loses as little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from streamprune.hardware.memory import format_bytes
from streamprune.output.search_folder import SEARCH_NAME
from streamprune.reporting.evaluations import Losses
from streamprune.reporting.record import checked
from streamprune.reporting.record_text import Count, Name, Number
from streamprune.tables import Table, count, plain

#: What the speed column is.
SPEED = (
    "read per token: bytes of weights that generating one token reads; with one sequence at a time, tokens per second "
    "are about the GPU's memory bandwidth divided by it"
)
UNIFORM = "All layers keep equally many experts: schedules that give layers different numbers are not searched."
#: What the measurement leaves out, where one of these formats is among the candidates.
_EIGHT_BIT_ACTIVATIONS = ("fp8", "fp8-dynamic")
ACTIVATIONS = (
    "The KL divergence of fp8 and fp8-dynamic is that of their weights alone: engines also round activations to 8 bits "
    "for them, which loses a little more. For w4a16 and w8a16 activations keep their 16 bits."
)
_ADVICE = "Search again with `streamprune search`, or remove the file."
#: Most candidates that a file may have.
_MOST = 1000


class GivenUp(Struct, frozen=True):
    """Why a candidate was given up: the KL divergence after a layer, its own and the best one's."""

    layer: Count
    kl: Number
    best_kl: Number


class Measured(Struct, frozen=True, kw_only=True):
    """A candidate of a search."""

    name: Name
    options: Name
    keep: Count
    width: Count | None = None
    weights: Name
    refit: bool
    weights_bytes: Count
    total_bytes: Count
    max_context: Count
    bytes_per_token: Count
    on_front: bool
    given_up: GivenUp | None = None
    sources: Annotated[list[Losses], Meta(max_length=_MOST)] = []
    all: Losses | None = None

    @property
    def kl(self) -> float:
        """The mean KL divergence over all text; infinite if it was not measured to the end."""
        return self.all.kl if self.all is not None and self.all.kl is not None else float("inf")


class Use(Struct, frozen=True):
    """What the budget is for."""

    context: Count
    batch: Count
    kv_dtype: Name


class SearchResult(Struct, frozen=True, kw_only=True):
    """search.json: `best` is the name of the first of the candidates."""

    against: Name
    dtype: Name
    budget_bytes: Count
    use: Use
    experts_per_layer: Count
    width: Count | None = None
    left_out: Annotated[list[Name], Meta(max_length=_MOST)] = []
    candidates: Annotated[list[Measured], Meta(min_length=1, max_length=_MOST)]

    def __post_init__(self) -> None:
        if self.candidates[0].all is None:
            raise ValueError("`candidates` begins with one that was not measured")

    @property
    def best(self) -> Measured:
        """The candidate that loses least."""
        return self.candidates[0]

    @property
    def measured(self) -> list[Measured]:
        """The candidates that were measured to the end, best first."""
        return [each for each in self.candidates if each.all is not None]


def search_result(value: Any) -> SearchResult:
    """JSON as the result of a search. Raises ReportError, with the fault."""
    return checked(value, SearchResult, SEARCH_NAME, _ADVICE)


def marked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`candidates`, sorted by what they lose, with `on_front`, and the name of the `best`."""
    measured = sorted((row for row in rows if "all" in row), key=lambda row: (row["all"]["kl"], row["total_bytes"]))
    given_up = sorted((row for row in rows if "all" not in row), key=lambda row: row["given_up"]["kl"])
    front, least = set(), float("inf")
    for row in measured:
        # Each of those before it loses less, or as little with less memory.
        if row["total_bytes"] < least:
            front.add(row["name"])
            least = row["total_bytes"]
    listed = [{**row, "on_front": row["name"] in front} for row in (*measured, *given_up)]
    return {"best": measured[0]["name"], "candidates": listed}


def notes_on(weights: Iterable[str]) -> list[str]:
    """What to know of the measurements of candidates in these formats."""
    return [ACTIVATIONS] if any(each in _EIGHT_BIT_ACTIVATIONS for each in weights) else []


def search_lines(result: SearchResult) -> list[str]:
    """The tables for a terminal, and what the best candidate is made with."""
    best = result.best
    lines = [line for table in search_tables(result) for line in table.text()]
    return [*lines, f"best: {best.name} ({best.options}), KL divergence {best.kl:.4f} nats per token"]


def search_tables(result: SearchResult) -> list[Table]:
    """All candidates; then what they lose by source, if there are several."""
    use = result.use
    sequences = "" if use.batch == 1 else f"{use.batch} sequences of "
    title = (
        f"Candidates for {format_bytes(result.budget_bytes)} with {sequences}{use.context:,} tokens, by KL divergence "
        "from the original on held-out text (nats per token, 95 % interval)"
    )
    columns = ["candidate", "KL", "interval", "weights", "memory", "longest context", "read per token", "front"]
    notes = ["front: no other takes as little memory and loses as little", SPEED, UNIFORM]
    notes += notes_on(each.weights for each in result.candidates)
    tables = [Table(title, columns, [_row(each) for each in result.candidates], notes)]
    names = [source.name for source in result.best.sources]
    if len(names) > 1:
        rows = [[each.name, *(f"{source.kl or 0.0:.4f}" for source in each.sources)] for each in result.measured]
        tables.append(Table("KL divergence by source", ["candidate", *map(plain, names)], rows))
    return tables


def _row(each: Measured) -> list[str]:
    sizes = [
        format_bytes(each.weights_bytes), format_bytes(each.total_bytes), count(each.max_context),
        format_bytes(each.bytes_per_token),
    ]  # fmt: skip
    if each.all is None:
        gone = each.given_up
        return [each.name, "–", f"given up after layer {gone.layer}" if gone is not None else "", *sizes, ""]
    span = each.all.kl_interval
    shown = f"{span[0]:.4f} to {span[1]:.4f}" if span is not None else "–"
    return [each.name, f"{each.kl:.4f}", shown, *sizes, "*" if each.on_front else ""]
