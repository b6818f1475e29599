"""The names of tasks: which lm-evaluation-harness cannot know, told from its files before it and torch are imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamprune.errors import SettingsError

LIST_OF_TASKS = "https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks"
_INSTALL = "pip install 'streamprune[tasks]'"
#: Files that define tasks, groups and tags. (Files that others include often have no suffix.)
_SUFFIXES = (".yaml", ".yml", ".py", "")
#: Characters of patterns, which name tasks that no file has to spell out.
_WILD = set("*?[")


def require_harness() -> None:
    """Raise SettingsError unless lm-evaluation-harness is installed."""
    missing = [name for name in ("lm_eval", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"--tasks needs lm-evaluation-harness, of which {missing[0]} is not installed: {_INSTALL}")


def refuse_tasks(names: Sequence[str], include: Path | None) -> None:
    """Raise SettingsError without the harness, without names, and for those that occur in none of its files."""
    require_harness()
    if include is not None and not include.is_dir():
        raise SettingsError(f"--include-path {include} is not a folder. Give the folder with the tasks' YAML files.")
    plain = [name for name in names if not _WILD & set(name) and not Path(name).is_file()]
    left, files = dict.fromkeys(plain), list(_files(include))
    for path in files:
        for name in [name for name in left if name in path]:
            del left[name]
    # Only for names that are in no path: there are thousands of files.
    for path in files if left else ():
        text = Path(path).read_bytes()
        for name in [name for name in left if name.encode() in text]:
            del left[name]
        if not left:
            break
    if left or not names:
        raise unknown_tasks(list(left), include)


def unknown_tasks(unknown: Sequence[str], include: Path | None) -> SettingsError:
    """The error for names that the harness does not know; or for none at all."""
    reason = f"knows no task, group or tag named {', '.join(unknown)}" if unknown else "was given no task"
    where = "" if include is None else f", and {include} has none that can be read"
    return SettingsError(
        f"--tasks: lm-evaluation-harness {reason}{where}. `python -m lm_eval ls tasks` lists them; see {LIST_OF_TASKS}"
    )


def _files(include: Path | None) -> Iterator[str]:
    """The files in which tasks are defined: the user's, and the harness's own."""
    found = importlib.util.find_spec("lm_eval")
    roots = [str(include)] if include is not None else []
    roots += [str(Path(where) / "tasks") for where in (found.submodule_search_locations or ())] if found else []
    for root in roots:
        for folder, _, names in os.walk(root):
            yield from (os.path.join(folder, name) for name in names if Path(name).suffix in _SUFFIXES)  # noqa: PTH118
