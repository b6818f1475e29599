"""What lies in a work folder, told without running anything; and removing what is no longer needed."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from streamprune.config import OutputSettings
from streamprune.errors import ResumeError
from streamprune.hardware.memory import format_bytes
from streamprune.output.writer import REPORT_NAME, put_back
from streamprune.work.folder import LOCK_NAME, REPLACED_NAME, WorkFolder, finished_inode, folder_bytes, resume_command
from streamprune.work.records import has_pruning, has_run, read_pruning, read_run, settings_of_pruning


def status_of(folder: Path) -> dict[str, Any]:
    """What is done and what is left of the run or pruning in a work folder, as JSON. ResumeError if there is none.

    `done` are the blocks that are scored, or of a pruning written; `written` those whose shards are on record. That is
    less where the choice needs the scores of all layers, and nothing where scoring is all that is asked for.
    """
    recorded = _recorded(folder)
    work = WorkFolder(folder)
    blocks = int(recorded["blocks"])
    found = {block: record for block in range(blocks) if (record := work.read_layer(block)) is not None}
    pruning = not has_run(folder)
    done = [block for block, record in found.items() if record.shards or not pruning]
    kind = "prune" if pruning else "score" if recorded["command"].get("only_score") is True else "run"
    return {
        "work_folder": str(folder),
        "command": kind,
        "model": recorded["command"]["model"],
        "output": recorded["command"]["output"],
        "stop_if_kl": recorded["command"].get("stop_if_kl"),
        "complete": is_complete(folder, Path(recorded["command"]["output"])),
        "running": _holder(folder),
        "blocks": blocks,
        "done": done,
        "left": [block for block in range(blocks) if block not in done],
        "written": [block for block, record in found.items() if record.shards],
        # (What has no states does without torch.)
        "states_saved_in_block": None if pruning else work.states.block(),
        "bytes": folder_bytes(folder),
    }


def status_text(status: dict[str, Any]) -> str:
    """The same for a terminal."""
    done, left, written = (len(status[name]) for name in ("done", "left", "written"))
    what = {"run": "done", "score": "scored", "prune": "written"}[status["command"]]
    more = ""
    if status["command"] == "run" and written < done:
        what, more = "scored", f", and {written} of {status['blocks']} are written"
    of = {"run": "", "score": " (scores)", "prune": " (`streamprune prune`)"}[status["command"]]
    lines = [
        f"{status['work_folder']}: {status['model']} -> {status['output']}{of}",
        f"{done} of {status['blocks']} blocks are {what}, {left} are left{more}; "
        f"{format_bytes(status['bytes'])} on disk",
    ]
    if status["complete"]:
        lines.append("The output is complete; `streamprune clean` removes this folder.")
    elif status["running"] is not None:
        lines.append(f"It is being worked on by process {status['running']}.")
    else:
        if left and status["command"] != "prune":
            lines.append(_states_text(status["states_saved_in_block"]))
        if type(status["stop_if_kl"]) is float:
            lines.append(
                f"It was begun with --stop-if-kl {status['stop_if_kl']:g} (nats per token), and ends where more is "
                "lost; `resume` takes another limit."
            )
        lines.append(f"Go on with: {resume_command(Path(status['work_folder']))}")
    return "\n".join(lines)


def _states_text(block: int | None) -> str:
    if block is None:
        return "Hidden states: none saved, so that a resume computes them from the beginning."
    return f"Hidden states were last saved in block {block + 1}."


def clean_up(folder: Path, everything: bool) -> int:
    """Remove what the run in a work folder no longer needs, or with `everything` all of it. Returns the bytes removed.

    Raises ResumeError for a folder that is none, OutputError while a run works in it.
    """
    if not (folder / LOCK_NAME).is_file():
        raise ResumeError(f"{folder} is no work folder of streamprune, so nothing in it is touched.")
    before = folder_bytes(folder)
    # Entering removes what was half written; saving has already removed old generations, unless it was cut short.
    with WorkFolder(folder) as work:
        settings = _settings(folder)
        complete = settings is not None and is_complete(folder, settings.output)
        if settings is not None:
            put_back(settings.folder_beside, settings.output)
            if complete or (everything and not _holds_anything(settings.folder_beside)):
                # What stood beside the output, where the work folder is somewhere else.
                shutil.rmtree(settings.folder_beside, ignore_errors=True)
        elif work.keeps_old_output():
            raise ResumeError(
                f"{folder / REPLACED_NAME} is what --overwrite was to replace. Move it where you want it, then clean."
            )
        if everything or complete or settings is None:
            work.remove()
        elif has_run(folder):
            work.states.forget_old()
    return before - (folder_bytes(folder) if folder.exists() else 0)


def _settings(folder: Path) -> OutputSettings | None:
    """What the run or pruning in a work folder was begun with; None where nothing whole says it."""
    run = read_run(folder)
    if run is not None:
        # Only here: it takes torch.
        from streamprune.pipeline.resume import settings_of

        return settings_of(run, folder)
    pruning = read_pruning(folder) if not has_run(folder) else None
    return settings_of_pruning(pruning, folder) if pruning is not None else None


def _holds_anything(folder: Path) -> bool:
    """Whether a folder beside an output is more than what keeps others off while the work is done elsewhere."""
    work = WorkFolder(folder)
    ours = (folder / LOCK_NAME).is_file()
    return not ours or work.has_progress() or has_run(folder) or has_pruning(folder) or _holder(folder) is not None


def ended(folder: Path, output: Path) -> bool:
    """Whether the command in a work folder had ended but for the folder's removal, which is made up for."""
    if not is_complete(folder, output):
        return False
    clean_up(folder, everything=True)
    return True


def is_complete(folder: Path, output: Path) -> bool:
    """Whether the output that a work folder is for has its name: a model, or a file of scores."""
    try:
        # Not by its contents: with --overwrite a pruned model was there before.
        there = output.is_file() or (output / REPORT_NAME).is_file()
        return there and output.stat().st_ino == finished_inode(folder)
    except OSError:
        return False


def _recorded(folder: Path) -> dict[str, Any]:
    recorded = read_run(folder)
    if recorded is None and not has_run(folder):
        recorded = read_pruning(folder)
        if recorded is None and has_pruning(folder):
            raise ResumeError(
                f"{folder} holds what `streamprune prune` began, but its record is damaged. Give the same command "
                "again; nothing but the time of a copy is lost."
            )
    if recorded is None:
        raise ResumeError(f"{folder} holds no run of streamprune. A run that has been started keeps one in OUT.work.")
    return recorded


def _holder(folder: Path) -> str | None:
    """The pid of the process that works in the folder; None if none does."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode(errors="replace").strip()
    finally:
        os.close(descriptor)
    return None
