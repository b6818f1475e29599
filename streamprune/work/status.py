"""What lies in a work folder, told without running anything; and removing what is no longer needed."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from streamprune.errors import ResumeError
from streamprune.machine import format_bytes
from streamprune.output.writer import put_back
from streamprune.work.folder import (
    LOCK_NAME,
    REPLACED_NAME,
    WorkFolder,
    finished_inode,
    folder_bytes,
    resume_command,
)
from streamprune.work.resume import settings_of
from streamprune.work.run_record import read_run


def status_of(folder: Path) -> dict[str, Any]:
    """What is done and what is left of the run in a work folder, as JSON. ResumeError if there is none."""
    run = _recorded(folder)
    work = WorkFolder(folder)
    blocks = int(run["blocks"])
    done = [block for block in range(blocks) if work.read_block(block) is not None]
    return {
        "work_folder": str(folder),
        "model": run["command"]["model"],
        "output": run["command"]["output"],
        "complete": is_complete(folder, run),
        "running": _holder(folder),
        "blocks": blocks,
        "done": done,
        "left": [block for block in range(blocks) if block not in done],
        "states_saved_in_block": work.states.block(),
        "bytes": folder_bytes(folder),
    }


def status_text(status: dict[str, Any]) -> str:
    """The same for a terminal."""
    lines = [
        f"{status['work_folder']}: {status['model']} -> {status['output']}",
        f"{len(status['done'])} of {status['blocks']} blocks are done, {len(status['left'])} are left; "
        f"{format_bytes(status['bytes'])} on disk",
    ]
    if status["complete"]:
        lines.append("The output is complete; `streamprune clean` removes this folder.")
    elif status["running"] is not None:
        lines.append(f"It is being worked on by process {status['running']}.")
    else:
        block = status["states_saved_in_block"]
        lines.append(
            "Hidden states: none saved, so that a resume computes them from the beginning."
            if block is None
            else f"Hidden states were last saved in block {block + 1}."
        )
        lines.append(f"Go on with: {resume_command(Path(status['work_folder']))}")
    return "\n".join(lines)


def clean_up(folder: Path, everything: bool) -> int:
    """Remove what the run in a work folder no longer needs, or with `everything` all of it. Returns the bytes removed.

    Raises ResumeError for a folder that is none, OutputError while a run works in it.
    """
    if not (folder / LOCK_NAME).is_file():
        raise ResumeError(f"{folder} is no work folder of streamprune, so nothing in it is touched.")
    before = folder_bytes(folder)
    # Entering removes what was half written; saving has already removed old generations, unless it was cut short.
    with WorkFolder(folder) as work:
        run = read_run(folder)
        complete = run is not None and is_complete(folder, run)
        if run is not None:
            settings = settings_of(run, folder)
            put_back(settings.folder_beside, settings.output)
            if complete:
                # What stood beside the output, where the work folder is somewhere else.
                shutil.rmtree(settings.folder_beside, ignore_errors=True)
        elif work.keeps_old_output():
            raise ResumeError(
                f"{folder / REPLACED_NAME} is what --overwrite was to replace. Move it where you want it, then clean."
            )
        if everything or complete or run is None:
            work.remove()
        else:
            work.states.forget_old()
    return before - (folder_bytes(folder) if folder.exists() else 0)


def is_complete(folder: Path, run: dict[str, Any]) -> bool:
    """Whether the output of a recorded run has its name."""
    output = Path(run["command"]["output"])
    try:
        # Not by its contents: with --overwrite a pruned model was there before.
        return (output / "streamprune.json").is_file() and output.stat().st_ino == finished_inode(folder)
    except OSError:
        return False


def _recorded(folder: Path) -> dict[str, Any]:
    run = read_run(folder)
    if run is None:
        raise ResumeError(f"{folder} holds no run of streamprune. A run that has been started keeps one in OUT.work.")
    return run


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
