"""From documents to token ids: the model's tokenizer, and its chat template."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from streamprune.calibration.chat import Chat, ChatRenderer
from streamprune.errors import BadRecordError, CalibrationError
from streamprune.files.json_text import parse_json, read_limited, show

#: Longer texts are tokenized in pieces of so many characters, as far as they are used: of one record of 18 MB that took
#: 214 s as a whole.
PIECE_CHARACTERS = 1 << 16
#: A piece ends before a space, if there is one among its last characters, where tokenizers begin a token anyway.
_SEARCHED_CHARACTERS = 1 << 10
#: Where processors keep a chat template that the tokenizer's own files may lack.
_PROCESSOR_TEMPLATE, _MOST_TEMPLATE_BYTES = "chat_template.json", 1 << 24
#: Files of a tokenizer: of a folder without one of them transformers says at length what it looked for.
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "merges.txt")
#: Keys in config.json of tokens that stand for what is not text.
_PLACEHOLDER_KEY = re.compile(r"(image|img|video|vision|audio|boi|eoi|boa|eoa)(_\w+)?_token_(id|index)")


class TokenMaker:
    """The model's tokenizer, loaded when the first record needs it. Use as a context manager.

    `vocab_size` is the model's number of tokens, `max_positions` its longest sequence, if it has a limit, and `day` the
    date for chat templates that write one.
    """

    def __init__(
        self, folder: Path, trust_remote_code: bool, vocab_size: int, max_positions: int | None, day: date
    ) -> None:
        self._folder, self._trust_remote_code = folder, trust_remote_code
        self._vocab_size, self._max_positions, self._day = vocab_size, max_positions, day
        self._renderer: ChatRenderer | None = None

    @property
    def wrote_date(self) -> bool:
        """Whether the chat template wrote the date into a text."""
        return self._renderer is not None and self._renderer.wrote_date

    def __enter__(self) -> TokenMaker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._renderer is not None:
            self._renderer.__exit__()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises CalibrationError if there is none that works."""
        return load_tokenizer(self._folder, self._trust_remote_code)

    @property
    def prefix(self) -> list[int]:
        """The token that the model expects before every text, if its tokenizer adds one."""
        ids = self.tokenizer("a").input_ids
        return [self.tokenizer.bos_token_id] if ids and ids[0] == self.tokenizer.bos_token_id is not None else []

    def pieces(self, place: str, text: str, ended: bool) -> Iterator[list[int]]:
        """The tokens of a text, piece by piece if it is long; with `ended` the end-of-text token comes last.

        (A chat template writes its own.) Raises CalibrationError, naming the record, if the tokenizer fails on it.
        """
        begin = 0
        while True:
            end = _piece_end(text, begin)
            ids = self._tokens(place, text[begin:end])
            if end == len(text) and ended and self.tokenizer.eos_token_id is not None:
                ids = [*ids, self.tokenizer.eos_token_id]
            yield ids
            begin = end
            if end == len(text):
                return

    def _tokens(self, place: str, text: str) -> list[int]:
        tokenizer = self.tokenizer
        try:
            ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:
            # The tokenizer may be code from the model's folder, and raise anything.
            raise BadRecordError(f"{place}: the model's tokenizer fails on this text: {error}") from None
        if (largest := max(ids, default=0)) >= self._vocab_size:
            raise CalibrationError(
                f"{place}: the tokenizer produced token {largest}, but the model has only {self._vocab_size} tokens. "
                "The tokenizer does not belong to this model."
            )
        return ids

    @cached_property
    def placeholders(self) -> dict[int, str]:
        """The tokens that stand for what is not text, such as an image, with the config's names of them."""
        try:
            config = parse_json(read_limited(self._folder / "config.json", _MOST_TEMPLATE_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        # (Some models have such keys in the config of a part.)
        parts = [config, *config.values()] if isinstance(config, dict) else []
        stated = [item for part in parts if isinstance(part, dict) for item in part.items()]
        return {value: key for key, value in stated if type(value) is int and _PLACEHOLDER_KEY.fullmatch(key)}

    def rendered(self, chat: Chat) -> str:
        """The text of a chat. Raises CalibrationError, naming the record, without a template or if it fails."""
        if not self.tokenizer.chat_template:
            raise CalibrationError(
                f"{chat.place} is a chat, but this model's tokenizer has no chat template. Give records with 'text'."
            )
        self._renderer = self._renderer or ChatRenderer(self.tokenizer, self._day)
        return self._renderer.render(chat)

    def ready(self, place: str, ids: list[Any]) -> list[int]:
        """A record's own token ids. Raises BadRecordError if the model cannot process them."""
        bad = [item for item in ids if type(item) is not int or not 0 <= item < self._vocab_size]
        if bad or not ids:
            what = f"{show(bad[0])} in 'input_ids'" if bad else "an empty 'input_ids'"
            raise BadRecordError(f"{place} has {what}; the model's tokens are the numbers 0 to {self._vocab_size - 1}.")
        if (name := next((self.placeholders[item] for item in ids if item in self.placeholders), None)) is not None:
            raise BadRecordError(
                f"{place} has the token that config.json names as {name!r} in 'input_ids', which stands for something "
                "other than text, and nothing goes with it. Only text is calibrated on: remove such records."
            )
        if self._max_positions is not None and len(ids) > self._max_positions:
            raise BadRecordError(
                f"{place} has {len(ids):,} tokens, but the model has only {self._max_positions:,} positions. "
                "Sequences of token ids are never cut: shorten it."
            )
        return ids


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in a model's folder. Raises CalibrationError if there is none that works."""
    from transformers import AutoTokenizer

    advice = "Add the tokenizer's files, or calibrate on JSONL records with 'input_ids'."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        works = bool(tokenizer("The answer is 42.").input_ids)
    except Exception as error:
        if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
            raise CalibrationError(f"{folder} has no tokenizer. {advice}") from error
        # Tokenizers raise all kinds of errors, some of them long.
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
        raise CalibrationError(f"The tokenizer in {folder} cannot be loaded: {reason}\n{advice}") from error
    if not works:
        # If its files are missing, transformers creates a tokenizer with an empty vocabulary for some models.
        raise CalibrationError(f"{folder} has no tokenizer. {advice}")
    if not tokenizer.chat_template and (template := _processor_template(folder)) is not None:
        tokenizer.chat_template = template
    return tokenizer


def _processor_template(folder: Path) -> Any:
    """The chat template that a model has only for its processor; None without one.

    Raises CalibrationError if the file cannot be read.
    """
    path = folder / _PROCESSOR_TEMPLATE
    if not path.is_file():
        return None
    try:
        found = parse_json(read_limited(path, _MOST_TEMPLATE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} cannot be read: {str(error)[:300]}. Download it again.") from None
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) and template else None


def _piece_end(text: str, begin: int) -> int:
    """Where the piece of a text that begins here ends."""
    end = begin + PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    space = max(text.rfind(mark, end - _SEARCHED_CHARACTERS, end) for mark in (" ", "\n"))
    return space if space > begin else end
