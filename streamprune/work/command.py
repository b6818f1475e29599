"""The settings of a command as a work folder records them, so that it can be gone on with; checked when read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from streamprune.errors import ResumeError, SettingsError
from streamprune.settings import SCHEDULES, Goal, Place
from streamprune.source.shard import show

P = TypeVar("P", bound=Place)


def command_of(settings: Place) -> dict[str, Any]:
    """The settings as JSON, with paths that mean the same from any folder."""
    command = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    model = Path(settings.model).expanduser()
    if model.is_dir():
        command["model"] = str(model.absolute())
    if isinstance(settings, Goal) and settings.schedule not in SCHEDULES:
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
