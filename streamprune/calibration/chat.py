"""Rendering chats with the model's chat template: an untrusted program, so it runs in a limited process.

transformers renders templates in Jinja's sandbox, which keeps them from attributes and files, but not from looping for
ever or from filling the memory: `{{ 'x' * 10**12 }}` and `{{ 9**9**9 }}` are single steps that no signal handler or
timer within the process can interrupt. So they are rendered in a forked process with limits that the system enforces,
which is killed when an answer takes too long.

What a template writes must depend on nothing but the chat: where it writes today's date, it gets one day's, whatever
day it is.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import psutil
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.meta import find_undeclared_variables

from streamprune.calibration.messages import text_part, texts_of
from streamprune.errors import BadRecordError, CalibrationError

#: Seconds for one chat. Templates take milliseconds.
MOST_SECONDS = 20.0
#: Bytes of text for one chat, and of memory beyond what this process has.
MOST_TEXT = 2**26
MOST_MEMORY = 2**30
_ADVICE = "Check the template, or give records with 'text'."


@dataclass(frozen=True)
class Chat:
    """A chat to render: messages, tools, documents, and variables for the template. `place` is for error messages.

    A message's content is text, or a list of parts that are text. `left_out` are the types of what was not. `columns`
    are other fields of the record: the template gets those that it reads as variables, unless `variables` has them.
    """

    place: str
    messages: list[Any]
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    documents: list[Any] | None = None
    left_out: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


class ChatRenderer:
    """A process that renders chats. It is started by the first of them; use as a context manager to end it.

    Templates that write the date get that of `day` (None: today). `wrote_date` says whether one did.
    """

    def __init__(self, tokenizer: Any, day: date | None = None) -> None:
        self._tokenizer, self._day = tokenizer, day or date.today()
        self.wrote_date = False
        #: The words in the template: columns of other names need not be sent.
        self._words = frozenset(re.findall(r"\w+", str(getattr(tokenizer, "chat_template", None))))
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
        """The text of a chat, its contents in the form that the template reads: text, or parts.

        Raises CalibrationError, naming the record, if the template exceeds MOST_SECONDS or MOST_MEMORY;
        BadRecordError if it raises an error, or produces more than MOST_TEXT bytes.
        """
        if self._child is None:
            self._start()
        try:
            # Parquet also has dates and the like, which templates get as text.
            given = {name: value for name in ("tools", "documents") if (value := getattr(chat, name))}
            columns = {name: value for name, value in chat.columns.items() if name in self._words}
            request = json.dumps((chat.messages, given | dict(chat.variables), columns), default=str).encode()
        except RecursionError:
            raise BadRecordError(f"{chat.place} is nested too deeply for a chat.") from None
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
        self.wrote_date |= answer[:1] == _DATED
        if answer[:1] == _REFUSAL:
            raise BadRecordError(f"{chat.place}: the model's chat template refuses this chat: {text}")
        return text

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        template = _Template(self._tokenizer, self._day)
        self._child = context.Process(target=_render_all, args=(template, theirs, self._pipe), daemon=True)
        with warnings.catch_warnings():
            # Newer Pythons warn of forks next to threads. This child only runs Jinja, and one that hangs is killed.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child.start()
        theirs.close()


#: The first byte of an answer: text follows, text with the date, or an error message.
_TEXT, _DATED, _REFUSAL = b"t", b"d", b"e"
#: Text that no template has: does a content arrive?
_MARK = "zqxjkv"
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def _render_all(template: _Template, pipe: Connection, parents: Connection) -> None:
    """The child process: render one chat after the other until the parent closes the pipe, then exit."""
    try:
        parents.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = psutil.Process().memory_info().vms + MOST_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        template.pin_date()
        while True:
            request = pipe.recv_bytes()
            # If the parent is killed, only this limit ends a template that loops.
            seconds = int(time.process_time() + MOST_SECONDS) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            pipe.send_bytes(template.answer(*json.loads(request)))
    except BaseException:
        # Always exit at once, so that nothing of the parent is cleaned up or flushed a second time.
        os._exit(1)


class Clock:
    """What transformers asks for the time, for a template: the beginning of `day`. `was_read`: it was asked."""

    def __init__(self, day: date) -> None:
        self._day, self.was_read = day, False

    def now(self, *_: Any) -> datetime:
        """The beginning of the day."""
        self.was_read = True
        return datetime(self._day.year, self._day.month, self._day.day)


@contextlib.contextmanager
def dated(day: date) -> Iterator[Clock]:
    """Within this context templates that this process renders get the date of `day`. The clock says whether one did."""
    clock = Clock(day)
    before = _ask(clock)
    try:
        yield clock
    finally:
        _ask(before)


def _ask(clock: Any) -> Any:
    """Have transformers ask `clock` for the time, for templates; returns what it asked before."""
    from transformers.utils import chat_template_utils

    before, chat_template_utils.datetime = chat_template_utils.datetime, clock
    return before


class _Template:
    """A tokenizer's chat template, in the child process."""

    def __init__(self, tokenizer: Any, day: date) -> None:
        self._tokenizer, self._clock = tokenizer, Clock(day)

    def pin_date(self) -> None:
        """Have templates get the same date on every day, in this process."""
        _ask(self._clock)

    def answer(self, messages: list[Any], variables: dict[str, Any], columns: dict[str, Any]) -> bytes:
        """The chat as text, or why the template refuses it."""
        try:
            read = {name: value for name, value in columns.items() if name in self._variables}
            variables = read | variables
            reads_text, self._clock.was_read = self._reads_text, False
            text = self._in_its_form(messages, reads_text, lambda messages: self._text(messages, variables))
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
        return (_DATED if self._clock.was_read else _TEXT) + data

    def _text(self, messages: list[Any], variables: Mapping[str, Any]) -> Any:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **variables)

    def _in_its_form(self, messages: list[Any], reads_text: bool, render: Callable[[list[Any]], Any]) -> Any:
        """The rendered chat, with contents as text, or as parts where the template reads them.

        A template that expects text would write nothing of a list, or its brackets; one that expects parts nothing of
        text. Where it reads both alike, several parts stay as they are.
        """
        if not reads_text:
            return render([_with_content(message, _as_part, parts=_unchanged) for message in messages])
        joined = [_with_content(message, str, parts=_joined) for message in messages]
        if joined == messages:
            return render(joined)
        text = render(joined)
        try:
            as_parts = render(
                [_with_content(message, str, parts=lambda parts: _as_part(_joined(parts))) for message in messages]
            )
        except Exception:
            # It does not accept parts.
            return text
        return render(messages) if as_parts == text else text

    @cached_property
    def _variables(self) -> set[str]:
        """The variables that the template reads, but for those that transformers gives it."""
        found = set[str]()
        stated = self._tokenizer.chat_template
        for text in stated.values() if isinstance(stated, Mapping) else (stated,):
            environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
            # (transformers has a tag of its own, around what an assistant says.)
            found |= find_undeclared_variables(environment.parse(_GENERATION.sub("", text)))
        return (
            found
            - DEFAULT_NAMESPACE.keys()
            - {"raise_exception", "strftime_now"}
            - {*self._tokenizer.special_tokens_map}
        )

    @cached_property
    def _reads_text(self) -> bool:
        """Whether the template writes a content that is text; or neither that nor parts, so that nobody knows."""

        def writes(content: Any) -> bool:
            try:
                return _MARK in self._text([{"role": "user", "content": content}], {})
            except Exception:
                return False

        return writes(_MARK) or not writes([text_part(_MARK)])


def _with_content(message: Any, text: Callable[[str], Any], parts: Callable[[list[Any]], Any]) -> Any:
    """The message with its content changed by `text` if it is text, by `parts` if it is a list of parts."""
    content = message.get("content")
    if not isinstance(content, (str, list)):
        return message
    return message | {"content": text(content) if isinstance(content, str) else parts(content)}


def _joined(parts: list[Any]) -> str:
    """The texts of parts as vLLM and llama.cpp join them for templates that read text."""
    return "\n".join(texts_of(parts)[0])


def _as_part(text: str) -> Any:
    return [text_part(text)] if text else text


def _unchanged(parts: list[Any]) -> Any:
    return parts
