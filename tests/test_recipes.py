"""Recipes: shares, lengths, modes, sameness, what is recorded of them, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from streamprune.calibration.pack import BUCKETS, Cutter, Packer, bucket, divided
from streamprune.calibration.recipe import RECIPE_KEYS, SOURCE_KEYS, read_recipe, shipped_recipes
from streamprune.errors import CalibrationError
from tests.recipes import calibrate, load, same_tokens, shares_of, texts_of, write_lines, write_recipe, write_texts
from tests.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "model")
    for letter in "abc":
        write_texts(tmp_path / f"{letter}.jsonl", letter)
    return tmp_path / "model"


def recipe(*sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"samples": 100, "sequence_length": 32, "sources": list(sources)} | fields


def source(letter: str, **fields: Any) -> dict[str, Any]:
    return {"name": letter, "path": f"{letter}.jsonl"} | fields


def test_shares_of_the_tokens_are_met_and_no_sequence_mixes_sources(model: Path) -> None:
    mix = recipe(source("a", share=5), source("b", share=3), source("c", share=2))
    calibration = calibrate(model, mix)
    assert calibration.sources == ("a", "b", "c")
    assert shares_of(calibration) == [0.5, 0.3, 0.2]
    assert calibration.tokens == 3200
    for index, letter in enumerate("abc"):
        assert set("".join(texts_of(model, calibration, index)).replace("</s>", "")) == {letter}
    for batch in calibration.micro_batches(96):
        letters = set(batch.ids.flatten().tolist()) - {2}
        assert letters == {3 + ord("abc"[batch.source]) - ord("!")}
        assert batch.ids.numel() <= 96
    sizes = [len(batch.ids) for batch in calibration.micro_batches(96)]
    assert [batch.source for batch in calibration.micro_batches_of(sizes)] == sorted(
        batch.source for batch in calibration.micro_batches(96)
    )
    with pytest.raises(ValueError, match="different lengths or sources"):
        calibration.micro_batches_of([51, 29, 20])


def test_without_shares_all_are_equal_and_shares_need_not_add_up(model: Path) -> None:
    assert calibrate(model, recipe(source("a"), source("b"))).tokens_of == (1600, 1600)
    assert calibrate(model, recipe(source("a", share=30), source("b", share=10))).tokens_of == (2400, 800)
    assert divided(10, [1, 1, 1]) == [4, 3, 3]
    assert divided(10**30 + 2, [1, 3]) == [(10**30 + 2) // 4 + 1, (10**30 + 2) * 3 // 4]


def test_a_share_that_so_few_sequences_cannot_meet_is_told(model: Path) -> None:
    calibration = calibrate(model, recipe(source("a", share=2), source("b", share=1)), samples=4)
    assert calibration.tokens_of == (96, 32)
    assert "b has 25.0% of the tokens instead of 33.3%" in calibration.notes[1]
    with pytest.raises(CalibrationError, match=r"Source 'b' .* would get 0 of 2 sequences of 32 tokens"):
        calibrate(model, recipe(source("a", share=9), source("b", share=1)), samples=2)


def test_the_total_in_tokens(model: Path) -> None:
    plain = {"sources": [source("a"), source("b")], "sequence_length": 32}
    assert calibrate(model, plain | {"tokens": 700}).tokens_of == (352, 320)
    cut = calibrate(model, plain | {"tokens": 700, "mode": "documents"})
    assert cut.tokens_of == (350, 350)
    assert [len(sequence) for sequence in cut.sequences] == ([32] * 10 + [30]) * 2


def test_the_users_numbers_count_instead_of_the_recipes(model: Path) -> None:
    calibration = calibrate(model, recipe(source("a")), samples=7, seq_len=16, seed=3)
    assert [len(sequence) for sequence in calibration.sequences] == [16] * 7
    assert (calibration.recipe["sequence_length"], calibration.recipe["seed"]) == (16, 3)
    counted = recipe(source("a", samples=30), source("b", samples=10), mode="documents")
    del counted["samples"]
    assert [calibrate(model, counted).source_of.count(index) for index in (0, 1)] == [30, 10]
    assert [calibrate(model, counted, samples=8).source_of.count(index) for index in (0, 1)] == [6, 2]


def test_seeds(model: Path) -> None:
    write_lines(model.parent / "n.jsonl", *({"text": f"number {n} of many"} for n in range(500)))
    mix = recipe(source("n"))
    assert same_tokens(calibrate(model, mix), calibrate(model, mix, seed=0))
    assert not same_tokens(calibrate(model, mix), calibrate(model, mix, seed=1))
    assert same_tokens(calibrate(model, mix | {"seed": 4}), calibrate(model, mix, seed=4))
    own = recipe(source("n", seed=4))
    assert same_tokens(calibrate(model, own, seed=1), calibrate(model, own, seed=2))
    assert calibrate(model, mix).fingerprint != calibrate(model, mix, seed=1).fingerprint


def test_two_processes_make_the_same_tokens(model: Path) -> None:
    """With other seeds for Python's hashes, which decide the order of its sets."""
    chats = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(99)]
    write_lines(model.parent / "chats.jsonl", *chats)
    mix = recipe({"name": "p", "builtin": "prose", "share": 2}, source("chats"), source("a"))
    mix["sources"][1] |= {"messages": "messages", "share": 1}
    mix["sources"][2] |= {"share": 1}
    path = write_recipe(model.parent / "mix.yaml", mix)
    code = (
        "import sys; from pathlib import Path\n"
        "from streamprune.calibration.sequences import load_calibration\n"
        "from streamprune.config import Sampling\n"
        "limits = {'vocab_size': 256, 'max_positions': 256}\n"
        "print(load_calibration([sys.argv[1]], Path(sys.argv[2]), Sampling(samples=40), **limits))\n"
    )
    # Hashes of text differ here: the seed is no other process's.
    said = subprocess.run(
        [sys.executable, "-c", code, path, model], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    ).stdout  # fmt: skip
    here = load([path], model, samples=40)
    assert said == f"{here}\n"
    assert here.fingerprint in said


