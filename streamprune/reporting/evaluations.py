"""What evaluations leave with a model: files of JSON in a folder of it, one for each kind. No torch.

| file | who writes it | what it holds |
|---|---|---|
| `text.json` | `eval --data`, `run --evaluate` | loss, and against the original KL and agreement, by source |
| `generation.json` | `eval --generate` | how continuations end: by themselves, in loops, not at all |
| `tasks.json` | `eval --tasks` | what lm-evaluation-harness gave, as it gave it |

`text.json` has `model`, `against` (null without), `dtype`, `data`, and `sources`, a list with for each source `name`,
`sequences`, `tokens` (that were predicted), `loss` and `perplexity`; with `against` also `original_loss`,
`original_perplexity`, `loss_increase`, `kl`, `kl_p99`, `top1_agreement` and `hidden_error` (a number per block). Losses
and KL are nats per token. Behind `loss`, `perplexity`, `loss_increase`, `kl` and `top1_agreement` stands
`NAME_interval`, [low, high] of 95 %, null where a source has fewer than two sequences. `all` is the same over all
tokens.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamprune.checkpoint.index import read_json
from streamprune.files.durable import write_whole, writing
from streamprune.hardware.memory import existing_folder
from streamprune.reporting.record import public_name

FOLDER_NAME = "evaluation"
TEXT_NAME, GENERATION_NAME, TASKS_NAME = "text.json", "generation.json", "tasks.json"
#: The format of text.json and generation.json.
RESULT_FORMAT = 1


def results_folder(model: Path) -> Path:
    """Where the results about a model lie that lies in `model`."""
    return model / FOLDER_NAME


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of that name in a folder of results; None if there is none.

    Raises CheckpointError for a file that is no JSON object.
    """
    path = folder / name
    return read_json(path) if path.is_file() else None


def without_folders(value: Any) -> Any:
    """A result, which may be published, with paths of this machine shortened to the last part of their names."""
    if isinstance(value, Mapping):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    if isinstance(value, str) and "/" in value:
        # What is no path at all may be too long for one, or hold what none can.
        with suppress(OSError, ValueError):
            return public_name(value)
    return value


def check_writable(folder: Path) -> None:
    """Raise OutputError, ResourceError unless results can be written into a folder, which need not be there yet."""
    with writing(f"Writing results to {folder}", folder):
        there = folder if os.path.lexists(folder) else existing_folder(folder)
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def write_result(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all, in the place of an earlier one. Raises OutputError, ResourceError."""
    with writing(f"Writing {folder / name}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, (json.dumps(result, indent=2) + "\n").encode())
