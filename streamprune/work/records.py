"""What a work folder's JSON files may hold: the run with its settings and tokens, finished layers, evaluation, pruning.

Each is checked when it is read. (The checksum in a file shows damage, but not who wrote it.)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint
from streamprune.config import OutputSettings, PruneSettings, PruningTarget
from streamprune.errors import ResumeError, SettingsError
from streamprune.files.durable import reached, read_record, reading, write_record, writing
from streamprune.files.json_text import show
from streamprune.models.config_json import MOST_LAYERS

#: The format of the files in a work folder. Version 0.1.0 wrote formats 1 and 2.
RUN_FORMAT = 3
#: Bytes that a file may have at most: of tokens, of saved states, and of anything else.
MOST_TOKENS_BYTES, MOST_INDEX_BYTES, MOST_RECORD_BYTES = 2**30, 2**27, 2**24
#: Files that are written twice, because nothing else could replace a damaged one.
RUN_NAMES, TOKENS_NAMES = ("run.json", "run.copy.json"), ("tokens.json", "tokens.copy.json")
PRUNING_NAME = "pruning.json"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
LayerCount = Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)]
#: Text that can be part of a path.
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*\Z")]
P = TypeVar("P", bound=OutputSettings)


class RecordedCommand(msgspec.Struct):
    """What the settings of every command have."""

    model: Name
    output: Name


class RecordedCalibration(msgspec.Struct):
    """The calibration of a run, without its tokens."""

    fingerprint: str
    sequences: Count
    tokens: Count
    sources: list[str]
    source_of: list[Count]
    recipe: dict[str, Any]
    notes: list[str]


class RecordedRun(msgspec.Struct):
    """run.json: the command, and everything that decides its result. `files` gives size and change time (ns)."""

    command: RecordedCommand
    settings: dict[str, Any]
    source: str
    files: dict[str, tuple[Count, Count]]
    calibration: RecordedCalibration
    versions: dict[str, Any]
    layers: LayerCount
    batch_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    budget_bytes: Count | None = None


class RecordedPruning(msgspec.Struct):
    """pruning.json: the command of `streamprune prune`, and what was decided."""

    command: RecordedCommand
    layers: LayerCount
    decided: dict[str, Any]


class FinishedShard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard in the work folder: its name, size and SHA-256."""

    file: str
    nbytes: Count
    sha256: str


class FinishedLayer(msgspec.Struct, frozen=True):
    """The record of a finished layer: its statistics (None without experts), the experts it keeps, and its shards.

    Where nothing is written while layers are scored, no experts and no shards are on record yet. The statistics are
    as they were read: they may not be valid.
    """

    result: dict[str, Any] | None
    kept: tuple[Count, ...]
    shards: list[FinishedShard]


class RecordedFigures(msgspec.Struct):
    """What was measured on one source of held-out text."""

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


class RecordedEvaluation(msgspec.Struct):
    """evaluation.json: what `--evaluate` measured."""

    data: dict[str, Any]
    sources: list[RecordedFigures]
    against: str
    all: RecordedFigures


class RecordedCursor(msgspec.Struct):
    """cursor.json: the newest generation of saved states, and perhaps the one before."""

    generations: Annotated[list[Count], msgspec.Meta(max_length=2)]


def is_valid(body: Any, kind: type[msgspec.Struct]) -> bool:
    """Whether JSON that was read from a file is of this kind."""
    try:
        msgspec.convert(body, kind)
    except msgspec.ValidationError:
        return False
    return True


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def is_cursor(body: Any) -> bool:
    """Whether this can be the cursor over the saved states."""
    return is_valid(body, RecordedCursor)


def check_format(path: Path, body: Any) -> None:
    """Raise ResumeError for a file of another version's work folder, or of something else."""
    stated = body.get("format") if isinstance(body, dict) else None
    if type(stated) is int and stated == RUN_FORMAT:
        return
    # A pruning of 0.1.0 states no format.
    old = (type(stated) is int and stated in (1, 2)) or (stated is None and path.name == PRUNING_NAME)
    maker = "streamprune 0.1.0" if old else f"another version of streamprune, in format {show(stated)}"
    raise ResumeError(
        f"{path} was made by {maker}. This version cannot resume it: remove {path.parent}, or begin anew with "
        "--resume never."
    )


