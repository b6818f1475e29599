"""The programs in `tools/`, called in this process: another one would import torch anew, which takes seconds."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any
from unittest.mock import patch

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def program(name: str) -> ModuleType:
    """`tools/NAME` as a module."""
    loader = importlib.machinery.SourceFileLoader(name, str(TOOLS / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_program(name: str, *arguments: str, **changes: Any) -> CompletedProcess[str]:
    """What `tools/NAME ARGUMENTS` prints, and how it ends. `changes` replace attributes of it, such as constants.

    An exception that it does not catch is raised here, instead of a traceback on stderr.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with (
        patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}), patch.object(sys, "path", list(sys.path)),
        patch.object(sys, "argv", [name, *arguments]), warnings.catch_warnings(),
        redirect_stdout(out), redirect_stderr(err),
    ):  # fmt: skip
        module = program(name)
        for attribute, value in changes.items():
            assert hasattr(module, attribute)
            setattr(module, attribute, value)
        try:
            module.main()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=err)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
    return CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())
