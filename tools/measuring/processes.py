"""Starting what is measured, each in a process of its own, and ending it with all that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import psutil

from measuring.forking import Forked, python_path
from measuring.shapes import ROOT

if TYPE_CHECKING:
    from streamprune.config import RunSettings

#: Characters of a failed process's messages that are shown.
TOLD = 2000


class ProcessError(Exception):
    """A process that failed, or was not done in time: which, how, and its last words."""


@dataclass(frozen=True)
class Job:
    """What a worker has to do: its kind (see `workers`), the files it works on, and how.

    `rounds` counts where a worker repeats things itself; `batch` is sequences at a time of a plain forward.
    """

    kind: str
    model: Path
    tokens: Path
    output: Path
    device: str = "cpu"
    batch: int = 1
    rounds: int = 0
    vram_gib: float | None = None
    states: str = "auto"

    def text(self) -> str:
        """As JSON, for the command line of the worker."""
        return json.dumps(
            {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        )

    def settings(self, **changes: Any) -> RunSettings:
        """The settings of a run that keeps half of the experts, but for the `changes`."""
        from streamprune.config import RunSettings

        experts = json.loads((self.model / "config.json").read_text())["num_experts"]
        fixed: dict[str, Any] = {"keep": experts // 2, "calibration": (str(self.tokens),), "samples": 10**9}
        places: dict[str, Any] = {"device": self.device, "vram_gib": self.vram_gib, "states": self.states}
        return RunSettings(**{"model": str(self.model), "output": self.output, **fixed, **places, **changes})

    @classmethod
    def parse(cls, text: str) -> Job:
        """The job that `text` made."""
        values = json.loads(text)
        return cls(**values | {name: Path(values[name]) for name in ("model", "tokens", "output")})


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of every process here: this checkout's code, whatever is installed; and no report at the end."""
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "STREAMPRUNE_REPORT": "0"}
    return {**os.environ, "PYTHONPATH": python_path(), **quiet, **more}


def work(job: Job, timeout: float | None = None, fresh: bool = False) -> dict[str, Any]:
    """Let a worker do a job: its figures, and with them `process_seconds`, from its start to its end.

    The worker is forked (see `run_forked`); with `fresh` it is an interpreter of its own, for figures of memory and of
    imports. Raises ProcessError if it fails or takes longer than `timeout` seconds.
    """
    begun = time.perf_counter()
    arguments = ["-m", "measuring.workers", job.text()]
    printed = run_process([sys.executable, *arguments], timeout) if fresh else run_forked(arguments, timeout)
    values: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return {**values, "process_seconds": time.perf_counter() - begun}


def run_process(
    command: Sequence[str],
    timeout: float | None = None,
    accepted: Sequence[int] = (0,),
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run a command, with `more` in its environment, and return what it printed on stdout.

    Raises ProcessError for another exit status than the accepted ones, and when it is not done after `timeout` seconds.
    """
    process = subprocess.Popen(
        command, env=environment(more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    return _printed(process, command, timeout, accepted)


def run_forked(arguments: Sequence[str], timeout: float | None = None, accepted: Sequence[int] = (0,)) -> str:
    """As `run_process` of `python ARGUMENTS` (`-m` or `-c` first), in a process that is forked (see `forking`)."""
    command = [sys.executable, *arguments]
    try:
        process = Forked(arguments, ROOT, environment({}))
    except (OSError, EOFError):
        # What cannot be forked here still works, and takes longer.
        return run_process(command, timeout, accepted)
    return _printed(process, command, timeout, accepted)


def _printed(
    process: subprocess.Popen[str] | Forked, command: Sequence[str], timeout: float | None, accepted: Sequence[int]
) -> str:
    """What a process prints on stdout until its end, which comes after `timeout` seconds at the latest."""
    try:
        printed, messages = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ProcessError(f"{_name(command)} was not done after {timeout:.0f} s") from None
    finally:
        _end(process)
    if process.returncode not in accepted:
        said = f"{_name(command)} ended with exit status {process.returncode}"
        # streamprune says what is wrong in one line; what launchers print around it does not help.
        errors = [line for line in messages.splitlines() if line.startswith("Error: ")]
        if errors:
            raise ProcessError(f"{said}: {errors[0].removeprefix('Error: ')}")
        raise ProcessError(f"{said}:\n{(messages.strip() or printed.strip())[-TOLD:]}")
    return printed


def log_of(output: Path) -> list[Mapping[str, Any]]:
    """The events of the log that streamprune writes next to its output."""
    # The name is that of streamprune.progress.LOG_SUFFIX.
    path = output.with_name(output.name + ".streamprune.log")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _name(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])[:TOLD]


def _end(process: subprocess.Popen[str] | Forked) -> None:
    """End a process and all that it started, which would go on without it, also where it is over itself."""
    started: list[psutil.Process] = []
    runs = process.poll() is None
    with suppress(psutil.NoSuchProcess):
        # What has left its session too.
        started = psutil.Process(process.pid).children(recursive=True) if runs else []
    # (It leads a session of its own, so that this is nobody else's group.)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in started:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    if runs:
        process.communicate()
