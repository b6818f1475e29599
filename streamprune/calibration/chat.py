"""Rendering chats with the model's chat template: a stranger's program, run where it can do no harm.

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
        # A child that is gone cannot be written to; that it is gone shows when it is read from.
        with contextlib.suppress(ConnectionError):
            self._pipe.send_bytes(request)
        try:
            answer = self._pipe.recv_bytes() if self._pipe.poll(MOST_SECONDS) else None
        except (EOFError, ConnectionError):
            raise CalibrationError(
                f"{chat.place}: the model's chat template went beyond every limit of time or memory with this chat, "
                f"and was ended by the system. {_ADVICE}"
            ) from None
        if answer is None:
            raise CalibrationError(
                f"{chat.place}: the model's chat template was not done with this chat after {MOST_SECONDS:g} seconds, "
                f"and was stopped. {_ADVICE}"
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


#: What an answer begins with.
_TEXT, _REFUSAL = b"t", b"e"


def _render_all(tokenizer: Any, pipe: Connection, parents: Connection) -> None:
    """The child: render what is asked for, one chat after the other, until nobody is left to ask; and end."""
    try:
        parents.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = psutil.Process().memory_info().vms + MOST_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        while True:
            request = pipe.recv_bytes()
            # Should the parent be killed, nobody else would end a template that loops.
            seconds = int(time.process_time() + MOST_SECONDS) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            pipe.send_bytes(_render(tokenizer, *json.loads(request)))
    except BaseException:
        # Whatever it is, also the end of the requests: nothing of the parent's is cleaned up or written a second time.
        os._exit(1)


def _render(tokenizer: Any, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any]) -> bytes:
    try:
        if tools:
            variables = {"tools": tools, **variables}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        if not isinstance(text, str):
            return _REFUSAL + f"it gives a {type(text).__name__} instead of text".encode()
        data = text.encode()
    except MemoryError:
        return _REFUSAL + f"it takes more than {MOST_MEMORY:,} bytes of memory".encode()
    except Exception as error:
        # A chat template is a program: it may refuse roles, orders or contents in any way.
        return _REFUSAL + (str(error).strip() or type(error).__name__)[:500].encode(errors="replace")
    if len(data) > MOST_TEXT:
        return _REFUSAL + f"it makes {len(data):,} bytes of text of it, more than {MOST_TEXT:,}".encode()
    return _TEXT + data
