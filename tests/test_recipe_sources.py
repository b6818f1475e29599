"""Where records come from, and how they become text: files, folders, parquet, templates, filters and chats."""

from __future__ import annotations

import datetime
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from streamprune.calibration.recipe import Source
from streamprune.calibration.records import content_of
from streamprune.calibration.rows import Row
from streamprune.calibration.sources import shuffled
from streamprune.calibration.templates import MissingFieldError, compiled, filled, parse_path
from streamprune.calibration.text_files import BATCH_ROWS, files_of, read_file, read_parquet
from streamprune.errors import CalibrationError
from tests.recipes import calibrate, load, made_of, same_tokens, texts_of, tool_model, write_lines, write_table


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tool_model(tmp_path / "model")


def test_parquet_and_jsonl_of_the_same_records_give_the_same_tokens(model: Path) -> None:
    records = [{"text": f"größer {n}"} for n in range(10)]
    write_lines(model.parent / "a.jsonl", *records)
    write_table(model.parent / "a.parquet", records)
    one, other = (load([model.parent / f"a.{kind}"], model, samples=4, seq_len=16) for kind in ("jsonl", "parquet"))
    assert sorted(texts_of(model, one)[0]) == sorted(texts_of(model, other)[0])
    assert len(one.sequences) == len(other.sequences) == 4
    ids = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    path = write_table(model.parent / "ids.parquet", ids)
    ready = load([path], model.parent / "none", samples=2)
    assert [sequence.tolist() for sequence in ready.sequences] == [[5, 6, 7], [8, 9]]


def test_parquet_rows_of_every_type_and_their_places(tmp_path: Path) -> None:
    record = {
        "text": "x", "none": None, "day": datetime.date(2024, 1, 2), "bytes": b"\xff", "list": [{"a": 1, "b": None}],
    }  # fmt: skip
    path = write_table(tmp_path / "a.parquet", [record] * 40, row_group_size=20)
    rows = list(read_parquet(path, random.Random(0)))
    assert len(rows) == 40
    assert {row.place.partition("a.parquet ")[2] for row in rows} == {
        f"row {row} of row group {group}" for row in range(1, 21) for group in (1, 2)
    }
    assert rows[0].values == record
    source = Source(path=str(path), text="{{ day }} {{ bytes }} {{ list[0].a }}{{ none }}{{ list[0].b }}")
    assert content_of(rows[0], source) == '"2024-01-02" "b\'\\\\xff\'" 1'


