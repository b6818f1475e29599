"""From records to token ids, with the model's own tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamprune.errors import CalibrationError
from streamprune.source.shard import show
from streamprune.text.chat import ChatRenderer
from streamprune.text.records import Record


class TokenMaker:
    """The model's tokenizer, loaded by the first record that needs it. Use as a context manager.

    `vocab_size` is how many tokens the model knows, and `max_positions` the longest sequence, if it has a limit.
    """

    def __init__(self, folder: Path, trust_remote_code: bool, vocab_size: int, max_positions: int | None) -> None:
        self._folder, self._trust_remote_code = folder, trust_remote_code
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._tokenizer: Any = None
        self._renderer: ChatRenderer | None = None

    def __enter__(self) -> TokenMaker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._renderer is not None:
            self._renderer.__exit__()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises CalibrationError where it has none that works."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder, self._trust_remote_code)
        return self._tokenizer

    @property
    def prefix(self) -> list[int]:
        """The token that the model expects before every text, if its tokenizer adds one."""
        ids = self.tokenizer("a").input_ids
        return [self.tokenizer.bos_token_id] if ids and ids[0] == self.tokenizer.bos_token_id is not None else []

    def document(self, record: Record) -> list[int]:
        """The tokens of a text or chat, with the end-of-text token behind text (a chat template writes its own).

        Raises CalibrationError, naming the record, where the template or the tokenizer fails on it.
        """
        text = record.text if record.chat is None else self._rendered(record)
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:
            # Tokenizers are programs too, and come with the model.
            raise CalibrationError(f"{record.place}: the model's tokenizer fails on this text: {error}") from None
        if record.chat is None and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise CalibrationError(
                f"{record.place}: the tokenizer gave token {largest}, but the model knows only {self._vocab_size}. "
                "Tokenizer and model do not belong together."
            )
        return ids

    def ready(self, record: Record) -> list[int]:
        """The record's own token ids. Raises CalibrationError for what the model could not take."""
        ids = record.input_ids or []
        bad = [item for item in ids if type(item) is not int or not 0 <= item < self._vocab_size]
        if bad or not ids:
            what = f"{show(bad[0])} in 'input_ids'" if bad else "an empty 'input_ids'"
            raise CalibrationError(
                f"{record.place} has {what}; the model's tokens are the numbers 0 to {self._vocab_size - 1}."
            )
        if self._max_positions is not None and len(ids) > self._max_positions:
            raise CalibrationError(
                f"{record.place} has {len(ids):,} tokens, but the model knows only {self._max_positions:,} positions. "
                "Sequences of token ids are never cut; shorten it."
            )
        return ids

    def _rendered(self, record: Record) -> str:
        assert record.chat is not None
        if not self.tokenizer.chat_template:
            raise CalibrationError(
                f"{record.place} holds a chat, but this model's tokenizer has no chat template. Give records with "
                "'text'."
            )
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer)
        return self._renderer.render(record.chat)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in a model's folder. Raises CalibrationError where there is none that works."""
    from transformers import AutoTokenizer

    advice = "Add the tokenizer's files, or calibrate on JSONL records with 'input_ids'."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        works = bool(tokenizer("The answer is 42.").input_ids)
    except Exception as error:
        # Tokenizers of every kind and age fail in their own ways; the user needs one sentence.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CalibrationError(f"The tokenizer in {folder} cannot be loaded: {reason}\n{advice}") from error
    if not works:
        # Without its files, transformers makes up a tokenizer with an empty vocabulary for some models.
        raise CalibrationError(f"{folder} holds no tokenizer. {advice}")
    return tokenizer
