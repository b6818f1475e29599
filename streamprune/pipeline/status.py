"""`status`: what a work folder contains, without running anything. `clean`: removing what is no longer needed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamprune.common_settings import WORK_SUFFIX, OutputSettings
from streamprune.errors import OutputError, ResumeError
from streamprune.files.kinds import describe, is_scores_file
from streamprune.files.names import sibling_path
from streamprune.hardware.memory import format_bytes
from streamprune.output.plan import REPORT_NAME
from streamprune.output.search_folder import SEARCH_NAME, SEARCH_SUFFIX
from streamprune.output.writer import put_back
from streamprune.work.folder import LOCK_NAME, REPLACED_NAME, WorkFolder, finished_inode, folder_bytes, resume_command
from streamprune.work.records import RecordedPruning, RecordedRun, has_pruning, has_run, read_pruning, read_run


def status_of(folder: Path) -> dict[str, Any]:
    """The progress of the run or pruning in a work folder, as JSON. Raises ResumeError if there is none.

    `done` is the number of scored layers (for `prune`: written layers); `written` is the number whose shards are
    recorded: fewer if experts are selected after all layers are scored, 0 for `score`. Layers count from 0.
    """
    recorded = _recorded(folder)
    if recorded is None and not folder.exists() and has_run(searching := search_work_folder(folder)):
        return status_of(searching)
    if recorded is None:
        if has_pruning(folder) and not has_run(folder):
            raise ResumeError(
                f"{folder} has an unfinished `streamprune prune`, but its record is damaged. Run the same command "
                "again; only the time of the file copy is lost."
            )
        raise ResumeError(f"{folder} has no run of streamprune: it {describe(folder)}. {_where_runs_are(folder)}")
    work, layers, command = WorkFolder(folder), recorded.layers, recorded.command
    found = {index: record for index in range(layers) if (record := work.read_layer(index)) is not None}
    pruning = isinstance(recorded, RecordedPruning)
    done = [index for index, record in found.items() if record.shards or not pruning]
    return {
        "work_folder": str(folder),
        "command": "prune" if pruning else _kind(command),
        "model": command["model"],
        "output": command["output"],
        "stop_if_kl": command.get("stop_if_kl"),
        "complete": is_complete(folder, Path(command["output"])),
        "running": _holder(folder),
        "blocks": layers,
        "done": done,
        "left": [index for index in range(layers) if index not in done],
        "written": [index for index, record in found.items() if record.shards],
        # (Reading states imports torch, and `prune` has no states.)
        "states_saved_in_block": None if pruning else work.states.layer(),
        "bytes": folder_bytes(folder),
    }


def _kind(command: Mapping[str, Any]) -> str:
    """Which command a recorded run is."""
    if "candidates" in command:
        return "search"
    return "score" if command.get("only_score") is True else "run"


def status_text(status: dict[str, Any]) -> str:
    """The result of `status_of` as text."""
    done, left, written = (len(status[name]) for name in ("done", "left", "written"))
    count, command = status["blocks"], status["command"]
    what = {"run": "done", "score": "scored", "prune": "written", "search": "measured"}[command]
    finished = f"{done} of {count} {what}, {left} left"
    if command == "run" and written < done:
        finished = f"{done} of {count} scored, {written} of {count} written"
    of = {"run": "", "score": " (scores)", "prune": " (`streamprune prune`)", "search": " (search)"}[command]
    lines = [
        f"{status['work_folder']}: {status['model']} -> {status['output']}{of}",
        f"layers: {finished}; {format_bytes(status['bytes'])} on disk",
    ]
    if status["complete"]:
        lines.append("The output is complete; `streamprune clean` removes this folder.")
    elif status["running"] is not None:
        lines.append(f"Process {status['running']} is working on it.")
    else:
        if left and command != "prune":
            saved = status["states_saved_in_block"]
            lines.append(
                "No hidden states are saved: resuming computes them from the first layer."
                if saved is None
                else f"Hidden states were last saved in layer {saved}/{count - 1}."
            )
        if type(status["stop_if_kl"]) is float:
            lines.append(
                f"It stops if the KL divergence exceeds {status['stop_if_kl']:g} nats per token (--stop-if-kl); "
                "`resume` accepts another limit."
            )
        lines.append(f"Resume with: {resume_command(Path(status['work_folder']))}")
    return "\n".join(lines)


def clean_up(folder: Path, everything: bool) -> int:
    """Remove what the run in a work folder no longer needs, or with `everything` all files. Returns the bytes removed.

    Raises ResumeError if streamprune did not make the folder, OutputError while a run works in it.
    """
    if not (folder / LOCK_NAME).is_file():
        raise ResumeError(f"Nothing was removed: {folder} {describe(folder)}. {_where_runs_are(folder)}")
    before = folder_bytes(folder)
    # Entering the folder removes partial files. Old generations of states only exist after an interruption.
    with WorkFolder(folder) as work:
        recorded = _recorded(folder)
        settings = recorded.settings_in(folder) if recorded is not None else None
        complete = settings is not None and is_complete(folder, settings.output)
        if settings is not None:
            put_back(settings.output_work_folder, settings.output)
            if complete or (everything and not _holds_anything(settings.output_work_folder)):
                # Also the work folder next to the output, if --work-dir is elsewhere.
                shutil.rmtree(settings.output_work_folder, ignore_errors=True)
        elif work.keeps_old_output():
            raise ResumeError(
                f"{folder / REPLACED_NAME} is the old output that --overwrite replaces. Move it elsewhere, then clean."
            )
        if everything or complete or settings is None:
            work.remove()
        elif has_run(folder):
            work.states.forget_old()
    return before - (folder_bytes(folder) if folder.exists() else 0)


def _holds_anything(folder: Path) -> bool:
    """Whether a work folder next to an output has files of its own, and not just reserves the name for --work-dir."""
    work = WorkFolder(folder)
    ours = (folder / LOCK_NAME).is_file()
    return not ours or work.has_progress() or has_run(folder) or has_pruning(folder) or _holder(folder) is not None


def ended(folder: Path, output: Path) -> bool:
    """Whether the command in a work folder had finished except for removing the folder. If so, remove it."""
    if not is_complete(folder, output):
        return False
    with WorkFolder(folder) as work:
        work.remove()
    # That next to the output, if --work-dir was elsewhere.
    shutil.rmtree(sibling_path(output, WORK_SUFFIX), ignore_errors=True)
    return True


def is_complete(folder: Path, output: Path) -> bool:
    """Whether the output of a work folder is complete at its path: a model, a scores file, or a search."""
    try:
        # Compared by inode, not by contents: with --overwrite an earlier output was there before.
        return is_there(output) and output.stat().st_ino == finished_inode(folder)
    except OSError:
        return False


def output_of(folder: Path) -> Path | None:
    """The finished output whose work folder is gone, since the command that worked in it has ended; None if none is."""
    if folder.exists() or not folder.name.endswith(WORK_SUFFIX):
        return None
    output = folder.with_name(folder.name.removesuffix(WORK_SUFFIX))
    return output if output.name and is_there(output) else None


def nothing_to_resume(folder: Path) -> ResumeError:
    """The error for a folder without a run to resume, with what it is instead."""
    return ResumeError(f"{folder} has no run to resume: it {describe(folder)}. {_where_runs_are(folder)}")


def nothing_to_redo(output: Path) -> OutputError:
    """The error for --from-layer where there is an output already."""
    return OutputError(
        f"{output} exists, and --from-layer redoes layers of an unfinished run only. To make all of it again, give the "
        "command with --overwrite instead."
    )


def search_work_folder(folder: Path) -> Path:
    """The work folder of the search of a `run --best`, which comes first, by the work folder of that run (OUT.work).

    The folder needs a name: not `.` or `/`.
    """
    output = folder.with_name(folder.name.removesuffix(WORK_SUFFIX))
    return sibling_path(sibling_path(output, SEARCH_SUFFIX), WORK_SUFFIX)


def _where_runs_are(folder: Path) -> str:
    """The end of a refusal of a folder that is no work folder: the one that may be meant, if there is one."""
    if folder.name:
        for work in (sibling_path(folder, WORK_SUFFIX), search_work_folder(folder)):
            if has_run(work) or has_pruning(work):
                return f"An unfinished run is in {work}."
    return "The work folder of an unfinished run is OUT.work."


def is_there(output: Path) -> bool:
    """Whether a path has something that streamprune may have made: a model, a scores file, or a search."""
    try:
        return is_scores_file(output) or any((output / name).is_file() for name in (REPORT_NAME, SEARCH_NAME))
    except OSError:
        return False


def remove_leftovers(settings: OutputSettings) -> None:
    """Remove what a command that was killed after its output had its name left in its work folders.

    A work folder that holds something else stays. Raises OutputError while another process works in it.
    """
    ended(settings.work_folder, settings.output)
    for folder in {settings.work_folder, settings.output_work_folder}:
        if folder.is_dir() and (not any(folder.iterdir()) or not _holds_anything(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _recorded(folder: Path) -> RecordedRun | RecordedPruning | None:
    """The record of the run or pruning in a work folder; None if none is intact."""
    return read_run(folder) or (read_pruning(folder) if not has_run(folder) else None)


def _holder(folder: Path) -> str | None:
    """The pid of the process that works in the folder, or None."""
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
