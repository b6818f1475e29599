"""`status` where a command's work folder is gone: it has ended, or stopped between the two halves of `run --best`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamprune.output.plan import REPORT_NAME
from streamprune.pipeline.best_results import best_command
from streamprune.pipeline.status import output_of, search_work_folder
from streamprune.work.folder import resume_command
from streamprune.work.records import has_run


def status_of_ended(folder: Path) -> dict[str, Any] | None:
    """What `status --json` prints of a command whose work folder is gone; None if it is there, or there was none."""
    if folder.exists() or has_run(search_work_folder(folder)):
        return None
    if (best := best_command(folder)) is not None and "output" in best:
        return {"work_folder": str(folder), "output": str(best["output"]), "complete": False}
    output = output_of(folder)
    return {"work_folder": str(folder), "output": str(output), "complete": True} if output is not None else None


def ended_text(status: dict[str, Any]) -> str:
    """The result of `status_of_ended` as text."""
    folder, output = Path(status["work_folder"]), Path(status["output"])
    if not status["complete"]:
        return (
            f"The search of `run --best` is done, and its best candidate not written yet: {output}\n"
            f"Resume with: {resume_command(folder)}"
        )
    lines = [f"Nothing is left to do: {folder} is gone, and {output} is complete."]
    if output.is_file():
        lines.append(f"What next: `streamprune inspect {output}`, `streamprune prune MODEL -o OUT --scores {output}`")
    elif (output / REPORT_NAME).is_file():
        lines.append(
            f"What next: `streamprune eval {output} --against MODEL`, `streamprune push {output} --repo-id NAME/REPO`"
        )
    return "\n".join(lines)
