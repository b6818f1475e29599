"""Values of a JSON file that may come from a stranger: looked at one by one, and refused with their place in it.

What streamprune.json says of an output, as the report needs it. Nothing in it is believed unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import read_json
from streamprune.config import ServingSpec
from streamprune.errors import CheckpointError, ReportError, SettingsError
from streamprune.files.json_text import show
from streamprune.fit.cache import KV_DTYPES
from streamprune.models.config_json import MOST_BLOCKS, MOST_EXPERTS
from streamprune.output.writer import REPORT_NAME
from streamprune.reporting.record import REPORT_FORMAT
from streamprune.selection.select import LayerSelection, Selection

#: Names of sources and tasks, and texts that are shown as they are.
LONGEST_NAME, LONGEST_TEXT = 1000, 10_000
#: What is listed: blocks, experts of a block, sources.
MOST_LISTED = 100_000
MOST_NUMBER = 2**53


@dataclass(frozen=True)
class Told:
    """A value, the file that it is from, where in it, and what helps if it is not what it should be."""

    value: Any = field(repr=False)
    file: Path
    advice: str
    where: str = ""

    def wrong(self, wanted: str) -> ReportError:
        """The error to raise for this value."""
        what = f"{self.where} is {show(self.value)}" if self.where else "it"
        return ReportError(f"{self.file}: {what}, but should be {wanted}. {self.advice}")

    def at(self, key: str) -> Told:
        """The entry of an object. Raises ReportError where there is none."""
        if not isinstance(self.value, dict) or key not in self.value:
            raise ReportError(f"{self.file}: {self.where or 'it'} has no {key!r} where one has to be. {self.advice}")
        return Told(self.value[key], self.file, self.advice, f"{self.where}.{key}" if self.where else key)

    def maybe(self, key: str) -> Told | None:
        """The entry of an object; None where it is missing or null."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.at(key) if self.value.get(key) is not None else None

    def each(self) -> Iterator[Told]:
        """The entries of a list."""
        if not isinstance(self.value, list) or len(self.value) > MOST_LISTED:
            raise self.wrong("a list")
        for number, entry in enumerate(self.value):
            yield Told(entry, self.file, self.advice, f"{self.where}[{number}]")

    def pairs(self) -> Iterator[tuple[str, Told]]:
        """The entries of an object, by name."""
        if not isinstance(self.value, dict) or len(self.value) > MOST_LISTED:
            raise self.wrong("an object")
        for key, entry in self.value.items():
            Told(key, self.file, self.advice, f"a name in {self.where or 'it'}").name()
            yield key, Told(entry, self.file, self.advice, f"{self.where}.{key}" if self.where else key)

    def name(self) -> str:
        """A short text that can be printed."""
        if not isinstance(self.value, str) or not self.value.isprintable() or not 0 < len(self.value) <= LONGEST_NAME:
            raise self.wrong("a name")
        return self.value

    def text(self) -> str:
        """A text of one line or more."""
        if not isinstance(self.value, str) or len(self.value) > LONGEST_TEXT:
            raise self.wrong("a text")
        if not all(character.isprintable() or character in "\n\t" for character in self.value):
            raise self.wrong("a text that can be printed")
        return self.value

    def whole(self, least: int = 0, most: int = MOST_NUMBER) -> int:
        """A whole number."""
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.wrong(f"a whole number from {least:,} to {most:,}")
        return self.value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number."""
        if type(self.value) not in (int, float) or not abs(self.value) <= 1e300 or not least <= self.value <= most:
            bounds = f" from {least:g} to {most:g}" if (least, most) != (-math.inf, math.inf) else ""
            raise self.wrong(f"a number{bounds}")
        return float(self.value)

    def flag(self) -> bool:
        """Yes or no."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value


_ADVICE = "Was it changed? Prune again, or restore it."
_TEXTS = ("method", "schedule", "propagate", "dtype", "device")


@dataclass(frozen=True)
class CalibrationSource:
    """A source of the calibration text: its tokens, and as far as it is told its share in the recipe and its records.

    What the share is of (tokens or records) is the recipe's affair.
    """

    name: str
    tokens: int
    share: float | None
    records: int | None


@dataclass(frozen=True)
class Calibrated:
    """The text that the model was scored on."""

    sources: tuple[CalibrationSource, ...]
    sequences: int
    tokens: int


@dataclass(frozen=True)
class Record:
    """How an output was made. `choice` has the scores and token counts of every expert, or empty ones without scores.

    `settings` are texts and numbers by name; `use` is what the memory was planned for, which `use_known` says is on
    record. `budget` is in bytes.
    """

    model: str
    revision: str | None
    settings: Mapping[str, str | float]
    mix: Mapping[str, float] | None
    use: ServingSpec
    use_known: bool
    budget: int | None
    experts: int
    top_k: int
    source_bytes: int
    calibration: Calibrated | None
    dropped: int
    choice: Selection = field(repr=False)
    versions: Mapping[str, str]

    @property
    def counts(self) -> Mapping[int, int]:
        """Experts that stay, by block."""
        return self.choice.counts_by_layer

    @property
    def scored(self) -> bool:
        """Whether every expert has a score on record."""
        return all(layer.scores for layer in self.choice.layers)

    @property
    def all_experts(self) -> int:
        """Experts of the source in all blocks together."""
        return self.experts * len(self.choice.layers)


