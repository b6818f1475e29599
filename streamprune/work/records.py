"""The JSON files of a work folder: the run with its settings and tokens, evaluation, pruning, search.

Each is checked when it is read. (The checksum in a file shows damage, but not who wrote it.)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint
from streamprune.common_settings import OutputSettings
from streamprune.config import PruneSettings, RunSettings, SearchSettings
from streamprune.errors import ResumeError, SettingsError
from streamprune.files.durable import kill_point, read_record, reading, write_record, writing
from streamprune.files.json_text import show
from streamprune.models.config_json import MOST_LAYERS
from streamprune.targets import PruningTarget
from streamprune.work.layer_records import Count

#: The format of the files in a work folder. Version 0.1.0 wrote formats 1 and 2; format 3 had another form of states;
#: format 4 (0.2.0) had no statistics of channels.
RUN_FORMAT = 5
#: Most bytes of a file with tokens, of the record of a layer, of an index of saved states, and of any other file. The
#: second and third have the energies of a layer's channels: in base64 2.8 and 5.6 MB a source for 256 experts of 2,048.
MOST_TOKENS_BYTES, MOST_LAYER_BYTES, MOST_INDEX_BYTES, MOST_RECORD_BYTES = 2**30, 2**29, 2**30, 2**24
#: Files that are written twice, because a damaged one cannot be recomputed.
RUN_NAMES, TOKENS_NAMES = ("run.json", "run.copy.json"), ("tokens.json", "tokens.copy.json")
PRUNING_NAME = "pruning.json"

S = TypeVar("S", bound=OutputSettings)
T = TypeVar("T", bound=Struct)


class RecordedCalibration(Struct):
    """The calibration of a run, without its tokens."""

    fingerprint: str
    sequences: Count
    tokens: Count
    sources: list[str]
    source_of: list[Count]
    recipe: dict[str, Any]
    notes: list[str]


class RecordedCommand(Struct, kw_only=True):
    """A command's settings, as `command_of` returns them, and the number of layers."""

    format: int = RUN_FORMAT
    command: dict[str, Any]
    layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            value = self.command.get(name)
            if not isinstance(value, str) or "\0" in value:
                raise ValueError(f"`$.command.{name}` is not a path")


class RecordedRun(RecordedCommand, kw_only=True):
    """run.json: the command, and everything that decides its result. `files` gives size and change time (ns).

    The sequences of `anchor`, the text that a refit also fits to, follow those of the calibration in tokens.json.
    `best` is the command of the `run --best` that a search is made for.
    """

    settings: dict[str, Any]
    source: str
    files: dict[str, Annotated[list[Count], Meta(min_length=2, max_length=2)]]
    calibration: RecordedCalibration
    versions: dict[str, Any]
    batch_tokens: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    budget_bytes: Count | None = None
    anchor: RecordedCalibration | None = None
    best: dict[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """The dtype that was computed in, such as "float32"; empty if that was not recorded."""
        return str(self.settings.get("computed in", "")).removeprefix("torch.")

    @property
    def recipes(self) -> list[dict[str, Any]]:
        """How the texts were made: the calibration, and the anchor if there is one."""
        return [text.recipe for text in (self.calibration, self.anchor) if text is not None]

    def settings_in(self, work: Path) -> RunSettings:
        """The settings with which the run in `work` is resumed. Raises ResumeError if they make no sense."""
        changes: dict[str, Any] = {"resume": "required", "from_layer": None}
        # Use the budget as recorded, since free GPU memory changes.
        if self.budget_bytes is not None:
            changes |= {"budget_gib": self.budget_bytes / 2**30, "gpu": None}
        kind = SearchSettings if "candidates" in self.command else RunSettings
        return settings_from(kind, {**self.command, **changes}, work)


class RecordedPruning(RecordedCommand, kw_only=True):
    """pruning.json: the command of `streamprune prune`, and what decides every byte of the result."""

    decided: dict[str, Any]

    def settings_in(self, work: Path) -> PruneSettings:
        """The settings with which the pruning in `work` is resumed. Raises ResumeError if they make no sense."""
        return settings_from(PruneSettings, {**self.command, "resume": "required"}, work)


class RecordedFigures(Struct):
    """The measurements on one source of held-out text."""

    name: str
    tokens: Count
    loss: float
    perplexity: float
    original_loss: float
    kl: float
    kl_p99: float
    top1_agreement: float
    loss_interval: tuple[float, float] | None
    kl_interval: tuple[float, float] | None


class RecordedEvaluation(Struct):
    """evaluation.json: the result of `--evaluate`."""

    data: dict[str, Any]
    sources: list[RecordedFigures]
    against: str
    all: RecordedFigures


class RecordedRefusal(Struct):
    """refused.json: what --stop-if-kl refused: `subject` is the divergence that was `kl`, above `factor` x the limit.

    `advice` says what else can be done.
    """

    subject: str
    kl: float
    factor: Annotated[int, Meta(ge=1)]
    advice: str


class GivenUp(Struct):
    """Why a candidate of a search was given up: the KL divergence, its own and the best one's, after a layer."""

    layer: Count
    kl: float
    best_kl: float


class RecordedSearch(Struct):
    """search.json: the candidates that were given up, by name."""

    given_up: dict[str, GivenUp]


class Cursor(Struct):
    """cursor.json: the newest generation of saved states, and the one before, if any."""

    generations: Annotated[list[Count], Meta(max_length=2)]


def converted(body: Any, kind: type[T]) -> T | None:
    """Parsed JSON as an object of this type; None if it does not match."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError:
        return None


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def _check_format(path: Path, body: Any) -> None:
    """Raise ResumeError for a file of another version's work folder, or of something else."""
    stated = body.get("format") if isinstance(body, dict) else None
    if stated == RUN_FORMAT:
        return
    # A pruning of 0.1.0 states no format.
    old = stated in (1, 2) or (stated is None and path.name == PRUNING_NAME)
    maker = "streamprune 0.1.0" if old else f"another version of streamprune, in format {show(stated)}"
    raise ResumeError(
        f"{path} was made by {maker}. This version cannot resume it: remove {path.parent}, or start over with "
        "--resume never."
    )


def command_of(settings: OutputSettings) -> dict[str, Any]:
    """The settings as JSON, with paths that mean the same from any folder."""
    command = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    model = Path(settings.model).expanduser()
    if model.is_dir():
        command["model"] = str(model.absolute())
    if isinstance(settings, PruningTarget) and settings.has_schedule_file:
        command["schedule"] = str(Path(settings.schedule).absolute())
    if "calibration" in command:
        files = [(source, Path(source).expanduser()) for source in command["calibration"]]
        command["calibration"] = [str(path.absolute()) if path.exists() else source for source, path in files]
    anchor = command.get("anchor")
    if anchor is not None and Path(anchor).expanduser().exists():
        command["anchor"] = str(Path(anchor).expanduser().absolute())
    return command


def settings_from(kind: type[S], command: Mapping[str, Any], work: Path) -> S:
    """The settings of type `kind` in a command recorded in `work`. Raises ResumeError if they make no sense."""
    try:
        unknown = command.keys() - {field.name for field in dataclasses.fields(kind)}
        if unknown:
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}")
        values = (value if isinstance(value, (list, tuple)) else (value,) for value in command.values())
        if any("\0" in str(each) for each in itertools.chain.from_iterable(values)):
            raise ValueError("a setting has a zero byte")
        return msgspec.convert(command, kind, dec_hook=_path)
    except (ArithmeticError, TypeError, ValueError, SettingsError) as error:
        raise ResumeError(
            f"{work} was made by another version of streamprune, or was changed ({show(str(error))}). Start over with "
            "--resume never."
        ) from None


