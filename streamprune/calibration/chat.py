"""Rendering chats with the model's chat template: a stranger's program, run where it can do no harm.

transformers renders templates in Jinja's sandbox, which keeps them from attributes and files, but not from looping for
ever or from filling the memory: `{{ 'x' * 10**12 }}` and `{{ 9**9**9 }}` are single steps that no signal handler or
timer within the process can interrupt. So they are rendered in a forked process, with limits that the system holds it
to, and which is killed when an answer takes too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from streamprune.errors import CalibrationError

#: Seconds for one chat. Templates take milliseconds.
MOST_SECONDS = 20.0
#: Bytes of text for one chat, and of memory beyond what this process has.
MOST_TEXT = 2**26
MOST_MEMORY = 2**30


@dataclass(frozen=True)
class Chat:
    """A chat to render: messages, tools, and variables for the template. `place` is for error messages."""

    place: str
    messages: list[Any]
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


class ChatRenderer:
    """A process that renders chats. It is started by the first of them; use as a context manager to end it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._child: int | None = None
        self._asking = self._answers = -1

    def __enter__(self) -> ChatRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is None:
            return
        for pipe in (self._asking, self._answers):
            os.close(pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        self._child = None

    def render(self, chat: Chat) -> str:
        """The text of a chat.

        Raises CalibrationError, naming the record, where the template refuses it, takes more than MOST_SECONDS or
        MOST_MEMORY, or makes more than MOST_TEXT bytes of it.
        """
        if self._child is None:
            self._start()
        try:
            # Parquet also has dates and the like, which templates get as text.
            request = json.dumps((chat.messages, chat.tools, dict(chat.variables)), default=str).encode()
        except RecursionError:
            raise CalibrationError(f"{chat.place} is nested too deeply for a chat.") from None
        # A child that is gone cannot be written to; why it is gone shows when it is read from.
        with contextlib.suppress(BrokenPipeError):
            _write(self._asking, len(request).to_bytes(8, "little") + request)
        kind, data = _answer(self._answers, chat.place)
        text = data.decode("utf-8", errors="replace")
        if kind != b"t":
            raise CalibrationError(f"{chat.place}: the model's chat template refuses this chat: {text}")
        return text

    def _start(self) -> None:
        asked, self._asking = os.pipe()
        self._answers, answering = os.pipe()
        with warnings.catch_warnings():
            # Newer Pythons warn of forks beside threads. This child only runs Jinja, and one that hangs is killed.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.close(self._asking)
            os.close(self._answers)
            _render_all(self._tokenizer, asked, answering)
        self._child = child
        os.close(asked)
        os.close(answering)


def _answer(pipe: int, place: str) -> tuple[bytes, bytes]:
    """What the child says of one chat: its kind, "t" for text and "e" for an error, and the bytes."""
    deadline = time.monotonic() + MOST_SECONDS
    head = _read(pipe, 9, deadline, place)
    return head[:1], _read(pipe, int.from_bytes(head[1:], "little"), deadline, place)


def _read(pipe: int, size: int, deadline: float, place: str) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise CalibrationError(
                f"{place}: the model's chat template was not done with this chat after {MOST_SECONDS:g} seconds, and "
                "was stopped. Check the template, or give records with 'text'."
            )
        part = os.read(pipe, min(size - len(data), 1 << 20))
        if not part:
            raise CalibrationError(
                f"{place}: the model's chat template went beyond every limit of time or memory with this chat, and was "
                "ended by the system. Check the template, or give records with 'text'."
            )
        data += part
    return bytes(data)


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _render_all(tokenizer: Any, asked: int, answering: int) -> None:
    """The child: render what is asked for, one chat after the other, until nobody is left to ask; and end."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = psutil.Process().memory_info().vms + MOST_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        with os.fdopen(asked, "rb") as requests:
            while len(head := requests.read(8)) == 8:
                # Should the parent be killed, nobody else would end a template that loops.
                seconds = int(time.process_time() + MOST_SECONDS) + 2
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
                messages, tools, variables = json.loads(requests.read(int.from_bytes(head, "little")))
                kind, data = _render(tokenizer, messages, tools, variables)
                _write(answering, kind + len(data).to_bytes(8, "little") + data)
    except BaseException:
        # Whatever it is: it ends here, with nothing of the parent's cleaned up or written a second time.
        os._exit(1)
    os._exit(0)


def _render(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any]
) -> tuple[bytes, bytes]:
    try:
        if tools:
            variables = {"tools": tools, **variables}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        if not isinstance(text, str):
            return b"e", f"it gives a {type(text).__name__} instead of text".encode()
        data = text.encode()
    except MemoryError:
        return b"e", f"it takes more than {MOST_MEMORY:,} bytes of memory".encode()
    except Exception as error:
        # A chat template is a program: it may refuse roles, orders or contents in any way.
        return b"e", (str(error).strip() or type(error).__name__)[:500].encode(errors="replace")
    if len(data) > MOST_TEXT:
        return b"e", f"it makes {len(data):,} bytes of text of it, more than {MOST_TEXT:,}".encode()
    return b"t", data
