"""Work that goes on behind the one who hands it over: a block is written while the next one is scored."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType


class Behind:
    """A thread that does one piece of work after the other. Use as a context manager: leaving waits for it.

    At most one piece is under way; what it raises is raised by the next call here. Where the block ends with an error
    of its own, that one counts.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:
                with suppress(Exception):
                    self.wait()
        finally:
            self._thread.shutdown()

    def hand(self, work: Callable[[], None]) -> None:
        """Wait for the piece before, and begin this one."""
        self.wait()
        self._under_way = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until all that was handed over is done."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()
