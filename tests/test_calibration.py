"""Calibration data: packing, chats, ready token ids, the built-in text, and everything that can be wrong with files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.calibration.sequences import Calibration
from streamprune.errors import CalibrationError
from tests import recipes
from tests.tokenizer import save_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_tokenizer(folder)
    return folder


def load(model: Path, *sources: Path | str, **options: Any) -> Calibration:
    return recipes.load(sources, model, **({"samples": 4, "seq_len": 8, "seed": 0} | options))


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def text_of(model: Path, sequence: torch.Tensor) -> str:
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(model).decode(sequence)
    return text


def test_text_is_packed_into_full_sequences(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    calibration = load(model, path, samples=10)
    assert [text_of(model, sequence) for sequence in calibration.sequences] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert "3 of 10 sequences (24 tokens)" in calibration.notes[0]
    assert calibration.tokens == 24


def test_documents_are_joined_by_the_end_of_text_token(model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "docs.jsonl", {"text": "aaaa"}, {"text": "bbbb"}, {"text": "cccc"})
    joined = "".join(text_of(model, sequence) for sequence in load(model, path, seq_len=5).sequences)
    assert sorted(joined.split("</s>")) == ["", "aaaa", "bbbb", "cccc"]


def test_a_tokenizer_that_begins_with_a_token_begins_every_sequence_with_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model", bos=True)
    (tmp_path / "t.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    sequences = load(tmp_path / "model", tmp_path / "t.txt").sequences
    assert all(sequence[0] == 1 and len(sequence) == 8 for sequence in sequences)
    assert [text_of(tmp_path / "model", sequence[1:]) for sequence in sequences[:2]] == ["abcdefg", "hijklmn"]


def test_chats_go_through_the_template(model: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}
    path = write_lines(tmp_path / "chat.jsonl", chat)
    (sequence,) = load(model, path, seq_len=15, samples=1).sequences
    assert text_of(model, sequence) == "<user>hi<bot>yo"


def test_input_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    records = [{"input_ids": list(range(3, 3 + length))} for length in (5, 100, 2)]
    path = write_lines(tmp_path / "ids.jsonl", *records)
    calibration = load(tmp_path / "no-tokenizer-needed", path)
    assert [sequence.tolist() for sequence in calibration.sequences] == [record["input_ids"] for record in records]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model: Path) -> None:
    first, again, other = (load(model, "builtin", seq_len=64, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(first.sequences) == 4


def test_builtin_domains(model: Path) -> None:
    records = load(model, "builtin:records", seq_len=64)
    assert '"type"' in text_of(model, torch.cat(records.sequences))
    with pytest.raises(CalibrationError, match=r"unknown domain 'poems'\. Domains: code, prose, arithmetic, records"):
        load(model, "builtin:code,poems")


def test_micro_batches_never_pad(tmp_path: Path) -> None:
    lengths = [5, 7, 5, 5, 7, 100]
    path = write_lines(tmp_path / "ids.jsonl", *({"input_ids": [9] * length} for length in lengths))
    batches = load(tmp_path, path, samples=6).micro_batches(max_tokens=10)
    assert [tuple(batch.ids.shape) for batch in batches] == [(2, 5), (1, 5), (1, 7), (1, 7), (1, 100)]


def test_default_sequence_length_follows_the_model(model: Path) -> None:
    assert {len(sequence) for sequence in load(model, "builtin", seq_len=None, samples=2).sequences} == {256}
    lengths = {len(s) for s in load(model, "builtin", seq_len=None, samples=2, max_positions=None).sequences}
    assert lengths == {2048}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2 is not valid JSON: Expecting value at character 1[.]"),
        (b'["text"]\n', "line 1 holds a JSON list"),
        (b'{"prompt": "a"}\n', "no 'text' .* it has 'prompt'"),
        (b'{"input_ids": [1, 2, 256]}\n', "line 1 has 256 in 'input_ids'; .* 0 to 255"),
        (b'{"input_ids": [1, "2"]}\n', "line 1 has '2' in 'input_ids'"),
        (b'{"input_ids": [1, -1]}\n', "line 1 has -1 in 'input_ids'"),
        (b'{"input_ids": [true]}\n', "line 1 has True"),
        (b'{"input_ids": []}\n', "empty 'input_ids'"),
        (b'{"messages": [{"role": 1}, 3]}\n', "line 1 has 3 among its messages, where an object"),
        (b"\xff\xfe\n", "not UTF-8 text"),
        (b"\n\n", "it contains no text"),
        (b'{"text": "ab"}\n', "shorter than one sequence of 8 tokens"),
    ],
)
def test_bad_files_are_refused_naming_the_place(content: bytes, words: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        load(model, path)
    assert "bad.jsonl" in str(caught.value)


def test_other_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no calibration file .*missing\.txt"):
        load(model, tmp_path / "missing.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="empty cannot be calibrated on: there is no file in it"):
        load(model, tmp_path / "empty")
    with pytest.raises(CalibrationError, match="longer than the 256 positions"):
        load(model, "builtin", seq_len=257)
    long = write_lines(tmp_path / "long.jsonl", {"input_ids": [5] * 300})
    with pytest.raises(CalibrationError, match="300 tokens, but the model has only 256 positions"):
        load(model, long)
    (tmp_path / "t.txt").write_text("zzzzzzzzzzzzzzzzzzz")
    with pytest.raises(CalibrationError, match="The tokenizer does not belong to this model"):
        load(model, tmp_path / "t.txt", vocab_size=50)


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model", chat=False)
    path = write_lines(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(CalibrationError, match="has no chat template"):
        load(tmp_path / "model", path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(CalibrationError, match=r"model has no tokenizer\. Add the tokenizer's files"):
        load(tmp_path / "model", "builtin")


def test_a_file_s_name_is_made_printable_for_the_source(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a\x1b\u00a0b.jsonl"
    write_lines(path, *[{"text": "some words to calibrate on"}] * 9)
    (name,) = load(model, path).sources
    assert name == "a?_b.jsonl"
