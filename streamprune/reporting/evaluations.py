"""The results of evaluations: JSON files in a model's folder `evaluation/`. No torch.

| file | written by | contents |
|---|---|---|
| `text.json` | `eval --data`, `run --evaluate` | loss, and against the original KL and agreement, by source |
| `generation.json` | `eval --generate` | how continuations end: with EOS, in loops, not at all |
| `text-against-NAME-….json` | `eval --against NAME` | the same where NAME is not what the model was made from |
| `text-on-NAMES-….json` | `eval --data` | the same on other text than what the model's run held out |
| `search.json` | `run --best` | the candidates of which this model is the best: `reporting.search` |
| `tasks.json` | `eval --tasks` | the result of lm-evaluation-harness |
| `tasks-against-NAME-….json` | the same, and `--against NAME` | where NAME is not what the model was made from |

The classes have the fields that the report reads; the files may have more. Losses and KL are nats per token. An
interval is [low, high] of 95 %, null if a source has fewer than two sequences.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard

from msgspec import Meta, Struct, field

from streamprune.checkpoint.index import read_json
from streamprune.files.durable import write_atomically, writing
from streamprune.hardware.memory import existing_folder
from streamprune.reporting.record import Kind, checked, public_name, read_object
from streamprune.reporting.record_text import MOST_LISTED, Count, Name, Number, Share

FOLDER_NAME = "evaluation"
#: In the name of a result that compares with another model than the one that was pruned.
_AGAINST = "-against-"
#: In the name of a result on other text than what the model's run held out.
_ON = "-on-"
#: What is said of such a model after its name.
NOT_THE_SOURCE = "which is not what this model was made from"
TEXT_NAME, GENERATION_NAME, TASKS_NAME = "text.json", "generation.json", "tasks.json"
#: The format of text.json and generation.json.
RESULT_FORMAT = 1
_ADVICE = "Evaluate again with `streamprune eval`, or remove the file."

Interval = tuple[Number, Number]
Sentences = Annotated[list[Annotated[str, Meta(max_length=10_000)]], Meta(max_length=MOST_LISTED)]


class _Checked(Struct, frozen=True, kw_only=True):
    """A part of a result whose names can be printed, and whose intervals have their ends in order."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"`{name}` is {value[:80]!r}, not a name that can be printed")
            if name.endswith("_interval") and value is not None and value[0] > value[1]:
                raise ValueError(f"`{name}` is {list(value)}, not [low, high]")


class Losses(_Checked, frozen=True, kw_only=True):
    """The measurements on the text of one source, or of all.

    The `original_` fields and those from `loss_increase` on are present if the original was measured too.
    `hidden_error` is the relative error of the hidden states after each layer.
    """

    name: Name = "all"
    sequences: Count | None = None
    tokens: Count
    loss: Number
    loss_interval: Interval | None = None
    perplexity: Number | None = None
    perplexity_interval: Interval | None = None
    original_loss: Number | None = None
    original_perplexity: Number | None = None
    loss_increase: Number | None = None
    loss_increase_interval: Interval | None = None
    kl: Number | None = None
    kl_interval: Interval | None = None
    kl_p99: Number | None = None
    top1_agreement: Number | None = None
    top1_agreement_interval: Interval | None = None
    hidden_error: Annotated[list[Annotated[float, Meta(ge=0, le=1.7e308)]], Meta(max_length=MOST_LISTED)] | None = None


class EvaluatedText(Struct, frozen=True):
    """The text of the measurements; `held_back` is true for what the run itself held out of its calibration."""

    held_back: bool | None = None


class TextResult(_Checked, frozen=True, kw_only=True):
    """text.json. `against_source` is false if the original is known not to be the model's source."""

    format: Literal[1] = 1
    against: Name | None = None
    against_source: bool | None = None
    data: EvaluatedText | None = None
    sources: Annotated[list[Losses], Meta(min_length=1, max_length=MOST_LISTED)]
    all: Losses | None = None

    @property
    def text_words(self) -> str:
        """Which text it is."""
        is_held_out = self.data is not None and self.data.held_back
        return "text that was " + ("held out of the calibration" if is_held_out else "given to `eval`")

    @property
    def original_words(self) -> str:
        """What it is compared with."""
        known_other = self.against_source is False
        return f"{self.against}, {NOT_THE_SOURCE}" if known_other else "the original"

    @property
    def rows(self) -> list[Losses]:
        """Every source, and all together if there are several."""
        return self.sources + ([self.all] if self.all and len(self.sources) > 1 else [])

    @property
    def compared(self) -> bool:
        """Whether the original was measured too."""
        return any(each.kl is not None for each in self.rows)


class Continuations(_Checked, frozen=True, kw_only=True):
    """How continuations ended: the shares that ended with EOS and that looped, and the share of repeated 4-grams.

    The last is None if they were too short to have any; `prompts` is None if they are those of the mode.
    """

    name: Name = "all"
    prompts: Count | None = None
    ended: Share
    looped: Share
    repeated_4grams: Share | None = None


class GenerationMode(Continuations, frozen=True, kw_only=True):
    """One way to generate, with the original's results if it was measured too, and by source.

    `form` says what the prompts were: "text" to be continued, or a "chat".
    """

    prompts: Count
    decoding: Name
    form: Name
    thinking: bool | None = None
    original: Continuations | None = None
    sources: Annotated[list[Continuations], Meta(max_length=MOST_LISTED)] = []

    @property
    def label(self) -> str:
        """The mode in words."""
        return mode_name(self.decoding, self.form, self.thinking)


def mode_name(decoding: str, form: str, thinking: bool | None) -> str:
    """A mode of generation in words: "greedy, chat, thinking on"."""
    words = {None: "", True: ", thinking on", False: ", thinking off"}[thinking]
    return f"{decoding}, {form}{words}"


