"""Rendering chats with the model's chat template: an untrusted program, so it runs in a limited process.

transformers renders templates in Jinja's sandbox, which keeps them from attributes and files, but not from looping for
ever or from filling the memory: `{{ 'x' * 10**12 }}` and `{{ 9**9**9 }}` are single steps that no signal handler or
timer within the process can interrupt. So they are rendered in a forked process with limits that the system enforces,
which is killed when an answer takes too long.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil

from streamprune.errors import CalibrationError

#: Seconds for one chat. Templates take milliseconds.
MOST_SECONDS = 20.0
#: Bytes of text for one chat, and of memory beyond what this process has.
MOST_TEXT = 2**26
MOST_MEMORY = 2**30
_ADVICE = "Check the template, or give records with 'text'."


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
        self._child: Any = None
        self._pipe: Any = None

    def __enter__(self) -> ChatRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._pipe.close()
            self._child.kill()
            self._child.join()
            self._child = None

    def render(self, chat: Chat) -> str:
        """The text of a chat.

        Raises CalibrationError, naming the record, if the template raises an error, exceeds MOST_SECONDS or
        MOST_MEMORY, or produces more than MOST_TEXT bytes.
        """
        if self._child is None:
            self._start()
        try:
            # Parquet also has dates and the like, which templates get as text.
            request = json.dumps((chat.messages, chat.tools, dict(chat.variables)), default=str).encode()
        except RecursionError:
            raise CalibrationError(f"{chat.place} is nested too deeply for a chat.") from None
        # If the child has ended, writing fails; reading reports it below.
        with contextlib.suppress(ConnectionError):
            self._pipe.send_bytes(request)
        try:
            answer = self._pipe.recv_bytes() if self._pipe.poll(MOST_SECONDS) else None
        except (EOFError, OSError):  # OSError: it ended within its answer.
            raise CalibrationError(
                f"{chat.place}: the model's chat template exceeded the limits of time or memory with this chat, "
                f"and was killed by the system. {_ADVICE}"
            ) from None
        if answer is None:
            raise CalibrationError(
                f"{chat.place}: the model's chat template was still running after {MOST_SECONDS:g} seconds with this "
                f"chat, and was stopped. {_ADVICE}"
            )
        text: str = answer[1:].decode("utf-8", errors="replace")
        if answer[:1] == _REFUSAL:
            raise CalibrationError(f"{chat.place}: the model's chat template refuses this chat: {text}")
        return text

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_render_all, args=(self._tokenizer, theirs, self._pipe), daemon=True)
        with warnings.catch_warnings():
            # Newer Pythons warn of forks next to threads. This child only runs Jinja, and one that hangs is killed.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child.start()
        theirs.close()


#: The first byte of an answer: text follows, or an error message.
_TEXT, _REFUSAL = b"t", b"e"


def _render_all(tokenizer: Any, pipe: Connection, parents: Connection) -> None:
    """The child process: render one chat after the other until the parent closes the pipe, then exit."""
    try:
        parents.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = psutil.Process().memory_info().vms + MOST_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        while True:
            request = pipe.recv_bytes()
            # If the parent is killed, only this limit ends a template that loops.
            seconds = int(time.process_time() + MOST_SECONDS) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            pipe.send_bytes(_render(tokenizer, *json.loads(request)))
    except BaseException:
        # Always exit at once, so that nothing of the parent is cleaned up or flushed a second time.
        os._exit(1)


def _render(tokenizer: Any, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any]) -> bytes:
    try:
        if tools:
            variables = {"tools": tools, **variables}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        if not isinstance(text, str):
            return _REFUSAL + f"it returns a {type(text).__name__} instead of text".encode()
        data = text.encode()
    except MemoryError:
        return _REFUSAL + f"it needs more than {MOST_MEMORY:,} bytes of memory".encode()
    except Exception as error:
        # A chat template is a program: it may raise anything for roles, orders or contents that it does not accept.
        return _REFUSAL + (str(error).strip() or type(error).__name__)[:500].encode(errors="replace")
    if len(data) > MOST_TEXT:
        return _REFUSAL + f"it produces {len(data):,} bytes of text, more than {MOST_TEXT:,}".encode()
    return _TEXT + data