def test_one_document_per_sequence(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model", bos=True)
    lengths = [3, 40, 7, 90, 1]
    write_lines(tmp_path / "a.jsonl", *({"text": "x" * length} for length in lengths))
    mix = {"sequence_length": 32, "mode": "documents", "sources": [source("a", samples=5)]}
    sequences = calibrate(tmp_path / "model", mix).sequences
    # The beginning-of-text token before, the end-of-text token behind, and 32 at most.
    assert sorted(len(sequence) for sequence in sequences) == [3, 5, 9, 32, 32]
    assert all(sequence[0] == 1 for sequence in sequences)
    assert sum(bool(sequence[-1] == 2) for sequence in sequences) == 3


def test_bucketed_documents_share_lengths_and_lose_little() -> None:
    assert [bucket(length) for length in (1, 15, 16, 31, 32, 33, 34, 1000, 2047, 2048)] == [
        1, 15, 16, 31, 32, 32, 34, 992, 1984, 2048,
    ]  # fmt: skip
    assert all(length - bucket(length) < max(1, length / BUCKETS) for length in range(1, 5000))
    assert len({bucket(length) for length in range(1024, 2048)}) == BUCKETS
    documents = [[9] * length for length in range(1024, 2048, 8)]
    cutter = Cutter([], 2048, bucketed=True)
    made = [len(sequence) for document in documents for sequence in cutter.add([document])]
    assert len(made) == 128
    assert len(set(made)) == BUCKETS


def test_a_prefix_that_is_there_is_not_written_twice() -> None:
    packer = Packer([1], 4)
    made = [*packer.add([[1, 5], [6, 7, 8]]), *packer.add([[9, 9, 1, 4, 4, 4]])]
    assert made == [[1, 5, 6, 7], [1, 8, 9, 9], [1, 4, 4, 4]]
    assert list(Cutter([1], 3, False).add([[1, 5], [6, 7]])) == [[1, 5, 6]]


def test_what_is_recorded_names_no_folder(model: Path) -> None:
    mix = recipe(
        source("a", path=str(model.parent / "a.jsonl"), share=1, field="text"), description="a try", name="mine", seed=5
    )
    assert calibrate(model, mix).recipe == {
        "name": "mine", "description": "a try", "mode": "packed", "sequence_length": 32, "seed": 5,
        "sources": [{"name": "a", "field": "text", "path": ["a.jsonl"], "share": 1.0, "records": 32, "sequences": 100,
                     "tokens": 3200}],
        "given": {"calibration": ["recipe.yaml"], "samples": None, "seq_len": None, "seed": None},
    }  # fmt: skip
    plain = load([model.parent / "a.jsonl"], model, samples=2, max_positions=8)
    assert plain.recipe["sources"][0] == {
        "name": "a.jsonl", "path": ["a.jsonl"], "share": None, "records": 1, "sequences": 2, "tokens": 16
    }  # fmt: skip


def test_files_named_directly_have_equal_parts_and_fill_up(model: Path) -> None:
    write_texts(model.parent / "short.jsonl", "s", count=1, length=69)
    files = [str(model.parent / f"{name}.jsonl") for name in ("a", "short", "b", "a")]
    mix = load(files, model, samples=40, seq_len=10)
    assert mix.sources == ("a.jsonl", "short.jsonl", "b.jsonl", "a.jsonl-2")
    assert mix.tokens_of == (110, 70, 110, 110)
    assert mix.notes == ("short.jsonl gave 7 of the 10 sequences of its share (70 tokens).",)
    few = load(["builtin"], model, samples=2, seq_len=10)
    assert few.sources == ("code", "prose")
    assert few.notes == ("With so few sequences, only these sources are used: code, prose.",)


def test_a_recipe_stands_alone(model: Path) -> None:
    path = write_recipe(model.parent / "r.yaml", recipe(source("a")))
    with pytest.raises(CalibrationError, match=r"r\.yaml is a recipe: give it alone"):
        load([path, "builtin"], model)
    with pytest.raises(CalibrationError, match=r"neither a file nor a recipe 'agentik'\. Did you mean 'agentic'"):
        calibrate(model, "agentik")


def test_recipes_in_json_and_records_named_like_them(model: Path) -> None:
    (model.parent / "r.json").write_text(json.dumps(recipe(source("a"))))
    assert calibrate(model, model.parent / "r.json").tokens == 3200
    for content, words in (
        (b"[1, 2]", r"Expected `object`, got `array`\. If it has records, make them one array"),
        (b'{\n"data": [{"text": "a"}]}', r"Unknown key 'data' .*\. If it has records, make them one array"),
        (b'{"seed": 1, "seed": 2}', "not a recipe in JSON"),
        (b"\xff", "not a recipe in JSON"),
    ):
        (model.parent / "r.json").write_bytes(content)
        with pytest.raises(CalibrationError, match=words):
            calibrate(model, model.parent / "r.json")
    with pytest.raises(CalibrationError, match="There is no calibration file"):
        calibrate(model, model.parent / "none.json")


def test_sources_that_are_too_short_or_empty(model: Path) -> None:
    short = write_texts(model.parent / "short.jsonl", "s", count=3, length=99)
    with pytest.raises(CalibrationError, match=r"'short' of recipe 'recipe' is too short: it has 288 tokens, 18% of"):
        calibrate(model, recipe(source("a", share=1), source("short", share=1)))
    with pytest.raises(CalibrationError, match="288 tokens in the 3 records that may be drawn, 18%"):
        calibrate(model, recipe(source("a", share=1), source("b", share=1, samples=3)))
    with pytest.raises(CalibrationError, match="it has 3 of the 9 required records"):
        calibrate(model, {"sequence_length": 32, "sources": [source("short", samples=9)]})
    short.write_text("\n\n")
    with pytest.raises(CalibrationError, match="Source 'short' of recipe 'recipe': it contains no text"):
        calibrate(model, recipe(source("a"), source("short")))
    with pytest.raises(CalibrationError, match="The sequence length 32 of 'recipe' is longer than the 16 positions"):
        calibrate(model, recipe(source("a")), max_positions=16)


def test_what_configs_readme_says_of_recipes_is_so(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "README.md").read_text()
    example = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "example.yaml").write_text(example)
    assert [source.share for source in read_recipe(tmp_path / "example.yaml").sources] == [0.5, 0.3, 0.2]
    tables = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    explained = set(re.findall(r"`(\w+)`", " ".join(tables))) | {
        "subset",
        "split",
        "revision",
        "data_files",
        "data_dir",
    }
    assert {*RECIPE_KEYS, *SOURCE_KEYS} <= explained
    for name, path in shipped_recipes().items():
        assert f"| `{name}` |" in text
        assert path.stem == name


def test_a_wheel_holds_the_shipped_recipes(tmp_path: Path) -> None:
    """In the repository the package has a link to configs/calibration; what is installed has the files."""
    for name in ("streamprune", "configs"):
        shutil.copytree(
            ROOT / name, tmp_path / "src" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "src")
    code = f"import setuptools.build_meta as build; build.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "src", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "from streamprune.calibration.recipe import *\n"
        "print(*(read_recipe(p).name for p in shipped_recipes().values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == sorted(path.stem for path in (ROOT / "configs" / "calibration").iterdir())
    recipes = tmp_path / "installed" / "streamprune" / "calibration" / "recipes"
    assert read_recipe(recipes / "agentic.yaml").samples == 1000
