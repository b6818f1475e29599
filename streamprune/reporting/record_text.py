"""What a record says of texts: the calibration, its sources and its recipe; and the kinds of values in it. No torch."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MOST_LISTED = 100_000
#: Whole numbers that are exact in every language's JSON, finite numbers, and names that can be shown.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Number = Annotated[float, Meta(ge=-1.7e308, le=1.7e308)]
Share = Annotated[float, Meta(ge=0, le=1)]
#: A name or a path, which may have 4,096 bytes.
Name = Annotated[str, Meta(min_length=1, max_length=5000)]


class SourceTokens(Struct, frozen=True):
    """A source of the calibration text, and how many tokens it has."""

    name: Name
    tokens: Count


class HeldBack(Struct, frozen=True):
    """The text that was held out of the calibration for measurements."""

    sequences: Count
    tokens: Count
    fingerprint: str


class RecipeSource(Struct, frozen=True):
    """A source in a recipe: where it is from, and its share (of tokens or records, as in the recipe)."""

    name: str
    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    commit: str | None = None
    data_files: str | list[str] | None = None
    data_dir: str | None = None
    path: str | list[str] | None = None
    builtin: str | list[str] | None = None
    share: Annotated[float, Meta(ge=0, le=1.7e308)] | None = None
    records: Count | None = None
    sequences: Count | None = None


class GivenCalibration(Struct, frozen=True):
    """The options of the command line that say what text the experts are scored on (or refitted to)."""

    calibration: Annotated[list[str], Meta(min_length=1)]
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    date: str | None = None
    skip_bad: Share | None = None


class Recipe(Struct, frozen=True):
    """How the calibration text was made."""

    name: str | None = None
    description: str | None = None
    mode: str | None = None
    sequence_length: Positive | None = None
    sources: Annotated[list[RecipeSource], Meta(max_length=MOST_LISTED)] = []
    given: GivenCalibration | None = None


class Calibration(Struct, frozen=True, kw_only=True):
    """The text that the experts were scored on (or refitted to).

    `recipe` is stored unchanged; `stated` has its valid fields.
    """

    sources: Annotated[list[SourceTokens], Meta(max_length=MOST_LISTED)]
    sequences: Count
    tokens: Count
    fingerprint: str | None = None
    recipe: Any = None
    held_back: HeldBack | UnsetType | None = UNSET

    @property
    def stated(self) -> Recipe:
        """The parsed recipe; empty if it is not as documented."""
        try:
            return msgspec.convert(self.recipe, Recipe)
        except msgspec.ValidationError:
            return Recipe()