class GenerationResult(_Checked, frozen=True, kw_only=True):
    """generation.json: whether continuations loop, what helps if they do (`advice`), and remarks."""

    format: Literal[1] = 1
    verdict: Literal["loops", "healthy", "unknown"]
    against: Name | None = None
    modes: Annotated[list[GenerationMode], Meta(max_length=MOST_LISTED)]
    advice: Sentences = []
    notes: Sentences = []


class TaskFigure(NamedTuple):
    """One measurement of a task: its value and standard error, and the original's value, each None without."""

    task: str
    metric: str
    value: float
    error: float | None
    original: float | None
    higher_is_better: bool | None

    @property
    def points_lost(self) -> float | None:
        """What the original had more, in percentage points; None unless both are shares of which more is better."""
        if self.original is None or not self.higher_is_better:
            return None
        are_shares = all(0 <= value <= 1 for value in (self.value, self.original))
        return 100 * (self.original - self.value) if are_shares else None

    @property
    def recovery(self) -> float | None:
        """The share of the original's value; None without one above 0, or where more is not better."""
        return self.value / self.original if self.original and self.original > 0 and self.higher_is_better else None


class TasksResult(_Checked, frozen=True, kw_only=True):
    """tasks.json, as lm-evaluation-harness lays it out: `results` by task, then by "metric,filter".

    `original_results` are the same of the model `against`; a server had the model under the name `served_model`.
    """

    against: Name | None = None
    served_model: Name | None = None
    results: Annotated[dict[Name, dict[str, Any]], Meta(max_length=MOST_LISTED)]
    original_results: Annotated[dict[Name, dict[str, Any]], Meta(max_length=MOST_LISTED)] = {}
    higher_is_better: dict[str, dict[str, bool | None]] = {}
    shots: dict[str, Any] = field(name="n-shot", default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(name="n-samples", default_factory=dict)

    def figures(self) -> Iterator[TaskFigure]:
        """All measurements."""
        for task, metrics in self.results.items():
            original = self.original_results.get(task, {})
            for key, value in metrics.items():
                metric, _, variant = key.partition(",")
                # A key without a filter ("alias") is no metric: the metrics are "acc,none" and the like.
                if not variant or metric.endswith("_stderr") or not _is_finite(value):
                    continue
                error, before = metrics.get(f"{metric}_stderr,{variant}"), original.get(key)
                yield TaskFigure(
                    task,
                    metric if variant == "none" else f"{metric}, {variant}",
                    float(value),
                    float(error) if _is_finite(error) else None,
                    float(before) if _is_finite(before) else None,
                    self.higher_is_better.get(task, {}).get(metric),
                )

    @property
    def compared(self) -> bool:
        """Whether the original was measured too."""
        return any(each.original is not None for each in self.figures())

    @property
    def place_words(self) -> str:
        """Where the model ran, after "measured by lm-evaluation-harness"."""
        return f" through a server that has the model as {self.served_model}" if self.served_model else ""


def _is_finite(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and abs(value) <= 1e300


def results_folder(model: Path) -> Path:
    """The folder with the results about the model in the folder `model`."""
    return model / FOLDER_NAME


def name_against(name: str, original: str, fingerprint: str) -> str:
    """The file of a result that compares with another model than the one that was pruned."""
    return _named(name, _AGAINST, original, fingerprint)


def name_on(name: str, sources: Iterable[str], fingerprint: str) -> str:
    """The file of a result on other text, of these sources, than what the model's run held out."""
    return _named(name, _ON, "-".join(sources), fingerprint)


def _named(name: str, kind: str, what: str, fingerprint: str) -> str:
    path, readable = Path(name), re.sub(r"[^A-Za-z0-9._-]+", "-", what)[-100:]
    return f"{path.stem}{kind}{readable}-{fingerprint[:8]}{path.suffix}"


def others_of(output: Path, name: str) -> list[str]:
    """The files of results about the model in `output` that are kept apart under `name_against` or `name_on`."""
    path, folder = Path(name), results_folder(output)
    return sorted(each.name for kind in (_AGAINST, _ON) for each in folder.glob(f"{path.stem}{kind}*{path.suffix}"))


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of that name in a folder of results, as JSON; None if there is none.

    Raises CheckpointError for a file that is no JSON object.
    """
    path = folder / name
    return read_json(path) if path.is_file() else None


def read_checked_result(output: Path, name: str, kind: type[Kind]) -> Kind | None:
    """The result in the file `name` of the model in `output`; None without the file.

    Raises ReportError for a file that is not as documented.
    """
    path = results_folder(output) / name
    return checked(read_object(path, _ADVICE), kind, path, _ADVICE) if path.is_file() else None


def without_folders(value: Any) -> Any:
    """A result, which may be published, with paths of this machine shortened to the last part of their names."""
    if isinstance(value, Mapping):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    if isinstance(value, str) and "/" in value:
        # Other texts may be too long for a path, contain invalid characters, or seem to name a user (`~`).
        with suppress(OSError, RuntimeError, ValueError):
            return public_name(value)
    return value


def check_writable(folder: Path) -> None:
    """Raise OutputError, ResourceError unless results can be written into a folder, which need not exist yet."""
    with writing(f"Writing results to {folder}", folder):
        there = folder if os.path.lexists(folder) else existing_folder(folder)
        with TemporaryFile(dir=there):
            pass


def write_result(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Replace a result, or leave the earlier one. Raises OutputError, ResourceError if it cannot be written."""
    contents = json.dumps(result, indent=2) + "\n"
    with writing(f"Writing {folder / name}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, contents.encode())
