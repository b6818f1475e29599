"""What may stand in the records of a work folder. A whole record need not be ours: a checksum is no signature.

The settings of a command as a work folder records them, so that it can be gone on with; checked when read back.

What a work folder records of its run, each file twice: no other file could stand in for a damaged one.

What `streamprune prune` records in its work folder: the command, and which experts it was keeping of which model.

Nothing is lost with it but the time of a file copy, so that one that is damaged counts as none.

The state of a model's files, by which it is seen whether they changed between two sittings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint
from streamprune.config import OutputSettings, PruneSettings, PruningTarget
from streamprune.errors import ResumeError, SettingsError
from streamprune.files.durable import reached, read_record, reading, write_record, writing
from streamprune.files.json_text import show
from streamprune.models.config_json import MOST_BLOCKS

#: The format in which runs are recorded.
RUN_FORMAT = 2
#: Bytes that a record may have at most: of tokens, of saved states, and of anything else.
MOST_TOKENS_BYTES, MOST_INDEX_BYTES, MOST_RECORD_BYTES = 2**30, 2**27, 2**24


def checked_run(path: Path, body: Any) -> dict[str, Any]:
    """The record of a run that was read from `path`.

    Raises ResumeError for one that this version did not write: whatever others read from it is of the right kind.
    """
    stated = body.get("format") if isinstance(body, dict) else None
    if type(stated) is not int or stated != RUN_FORMAT:
        raise ResumeError(
            f"{path} was recorded in format {show(stated)}; this version of streamprune reads {RUN_FORMAT}. Use the "
            "version that began the run, or begin anew with --resume never."
        )
    wrong = next((name for name, is_right in _RUN_PARTS.items() if not is_right(body.get(name))), None)
    if wrong is not None:
        raise ResumeError(
            f"{path} was made or changed by something else: its {wrong!r} is {show(body.get(wrong))}. Begin anew with "
            "--resume never."
        )
    known: dict[str, Any] = body
    return known


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on that any machine can hold."""
    return type(value) is int and 0 <= value < 2**63


def is_block(body: Any) -> bool:
    """Whether this can be the record of a finished block: its result (None without experts) and its shards."""
    return (
        isinstance(body, dict)
        and "result" in body
        and (body["result"] is None or isinstance(body["result"], dict))
        and isinstance(body.get("kept"), list)
        and all(map(is_count, body["kept"]))
        and isinstance(body.get("shards"), list)
        and all(map(_is_shard, body["shards"]))
    )


def is_evaluation(body: Any) -> bool:
    """Whether this can be the record of an evaluation: sources with numbers, and all of them together."""
    if (
        not isinstance(body, dict)
        or not isinstance(body.get("data"), dict)
        or not isinstance(body.get("sources"), list)
        or not isinstance(body.get("against"), str)
    ):
        return False
    return all(map(_are_figures, [*body["sources"], body.get("all")]))


def _are_figures(value: Any) -> bool:
    """Whether these can be the figures of a source, compared with an original's."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not is_count(value.get("tokens")):
        return False
    numbers = [value.get(name) for name in ("loss", "perplexity", "original_loss", "kl", "kl_p99", "top1_agreement")]
    intervals = [value.get(f"{name}_interval", ()) for name in ("loss", "kl")]
    for ends in intervals:
        numbers += ends if isinstance(ends, list) and len(ends) == 2 else [0.0 if ends is None else None]
    return all(type(number) is float for number in numbers)


def is_cursor(body: Any) -> bool:
    """Whether this can be the cursor: it names the newest generation of states and perhaps the one before."""
    numbers = body.get("generations") if isinstance(body, dict) else None
    return isinstance(numbers, list) and len(numbers) <= 2 and all(map(is_count, numbers))


def is_pruning(body: Any) -> bool:
    """Whether this can be the record of a pruning: its command, the model's blocks, and what was decided."""
    return (
        isinstance(body, dict)
        and _is_command(body.get("command"))
        and is_count(body.get("blocks"))
        and 1 <= body["blocks"] <= MOST_BLOCKS
        and isinstance(body.get("decided"), dict)
    )


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"file", "nbytes", "sha256"}
        and isinstance(value["file"], str)
        and is_count(value["nbytes"])
        and isinstance(value["sha256"], str)
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_command(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) and "\0" not in value[name] for name in ("model", "output")
    )


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(facts, list) and len(facts) == 2 and all(map(is_count, facts)) for facts in value.values()
    )


