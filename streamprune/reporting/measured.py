"""What evaluations left with an output: text.json, generation.json and tasks.json, checked. Each may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamprune.errors import CheckpointError, ReportError
from streamprune.reporting.evaluations import (
    GENERATION_NAME,
    RESULT_FORMAT,
    TASKS_NAME,
    TEXT_NAME,
    read_result,
    results_folder,
)
from streamprune.reporting.read_record import Told

_ADVICE = "Evaluate again with `streamprune eval`, or remove the file."
#: The numbers of a source in text.json; those of the second row have an interval.
_PLAIN = ("original_loss", "original_perplexity", "kl_p99")
_WITH_INTERVAL = ("loss", "perplexity", "loss_increase", "kl", "top1_agreement")

Interval = tuple[float, float]


@dataclass(frozen=True)
class OfSource:
    """What was measured on the held-out text of one source, or of all: `values` and `intervals` by their names there.

    `hidden_error` is the relative error of the hidden states after every block.
    """

    name: str
    sequences: int | None
    tokens: int
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]
    hidden_error: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TextResult:
    """Losses by source and of all together; with the original's and the divergence from it if known.

    `held_back`: on text that the run itself held back. `against_source`: not compared with another model than the
    source, as far as is known.
    """

    against: str | None
    sources: tuple[OfSource, ...]
    whole: OfSource | None
    held_back: bool
    against_source: bool

    @property
    def text_words(self) -> str:
        """What text it is."""
        return "text that was held back from the calibration" if self.held_back else "text that was given to `eval`"

    @property
    def original_words(self) -> str:
        """What it is compared with."""
        if self.against_source:
            return "the original"
        return f"{self.against}, which is not what this model was made from"

    @property
    def rows(self) -> tuple[OfSource, ...]:
        """Every source, and all together."""
        return self.sources + ((self.whole,) if self.whole else ())

    @property
    def compared(self) -> bool:
        """Whether the original was measured too."""
        return any("kl" in each.values for each in self.rows)


@dataclass(frozen=True)
class Continuations:
    """How continuations went: shares that ended by themselves and that looped, and of 4-grams that came before.

    The last is None where they were too short to have any.
    """

    name: str
    prompts: int
    ended: float
    looped: float
    repeated: float | None


@dataclass(frozen=True)
class Mode:
    """One way to generate, with the original's figures where they were taken, and by source.

    `form` is what the prompts were: "text" that went on, or a "chat".
    """

    decoding: str
    form: str
    thinking: bool | None
    pruned: Continuations
    original: Continuations | None
    sources: tuple[Continuations, ...]

    @property
    def label(self) -> str:
        """The way in words."""
        return (
            f"{self.decoding}, {self.form}" + {None: "", True: ", thinking on", False: ", thinking off"}[self.thinking]
        )


@dataclass(frozen=True)
class GenerationResult:
    """Whether continuations loop ("loops", "healthy", or "unknown"), what helps if they do, and remarks."""

    verdict: str
    against: str | None
    modes: tuple[Mode, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def loops(self) -> bool:
        """Whether they do."""
        return self.verdict == "loops"


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    error: float | None
    shots: int | None
    examples: int | None


def read_text(output: Path) -> TextResult | None:
    """The losses of text.json; None without the file. Raises ReportError for a file that is not as documented."""
    told = _read(output, TEXT_NAME, RESULT_FORMAT)
    if told is None:
        return None
    against, whole = told.maybe("against"), told.maybe("all")
    sources = tuple(_source(each, each.at("name").name()) for each in told.at("sources").each())
    if not sources:
        raise told.at("sources").wrong("at least one source")
    data, is_source = told.maybe("data"), told.maybe("against_source")
    held_back = data.maybe("held_back") if data else None
    return TextResult(
        against.name() if against else None,
        sources,
        _source(whole, "all") if whole else None,
        held_back.flag() if held_back else False,
        is_source.flag() if is_source else True,
    )


def read_generation(output: Path) -> GenerationResult | None:
    """How continuations end, from generation.json; None without the file. Raises ReportError as `read_text`."""
    told = _read(output, GENERATION_NAME, RESULT_FORMAT)
    if told is None:
        return None
    verdict, against = told.at("verdict"), told.maybe("against")
    advice, notes = told.maybe("advice"), told.maybe("notes")
    if verdict.value not in ("healthy", "loops", "unknown"):
        raise verdict.wrong("healthy, loops or unknown")
    return GenerationResult(
        verdict.value,
        against.name() if against else None,
        tuple(map(_mode, told.at("modes").each())),
        tuple(sentence.text() for sentence in advice.each()) if advice else (),
        tuple(sentence.text() for sentence in notes.each()) if notes else (),
    )


def read_tasks(output: Path) -> tuple[TaskResult, ...]:
    """Every metric of tasks.json; empty without the file. Raises ReportError for what is no result of the harness."""
    told = _read(output, TASKS_NAME, None)
    if told is None:
        return ()
    shots = told.maybe("n-shot")
    numbers = {task: count.value for task, count in shots.pairs()} if shots else {}
    found = []
    for task, metrics in told.at("results").pairs():
        for key, value in metrics.pairs():
            metric, _, variant = key.partition(",")
            # What has no filter behind it ("acc,none") is no metric, but what the harness tells beside them.
            if not variant or metric.endswith("_stderr") or type(value.value) not in (int, float):
                continue
            error = metrics.value.get(f"{metric}_stderr,{variant}")
            shot = numbers.get(task)
            found.append(
                TaskResult(
                    task,
                    metric if variant == "none" else f"{metric}, {variant}",
                    value.number(),
                    float(error) if type(error) in (int, float) else None,
                    shot if type(shot) is int else None,
                    _examples(told, task),
                )
            )
    return tuple(found)


def _examples(told: Told, task: str) -> int | None:
    """How many examples of a task were taken; None where the harness does not tell."""
    samples = told.maybe("n-samples")
    of_task = samples.maybe(task) if samples else None
    taken = of_task.maybe("effective") if of_task else None
    return taken.whole() if taken else None


def _read(output: Path, name: str, wanted: int | None) -> Told | None:
    folder = results_folder(output)
    try:
        value = read_result(folder, name)
    except CheckpointError as error:
        raise ReportError(f"{error} {_ADVICE}") from None
    if value is None:
        return None
    told = Told(value, folder / name, _ADVICE)
    if wanted is not None and value.get("format", wanted) != wanted:
        raise told.at("format").wrong(f"{wanted}, which this version of streamprune reads")
    return told


def _source(told: Told, name: str) -> OfSource:
    values, intervals = {}, {}
    for key in (*_PLAIN, *_WITH_INTERVAL):
        value, interval = told.maybe(key), told.maybe(f"{key}_interval")
        if value is not None:
            values[key] = value.number()
        if interval is not None:
            ends = [end.number() for end in interval.each()]
            if len(ends) != 2 or ends[0] > ends[1]:
                raise interval.wrong("[low, high]")
            intervals[key] = (ends[0], ends[1])
    told.at("loss").number()
    sequences, error = told.maybe("sequences"), told.maybe("hidden_error")
    return OfSource(
        name,
        sequences.whole() if sequences else None,
        told.at("tokens").whole(),
        values,
        intervals,
        tuple(each.number(0) for each in error.each()) if error else (),
    )


def _mode(told: Told) -> Mode:
    thinking, original, sources = (told.maybe(key) for key in ("thinking", "original", "sources"))
    prompts = told.at("prompts").whole()
    return Mode(
        told.at("decoding").name(),
        told.at("form").name(),
        thinking.flag() if thinking else None,
        _continuations(told, "all", prompts),
        # (Of the same prompts.)
        _continuations(original, "all", prompts) if original else None,
        tuple(_continuations(each, each.at("name").name(), each.at("prompts").whole()) for each in sources.each())
        if sources
        else (),
    )


def _continuations(told: Told, name: str, prompts: int) -> Continuations:
    repeated = told.maybe("repeated_4grams")
    return Continuations(
        name,
        prompts,
        told.at("ended").number(0, 1),
        told.at("looped").number(0, 1),
        repeated.number(0, 1) if repeated else None,
    )
