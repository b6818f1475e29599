"""Python in processes that are forked off one which has imported the libraries: an interpreter takes 5 to 8 s for that.

The process that is forked never uses a GPU: CUDA does not survive a fork, and each process has a context of its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from measuring.shapes import ROOT

_PROCESSES = multiprocessing.get_context("forkserver")
#: What most commands and workers import sooner or later.
_IMPORTED = (
    "accelerate", "jinja2", "compressed_tensors", "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "streamprune.cli", "streamprune.pipeline.run",
    "streamprune.pipeline.prune", "measuring.workers", "measuring.profiling", "measuring.watching",
)  # fmt: skip


class Forked:
    """Like `subprocess.Popen` of `python -m MODULE WORDS` or `python -c CODE WORDS` in a session of its own.

    What it prints goes to files. It is ended with the process that made it. Raises OSError or EOFError where it cannot
    be started.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.arguments = list(arguments)
        self._printed = tempfile.TemporaryDirectory(prefix="streamprune-forked-")
        self._files = [Path(self._printed.name) / name for name in ("out", "err")]
        for path in self._files:
            path.touch()
        given = (self.arguments, folder, dict(environment), self._files)
        self._process = _PROCESSES.Process(target=_run, args=given, daemon=True)
        start_server(environment)
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed on stdout and stderr, once it has ended.

        Raises subprocess.TimeoutExpired where it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
        out, err = (path.read_text() for path in self._files)
        return out, err


def start_server(environment: Mapping[str, str]) -> None:
    """Start the process that is forked, with these variables, unless it runs: some count only when it imports."""
    # (Of the modules that are imported there none may fail: in this one each may.)
    _PROCESSES.set_forkserver_preload(["measuring.imported"])
    with patch.dict(os.environ, {**environment, "PYTHONPATH": python_path()}, clear=True):
        forkserver.ensure_running()


def python_path() -> str:
    """PYTHONPATH for this checkout's code, before what it has already."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "tools"), *([before] if before else [])])


def import_libraries() -> None:
    """Import what most processes need, in the one that is forked."""
    for name in _IMPORTED:
        # What is missing or broken here is said by the process that needs it.
        with suppress(Exception):
            import_module(name)


def _run(arguments: list[str], folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    os.setsid()
    for descriptor, path in enumerate(files, start=1):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if _cuda_is_lost():
        os.execv(sys.executable, [sys.executable, *arguments])
    # A daemon would not be allowed to start others.
    multiprocessing.current_process().daemon = False
    option, what, *words = arguments
    sys.argv = [option, *words]
    sys.path.insert(0, str(folder))
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, option, "exec"), {"__name__": "__main__"})
    finally:
        # multiprocessing leaves these out.
        atexit._run_exitfuncs()


def _cuda_is_lost() -> bool:
    """Whether a library has asked for GPUs as it was imported: CUDA fails in processes that are forked after that."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()
