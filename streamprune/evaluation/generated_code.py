"""Running code that a model wrote, as HumanEval and MBPP do: the consent to it, and limits of time and memory.

The harness's tasks run every answer in a process of its own (`multiprocessing`), and end it after seconds of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil

#: Seconds of CPU time for each process, and bytes of memory beyond what it shares with this one.
CPU_SECONDS = 60
MEMORY_BYTES = 4 << 30
#: What Hugging Face's `evaluate` wants to see before it runs code.
CONSENT = "HF_ALLOW_CODE_EVAL"
_limited = False


@contextmanager
def running_code(allowed: bool) -> Iterator[None]:
    """Let the harness run generated code within, if `allowed`, in processes that are limited.

    Not for several threads at a time: it changes the environment.
    """
    global _limited
    if not allowed:
        yield
        return
    _watch_forks()
    before, method = os.environ.get(CONSENT), multiprocessing.get_start_method(allow_none=True)
    # Only processes that are forked from this one get the limits.
    multiprocessing.set_start_method("fork", force=True)
    os.environ[CONSENT] = "1"
    _limited = True
    try:
        yield
    finally:
        _limited = False
        multiprocessing.set_start_method(method, force=True)
        if before is None:
            del os.environ[CONSENT]
        else:
            os.environ[CONSENT] = before


@cache
def _watch_forks() -> None:
    # It cannot be taken back.
    os.register_at_fork(after_in_child=_limit_this_process)


def _limit_this_process() -> None:
    if not _limited:
        return
    shared = psutil.Process().memory_info().vms
    for kind, most in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, shared + MEMORY_BYTES)):
        # Where the system's own limit is lower, it stays.
        _, hard = resource.getrlimit(kind)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (wanted, wanted))
