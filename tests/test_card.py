"""The model card: what it tells is what the record says, its command makes the same files, and no name breaks it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, ModelCardData
from msgspec import convert, structs

from streamprune.cli import main
from streamprune.pipeline import finish
from streamprune.reporting.card import THIS_MODEL, mix_text, reproduce_command
from streamprune.reporting.card import metadata as card_metadata
from streamprune.reporting.record import Record
from streamprune.reporting.record_computed import RecordedImatrix
from streamprune.saliency.scores_file import read_scores, write_scores
from streamprune.selection.settings import SelectionSettings
from tests.helpers import known_family, tree_bytes
from tests.recipes import write_lines
from tests.tiny import make_model, tiny_config
from tests.tokenizer import save_tokenizer

HEADINGS = ["Experts per layer", "Calibration", "Domain retention", "Memory", "Use", "Scores", "What was not tested",
            "How to reproduce"]  # fmt: skip


def invoke(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a file of text, and scores of both."""
    home = tmp_path_factory.mktemp("home")
    config = tiny_config(known_family("qwen3_moe"))
    config.num_hidden_layers = 2
    make_model(home / "model", config)
    save_tokenizer(home / "model")
    write_lines(home / "my text.jsonl", *({"text": f"line {number} " * 9} for number in range(40)))
    (home / "schedule.json").write_text("[4, 6]")
    invoke("score", home / "model", "-o", home / "s.safetensors", *calibration(home), "--quiet")
    return home


def calibration(home: Path) -> list[Any]:
    return ["--calibration", home / "my text.jsonl", "--calibration", "builtin:code,prose", "--samples", 7, "--seq-len",
            24, "--seed", 3]  # fmt: skip


def card_of(output: Path) -> str:
    return (output / "README.md").read_text()


def command_in(card: str) -> list[str]:
    found = re.search(r"## How to reproduce\n.*?```bash\n(.*?)\n```", card, re.DOTALL)
    assert found is not None
    return shlex.split(found[1])


WAYS: list[tuple[str, list[Any]]] = [
    ("run", ["--budget-gib", 0.50144, "--context", 128, "--batch", 2, "--method", "ean", "--max-shard-size", 100_000]),
    ("run", ["--ratio", 0.4, "--mix", "code=2,prose=1,my_text.jsonl=0.5", "--schedule", "linear-decrease"]),
    ("run", ["--keep", 5, "--samples", 12, "--evaluate"]),
    ("prune", ["--keep", 4, "--method", "random", "--seed", 3]),
    ("prune", ["--keep", 4, "--method", "random", "--seed", 8]),
    ("prune", ["--schedule", "schedule.json"]),
    ("prune", ["--budget-gib", 0.50131, "--schedule", "global", "--floor", 3, "--kv-dtype", "fp8"]),
    ("prune", ["--keep-file", "list.json"]),
    ("by hand", ["--keep-file", "list.json"]),
    ("run", ["--keep", 5, "--width", 12, "--schedule", "global", "--mix", "code=1,prose=2"]),
    ("run", ["--keep", 5, "--no-channels"]),
    ("run", ["--keep", 5, "--width", 16, "--refit", "--anchor", "my text.jsonl"]),
    ("run", ["--scores", "s.safetensors", "--samples", 20, "--keep", 5, "--refit", "--anchor", "none"]),
    ("prune", ["--ratio", 0.5, "--by", "channels", "--width-multiple", 10]),
    ("prune", ["--ratio", 0.5, "--by", "both"]),
    ("prune", ["--budget-gib", 0.501214, "--by", "channels"]),
]