def read_record(output: Path) -> Record:
    """Read the record of the model in `output`. Raises ReportError where there is none that can be used."""
    path = output / REPORT_NAME
    if not path.is_file():
        raise ReportError(
            f"{output} has no {REPORT_NAME}, so that nothing is known of how it was made. Give a model's folder that "
            "`streamprune run` or `streamprune prune` wrote."
        )
    try:
        told = Told(read_json(path), path, _ADVICE)
    except CheckpointError as error:
        raise ReportError(str(error)) from None
    if told.at("format").value != REPORT_FORMAT:
        raise ReportError(
            f"{path} has format {told.at('format').whole()}, but this version of streamprune reads {REPORT_FORMAT}. "
            "Prune again from the same scores, which takes the time of a copy."
        )
    source, settings = told.at("source"), told.at("settings")
    experts = source.at("experts").whole(1, MOST_EXPERTS)
    use, known, budget = _use(told.maybe("use"))
    revision = settings.maybe("revision")
    return Record(
        settings.at("model").name(),
        revision.name() if revision else None,
        _settings(settings),
        _shares(settings.maybe("mix")),
        use,
        known,
        budget,
        experts,
        source.at("top_k").whole(1, experts),
        source.at("bytes").whole(),
        _calibration(told.maybe("calibration")),
        len(list(told.at("dropped").each())),
        _choice(told, experts),
        {name: version.name() for name, version in told.at("versions").pairs()},
    )


def _settings(told: Told) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for name in _TEXTS:
        value = told.maybe(name)
        if value is not None:
            found[name] = value.name()
    for name in ("spread", "floor", "seed"):
        value = told.maybe(name)
        if value is not None:
            found[name] = value.number()
    return found


def _shares(told: Told | None) -> dict[str, float] | None:
    return None if told is None else {name: share.number(0, 1) for name, share in told.pairs()}


def _use(told: Told | None) -> tuple[ServingSpec, bool, int | None]:
    if told is None:
        return ServingSpec(), False, None
    budget, kv_dtype = told.maybe("budget_bytes"), told.at("kv_dtype").name()
    if kv_dtype not in KV_DTYPES:
        raise told.at("kv_dtype").wrong(f"one of {', '.join(KV_DTYPES)}")
    try:
        use = ServingSpec(told.at("context").whole(1), told.at("batch").whole(1), kv_dtype)
    except SettingsError as error:
        raise ReportError(f"{told.file}: {told.where}: {error} {_ADVICE}") from None
    return use, True, budget.whole(1) if budget else None


def _calibration(told: Told | None) -> Calibrated | None:
    if told is None:
        return None
    recipe = told.maybe("recipe")
    listed = recipe.maybe("sources") if recipe else None
    stated = {each.at("name").name(): each for each in listed.each()} if listed else {}
    return Calibrated(
        tuple(_source(each, stated.get(each.at("name").name())) for each in told.at("sources").each()),
        told.at("sequences").whole(),
        told.at("tokens").whole(),
    )


def _source(told: Told, stated: Told | None) -> CalibrationSource:
    share, records = (stated.maybe(name) if stated else None for name in ("share", "records"))
    return CalibrationSource(
        told.at("name").name(),
        told.at("tokens").whole(),
        share.number(0) if share else None,
        records.whole() if records else None,
    )


def _choice(told: Told, experts: int) -> Selection:
    layers = tuple(_layer(each, experts) for each in told.at("layers").each())
    blocks = [layer.index for layer in layers]
    if not blocks or blocks != sorted(set(blocks)):
        raise told.at("layers").wrong("a list of layers in ascending order")
    protected = {}
    for block, numbers in told.at("protected").pairs():
        if block not in map(str, blocks):
            raise numbers.wrong("of a layer with experts")
        protected[int(block)] = tuple(number.whole(0, experts - 1) for number in numbers.each())
    return Selection(layers, protected=protected)


def _layer(told: Told, experts: int) -> LayerSelection:
    kept = tuple(number.whole(0, experts - 1) for number in told.at("kept").each())
    if not kept or list(kept) != sorted(set(kept)):
        raise told.at("kept").wrong("ascending numbers of experts")
    scores = tuple(score.number() for score in told.at("scores").each())
    counts = tuple(count.whole() for count in told.at("counts").each())
    for name, values in (("scores", scores), ("counts", counts)):
        if len(values) not in (0, experts):
            raise told.at(name).wrong(f"{experts} numbers, one for each expert")
    return LayerSelection(told.at("index").whole(0, MOST_BLOCKS), kept, scores, counts)
