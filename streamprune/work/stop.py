"""Stopping in good order: the first SIGINT or SIGTERM is a request, the second ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user has asked to stop.

    While `patient`, somebody looks at it soon and stops in good order; otherwise a signal becomes a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.patient = False

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, as long as this lasts; a second one ends the process.

    Outside the main thread, where no signals arrive, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for other in usual:
            # Not what Python makes of it: an exception somewhere in the middle is what nobody can prepare for.
            signal.signal(other, signal.SIG_DFL)
        if not request.patient:
            raise KeyboardInterrupt

    for number in usual:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
