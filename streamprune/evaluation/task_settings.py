"""Which tasks of lm-evaluation-harness to run, and how. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streamprune.errors import SettingsError

#: The most new tokens of an answer where the user names no number: pruned models that think may never end.
MOST_NEW_TOKENS = 2048
#: What the harness takes where a task states no number.
HARNESS_NEW_TOKENS = 256
#: The harness's names for that number, the one that counts first.
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: What ends the thoughts of models that think. They are no part of an answer.
THINKING_END = "</think>"


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which tasks to run, and how. Raises SettingsError for what is impossible.

    `tasks` are names or patterns of tasks, groups and tags, or YAML files; with `include_path` also those in that
    folder (its YAML may name Python code, which is then run). `limit` is the number of examples of each task, or a
    share of them. `batch_size` is in examples; None is "auto" on a GPU, CPU_BATCH on a CPU, 1 with a server.

    `num_fewshot`, `apply_chat_template` and `gen_kwargs` are the harness's own. `max_new_tokens` is of every answer;
    None is what the task states, and MOST_NEW_TOKENS at most. `thinking` sets the chat template's switch. `allow_code`
    lets tasks run code that the model writes.

    With `server`, the address of one with OpenAI's interface, the model that it has as `served_model` is measured.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: float | None = None
    batch_size: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    gen_kwargs: str | None = None
    max_new_tokens: int | None = None
    thinking: bool | None = None
    allow_code: bool = False
    server: str | None = None
    served_model: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise SettingsError(
                f"--limit {self.limit:g} is not above 0. It is a number of examples, or a share below 1."
            )
        for name, value, least in (
            ("--num-fewshot", self.num_fewshot, 0),
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--batch-size", self.batch_size, 1),
        ):
            if value is not None and value < least:
                raise SettingsError(f"{name} {value} is too small: at least {least}.")
        if self.thinking is not None and not self.apply_chat_template:
            raise SettingsError("--thinking is a switch of the chat template: add --apply-chat-template.")
        if (self.server is None) != (self.served_model is None):
            raise SettingsError("--server and --served-model belong together: its address, and its name of the model.")
        self._check_server()
        stated = [name for name in TOKEN_LIMITS if name in self.generation]
        if stated and self.max_new_tokens is not None:
            raise SettingsError(f"--gen-kwargs has {stated[0]}, and --max-new-tokens is given too. Give one of them.")

    def _check_server(self) -> None:
        if self.server is None:
            return
        try:
            parts = urlsplit(self.server)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            usable = False
        if not usable:
            raise SettingsError(f"--server {self.server!r} is no address. Give one such as http://127.0.0.1:8000")
        if self.apply_chat_template and (self.batch_size or 1) > 1:
            raise SettingsError(f"--batch-size {self.batch_size}: a server takes one chat at a time. Omit it.")

    @property
    def generation(self) -> dict[str, Any]:
        """`gen_kwargs` by name: `name=value,…`, or JSON. Raises SettingsError for anything else."""
        text = (self.gen_kwargs or "").strip()
        if not text.startswith("{"):
            pairs = [part.partition("=") for part in text.split(",") if part]
            if all(name and sign for name, sign, _ in pairs):
                return {name.strip(): _value(value.strip()) for name, _, value in pairs}
        else:
            try:
                found: dict[str, Any] = json.loads(text)
                return found
            except ValueError:
                pass
        raise SettingsError(
            f"--gen-kwargs {self.gen_kwargs!r} is neither name=value,name=value nor JSON. An example: "
            "temperature=0.6,do_sample=true"
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """`generation` without a limit of new tokens."""
        return {name: value for name, value in self.generation.items() if name not in TOKEN_LIMITS}

    def new_tokens(self, stated: dict[str, Any]) -> tuple[int, int]:
        """The most new tokens of an answer for a task with these `generation_kwargs`, and what the task states."""
        own = _limit_of(stated) or HARNESS_NEW_TOKENS
        given = self.max_new_tokens or _limit_of(self.generation)
        return given or min(own, MOST_NEW_TOKENS), own


def _limit_of(kwargs: dict[str, Any]) -> int | None:
    stated = (kwargs.get(name) for name in TOKEN_LIMITS)
    return next((int(value) for value in stated if isinstance(value, int) and value > 0), None)


def _value(text: str) -> Any:
    """A value of `--gen-kwargs` as the harness reads it: booleans, numbers, else text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
