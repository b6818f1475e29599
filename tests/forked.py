"""Python in processes that are forked off one which has imported torch, transformers and the package.

An interpreter of its own imports them in 5 to 8 s of CPU time. For tests of what processes do: not of what they import
or say while they do, nor with variables that libraries read when they are imported (HF_HOME), nor of memory.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

from streamprune import progress

_PROCESSES = multiprocessing.get_context("forkserver")
#: Of the process that is forked: as it was before any test changed it, and without threads, which are lost in a fork.
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
#: What most commands import sooner or later.
_IMPORTED = [
    "streamprune.cli",
    "streamprune.pipeline.run",
    "streamprune.pipeline.prune",
    "accelerate",
    "jinja2",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


class Forked:
    """Like `subprocess.Popen` of `python -c CODE WORDS` with pipes for what it prints, as text."""

    def __init__(
        self, code: str, words: Sequence[object], folder: Path, environment: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        self._printed = tempfile.TemporaryDirectory(prefix="streamprune-forked-")
        self._files = [Path(self._printed.name) / name for name in ("out", "err")]
        for path in self._files:
            path.touch()
        given = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
        arguments = (code, list(map(str, words)), folder, given, self._files)
        self._process = _PROCESSES.Process(target=_run, args=arguments, daemon=True)
        _PROCESSES.set_forkserver_preload(_IMPORTED)
        with patch.dict(os.environ, _ENVIRONMENT, clear=True):
            self._process.start()

    def poll(self) -> int | None:
        """The exit status, negative for the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, once it has ended. Raises TimeoutError."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"process {self._process.pid} still runs after {timeout} s")
        out, err = (path.read_text() for path in self._files)
        return out, err


def _run(code: str, words: list[str], folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, path in enumerate(files, start=1):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *words]
    # As in the tests' own process: what is said must not depend on the machine.
    progress.SILENT_SECONDS = 1e6
    try:
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    finally:
        # multiprocessing leaves these out.
        atexit._run_exitfuncs()
