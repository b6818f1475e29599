"""What fuzzing needs: valid things to begin with, ways to make them strange, and the judgement of an outcome.

An input passes when it ends in success or in one clear message, in time, with little memory, and names the place.
"""

from __future__ import annotations

import copy
import json
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from click.testing import CliRunner
from hypothesis import strategies as st

from streamprune.cli import main
from streamprune.errors import StreampruneError

#: Seconds of computing that an input may take, and seconds on the clock for one that only waits (a busy machine may
#: give a test a fifteenth of its time). A hang is ended by a signal, which no deadline of hypothesis would do.
WATCHDOG_SECONDS, WAITING_SECONDS = 30, 600
#: Bytes of address space that one input may take beyond what is there, so that a giant claim fails instead of swapping.
MOST_MEMORY = 4 * 2**30
#: Characters of a message.
MOST_MESSAGE = 4000

#: Numbers at which code breaks.
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from(
        [2**31 - 1, 2**31, 2**32, 2**50, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**9, 10**30, 10**400]
    ),
    st.sampled_from([0.5, -1.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"), -0.0]),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "..", "../x.safetensors", "/etc/passwd", "a\0b", "\ud800", "F32", "I64", "U8", "float32", "nan",
         "x" * 5000, "tensor", "value", "dict", "__class__", "model.safetensors", "silu", "eager",
         "qwen3_moe", "-1", "\n\n"]
    ),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)


def nested(depth: int, inner: Any = 1) -> Any:
    """Lists within lists; beyond a thousand only as text, since Python's own encoder stops there."""
    for _ in range(depth):
        inner = [inner]
    return inner


STRANGE = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.text(max_size=6), SCALARS, max_size=3),
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3)),
    st.sampled_from([nested(40), nested(200), [[]] * 300, {str(number): number for number in range(300)}]),
)


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, as keys and indexes from the top."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*here, key))


@st.composite
def mutated_json(draw: st.DrawFn, valid: Any, changes: int = 3) -> Any:
    """A valid JSON value with a few of its values replaced, removed, doubled, exchanged or added."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, changes))):
        path = draw(st.sampled_from(list(paths_in(value))))
        if not path:
            # The whole is only rarely replaced: little lies behind that.
            if draw(st.integers(0, 9)) == 0:
                return copy.deepcopy(draw(STRANGE))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "number", "remove", "add", "double"]))
        old = parent[path[-1]]
        if how == "number" and type(old) is int:
            parent[path[-1]] = draw(st.sampled_from([old + 1, old - 1, -old, old * 2, old * 2**40, str(old), [old]]))
        elif how == "remove":
            del parent[path[-1]]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(WORDS)] = copy.deepcopy(draw(STRANGE))
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(old))
        else:
            parent[path[-1]] = copy.deepcopy(draw(STRANGE))
    return value


def as_json(value: Any) -> bytes:
    """JSON in UTF-8, with a lone surrogate as an escape: it has no other form."""
    return json.dumps(value).encode()


@st.composite
def mutated_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with bits flipped, pieces cut out, doubled, or overwritten by something odd."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "drop", "insert", "double", "end"]))
        if how == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[place:]
        elif how == "drop":
            del data[place : place + draw(st.integers(1, 20))]
        elif how == "double":
            data[place:place] = data[place : place + draw(st.integers(1, 40))]
        elif how == "end":
            data += draw(st.binary(max_size=9))
        else:
            data[place:place] = draw(
                st.sampled_from(
                    [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"1" * 5000, b"[" * 2000, b"[" * 100_000,
                     b"{", b"}", b'"', b"\\", b"1e999", b"NaN", b"-", b"\r", b"\n", b"\xf4\x90\x80\x80"]
                )
            )  # fmt: skip
    return bytes(data)


@contextmanager
def watched() -> Iterator[None]:
    """Fail with TimeoutError or MemoryError where an input hangs or fills the memory."""

    def bark(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {WATCHDOG_SECONDS} seconds of computing, or {WAITING_SECONDS} of waiting")

    with Path("/proc/self/statm").open() as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, WATCHDOG_SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, WAITING_SECONDS),
    )
    before, limits = [signal.signal(number, bark) for _, number, _ in timers], resource.getrlimit(resource.RLIMIT_AS)
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_MEMORY, limits[1]))
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def resident_bytes() -> int:
    """Bytes that this process has in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass
class Tally:
    """How many inputs were given, and how many of them were refused."""

    inputs: int = 0
    refused: int = 0


def judge(tally: Tally, names: str | None, action: Callable[[], Any]) -> Any:
    """Run `action`; its result, or the StreampruneError it raised. Anything else it raises fails the input.

    A refusal has to be a message of some length that contains `names`.
    """
    tally.inputs += 1
    with watched():
        try:
            return action()
        except StreampruneError as error:
            refusal = error
    tally.refused += 1
    message = str(refusal)
    assert message.strip(), type(refusal)
    assert len(message) < MOST_MESSAGE, message[:1000]
    message.encode()  # It has to be printed.
    assert names is None or names in message, message
    return refusal


def judge_command(tally: Tally, names: str | None, *arguments: str) -> None:
    """Run the command line. It has to succeed, or to say what is wrong after one "Error: ", without a traceback."""
    tally.inputs += 1
    with watched():
        result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError("".join(traceback.format_exception(result.exception))) from result.exception
    assert "Traceback" not in result.output, result.output
    assert result.exit_code in (0, 1, 2, 3), result.output
    failed = result.exit_code in (1, 2)
    # What others say may stand within our message, but begins no line.
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == failed, result.output
    assert result.stderr.startswith("Error: ") or not failed, result.output
    if failed:
        tally.refused += 1
        assert len(result.stderr) < MOST_MESSAGE, result.stderr[:1000]
        assert names is None or names in result.stderr, result.stderr
