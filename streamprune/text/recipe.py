"""A calibration recipe: which sources, in which shares, made into sequences in which way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.text.template import Path as FieldPath
from streamprune.text.template import Template

#: How documents become sequences. `packed`: laid end to end and divided into full sequences. `documents`: each one by
#: itself, cut at the sequence length. `bucketed`: the same, with every length rounded down to one of sixteen per power
#: of two, so that many are equal and go through the model together; less than a sixteenth of a document is lost.
MODES = ("packed", "documents", "bucketed")


@dataclass(frozen=True)
class Turn:
    """One message of a chat that is built from a record's fields; `tool_calls` is the field that holds them."""

    role: str
    content: Template | None = None
    tool_calls: FieldPath | None = None


@dataclass(frozen=True)
class ChatForm:
    """Where a record's chat is, and how the model's chat template is to render it.

    `messages` is the field with the messages; without it they are made of templates, `turns`. `columns` are the keys of
    role and content in a message, and `roles` what its roles are called in chat templates. `tools` is the field with
    the tools; `options` are variables for the template.
    """

    messages: FieldPath | None = None
    turns: tuple[Turn, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    tools: FieldPath | None = None
    thinking: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools."""
        # Qwen's templates and their kin ask for the first name, those of DeepSeek and Granite for the second.
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking, "thinking": self.thinking}
        return {**thinking, **self.options}


@dataclass(frozen=True)
class Condition:
    """What a record's field must be for the record to be used: one of `values`, or within `least` and `most`."""

    path: FieldPath
    values: tuple[Any, ...] | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Source:
    """One named source of a recipe: `builtin`, `paths` or `dataset` says where it is.

    `share` is its part of all tokens, and `samples` how many records are drawn from it at most (or, where no source
    has a share, exactly). Without `text` and `chat`, a record's own `input_ids`, `messages`, `conversations` or `text`
    count.
    """

    name: str
    builtin: str | None = None
    paths: tuple[Path, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    data_dir: str | None = None
    share: float | None = None
    samples: int | None = None
    seed: int | None = None
    text: Template | None = None
    chat: ChatForm | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    #: The recipe's own words, for the record of how the tokens were made.
    stated: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def public(self) -> dict[str, Any]:
        """What may be published of it, as JSON: no local folder is in it."""
        stated = {key: value for key, value in self.stated.items() if key not in ("name", "share", "samples", "path")}
        if self.paths:
            stated["path"] = [path.resolve().name for path in self.paths]
        elif self.builtin is not None:
            stated["builtin"] = self.builtin
        return stated


@dataclass(frozen=True)
class Recipe:
    """How calibration tokens are made. The total is `tokens`, or `samples` times the sequence length.

    With `strict` a source that is too short is an error; else it gives what it has, and the others fill up.
    """

    name: str
    sources: tuple[Source, ...]
    description: str = ""
    sequence_length: int | None = None
    samples: int | None = None
    tokens: int | None = None
    mode: str = "packed"
    seed: int = 0
    strict: bool = True

    @property
    def by_count(self) -> bool:
        """Whether each source gives a stated number of records, instead of a share of the tokens."""
        return all(source.share is None and source.samples is not None for source in self.sources)