def _is_calibration(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("fingerprint"), str)
        and is_count(value.get("sequences"))
        and is_count(value.get("tokens"))
        and _are_texts(value.get("sources"))
        and isinstance(value.get("source_of"), list)
        and all(map(is_count, value["source_of"]))
        and isinstance(value.get("recipe"), dict)
        and _are_texts(value.get("notes"))
    )


#: What a record of a run consists of, and how each part has to look.
_RUN_PARTS: dict[str, Callable[[Any], bool]] = {
    "command": _is_command,
    "settings": lambda value: isinstance(value, dict),
    "source": lambda value: isinstance(value, str),
    "files": _are_files,
    "calibration": _is_calibration,
    "versions": lambda value: isinstance(value, dict),
    "blocks": lambda value: is_count(value) and 1 <= value <= MOST_BLOCKS,
    "budget_bytes": lambda value: value is None or is_count(value),
    "batch_tokens": lambda value: is_count(value) and value >= 1,
}


P = TypeVar("P", bound=OutputSettings)


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

    `changes` count instead of what is recorded. Raises ResumeError if the settings make no sense.
    """
    try:
        command: dict[str, Any] = {**recorded, **changes}
        hints = get_type_hints(kind)
        for name, hint in hints.items():
            if _is_of(Path(), hint) and isinstance(command.get(name), str):
                command[name] = Path(command[name])
            elif get_origin(hint) is tuple and name in command:
                command[name] = tuple(command[name])
            # Settings do not look themselves whether they are of the type that they declare.
            if name in command and not _is_of(command[name], hint):
                raise TypeError(f"{name} is {show(command[name])}")
        return kind(**command)
    except (ArithmeticError, KeyError, TypeError, ValueError, SettingsError) as error:
        raise ResumeError(
            f"{work} was recorded by another version of streamprune, or was changed ({show(str(error))}). Begin anew "
            "with --resume never."
        ) from None


def with_changes(settings: P, work: Path, changes: Mapping[str, Any]) -> P:
    """Recorded settings with what is given anew, to go on in `work`. Raises ResumeError for code nobody now trusts."""
    if settings.trust_remote_code and "trust_remote_code" not in changes:
        raise ResumeError(
            f"What {work} holds was begun with --trust-remote-code, but a file's word is not enough to run a model's "
            "code. If you began it, and trust the author still, add --trust-remote-code."
        )
    return dataclasses.replace(settings, work_dir=work.absolute(), **changes)


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_is_of(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, get_args(hint)[0]) for item in value)
    if hint is Path:
        return isinstance(value, Path) and "\0" not in str(value)
    if hint is str:
        return isinstance(value, str) and "\0" not in value
    return type(value) is hint or (hint is float and type(value) is int)


RUN_NAMES, TOKENS_NAMES = ("run.json", "run.copy.json"), ("tokens.json", "tokens.copy.json")


def write_run(folder: Path, run: dict[str, Any], tokens: list[list[int]]) -> None:
    """Record what is run, and on what. From here on the run can be resumed."""
    with writing(f"Recording the run in {folder}", folder):
        # The tokens first: a record of the run says that they are there.
        for names, body in ((TOKENS_NAMES, tokens), (RUN_NAMES, run)):
            for name in names:
                write_record(folder / name, body)
    reached("run recorded")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the run in a work folder; None if there is nothing whole.

    Raises ResumeError for a record that this version did not write.
    """
    for name in RUN_NAMES:
        body = read_record(folder / name, MOST_RECORD_BYTES)
        if body is not None:
            return checked_run(folder / name, body)
    return None


def has_run(folder: Path) -> bool:
    """Whether a run was recorded in a work folder, whole or not."""
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


PRUNING_NAME = "pruning.json"


def write_pruning(folder: Path, settings: PruneSettings, blocks: int, decided: dict[str, Any]) -> None:
    """Record what is pruned: a model of so many blocks, and `decided` (JSON), which decides every byte of the result.

    From here on the pruning can be resumed. Raises OutputError or ResourceError if the disk fails.
    """
    with writing(f"Recording the pruning in {folder}", folder):
        write_record(folder / PRUNING_NAME, {"command": command_of(settings), "blocks": blocks, "decided": decided})


def read_pruning(folder: Path) -> dict[str, Any] | None:
    """What is recorded of the pruning in a work folder; None if there is nothing whole of this version's."""
    body = read_record(folder / PRUNING_NAME, MOST_RECORD_BYTES)
    return body if is_pruning(body) else None


def has_pruning(folder: Path) -> bool:
    """Whether a pruning was recorded in a work folder, whole or not."""
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
