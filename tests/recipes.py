"""Recipes made on the spot, what comes of them, and stand-ins for data sets of the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from streamprune.calibration.recipe import Source
from streamprune.calibration.sequences import Calibration, load_calibration
from streamprune.common_settings import Sampling
from tests.tokenizer import save_tokenizer

#: Messages, tools and variables, as they reach the template.
TOOL_CHAT = (
    "{% if tools %}[{{ tools|tojson }}]{% endif %}{% if enable_thinking %}[think]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments|tojson }}]{% endfor %}"
    "{% endfor %}{{ effort }}"
)


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_texts(path: Path, letter: str, count: int = 200, length: int = 99) -> Path:
    """A JSONL file of texts that consist of one letter, so that every token tells its source."""
    return write_lines(path, *({"text": letter * length} for _ in range(count)))


def write_table(path: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    """A parquet file of records."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def write_recipe(path: Path, recipe: Any) -> Path:
    # JSON is YAML as well.
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def calibrate(model: Path, recipe: Any, **options: Any) -> Calibration:
    """The calibration that a recipe (a dict, or a path or name) gives for the tokenizer in a folder."""
    if isinstance(recipe, dict):
        recipe = write_recipe(model.parent / "recipe.yaml", recipe)
    return load([recipe], model, **({"max_positions": 4096} | options))


def load(sources: Sequence[Path | str], model: Path, **options: Any) -> Calibration:
    """The calibration that files, folders or recipes give for the tokenizer in a folder, with 256 tokens."""
    sampling = {each.name: options.pop(each.name) for each in fields(Sampling) if each.name in options}
    limits = {"vocab_size": 256, "max_positions": 256} | options
    return load_calibration([str(source) for source in sources], model, Sampling(**sampling), **limits)


def shares_of(calibration: Calibration) -> list[float]:
    return [tokens / calibration.tokens for tokens in calibration.tokens_of]


def texts_of(model: Path, calibration: Calibration, source: int = 0) -> list[str]:
    """The decoded sequences of a source."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = zip(calibration.sequences, calibration.source_of, strict=True)
    return [tokenizer.decode(sequence) for sequence, index in pairs if index == source]


def same_tokens(one: Calibration, other: Calibration) -> bool:
    return len(one.sequences) == len(other.sequences) and all(map(torch.equal, one.sequences, other.sequences))


def stand_in(folder: Path, files: dict[str, list[dict[str, Any]]], configs: list[dict[str, Any]]) -> Path:
    """A data set as its author would upload it: files with records, and a card that says what is which."""
    import yaml

    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            write_table(path, records)
        else:
            write_lines(path, *records)
    if configs:
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def redirect(monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]) -> None:
    """Have data sets of the Hub read from local folders, and nothing asked of the Hub."""
    import datasets

    def load_stream(source: Source, commit: str | None) -> Any:
        assert source.dataset is not None
        assert commit == "c0ffee"
        return datasets.load_dataset(
            str(places[source.dataset]),
            source.subset,
            split=source.split or "train",
            data_files=source.data_files,
            data_dir=source.data_dir,
            streaming=True,
        )

    monkeypatch.setattr("streamprune.calibration.sources.load_stream", load_stream)
    monkeypatch.setattr("streamprune.calibration.sources._commit", lambda source: "c0ffee")


def tool_model(folder: Path) -> Path:
    """A folder with a tokenizer whose chat template knows tools and thinking."""
    tokenizer = save_tokenizer(folder, chat=False)
    tokenizer.chat_template = TOOL_CHAT
    tokenizer.save_pretrained(folder)
    return folder


def made_of(model: Path, source: dict[str, Any], **fields: Any) -> list[str]:
    """The texts that a recipe of one source makes of its records, each by itself."""
    fields = {"mode": "documents", "sequence_length": 4096} | fields
    return texts_of(model, calibrate(model, {"sources": [{"samples": 1} | source]} | fields))