@pytest.mark.parametrize(("how", "options"), WAYS, ids=range(len(WAYS)))
def test_its_command_makes_the_same_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, options: list[Any]
) -> None:
    (home / "list.json").write_text(json.dumps({str(layer): [0, 2, layer + 3] for layer in range(2)}))
    monkeypatch.chdir(home)
    scored = calibration(home) if how == "run" else ["--scores", home / "s.safetensors"] if how == "prune" else []
    command = "run" if how == "run" else "prune"
    invoke(command, home / "model", "-o", tmp_path / "first", *scored, *options, "--quiet")

    # Somewhere else, where the files have the names that the card gives them, and nothing else is there.
    there = tmp_path / "there"
    there.mkdir()
    for name in ("model", "my text.jsonl", "schedule.json"):
        (there / name).symlink_to(home / name)
    card = card_of(tmp_path / "first")
    told = command_in(card)
    assert told[0] == "streamprune"
    if f" {THIS_MODEL}" in shlex.join(told):
        assert told[1] == ("run" if "--refit" in told else "prune")
        assert "the files of this one" in card
        (there / THIS_MODEL).symlink_to(tmp_path / "first")
    assert str(tmp_path) not in card
    assert str(home) not in card
    monkeypatch.chdir(there)
    invoke(*told[1:])
    assert tree_bytes(there / told[told.index("-o") + 1]) == tree_bytes(tmp_path / "first")


def test_which_command_it_is(home: Path, tmp_path: Path) -> None:
    """Scoring again is what is asked for; only what a run cannot choose needs the scores that were published."""
    kinds = {}
    for number, options in enumerate((["--seed", 3], ["--seed", 8])):
        output = tmp_path / str(number)
        invoke("prune", home / "model", "-o", output, "--scores", home / "s.safetensors", "--keep", 4, "--method",
               "random", *options, "--quiet")  # fmt: skip
        kinds[number] = command_in(card_of(output))[1]
    assert kinds == {0: "run", 1: "prune"}
    report = json.loads((tmp_path / "0" / "streamprune.json").read_text())
    for spoil in (
        lambda: report["settings"].update(propagate="pruned"),
        lambda: report["calibration"]["recipe"].update(given={"calibration": [1]}),
        lambda: report["calibration"]["recipe"].pop("given"),
        lambda: report["calibration"].update(recipe="a stranger's"),
    ):
        spoil()
        assert reproduce_command(convert(report, Record)).startswith(
            "streamprune prune model -o model-pruned --scores this-model "
        )


@pytest.mark.parametrize(
    "stated",
    ["a=1,b=1,c=1", "a=0.7,b=0.3", "a=1,b=1,c=1,d=1,e=1,f=1,g=1", "a=1e-30,b=5", "a=0.123456789,b=3", "a=1,b=0",
     "x,y=3,z=4", "a=1e-300,b=1"],
)  # fmt: skip
def test_a_mix_is_told_so_that_it_comes_back_the_same(stated: str) -> None:
    shares = SelectionSettings(mix=stated).shares
    assert shares is not None
    assert SelectionSettings(mix=mix_text(shares)).shares == shares


