"""Files as people have them: arrays, recipes told by their content, byte order marks, compression, long records."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from streamprune.calibration import tokens
from streamprune.calibration.left_out import LeftOut
from streamprune.calibration.rows import Row, _Text
from streamprune.calibration.text_files import read_file
from streamprune.errors import CalibrationError
from tests.recipes import calibrate, load, made_of, texts_of, write_lines
from tests.tokenizer import save_tokenizer

RECORDS = [{"text": "one"}, {"text": "twö"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def zstd(data: bytes) -> bytes:
    compressed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return compressed


def rows(path: Path, **options: Any) -> list[Row]:
    return list(read_file(path, random.Random(0), **options))


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in rows(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps(RECORDS, indent=2).encode()),
        ("a.json", BOM + json.dumps(RECORDS, indent=2).encode()),
        ("a.json", b' \n[ "one" ,\n"tw\\u00f6"\n]\n'),
        ("a.json", b"\n" + LINES),
        ("a.json", BOM + LINES),
        ("a.jsonl", BOM + LINES),
        # (Two files in one.)
        ("a.jsonl", LINES[:16] + BOM + LINES[16:]),
        ("a.txt", LINES),
        ("a", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
        ("a.jsonl.gz", gzip.compress(LINES[:16]) + gzip.compress(LINES[16:])),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.json.zst", zstd(LINES)),
        ("a.jsonl.zst", zstd(LINES[:16]) + zstd(LINES[16:])),
    ],
    # (The bytes of a compressed file have the time in them: workers would not have the same tests.)
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_records_in_every_wrapping(name: str, content: bytes, model: Path) -> None:
    """Named on the command line, in a folder, and in a recipe."""
    path = model.parent / "data" / name
    path.parent.mkdir()
    path.write_bytes(content)
    assert values(path) == RECORDS
    for source in (path, path.parent):
        made = load([source], model, samples=1, seq_len=9)
        # (The second record's tokens are the bytes of its characters.)
        assert sorted(texts_of(model, made)[0].split("</s>")) == ["", "one", "twö"]
    assert sorted(made_of(model, {"path": f"data/{name}", "samples": 2})) == ["one</s>", "twö</s>"]


def test_text_with_a_byte_order_mark_and_text_in_two_bytes(model: Path) -> None:
    (model.parent / "a.txt").write_bytes(BOM + b"hello")
    (model.parent / "a.txt.gz").write_bytes(gzip.compress(BOM + b"hello"))
    for name in ("a.txt", "a.txt.gz"):
        assert made_of(model, {"path": name}) == ["hello</s>"]
    (model.parent / "r.json").write_bytes(BOM + b'{"sources": [{"path": "a.txt", "samples": 1}], "mode": "documents"}')
    assert calibrate(model, model.parent / "r.json").tokens == 6
    (model.parent / "a.txt").write_bytes("hello".encode("utf-16"))
    with pytest.raises(CalibrationError, match=r"a\.txt is not UTF-8 text but UTF-16\. Convert it: iconv"):
        made_of(model, {"path": "a.txt"})


def test_json_that_is_no_data_is_text_in_a_folder_of_code_and_said(model: Path) -> None:
    folder = model.parent / "code"
    folder.mkdir()
    (folder / "users.json").write_text('[{"id": 1}]')
    (folder / "one.json").write_text('{"id": 2}')
    (folder / "package.json").write_text('{\n "six": 6\n}')
    (folder / "numbers.json").write_text("[1, 2]")
    made = load([folder], model, samples=1, seq_len=43)
    assert '[{"id": 1}]' in texts_of(model, made)[0]
    (note,) = (note for note in made.notes if "JSON files" in note)
    assert note.startswith("code: JSON files read as plain text, since they are no records, or such without 'text'")
    assert "'input_ids': 4, first " in note
    # Named by itself, or where the recipe says what counts, it has records.
    with pytest.raises(CalibrationError, match=r"users\.json record 1 has no 'text'"):
        load([folder / "users.json"], model)
    (folder / "one.json").unlink()
    (folder / "package.json").unlink()
    (folder / "numbers.json").unlink()
    assert made_of(model, {"path": "code", "field": "id"}) == ["1</s>"]


@pytest.mark.parametrize(
    "content",
    [
        '// one\n[{"text": "a"}]',
        '[ // one\n {"text": "a"}]',
        '[/* one\n */\n{"id": 1}]',
        '[{ // one\n "id": 1}]',
        '[{"id": 1 /* one */}]',
        '[{"text": "a"} // one\n, {"text": "b"}]',
        '[{"text": "a"}, // one\n {"text": "b"}]',
        '[{"id": "a",}]',
        '[{"id": [1, ]}]',
    ],
)
def test_json_with_comments_is_text_in_a_folder_of_code_and_an_error_as_a_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    left_out = LeftOut()
    assert [row.values for row in read_file(path, random.Random(0), left_out)] == [{"text": content}]
    assert left_out.prose == [path]
    with pytest.raises(CalibrationError, match=r"settings\.json.*JSON has neither comments nor trailing commas"):
        list(read_file(path, random.Random(0)))


@pytest.mark.parametrize("content", ['[{"text": "a', '[{"text": "a"}, {"text": "b', '[{"text": "a"}', '[{"id": 1, "x"'])
def test_an_array_that_is_cut_off_stays_an_error_in_a_folder(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"a\.json( record \d)? is not .*Was the file cut\? Download it again\."):
        list(read_file(path, random.Random(0), LeftOut()))


def test_a_long_array_is_read_no_further_than_it_has_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = {"text": "x" * 70_000, "more": ["[", "]", {"a": '"},{'}]}
    path.write_text(json.dumps([record] * 9 + [{"text": "y"}])[:-1])
    found = read_file(path, random.Random(0))
    assert [next(found).values for _ in range(10)] == [record] * 9 + [{"text": "y"}]
    with pytest.raises(CalibrationError, match=r"a\.json is not a valid JSON array: the end of the file where ','"):
        next(found)


def test_records_after_a_long_one_do_not_copy_what_was_read() -> None:
    """(Of 17 MB with 40,000 short records after a long one that took 36 s.)"""
    text = _Text(io.BytesIO(json.dumps(["x" * 70_000] + ["y"] * 9_000).encode()), "here")
    text.skip("[")
    text.value("record 1")
    held = text._text
    for _ in range(9_000):
        text.skip(",")
        assert text.value("record") == '"y"'
    assert text._text is held
    text.skip("]")
    assert text.is_over()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}, {"text": "b]', r"record 2 is not valid JSON: .*\. Was the file cut\? Download it again"),
        ('[{"text": "a"} {"text": "b"}]', "not a valid JSON array: '{' where ',' belongs"),
        ('[{"text": "a"}] []', "has more after the end of its array"),
        ('[{"text": "a"}, 7]', "record 2 holds a JSON int, not an object"),
        ('[{"text": "a"}, {"text": "\\ud83d"}]', "record 2 is not valid JSON"),
        ("[]", r"a\.json: it contains no text, in 0 records"),
        ("[{" + "[" * 9999, "record 1 is not valid JSON"),
    ],
)
def test_arrays_that_are_none(content: str, words: str, model: Path) -> None:
    path = model.parent / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        load([path], model)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_damaged_compressed_files(name: str, pack: Any, model: Path) -> None:
    (model.parent / name).write_bytes(pack(LINES * 999)[:-9])
    with pytest.raises(CalibrationError, match=rf"{re.escape(name)} cannot be decompressed: .*\. Download it again"):
        made_of(model, {"path": name, "samples": 9999})
    (model.parent / name).write_bytes(b"no such thing")
    with pytest.raises(CalibrationError, match="cannot be decompressed"):
        made_of(model, {"path": name})


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_of_a_long_record_only_what_is_used_is_tokenized(
    mode: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"{number} words and \n" for number in range(50_000))
    write_lines(model.parent / "a.jsonl", {"text": text})
    tokenized = []
    whole = tokens.TokenMaker._tokens

    def counting(maker: Any, place: str, piece: str) -> list[int]:
        tokenized.append(piece)
        return whole(maker, place, piece)

    monkeypatch.setattr(tokens.TokenMaker, "_tokens", counting)
    source = {"sources": [{"path": "a.jsonl"}], "samples": 2 if mode == "packed" else 1, "sequence_length": 100}
    made = calibrate(model, source | {"mode": mode})
    assert "".join(texts_of(model, made)) == text[: made.tokens]
    assert len(tokenized) == 1
    # All of it, in pieces, is the same text.
    parts = list(tokens.TokenMaker(model, False, 256, None, made_day()).pieces("here", text, ended=True))
    assert len(parts) > 9
    assert sum(map(len, parts)) == len(text) + 1


def made_day() -> Any:
    import datetime

    return datetime.date(2024, 1, 1)


BAD = [
    b"{oops\n", b"[1]\n", b'{"text": "\xff"}\n', b'{"other": 1}\n', b'{"input_ids": [999]}\n',
    b'{"messages": [7]}\n',
]  # fmt: skip


def test_bad_records_are_passed_over_up_to_a_share(model: Path) -> None:
    path = model.parent / "a.jsonl"
    path.write_bytes(b"".join(BAD) + b'{"text": "good"}\n' * 94)
    with pytest.raises(CalibrationError, match=r"line \d.*To pass over a few bad records: --skip-bad 1%"):
        load([path], model, samples=10, seq_len=50)
    made = load([path], model, samples=10, seq_len=50, skip_bad=0.06)
    assert "".join(texts_of(model, made)).replace("</s>", "").replace("good", "") == ""
    (note,) = (note for note in made.notes if "bad" in note)
    assert "a.jsonl: 6 of 100 records are bad and passed over (6.0%), first: " in note
    assert made.recipe["sources"][0]["bad_records"] == 6
    assert made.recipe["given"]["skip_bad"] == 0.06
    with pytest.raises(CalibrationError, match=r"6 of the first 100 records are bad, more than --skip-bad 5% passes"):
        load([path], model, samples=10, seq_len=50, skip_bad=0.05)
    # Without end, they are not read to the end.
    path.write_bytes(b"".join(BAD) * 900)
    with pytest.raises(CalibrationError, match="11 of the first 11 records are bad"):
        load([path], model, samples=10, seq_len=50, skip_bad=0.01)


def test_a_usual_field_of_another_kind_is_shown(model: Path) -> None:
    path = write_lines(model.parent / "a.jsonl", {"id": 1, "text": ["one", "two"]})
    with pytest.raises(CalibrationError, match=r"line 1 has \['one', 'two'\] for 'text'\. 'text' is a string, "):
        load([path], model)


def test_sources_that_give_little_or_nothing_say_so_in_numbers(model: Path) -> None:
    path = write_lines(model.parent / "a.jsonl", {"text": " "}, {"text": None})
    with pytest.raises(CalibrationError, match="it contains no text, in 2 records"):
        load([path], model)
    write_lines(path, {"text": "hi"}, {"text": "ho"}, {"text": ""})
    with pytest.raises(CalibrationError, match="shorter than one sequence of 8 tokens: it has 6, in 2 records"):
        load([path], model, seq_len=8)
    made = load([path], model, seq_len=3)
    assert made.notes == (
        "a.jsonl: 1 of 3 records have no text.",
        "The text gave 2 of 512 sequences (6 tokens).",
    )
    made = calibrate(model, {"sources": [{"path": "a.jsonl", "samples": 2}], "mode": "documents"})
    assert made.notes[0] == "a.jsonl: it gives only 6 tokens, from 2 records."
