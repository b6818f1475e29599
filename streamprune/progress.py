"""Progress of a run: a line for each layer, a bar on a terminal, nothing with --quiet; the log file; utilisation."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from streamprune.hardware.memory import format_bytes

if TYPE_CHECKING:
    import torch


#: The log is named like the output, with this suffix. (OUT.log may be where the user redirects stderr.)
LOG_SUFFIX = ".streamprune.log"


#: Seconds after which a stage says what it is doing, unless it has ended.
SILENT_SECONDS = 1.0


@contextmanager
def stage(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Within this context: say `what` is going on, if it takes so long that it would be missed.

    So a refusal that comes at once is a single message, and nobody waits without a word.
    """
    over = threading.Event()

    def wait() -> None:
        if not over.wait(SILENT_SECONDS):
            say(f"{what} ...")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class LayerProgress:
    """A finished layer (`layer` counts from 0). Without experts `experts` is 0 and `fewest_tokens` None.

    `kept` is None where layers are only scored. `peak_bytes` is the peak of the device's memory in this layer.
    `channels` are those that each kept expert keeps, and those that it had; None if it keeps all.
    """

    layer: int
    kept: int | None
    experts: int
    fewest_tokens: int | None
    seconds: float
    peak_bytes: int
    channels: tuple[int, int] | None = None


class Progress:
    """Prints to stderr, so that stdout stays free for results. Times and peaks also go to a log of JSON lines.

    As a context manager it removes the bar at the end.
    """

    def __init__(self, layers: int, quiet: bool, stream: TextIO | None = None) -> None:
        self._layers, self._quiet, self._stream = layers, quiet, stream or sys.stderr
        self._started = time.monotonic()
        self._events: list[dict[str, Any]] = []
        self._bar: Any = None
        #: Of this sweep over the layers: those that ended, the last of them, and when the first one began.
        self._ended, self._last_layer, self._sweep_began = 0, -1, 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._quiet:
            tqdm.write(text, file=self._stream)

    def name_of(self, layer: int) -> str:
        """A layer and the last one, both counted from 0 as in `model.layers.N`: "layer 3/47"."""
        return name_of_layer(layer, self._layers)

    def start(self, label: str, sequences: int) -> None:
        """Start a step with this many sequences, which `step` counts; on a terminal with a bar."""
        self.end()
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(total=sequences, desc=label, file=self._stream, leave=False, unit="seq")

    def step(self, sequences: int) -> None:
        if self._bar is not None:
            self._bar.update(sequences)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def end_layer(self, done: LayerProgress) -> None:
        self.end()
        # The log keeps these keys, so that reports of earlier outputs still work.
        values = asdict(done)
        if done.channels is None:
            del values["channels"]
        self.log("block", {"block": values.pop("layer"), "blocks": self._layers, **values})
        left = self._seconds_left(done)
        if done.experts:
            scored = f"scored {done.experts}" if done.kept is None else f"kept {done.kept}/{done.experts}"
            narrower = "" if done.channels is None else f" with {done.channels[0]}/{done.channels[1]} channels"
            what = f"{scored}{narrower}, fewest tokens {done.fewest_tokens}"
        else:
            what = "no experts" if done.kept is None else "no experts, copied"
        self.say(
            f"{self.name_of(done.layer)}: {what}, {done.seconds:.1f} s, peak {format_bytes(done.peak_bytes)}, "
            f"{_duration(left)} left"
        )

    def _seconds_left(self, done: LayerProgress) -> float:
        """Seconds until this sweep over the layers ends: as fast as since its first layer began.

        So neither what came before the layers counts, nor layers of a run that was interrupted.
        """
        if done.layer <= self._last_layer or not self._ended:
            self._ended, self._sweep_began = 0, self.seconds - done.seconds
        self._ended, self._last_layer = self._ended + 1, done.layer
        return (self.seconds - self._sweep_began) / self._ended * max(0, self._layers - done.layer - 1)

    def log(self, event: str, values: dict[str, Any]) -> None:
        """Record an event that `write_log` writes to the log, with the seconds since the beginning."""
        self._events.append({"event": event, "at_seconds": round(self.seconds, 3), **values})

    def write_log(self, path: Path) -> None:
        try:
            path.write_text("".join(json.dumps(event) + "\n" for event in self._events), encoding="utf-8")
        except OSError as error:
            # The result is complete without its log.
            self.say(f"note: the log {path} could not be written: {error.strerror}.")


def name_of_layer(layer: int, layers: int) -> str:
    """A layer and the last of so many: "layer 3/47"; behind these is the layer for multi-token prediction."""
    return f"layer {layer}/{layers - 1}" if layer < layers else "the MTP layer"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


#: What a run spends its time on.
RESOURCES = ("read", "compute", "write", "states")


class Busy:
    """A clock for each of `RESOURCES`. Several threads that use one at the same time count once.

    Work that is queued on a GPU is measured by events, which `synchronize` adds up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = dict.fromkeys(RESOURCES, 0)
        self._since, self._spent = dict.fromkeys(RESOURCES, 0.0), dict.fromkeys(RESOURCES, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._began = time.perf_counter()

    @contextmanager
    def at(self, resource: str) -> Iterator[None]:
        """Count the time within this context for `resource`."""
        with self._lock:
            if self._users[resource] == 0:
                self._since[resource] = time.perf_counter()
            self._users[resource] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[resource] -= 1
                if self._users[resource] == 0:
                    self._spent[resource] += time.perf_counter() - self._since[resource]

    @contextmanager
    def on_device(self, resource: str, device: torch.device) -> Iterator[None]:
        """The same for work that is queued on a GPU's current stream. On the CPU the host itself does it."""
        if device.type == "cpu":
            with self.at(resource):
                yield
            return
        import torch

        from streamprune.hardware.device import record_event

        begin = record_event(torch.accelerator.current_stream(device), timed=True)
        yield
        end = record_event(torch.accelerator.current_stream(device), timed=True)
        self._events.append((resource, begin, end))

    def synchronize(self) -> None:
        """Add up the times of events. Waits for the GPU; call it where the run waits anyway."""
        events, self._events = self._events, []
        for resource, begin, end in events:
            end.synchronize()
            self._spent[resource] += begin.elapsed_time(end) / 1000

    def utilisation(self) -> dict[str, float]:
        """The share of the time since the beginning in which each resource was busy, and that time in seconds."""
        self.synchronize()
        seconds = time.perf_counter() - self._began
        shares = {name: round(min(1.0, spent / seconds), 4) for name, spent in self._spent.items()}
        return shares | {"seconds": round(seconds, 3)}


def describe(shares: dict[str, float]) -> str:
    """One line: "busy: computing 96%, reading 9%, writing 12%, moving hidden states 0% of 13.4 s"."""
    words = {"compute": "computing", "read": "reading", "write": "writing", "states": "moving hidden states"}
    parts = ", ".join(f"{word} {shares[name]:.0%}" for name, word in words.items())
    return f"busy: {parts} of {shares['seconds']:.1f} s"
