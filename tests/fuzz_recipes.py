"""Strange recipes and parquet files: what `fuzz_targets` gives to the calibration."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from tests.fuzzing import as_json, mutated_bytes, mutated_json
from tests.recipes import write_lines

RECIPE_NAME = "recipe.yaml"
RECORD = {
    "text": "some text of a few words", "q": "why?", "choices": ["a", "b"], "n": 1, "meta": {"lang": "de", "m": None},
    "messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}],
    "chat": '[{"from": "human", "value": "hi"}]', "tools": '[{"name": "f", "parameters": {}}]',
}  # fmt: skip
#: Every key that needs no Hub, in a recipe that works with `RECORDS` of such records beside it.
RECIPE: dict[str, Any] = {
    "name": "mix", "description": "of all", "sequence_length": 8, "samples": 12, "mode": "packed", "seed": 3,
    "sources": [
        {"name": "a", "path": ["recipe.jsonl"], "share": 0.5,
         "text": "{{ q }} {{ choices[0] }} {{ meta.lang }}{}", "samples": 30,
         "labels": {"n": ["no", "yes"]}, "filter": {"meta.lang": ["de", "en"], "n": {"min": 0, "max": 9.5}}},
        {"name": "b", "path": "recipe.jsonl", "share": 1, "messages": "chat", "tools": "tools", "thinking": True,
         "columns": {"role": "from", "content": "value"}, "roles": {"human": "user"}, "template_options": {"x": "y"}},
        {"name": "c", "path": "recipe.jsonl", "share": 1, "seed": 5, "tools": "tools",
         "messages": [{"role": "user", "content": "{{ q }}"}, {"role": "bot", "tool_calls": "tools"}]},
        {"name": "d", "path": "recipe.jsonl", "share": 1, "messages": "messages"},
        {"name": "e", "path": "recipe.jsonl", "share": 1, "field": "meta.lang"},
    ],
}  # fmt: skip
YAML = b"""# A comment
samples: 8
sequence_length: 8
sources:
  - {name: a, path: recipe.jsonl, share: 1.0, field: text}
  - name: b
    path: [recipe.jsonl]
    share: 2
    text: >-
      {{ q }}
      and more
"""


def write_records(folder: Path) -> None:
    """What the recipes name."""
    write_lines(folder / "recipe.jsonl", *[RECORD] * 40)


def recipes() -> st.SearchStrategy[bytes]:
    """Recipes with a few values exchanged, and with a few bytes."""
    return mutated_json(RECIPE).map(as_json) | mutated_bytes(YAML)


def parquet_files() -> st.SearchStrategy[bytes]:
    """Parquet files with a few bytes exchanged: of several row groups and types, compressed and not."""
    plain = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORD] * 20), plain, row_group_size=7, compression="none")
    small = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text of a few words"] * 9}), small, compression="zstd")
    ids = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[1, 2, 3], [4, 5], []]}), ids, compression="snappy")
    return st.one_of(*(mutated_bytes(file.getvalue()) for file in (plain, small, ids)))