def _path(kind: type[Any], value: Any) -> Path:
    if kind is not Path or not isinstance(value, (str, Path)):
        raise TypeError(f"{show(value)} is not a path")
    return Path(value)


def with_changes(settings: S, work: Path, changes: Mapping[str, Any]) -> S:
    """Recorded settings with `changes`, to resume in `work`.

    Raises ResumeError if a model's code would run only because the record says so.
    """
    if settings.trust_remote_code and "trust_remote_code" not in changes:
        raise ResumeError(
            f"The run in {work} was started with --trust-remote-code, but a file alone must not enable a model's code. "
            "If you started it, and still trust the author, add --trust-remote-code."
        )
    return dataclasses.replace(settings, work_dir=work.absolute(), **changes)


def write_run(folder: Path, run: RecordedRun, tokens: Sequence[Sequence[int]]) -> None:
    """Record the run and its calibration sequences in a work folder. From here on it can be resumed."""
    with writing(f"Recording the run in {folder}", folder):
        # The tokens first: a record of the run implies that they exist.
        for names, body in ((TOKENS_NAMES, tokens), (RUN_NAMES, msgspec.to_builtins(run))):
            for name in names:
                write_record(folder / name, body)
    kill_point("run recorded")


def read_run(folder: Path) -> RecordedRun | None:
    """The record of the run in a work folder; None if neither copy is intact.

    Raises ResumeError for a record that this version did not write.
    """
    for name in RUN_NAMES:
        body = read_record(folder / name, MOST_RECORD_BYTES)
        if body is None:
            continue
        _check_format(folder / name, body)
        try:
            return msgspec.convert(body, RecordedRun)
        except msgspec.ValidationError as error:
            raise ResumeError(
                f"{folder / name} was made or changed by something else: {show(str(error))}. Start over with --resume "
                "never."
            ) from None
    return None


def has_run(folder: Path) -> bool:
    """Whether a run was recorded in a work folder, intact or not."""
    return any((folder / name).exists() for name in RUN_NAMES)


def read_tokens(folder: Path) -> list[list[int]]:
    """The recorded calibration sequences. Raises ResumeError if they are damaged."""
    for name in TOKENS_NAMES:
        tokens = read_record(folder / name, MOST_TOKENS_BYTES)
        if isinstance(tokens, list):
            return tokens
    raise ResumeError(
        f"{folder / TOKENS_NAMES[0]} is damaged, and so is its copy. Give the calibration again with the same "
        "`streamprune run` command, or start over with --resume never."
    )


def write_pruning(folder: Path, pruning: RecordedPruning) -> None:
    """Record a pruning. From here on it can be resumed. Raises OutputError or ResourceError if the disk fails."""
    with writing(f"Recording the pruning in {folder}", folder):
        write_record(folder / PRUNING_NAME, msgspec.to_builtins(pruning))


def read_pruning(folder: Path) -> RecordedPruning | None:
    """The record of the pruning in a work folder; None if it is missing, damaged, or invalid.

    Only the time of a file copy is lost with it. Raises ResumeError for a record of another version.
    """
    body = read_record(folder / PRUNING_NAME, MOST_RECORD_BYTES)
    if body is None:
        return None
    _check_format(folder / PRUNING_NAME, body)
    return converted(body, RecordedPruning)


def has_pruning(folder: Path) -> bool:
    """Whether a pruning was recorded in a work folder, intact or not."""
    return (folder / PRUNING_NAME).exists()


def file_states(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change (ns) of every file of the model that goes into the result, tokenizer files included."""
    states = {}
    for file in (*checkpoint.files, CONFIG_NAME, *map(str, checkpoint.small_files())):
        with reading(checkpoint.folder / file):
            facts = (checkpoint.folder / file).stat()
        states[file] = [facts.st_size, facts.st_mtime_ns]
    return states