def rows_of(card: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    part = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def test_its_figures_are_those_of_the_record(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = invoke("prune", home / "model", "-o", output, "--scores", home / "s.safetensors", "--ratio", 0.4,
                  "--schedule", "linear-decrease", "--json", "--quiet")  # fmt: skip
    summary, report, card = (
        json.loads(done.stdout),
        json.loads((output / "streamprune.json").read_text()),
        card_of(output),
    )
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == HEADINGS

    counts = {layer["index"]: len(layer["kept"]) for layer in report["layers"]}
    told = {}
    for layers, count, _ in rows_of(card, "Experts per layer"):
        first, _, last = layers.partition("–")
        told |= dict.fromkeys(range(int(first), int(last or first) + 1), int(count))
    assert told == counts
    assert len(set(counts.values())) > 1

    made = {each["name"]: each for each in report["calibration"]["recipe"]["sources"]}
    whole = report["calibration"]["tokens"]
    assert rows_of(card, "Calibration") == [
        [each["name"], place, f"{made[each['name']]['records']:,}", str(made[each["name"]]["sequences"]),
         f"{each['tokens']:,}", f"{each['tokens'] / whole:.1%}"]
        for each, place in zip(report["calibration"]["sources"], ["my text.jsonl", "builtin code", "builtin prose"],
                               strict=True)
    ]  # fmt: skip
    kept = {row[0]: row[1:3] for row in rows_of(card, "Domain retention")}
    assert kept == {
        name: [f"{each['kept']:.1%}", f"{each['best']:.1%}"] for name, each in summary["domain_retention"].items()
    }
    # What cannot load it is not said to.
    use = card.partition("## Use")[2].partition("## Scores")[0]
    assert "trust_remote_code=True" in use
    assert "vllm serve" not in card
    assert "convert_hf_to_gguf.py" not in card


def test_a_width_that_needs_another_implementation_is_loaded_with_it(home: Path, tmp_path: Path) -> None:
    invoke(
        "prune", home / "model", "-o", tmp_path / "out", "--scores", home / "s.safetensors", "--width", 13, "--quiet"
    )
    assert 'device_map="auto", experts_implementation="eager")' in card_of(tmp_path / "out")


def told_of(card: str) -> str:
    """The title and what was done to the source."""
    return card.partition("\n# ")[2].partition("\n\n|")[0]


def test_narrower_experts_are_told(home: Path, tmp_path: Path) -> None:
    for name, options in (("narrow", []), ("both", ["--keep", 5]), ("plain", ["--keep", 5])):
        width = ["--width", 12] if name != "plain" else []
        done = invoke("prune", home / "model", "-o", tmp_path / name, "--scores", home / "s.safetensors", *options,
                      *width, "--json", "--quiet")  # fmt: skip
        card, summary = card_of(tmp_path / name), json.loads(done.stdout)
        tags = ModelCard(card).data.tags
        if name == "plain":
            assert told_of(card).startswith("model, 5 of 8 experts\n")
            assert "Every remaining tensor is byte-identical to the source's; nothing was retrained.\n\n" in card
            assert not {"width", "source_width", "energy_kept"} & summary.keys()
            assert "channel" not in card.lower()
            continue
        assert (summary["width"], summary["source_width"]) == (12, 32)
        kept = {row[0]: row[1:3] for row in rows_of(card, "Energy kept")}
        assert kept == {
            name: [f"{each['kept']:.1%}", f"{each['best']:.1%}"] for name, each in summary["energy_kept"].items()
        }
        assert 0 < summary["energy_kept"]["prose"]["kept"] < 1
        told = told_of(card)
        assert "keeps 12 of its 32 channels (`moe_intermediate_size`), those with the highest energy. " in told
        assert "What remains of each tensor is byte-identical to the source's" in told
        assert "| channels per expert | 32 | 12 |" in card
        assert "12 channels are no multiple of what these need" in card
        # (12 channels in float32 are three times 16 bytes.)
        assert 'device_map="auto")' in card
        if name == "narrow":
            assert told_of(card).startswith("model, 12 of 32 channels per expert\n")
            assert "each of the 16 experts in its 2 Mixture-of-Experts layers keeps" in told_of(card)
            assert "Every layer keeps all 8 experts." in card
            assert "removed" not in told_of(card)
            assert "## Domain retention" not in card, "it is 100 % where all experts stay"
            assert ("width-pruning" in tags, "expert-pruning" in tags, "reap" in tags) == (True, False, False)
        else:
            assert told_of(card).startswith("model, 5 of 8 experts, 12 of 32 channels each\n")
            assert "6 were removed" in told_of(card)
            assert "## Domain retention" in card
            assert {"width-pruning", "expert-pruning", "reap"} <= set(tags)


def test_a_dry_run_tells_the_width(home: Path, tmp_path: Path) -> None:
    words = ("run", home / "model", "-o", tmp_path / "out", "--dry-run", "--json")
    told = invoke(*words, "--width", 12)
    summary = json.loads(told.stdout)
    assert (summary["width"], summary["source_width"], summary["experts_per_layer"]) == (12, 32, 8)
    assert "keeping 8 of 8, each with 12 of 32 channels" in told.stderr
    assert not {"width", "source_width"} & json.loads(invoke(*words, "--keep", 5).stdout).keys()


def test_a_refit_is_told_with_its_figures(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    invoke("run", home / "model", "-o", output, *calibration(home), "--keep", 5, "--width", 16, "--refit", "--anchor",
           "none", "--quiet")  # fmt: skip
    card, report = card_of(output), json.loads((output / "streamprune.json").read_text())
    assert "what remains of the gate and up projections and of every other tensor is byte-identical" in told_of(card)
    assert "nothing was retrained" not in card
    layers = report["refit"]["layers"]
    shares = [share for layer in layers for share in layer["shares"]]
    rows = {row[0]: row[1:] for row in rows_of(card, "Refit")}
    for moment in ("before", "after"):
        errors = [layer[moment] for layer in layers]
        assert rows[f"relative error of a layer's output {moment}"] == [
            f"{value:.1%}" for value in (min(errors), sum(errors) / 2, max(errors))
        ]
    found = [float(cell) for cell in rows["share taken of an expert's fitted change"]]
    assert found == pytest.approx([min(shares), sum(shares) / len(shares), max(shares)], rel=1e-3)


def test_what_a_search_and_an_importance_matrix_add(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scores of `run --best` are those of its search: the command of the card gives others in the last digits.
    matrix = RecordedImatrix(file="it's.gguf", sha256="0" * 64, weights=36, sequences=8, tokens=1000)
    usual = finish.make_record
    monkeypatch.setattr(finish, "make_record", lambda *given: structs.replace(usual(*given), imatrix=matrix))
    monkeypatch.setattr(finish, "noted_results", lambda _: {"search.json": {}})
    output = tmp_path / "out"
    invoke("prune", home / "model", "-o", output, "--scores", home / "s.safetensors", "--keep", 5, "--quiet",
           "--no-report")  # fmt: skip
    card = card_of(output)
    assert "these are of a search, which measured all candidates at once, and agree to about ten digits" in card
    assert "`it's.gguf`: 36 weights, from 1,000 tokens of the calibration" in card
    told = card.partition("## Importance matrix")[2].partition("```bash\n")[2].partition("\n")[0]
    assert shlex.split(told) == [
        "llama-quantize", "--imatrix", "it's.gguf", "model.gguf", "model-Q4_K_M.gguf", "Q4_K_M"
    ]  # fmt: skip


def test_an_even_model_is_told_in_a_line_and_for_every_engine(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    invoke("prune", home / "model", "-o", output, "--scores", home / "s.safetensors", "--keep", 5, "--quiet")
    card = card_of(output)
    assert "Every layer keeps 5 of 8 experts." in card
    assert "arXiv:2510.13999" in card
    # The model has 256 positions: no engine can be asked for more.
    assert "vllm serve . --max-model-len 256\n" in card
    assert "38% of the experts' weights are removed: around 50 % the loss is noticeable" in card
    assert "llama-quantize" not in card
    assert "of a search" not in card
    assert "--outtype f32\nllama-server -m model.gguf -c 256\n" in card
    assert "neither transformers nor vLLM nor llama.cpp has loaded these very files" in card
    assert "longer than the 24 tokens" in card
    assert "trust_remote_code" not in card


def test_a_model_with_layers_that_have_no_experts(tmp_path: Path) -> None:
    config = tiny_config(known_family("deepseek_v3"))
    config.topk_group = 2
    model = make_model(tmp_path / "model", config)
    (tmp_path / "list.json").write_text(json.dumps({str(layer): [0, 2, 5, 6] for layer in range(1, 4)}))
    invoke("prune", model, "-o", tmp_path / "out", "--keep-file", tmp_path / "list.json", "--quiet")
    card = card_of(tmp_path / "out")
    assert "Each of the layers 1–3 keeps 4 of 8 experts. 1 other layer has no experts to choose from." in card
    assert "chosen by hand, without scores" in card
    assert [heading for heading in HEADINGS if f"## {heading}" not in card] == ["Calibration", "Domain retention"]
    # What a program does not take has no command, but the reason.
    assert "Not with llama.cpp: llama.cpp ends with an error where the router picks all of its 2 groups.\n\n" in card
    assert "convert_hf_to_gguf.py" not in card
    assert "With vLLM, if it supports the source's architecture:\n\n```bash\nvllm serve . " in card
    told = invoke("prune", model, "-o", tmp_path / "gguf", "--keep-file", tmp_path / "list.json", "--gguf", "Q4_K_M")
    for words in (
        "note: llama.cpp cannot make Q4_K_M of the result: ",
        "warning: llama.cpp cannot make Q4_K_M of it: ",
    ):
        assert f"{words}llama.cpp ends with an error where the router picks all of its 2 groups.\n" in told.stderr
    assert "Next, for" not in told.stderr


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("license: [mit, 'apache-2.0']\nlanguage: no\n", {"license": ["mit", "apache-2.0"], "language": "no"}),
    ("license: {a: [1]}\nlanguage: [en, {b: c}, no, 7]\n", {"language": ["en", "no"]}),
    ('license: "a\\n---\\nbase_model: evil/x"\n', {"license": "a --- base_model: evil/x"}),
    ('license_name: "x: y # {z}"\nlicense_link: "| >"\n', {"license_name": "x: y # {z}", "license_link": "| >"}),
    ('license: "\\e[2J\\u202e\\x85*&!%@"\n', {"license": "?[2J? *&!%@"}),
    ("pipeline_tag: [a]\nbase_model: [org/a, ../../etc, 3]\n", {"base_model": ["org/a"]}),
    ("base_model: not a hub id\n", {}),
    ("model-index: 5\nlicense: mit\n", {"license": "mit"}),
    ("[1, 2]\n", {}),
    ("a: &a [*a]\n", {}),
]


@pytest.mark.parametrize(("metadata", "expected"), HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_the_sources_card_says_the_metadata_are_sound(
    tmp_path: Path, metadata: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}---\n# Source\n", encoding="utf-8")
    text = f"---\n{card_metadata('model', ('expert-pruning',), tmp_path).to_yaml()}\n---\n\n# Ours\n"
    card = ModelCard(text)
    found = card.data.to_dict()
    usual = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert {name: value for name, value in found.items() if name != "tags"} == usual | expected
    assert found["tags"] == ["mixture-of-experts", "moe", "pruning", "expert-pruning", "streamprune"]
    # As the Hub reads it, and once around through the library's own class.
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")) == found
    assert yaml.safe_load(ModelCardData(**found).to_yaml()) == found
    assert card.text.strip() == "# Ours"


def test_a_hostile_card_of_the_source_and_the_whole_way(home: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    (model / "README.md").write_text(f"---\n{HOSTILE[2][0]}---\n# Source\n", encoding="utf-8")
    (tmp_path / "list.json").write_text("[[0, 1, 2], [0, 1, 2]]")
    invoke("prune", model, "-o", tmp_path / "out", "--keep-file", tmp_path / "list.json", "--quiet")
    card = ModelCard(card_of(tmp_path / "out"))
    assert card.data.license == "a --- base_model: evil/x"
    assert card.data.base_model is None
    assert card.text.lstrip().startswith("# model, 3 of 8 experts")


def test_a_stranger_names_what_he_likes(home: Path, tmp_path: Path) -> None:
    """A scores file tells the model's name, its sources and recipe: all of it gets into the card."""
    scores = read_scores(home / "s.safetensors")
    names = ("a|b`c", "<script>alert(1)</script>", "x  y")
    told = json.loads(json.dumps(scores.provenance))
    told["model"] = "m`; rm -rf /\n```\n# Owned"
    for source, name in zip(told["calibration"]["sources"], names, strict=True):
        source["name"] = name
    sources = [5, {"name": names[0], "dataset": ["d|"], "records": "many"}]
    told["calibration"]["recipe"] = {
        "name": "n\n# Owned", "description": "[x](javascript:1)", "mode": ["packed"], "sources": sources
    }  # fmt: skip
    told["versions"] |= {"python\n# Owned": {"3": "<b>"}}
    write_scores(tmp_path / "s.safetensors", replace(scores, sources=names, provenance=told))
    invoke("prune", home / "model", "-o", tmp_path / "out", "--scores", tmp_path / "s.safetensors", "--keep", 5,
           "--quiet")  # fmt: skip
    card = card_of(tmp_path / "out")
    # Only headings of our own, wherever no block of code is open.
    fence, found = "", []
    for line in card.split("\n---\n", 1)[1].splitlines():
        run = re.match(r"`{3,}", line)
        if run is not None and fence in ("", line):
            fence = "" if fence else run[0]
        elif not fence and line.startswith("#"):
            found.append(line.lstrip("# "))
    assert found[1:] == HEADINGS
    assert "Owned" in found[0]
    assert "<script>" not in re.sub(r"`+[^`\n]*`+", "", card)
    assert all(len(row) == 6 for row in rows_of(card, "Calibration"))
    command = re.search(r"## How to reproduce\n.*?\n(`{4,})bash\n(.*?)\n\1\n", card, re.DOTALL)
    assert command is not None
    assert shlex.split(command[2])[2] == told["model"]