def test_a_small_parquet_file_that_stands_for_much(tmp_path: Path) -> None:
    """A dictionary of one text of 4 MB, and a million rows that name it."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10**6, pyarrow.int32()), ["x" * 2**22])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")
    assert path.stat().st_size < 2**20
    rows = read_parquet(path, random.Random(0))
    assert len(next(rows).values["text"]) == 2**22
    assert pyarrow.total_allocated_bytes() < 3 * BATCH_ROWS * 2**22
    rows.close()


@pytest.mark.parametrize("cut", [0, 3, 200, -1, -9])
def test_damaged_parquet_files(cut: int, model: Path) -> None:
    path = write_table(model.parent / "a.parquet", [{"text": "x" * 99}] * 99)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CalibrationError, match=r"a\.parquet cannot be read as a parquet file: .*\. Download it again"):
        made_of(model, {"path": "a.parquet"})
    os.truncate(path, 2**40)
    with pytest.raises(CalibrationError, match=r"a\.parquet cannot be read as a parquet file"):
        made_of(model, {"path": "a.parquet"})


def test_a_folder_is_all_the_text_in_it(model: Path) -> None:
    folder = model.parent / "texts"
    write_lines(folder / "deep" / "er" / "a.jsonl", {"text": "one"}, {"text": "two"})
    write_table(folder / "b.parquet", [{"text": "three"}])
    write_lines(folder / "lines.json", {"text": "four"})
    (folder / "five.py").write_text("five")
    (folder / "package.json").write_text('{\n "six": 6\n}')
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (folder / "latin.txt").write_bytes("größer".encode("latin-1") * 9000)
    (folder / "empty.txt").write_text("")
    taken, left_out = files_of(folder)
    assert [path.name for path in left_out] == ["empty.txt", "latin.txt", "picture.png"]
    assert len(taken) == 5
    calibration = calibrate(model, {"sources": [{"path": "texts", "samples": 6}], "mode": "documents"})
    assert sorted(text.removesuffix("</s>") for text in texts_of(model, calibration)) == sorted(
        ["one", "two", "three", "four", "five", '{\n "six": 6\n}']
    )
    assert calibration.sources == ("texts",)
    assert any(
        "texts: files left out, since they are empty or not text in UTF-8: 3, first" in note
        for note in calibration.notes
    )
    (model.parent / "pictures").mkdir()
    (folder / "picture.png").rename(model.parent / "pictures" / "a.png")
    with pytest.raises(CalibrationError, match="none of the 1 files in it is text, JSONL or parquet"):
        made_of(model, {"path": "pictures"})


def test_text_that_is_cut_within_a_character_is_still_text(tmp_path: Path) -> None:
    for shift in range(4):
        (tmp_path / "a.txt").write_text("x" * shift + "大" * 5000)
        assert files_of(tmp_path)[1] == []


def test_several_paths_are_one_source(model: Path) -> None:
    write_lines(model.parent / "a.jsonl", {"text": "one"})
    write_lines(model.parent / "b.jsonl", {"text": "two"})
    assert sorted(made_of(model, {"name": "ab", "path": ["a.jsonl", "b.jsonl"], "samples": 2})) == [
        "one</s>",
        "two</s>",
    ]


def test_templates(model: Path) -> None:
    record = {"q": "why?", "choices": ["a", "b"], "meta": {"lang": "de", "n": 3}, "nothing": None, "with space": True}
    write_lines(model.parent / "a.jsonl", record)
    text = (
        "{{ '{' }}{{ q }}} {{ choices[1] }} {{ choices }} {{ meta.lang }}{{ meta.n }}{{ nothing }}{{ nothing.more }} "
        "{{ record['with space'] }}"
    )
    (made,) = made_of(model, {"path": "a.jsonl", "text": text})
    assert made == '{why?} b ["a", "b"] de3 true</s>'
    (made,) = made_of(model, {"path": "a.jsonl", "field": "meta.lang"})
    assert made == "de</s>"
    with pytest.raises(
        CalibrationError, match=r"a\.jsonl line 1 has no 'answer', which source 'a.jsonl' needs; it has"
    ):
        made_of(model, {"path": "a.jsonl", "text": "{{ q }} {{ answer }}"})
    with pytest.raises(CalibrationError, match="has no '2'"):
        made_of(model, {"path": "a.jsonl", "text": "{{ choices[2] }}"})


def test_labels_name_numbers(model: Path) -> None:
    path = write_lines(model.parent / "a.jsonl", {"answer": 1}, {"answer": 1})
    labelled = {"path": "a.jsonl", "field": "answer", "labels": {"answer": ["A", "B"]}}
    assert made_of(model, labelled) == ["B</s>"]
    for value in (2, -1, "1", True, None, 1.0):
        write_lines(path, {"answer": value})
        with pytest.raises(CalibrationError, match="for 'answer', where 'labels' names the numbers 0 to 1"):
            made_of(model, labelled)


@pytest.mark.parametrize(
    ("condition", "numbers"),
    [
        ({"lang": "de"}, [0, 2]),
        ({"lang": ["en", "fr"]}, [1, 3]),
        ({"score": {"min": 0.5}}, [1, 2]),
        ({"score": {"min": 0.5, "max": 0.9}}, [1]),
        ({"score": 1}, [2]),
        ({"good": True}, [1]),
        ({"good": 1}, [3]),
        ({"meta.kind": "a"}, [0]),
        ({"lang": "de", "score": {"min": 0.5}}, [2]),
    ],
)
def test_filters(condition: dict[str, Any], numbers: list[int], model: Path) -> None:
    write_lines(
        model.parent / "a.jsonl",
        {"n": 0, "lang": "de", "score": 0.1, "good": None, "meta": {"kind": "a"}},
        {"n": 1, "lang": "en", "score": 0.5, "good": True, "meta": {"kind": None}},
        {"n": 2, "lang": "de", "score": 1, "good": False, "meta": None},
        {"n": 3, "lang": "fr", "score": None, "good": 1, "meta": {"kind": "b"}},
    )
    source = {"path": "a.jsonl", "field": "n", "filter": condition, "samples": len(numbers)}
    assert sorted(made_of(model, source)) == [f"{number}</s>" for number in numbers]


def test_filters_that_nothing_passes_and_fields_that_are_not_there(model: Path) -> None:
    write_lines(model.parent / "a.jsonl", *[{"text": "x", "lang": "de"}] * 7)
    with pytest.raises(CalibrationError, match=r"Source 'a\.jsonl' .*: none of its 7 records passes its 'filter'"):
        made_of(model, {"path": "a.jsonl", "filter": {"lang": "en"}})
    with pytest.raises(CalibrationError, match=r"a\.jsonl line \d has no 'language'"):
        made_of(model, {"path": "a.jsonl", "filter": {"language": "en"}})


def test_rows_are_shuffled_within_what_may_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(str(number), {}, 100) for number in range(1000)]
    for most_rows, most_bytes in ((50, 10**9), (10**9, 5000)):
        monkeypatch.setattr("streamprune.calibration.sources.MOST_HELD_BYTES", most_bytes)
        seen = 0

        def counted() -> Any:
            nonlocal seen
            for row in rows:
                seen += 1
                yield row

        drawn = shuffled(counted(), random.Random(0), most_rows)
        first = [next(drawn) for _ in range(100)]
        assert seen == 150
        rest = list(drawn)
        assert sorted(number for number, _ in first + rest) == list(range(1000))
        assert [number for number, _ in first + rest] != list(range(1000))
        assert all(row.place == str(number) for number, row in first)


def test_only_so_much_of_a_source_is_read_as_its_share_takes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(model.parent / "a.jsonl", *({"text": "x" * 99} for _ in range(3000)))
    read = 0

    def counting(*given: Any) -> Any:
        nonlocal read
        for row in read_file(*given):
            read += 1
            yield row

    monkeypatch.setattr("streamprune.calibration.text_files.read_file", counting)
    monkeypatch.setattr("streamprune.calibration.sources.MOST_HELD_BYTES", 10_000)
    calibrate(model, {"sequence_length": 100, "samples": 20, "sources": [{"path": "a.jsonl"}]})
    assert 20 < read < 150


def test_builtin_sources(model: Path) -> None:
    sources = [{"builtin": "records", "share": 3}, {"name": "sums", "builtin": "arithmetic", "share": 1}]
    calibration = calibrate(model, {"sequence_length": 64, "samples": 40, "sources": sources})
    assert calibration.sources == ("records", "sums")
    assert calibration.tokens_of == (1920, 640)
    assert '"type"' in texts_of(model, calibration, 0)[0]
    again = calibrate(model, {"sequence_length": 64, "samples": 40, "sources": sources})
    assert same_tokens(calibration, again)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ a", "not a template"),
        ("{{ }}", "not a template"),
        ("{a}", "{a} is plain text: write {{a}} for the field"),
        ("{{ b }} {meta.lang} {c[0]}", "{meta.lang} is plain text"),
        ("{{ a.upper() }}", "`call` is not allowed in a template: only fields"),
        ("{% for a in b %}{% endfor %}", "`for` is not allowed"),
        ("{% set a = 1 %}", "`assign` is not allowed"),
        ("{% include 'x' %}", "`include` is not allowed"),
        ("{{ 9 ** 9 ** 9 }}", "`pow` is not allowed"),
        ("{{ 'x' * 10 ** 12 }}", "`mul` is not allowed"),
        ("{{ a|xmlattr }}", "No filter named 'xmlattr'"),
    ],
)
def test_texts_that_are_no_templates(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        compiled(text)


def test_what_a_template_can_do() -> None:
    values = {"q": "Why", "list": ["a", "b"], "n": None, "items": 3, "range": "r", "o": {"keys": "k"}}
    for text, made in {
        '{"a": 1} {{ q }}\n': '{"a": 1} Why\n',
        "{% if n %}x{% else %}{{ q|lower }}{% endif %}": "why",
        "{{ list|join(', ') }} {{ list|tojson }} {{ none_such|default('d') }}": 'a, b ["a", "b"] d',
        "{{ items }} {{ range }} {{ o.keys }}": "3 r k",
    }.items():
        assert filled(text, values) == made
    for text in (
        "{{ q.__class__ }}",
        "{{ ''.__class__ }}",
        "{{ dict }}",
        "{{ o.items }}",
        "{% if none_such %}{% endif %}",
    ):
        with pytest.raises(MissingFieldError):
            filled(text, values)


@pytest.mark.parametrize("text", ["a.", "[0]", "a[x]", "a[99999999999]", "", "{a}", "x" * 201])
def test_texts_that_are_no_paths(text: str) -> None:
    with pytest.raises(ValueError, match="is not a field path"):
        parse_path(text)


def test_paths_of_fields() -> None:
    assert parse_path("a.b[0].c d[12]") == ("a", "b", 0, "c d", 12)
