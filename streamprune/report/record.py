"""What streamprune.json says of an output, as the report needs it. Nothing in it is believed unchecked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamprune.choice.choose import Choice, ChosenLayer
from streamprune.errors import CheckpointError, ReportError, SettingsError
from streamprune.fit.kv_cache import KV_DTYPES
from streamprune.output.writer import REPORT_NAME
from streamprune.report.told import Told
from streamprune.result.record import REPORT_FORMAT
from streamprune.settings import Use
from streamprune.source.checkpoint import read_json
from streamprune.source.config_facts import MOST_BLOCKS, MOST_EXPERTS

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
    use: Use
    use_known: bool
    budget: int | None
    experts: int
    top_k: int
    source_bytes: int
    calibration: Calibrated | None
    dropped: int
    choice: Choice = field(repr=False)
    versions: Mapping[str, str]

    @property
    def counts(self) -> Mapping[int, int]:
        """Experts that stay, by block."""
        return self.choice.counts_by_block

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


def _use(told: Told | None) -> tuple[Use, bool, int | None]:
    if told is None:
        return Use(), False, None
    budget, kv_dtype = told.maybe("budget_bytes"), told.at("kv_dtype").name()
    if kv_dtype not in KV_DTYPES:
        raise told.at("kv_dtype").wrong(f"one of {', '.join(KV_DTYPES)}")
    try:
        use = Use(told.at("context").whole(1), told.at("batch").whole(1), kv_dtype)
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


def _choice(told: Told, experts: int) -> Choice:
    layers = tuple(_layer(each, experts) for each in told.at("layers").each())
    blocks = [layer.block for layer in layers]
    if not blocks or blocks != sorted(set(blocks)):
        raise told.at("layers").wrong("a list of layers in ascending order")
    protected = {}
    for block, numbers in told.at("protected").pairs():
        if block not in map(str, blocks):
            raise numbers.wrong("of a layer with experts")
        protected[int(block)] = tuple(number.whole(0, experts - 1) for number in numbers.each())
    return Choice(layers, protected)


def _layer(told: Told, experts: int) -> ChosenLayer:
    kept = tuple(number.whole(0, experts - 1) for number in told.at("kept").each())
    if not kept or list(kept) != sorted(set(kept)):
        raise told.at("kept").wrong("ascending numbers of experts")
    scores = tuple(score.number() for score in told.at("scores").each())
    counts = tuple(count.whole() for count in told.at("counts").each())
    for name, values in (("scores", scores), ("counts", counts)):
        if len(values) not in (0, experts):
            raise told.at(name).wrong(f"{experts} numbers, one for each expert")
    return ChosenLayer(told.at("index").whole(0, MOST_BLOCKS), kept, scores, counts)
