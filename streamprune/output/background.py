"""Writing in the background: a layer is written while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import TracebackType


class BackgroundWriter:
    """Runs one function at a time in a thread. Use as a context manager: leaving it waits for the function.

    An error of the function is raised by the next call here; but if the `with` block raises one, only that is raised.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._running: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._thread, suppress(Exception) if error is not None else nullcontext():
            self.wait()

    def submit(self, work: Callable[[], None]) -> None:
        """Wait for the previous function, and start this one."""
        self.wait()
        self._running = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until everything that was submitted is done."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