def _checked(path: Path, body: Any, kind: type[msgspec.Struct]) -> dict[str, Any]:
    check_format(path, body)
    try:
        msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ResumeError(
            f"{path} was made or changed by something else: {show(str(error))}. Begin anew with --resume never."
        ) from None
    known: dict[str, Any] = body
    return known


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
    return command


def settings_from(kind: type[P], recorded: Mapping[str, Any], work: Path, **changes: Any) -> P:
    """The settings of type `kind` that a command was recorded with in `work`, to go on with it.

    `changes` replace what is recorded. Raises ResumeError if the settings make no sense.
    """
    command: dict[str, Any] = {**recorded, **changes}
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
            f"{work} was made by another version of streamprune, or was changed ({show(str(error))}). Begin anew with "
            "--resume never."
        ) from None


def _path(kind: type[Any], value: Any) -> Path:
    if kind is not Path or not isinstance(value, (str, Path)):
        raise TypeError(f"{show(value)} is no path")
    return Path(value)


def with_changes(settings: P, work: Path, changes: Mapping[str, Any]) -> P:
    """Recorded settings with what is given anew, to go on in `work`. Raises ResumeError for code nobody now trusts."""
    if settings.trust_remote_code and "trust_remote_code" not in changes:
        raise ResumeError(
            f"What {work} holds was begun with --trust-remote-code, but a file's word is not enough to run a model's "
            "code. If you began it, and trust the author still, add --trust-remote-code."
        )
    return dataclasses.replace(settings, work_dir=work.absolute(), **changes)


def write_run(folder: Path, run: dict[str, Any], tokens: list[list[int]]) -> None:
    """Record what is run, and on what. From here on the run can be resumed."""
    with writing(f"Recording the run in {folder}", folder):
        # The tokens first: a record of the run says that they are there.
        for names, body in ((TOKENS_NAMES, tokens), (RUN_NAMES, run)):
            for name in names:
                write_record(folder / name, body)
    reached("run recorded")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the run in a work folder; None if nothing of it is intact.

    Raises ResumeError for a record that this version did not write.
    """
    for name in RUN_NAMES:
        body = read_record(folder / name, MOST_RECORD_BYTES)
        if body is not None:
            return _checked(folder / name, body, RecordedRun)
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
        "`streamprune run` command, or begin anew with --resume never."
    )


def write_pruning(folder: Path, settings: PruneSettings, layers: int, decided: dict[str, Any]) -> None:
    """Record what is pruned: a model of so many layers, and `decided` (JSON), which decides every byte of the result.

    From here on the pruning can be resumed. Raises OutputError or ResourceError if the disk fails.
    """
    with writing(f"Recording the pruning in {folder}", folder):
        record = {"format": RUN_FORMAT, "command": command_of(settings), "layers": layers, "decided": decided}
        write_record(folder / PRUNING_NAME, record)


def read_pruning(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the pruning in a work folder; None if it is missing or damaged.

    Raises ResumeError for a record of another version.
    """
    body = read_record(folder / PRUNING_NAME, MOST_RECORD_BYTES)
    if body is None:
        return None
    check_format(folder / PRUNING_NAME, body)
    # Only the time of a file copy is lost with it, so that what makes no sense counts as missing.
    return body if is_valid(body, RecordedPruning) else None


def has_pruning(folder: Path) -> bool:
    """Whether a pruning was recorded in a work folder, intact or not."""
    return (folder / PRUNING_NAME).exists()


def settings_of_pruning(recorded: dict[str, Any], work: Path) -> PruneSettings:
    """The settings of a recorded pruning, to go on with it in `work`. Raises ResumeError if they make no sense."""
    return settings_from(PruneSettings, recorded["command"], work, resume="required")


def file_states(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change (ns) of every file of the model that goes into the result, tokenizer files included."""
    states = {}
    for file in (*checkpoint.files, CONFIG_NAME, *map(str, checkpoint.small_files())):
        with reading(checkpoint.folder / file):
            facts = (checkpoint.folder / file).stat()
        states[file] = [facts.st_size, facts.st_mtime_ns]
    return states
