"""What the user sees while it runs: a line per block, a bar on a terminal, nothing with --quiet; and the log file."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from streamprune.machine import format_bytes

#: The log's name is the output's with this behind it. (OUT.log may well be where the user sends our messages.)
LOG_SUFFIX = ".streamprune.log"


@dataclass(frozen=True)
class BlockLine:
    """What is told about one finished block. `experts` is 0 and `fewest_tokens` None for a block without experts.

    `kept` is None where blocks are only scored.
    """

    block: int
    blocks: int
    kept: int | None
    experts: int
    fewest_tokens: int | None
    seconds: float
    peak_bytes: int


class Progress:
    """Writes to stderr, so that stdout stays free for results. Times and peaks also go to a log, one JSON per line."""

    def __init__(self, blocks: int, quiet: bool, stream: TextIO | None = None) -> None:
        self._blocks = blocks
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._events: list[dict[str, Any]] = []
        self._bar: Any = None
        self._ended = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """A line for the user, above the bar if there is one."""
        if not self._quiet:
            tqdm.write(text, file=self._stream)

    def start_block(self, block: int, sequences: int) -> None:
        """Begin a block, through which so many sequences go."""
        self.start(f"block {block + 1}/{self._blocks}", sequences)

    def start(self, label: str, sequences: int) -> None:
        """Begin what `step` goes on with, on a terminal with a bar, in the place of what was begun before."""
        self.end()
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(total=sequences, desc=label, file=self._stream, leave=False, unit="seq")

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, sequences: int) -> None:
        if self._bar is not None:
            self._bar.update(sequences)

    def end_block(self, line: BlockLine) -> None:
        self.end()
        self.log("block", asdict(line))
        done = line.block + 1
        # By the blocks of this sitting: earlier ones may be done already.
        self._ended += 1
        left = self.seconds / self._ended * (self._blocks - done)
        if line.experts:
            done_with = f"scored {line.experts}" if line.kept is None else f"kept {line.kept}/{line.experts}"
            what = f"{done_with}, fewest tokens {line.fewest_tokens}"
        else:
            what = "no experts" if line.kept is None else "no experts, copied"
        self.say(
            f"block {done}/{self._blocks}: {what}, {line.seconds:.1f} s, peak {format_bytes(line.peak_bytes)}, "
            f"{_duration(left)} left"
        )

    def log(self, event: str, values: dict[str, Any]) -> None:
        """Record what varies from run to run; `write_log` puts it beside the output."""
        self._events.append({"event": event, "at_seconds": round(self.seconds, 3), **values})

    def write_log(self, path: Path) -> None:
        try:
            path.write_text("".join(json.dumps(event) + "\n" for event in self._events), encoding="utf-8")
        except OSError as error:
            # A result is not worth less without its log.
            self.say(f"note: the log {path} could not be written: {error.strerror}.")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
