"""The report of an output: its numbers are those of the files, and nothing but an error comes of damaged ones."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from streamprune.cli import main
from streamprune.fit.estimate import Estimate
from streamprune.fit.footprint import read_footprint
from streamprune.machine import format_bytes
from streamprune.report import write
from streamprune.report.facts import read_facts
from streamprune.report.write import ALL_PICTURES, write_report
from streamprune.result.sections import markers, placeholder, with_sections
from streamprune.settings import Use
from streamprune.source.checkpoint import is_small_file
from tests.helpers import known_family, prune, tree_bytes
from tests.tiny import make_model, tiny_config, write_token_ids

CONTEXT = 128


@dataclass(frozen=True)
class Made:
    """An output of `streamprune run` with its report, and all that the command said."""

    model: Path
    output: Path
    told: Result


def call(*words: object, **env: str) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env=env or None)


def measured(name: str, number: int) -> dict[str, Any]:
    """What text.json has of a source."""
    loss, kl = 1.25 + number, 0.0625 * (number + 1)
    return {
        "name": name, "sequences": 8, "tokens": 4000 + number,
        "loss": loss, "loss_interval": [loss - 0.125, loss + 0.25],
        "perplexity": math.exp(loss), "perplexity_interval": [math.exp(loss - 0.125), math.exp(loss + 0.25)],
        "original_loss": loss - kl, "original_perplexity": math.exp(loss - kl),
        "loss_increase": kl, "loss_increase_interval": [kl / 2, kl * 2],
        "kl": kl, "kl_interval": [kl / 2, kl * 2], "kl_p99": kl * 9,
        "top1_agreement": 0.875, "top1_agreement_interval": None,
        "hidden_error": [kl * block for block in range(4)],
    }  # fmt: skip


def text_result(*names: str) -> dict[str, Any]:
    sources = [measured(name, number) for number, name in enumerate(names)]
    whole = {key: value for key, value in measured("", 9).items() if key != "name"}
    return {
        "format": 1, "model": "out", "against": "m", "dtype": "float32", "data": "d", "sources": sources, "all": whole,
    }  # fmt: skip


def generation_result(verdict: str = "loops") -> dict[str, Any]:
    went = {"prompts": 16, "ended": 0.25, "looped": 0.75, "repeated_4grams": 0.5}
    mode = {**went, "decoding": "greedy", "thinking": True, "sources": [{"name": "one", **went}], "original": went}
    advice = ["Turn thinking off with `enable_thinking=False`."]
    return {"format": 1, "model": "out", "against": "m", "settings": {}, "modes": [mode], "verdict": verdict,
            "advice": advice}  # fmt: skip


TASKS = {
    "results": {"arc_easy": {"alias": "arc", "acc,none": 0.75, "acc_stderr,none": 0.0125}},
    "n-shot": {"arc_easy": 0},
}


def put(output: Path, name: str, value: Any) -> None:
    (output / "evaluation").mkdir(exist_ok=True)
    (output / "evaluation" / name).write_text(json.dumps(value))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    model = make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    sources = [write_token_ids(folder / f"{name}.jsonl", seed=seed) for seed, name in enumerate(("one", "two"))]
    words = [word for source in sources for word in ("--calibration", source)]
    output = folder / "out"
    told = call("run", model, "-o", output, "--budget-gib", "0.5015", "--context", CONTEXT, "--schedule", "global",
                *words, "--report")  # fmt: skip
    assert told.exit_code == 0, told.output
    return Made(model, output, told)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A copy of the output that a test may change, with its log."""
    shutil.copytree(made.output, tmp_path / "out")
    shutil.copy(f"{made.output}.streamprune.log", tmp_path / "out.streamprune.log")
    return tmp_path / "out"


class Tables(HTMLParser):
    """Every table of a page by its caption: rows of cells, and of whether these are struck out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[tuple[str, bool]]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._caption = self._struck = False
        self._name = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self._caption, self._name = True, ""
        elif tag == "tr":
            self.found[self._name].append([])
        elif tag in ("td", "th"):
            self.found[self._name][-1].append(("", False))
        self._struck = tag == "s"

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._caption = False
            self.found[self._name] = []
        if tag == "table":
            self._name = ""

    def handle_data(self, data: str) -> None:
        if self._caption:
            self._name += data
        elif self._name and data.strip():
            text, struck = self.found[self._name][-1][-1]
            self.found[self._name][-1][-1] = (text + data.strip("\n"), struck or self._struck)

    def rows(self, caption: str) -> list[list[str]]:
        """The texts of a table's rows, without that of the columns' names."""
        return [[text for text, _ in row] for row in self.found[caption][1:]]


def tables(output: Path) -> Tables:
    return Tables((output / "report.html").read_text(encoding="utf-8"))


def record_of(output: Path) -> dict[str, Any]:
    record = json.loads((output / "streamprune.json").read_text())
    assert isinstance(record, dict)
    return record


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{output}.streamprune.log").read_text().splitlines()]


def test_the_tables_hold_the_numbers_of_the_record(made: Made) -> None:
    page, layers = tables(made.output), record_of(made.output)["layers"]
    by_layer = page.rows("Experts by layer")
    scores = page.found["Scores by layer and expert; struck out: removed"]
    tokens = page.rows("Tokens per expert by layer")
    assert len(by_layer) == len(tokens) == len(layers) == 4
    for layer, row, cells, told in zip(layers, by_layer, scores[1:], tokens, strict=True):
        kept = set(layer["kept"])
        lowest = min(layer["scores"][expert] for expert in kept)
        gone = [layer["scores"][expert] for expert in range(8) if expert not in kept]
        assert row[:3] == [str(layer["index"]), str(len(kept)), str(8 - len(kept))]
        assert row[4:6] == [f"{lowest:.4g}", f"{max(gone):.4g}" if gone else "–"]
        assert cells[0] == (str(layer["index"]), False)
        assert [text for text, _ in cells[1:]] == [f"{score:.4g}" for score in layer["scores"]]
        assert [struck for _, struck in cells[1:]] == [expert not in kept for expert in range(8)]
        quarters = np.percentile(layer["counts"], (0, 25, 50, 75, 100))
        assert [float(text.replace(",", "")) for text in told[1:6]] == quarters.tolist()
        assert int(told[6]) == min(layer["counts"][expert] for expert in kept)
        assert int(told[7]) == layer["counts"].count(0)


def test_memory_retention_calibration_and_course_are_those_of_the_run(made: Made) -> None:
    page, (*blocks, summary) = tables(made.output), log_of(made.output)
    memory = {row[0]: row[1:] for row in page.rows("Memory, one card")}
    before = Estimate(read_footprint(str(made.model)), Use(context=CONTEXT))
    assert record_of(made.output)["use"]["budget_bytes"] == summary["memory"]["budget_bytes"]
    for term in summary["memory"]["terms"]:
        assert memory[term["name"]][1] == format_bytes(term["bytes"])
    assert {term.name: format_bytes(term.bytes) for term in before.terms}.items() <= {
        name: row[0] for name, row in memory.items()
    }.items()
    assert memory["total"] == [format_bytes(before.total), format_bytes(summary["memory"]["total_bytes"])]
    budget = f"left of the budget of {format_bytes(summary['memory']['budget_bytes'])}"
    missing = before.total - summary["memory"]["budget_bytes"]
    assert memory[budget] == [
        f"does not fit: {format_bytes(missing)} missing", format_bytes(summary["memory"]["left_bytes"])
    ]  # fmt: skip
    kept = {row[0]: row[1:3] for row in page.rows("Saliency kept by source")}
    assert kept == {
        name: [f"{each['kept']:.1%}", f"{each['best']:.1%}"] for name, each in summary["domain_retention"].items()
    }
    assert page.rows("Calibration text by source") == [
        [name, "–", "4", "96", "50.0%", "as it is"] for name in ("one.jsonl", "two.jsonl")
    ]
    course = page.rows("The run by block")
    assert course == [
        [str(each["block"]), f"{each['at_seconds']:.1f}", f"{each['seconds']:.2f}", format_bytes(each["peak_bytes"])]
        for each in blocks
    ]
    assert "every byte was compared with the source" in (made.output / "report.html").read_text()


def test_the_tables_hold_the_numbers_of_the_evaluations(copy: Path) -> None:
    text = text_result("one", "two")
    put(copy, "text.json", text)
    put(copy, "generation.json", generation_result())
    put(copy, "tasks.json", TASKS)
    write_report(copy)
    page = tables(copy)
    for row, each in zip(
        page.rows("Divergence from the original, nats per token"), [*text["sources"], text["all"]], strict=True
    ):
        low, high = each["kl_interval"]
        assert row == [each.get("name", "all"), f"{each['kl']:.4g}", f"{low:.4g} to {high:.4g}",
                       f"{each['kl_p99']:.4g}", "87.5%", "–"]  # fmt: skip
    for row, each in zip(page.rows("Loss on held-out text, nats per token"), text["sources"], strict=False):
        assert row[1:3] == [f"{each['tokens']:,}", f"{each['loss']:.4g}"]
        assert float(row[4].replace(",", "")) == pytest.approx(each["perplexity"], rel=1e-3)
        assert row[6:9] == [f"{each[key]:.4g}" for key in ("original_loss", "original_perplexity", "loss_increase")]
    depth = page.rows("Relative error of the hidden states after each block")
    assert [row[1] for row in depth] == [f"{value:.4g}" for value in text["sources"][0]["hidden_error"]]
    assert page.rows("Continuations") == [
        [name, "16", "25.0%", "75.0%", "50.0%"] for name in ("greedy, thinking on", "greedy, thinking on, the original")
    ]
    assert page.rows("Tasks") == [["arc_easy", "acc", "0", "0.75", "0.013"]]
    assert "enable_thinking=False" in (copy / "report.html").read_text()
    card = (copy / "README.md").read_text()
    assert "runs into loops" in card
    assert "enable&#95;thinking=False" in card
    assert f"| one | 4,000 | {1.25 - 0.0625:.4g} | 1.25 | 0.0625 | 0.03125 to 0.125 | 87.5% |" in card
    assert {path.stem for path in (copy / "pictures").iterdir()} == ALL_PICTURES
    for name in set(re.findall(r"\]\(pictures/(\w+)\.png\)", card)) | ALL_PICTURES:
        with Image.open(copy / "pictures" / f"{name}.png") as picture:
            assert picture.width == 960


def test_the_same_input_gives_the_same_bytes(made: Made, copy: Path) -> None:
    put(copy, "text.json", text_result("one", "two"))
    write_report(copy)
    first = tree_bytes(copy)
    write_report(copy)
    assert tree_bytes(copy) == first
    shutil.rmtree(copy / "evaluation")
    write_report(copy)
    found, first = tree_bytes(copy), tree_bytes(made.output)
    cards = [each.pop("README.md") for each in (found, first)]
    assert found == first, "what an evaluation added has gone with it"
    assert cards[0] == with_sections(cards[1], {}) + b"\n" + placeholder("evaluation").encode()


def test_the_page_needs_nothing_else(copy: Path) -> None:
    put(copy, "text.json", text_result("one", "two"))
    write_report(copy)
    page = (copy / "report.html").read_text()
    tags = Tables(page).tags
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in tags}
    links = [
        value or "" for _, attributes in tags for name, value in attributes.items() if name.endswith(("href", "src"))
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "figures share no names"
    # (Their namespaces are names, which nobody fetches.)
    assert set(re.findall(r"https?://[^\"<]*", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_names_from_strangers_are_only_text(copy: Path) -> None:
    name = "<script>alert(1)</script>|$\\frac{`&\"' [x](http://e.vil)"
    put(copy, "text.json", text_result(name, "two"))
    put(copy, "generation.json", {**generation_result(), "advice": [name]})
    put(copy, "tasks.json", {"results": {name: {f"acc{name},none": 0.5}}})
    record = record_of(copy)
    record["settings"] |= {"model": name, "method": name}
    (copy / "streamprune.json").write_text(json.dumps(record))
    before = (copy / "README.md").read_bytes()
    write_report(copy)
    page = (copy / "report.html").read_text()
    assert "<script" not in page
    assert any(name in row for row in tables(copy).rows("Loss on held-out text, nats per token"))
    added = (copy / "README.md").read_bytes()[len(before) - 400 :].decode()
    assert "<script" not in added
    assert "](http" not in added
    rows = [line for line in added.splitlines() if line.startswith("| &#60;script")]
    assert len(rows) == 2
    assert all(line.count("|") == columns for line, columns in zip(rows, (8, 6), strict=True))


def test_what_is_missing_is_said(copy: Path) -> None:
    Path(f"{copy}.streamprune.log").unlink()
    shutil.rmtree(copy / "scores")
    (copy / "README.md").unlink()
    write_report(copy)
    page = (copy / "report.html").read_text()
    assert "There is no log (out.streamprune.log) beside the model" in page
    assert "The scores are not with the model" in page
    assert "Not measured. <code>streamprune eval</code>" in page
    assert not (copy / "README.md").exists()
    assert not (copy / "pictures" / "course.png").exists()
    assert "Memory, one card" in tables(copy).found, "by the names of the tensors alone"


def test_the_log_of_another_run_is_not_taken(copy: Path) -> None:
    *blocks, summary = log_of(copy)
    summary["experts_per_layer"] = 7
    Path(f"{copy}.streamprune.log").write_text("".join(json.dumps(event) + "\n" for event in (*blocks, summary)))
    write_report(copy)
    assert "is of another run" in (copy / "report.html").read_text()
    assert "The run by block" not in tables(copy).found


def test_a_choice_by_hand_has_a_report_without_scores(made: Made, tmp_path: Path) -> None:
    choice = tmp_path / "keep.json"
    choice.write_text(json.dumps([[0, 1, 2], [3, 4], [1, 2, 7], [5, 6, 7]]))
    told = call("prune", made.model, "-o", tmp_path / "out", "--keep-file", choice, "--report")
    assert told.exit_code == 0, told.output
    assert told.stderr.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    page = tables(tmp_path / "out")
    cells = page.found["Scores by layer and expert; struck out: removed"][2][1:]
    assert [number for number, (_, struck) in enumerate(cells) if not struck] == [3, 4]
    memory = {row[0]: row[1:] for row in page.rows("Memory, one card")}
    assert memory["weights: experts"][0] == format_bytes(4 * 8 * 3 * 64 * 32 * 4)
    assert memory["weights: experts"][1] == format_bytes(11 * 3 * 64 * 32 * 4)
    assert "Tokens per expert by layer" not in page.found


@pytest.mark.parametrize(
    ("family", "settings"),
    [("granitemoe", {}), ("gpt_oss", {"schedule": "linear-increase", "spread": 0.3}), ("deepseek_v3", {"keep": 6})],
)
def test_the_memory_before_is_the_sources(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Where experts lie in one tensor or in many, and blocks keep equal numbers or not."""
    model = make_model(tmp_path / "model", tiny_config(known_family(family)))
    result = prune(model, tmp_path / "out", context=CONTEXT, **settings)
    memory = read_facts(tmp_path / "out").memory
    assert not isinstance(memory, str)
    assert [vars(term) for term in memory.after.terms] == result.summary["memory"]["terms"]
    assert memory.before is not None
    assert memory.before.terms == Estimate(read_footprint(str(model)), Use(context=CONTEXT)).terms


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(output: Path) -> None:
        path = output / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def result(name: str, value: Any) -> Callable[[Path], None]:
    return lambda output: put(output, name, value)


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name != key}


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no record": (lambda output: (output / "streamprune.json").unlink(), "has no streamprune.json"),
    "record no JSON": (lambda output: (output / "streamprune.json").write_text("{"), "cannot be read as JSON"),
    "no layers": (changed("streamprune.json", lambda told: {**told, "layers": []}), "layers is []"),
    "other format": (changed("streamprune.json", lambda told: {**told, "format": 7}), "format 7"),
    "unknown expert": (
        changed("streamprune.json", lambda told: {**told, "layers": [{**told["layers"][0], "kept": [9]}]}),
        "layers[0].kept[0] is 9",
    ),
    "scores that are no numbers": (
        changed("streamprune.json", lambda told: {**told, "layers": [{**told["layers"][0], "scores": [math.nan] * 8}]}),
        "scores[0] is nan",
    ),
    "use": (changed("streamprune.json", lambda told: {**told, "use": {**told["use"], "context": 0}}), "context is 0"),
    "text without loss": (
        result("text.json", {"sources": [{"name": "x", "tokens": 3}]}), "sources[0] has no 'loss' where"
    ),
    "text of a list": (result("text.json", [1]), "not an object"),
    "interval": (
        result("text.json", {"sources": [{"name": "x", "tokens": 3, "loss": 1, "loss_interval": [2, 1]}]}),
        "loss_interval is [2, 1]",
    ),
    "name with a line break": (result("text.json", {"sources": [{"name": "a\nb"}]}), "name is 'a\\nb'"),
    "verdict": (result("generation.json", generation_result("fine")), "verdict is 'fine'"),
    "mode": (result("generation.json", {"verdict": "loops", "modes": [{"decoding": "greedy"}]}), "no 'prompts'"),
    "tasks": (result("tasks.json", {"results": [1]}), "results is [1]"),
    "scores": (lambda output: (output / "scores" / "scores.safetensors").write_bytes(b"x" * 90), "scores"),
    "log": (lambda output: Path(f"{output}.streamprune.log").write_text("no log"), "is no log of a run"),
    "weights": (lambda output: (output / "model.safetensors.index.json").unlink(), "is it a complete model folder"),
    "marker": (
        lambda output: (output / "README.md").write_text(markers("pictures")[0]), "1 lines that begin its section"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_damaged_is_one_error_and_changes_nothing(how: str, copy: Path) -> None:
    damage, message = BROKEN[how]
    damage(copy)
    before = tree_bytes(copy)
    told = call("report", copy)
    assert told.exit_code == 1
    assert told.stdout == ""
    assert told.stderr.startswith("Error: ")
    assert told.stderr.count("\n") == 1
    assert message.lower() in told.stderr.lower()
    assert tree_bytes(copy) == before


def test_sections_leave_the_rest_of_a_card_alone() -> None:
    for card in (b"", b"# Title", "# Größe\r\n\r\nedited \xff by hand\r\n".encode("latin-1"), b"a\n\n\n"):
        once = with_sections(card, {"pictures": "## Pictures\n\n![x](y)", "evaluation": "## Evaluation"})
        assert once.startswith(card)
        assert once.index(b"## Evaluation") < once.index(b"## Pictures")
        assert with_sections(once, {"pictures": "## Pictures\n\n![x](y)", "evaluation": "## Evaluation"}) == once
        assert with_sections(card, {"pictures": "", "evaluation": "\n"}) == card
        moved = once.replace(b"## Evaluation", b"old text") + b"more by hand"
        assert with_sections(moved, {"evaluation": "## Evaluation"}) == once + b"more by hand"
    empty = f"# Title\n\n{placeholder('evaluation')}\nThe end.\n".encode()
    filled = with_sections(empty, {"evaluation": "numbers"})
    assert filled == empty.replace(b"-->\n<!--", b"-->\nnumbers\n<!--")
    assert with_sections(filled, {"evaluation": ""}) == empty


def test_a_run_says_where_its_report_is_and_works_on_with_it(made: Made, tmp_path: Path) -> None:
    assert made.told.stderr.splitlines()[-1] == f"report: {made.output / 'report.html'}"
    told = call("verify", made.output, "--source", made.model)
    assert told.exit_code == 0, told.output
    assert not is_small_file("report.html"), "what is made from this model has a report of its own"
    shutil.copytree(made.output, tmp_path / "out")
    words = [
        "prune",
        made.model,
        "-o",
        tmp_path / "out",
        "--scores",
        made.output,
        "--keep",
        4,
        "--overwrite",
        "--quiet",
    ]
    told = call(*words)
    assert (told.exit_code, told.output) == (0, "")
    assert not (tmp_path / "out" / "report.html").exists(), "STREAMPRUNE_REPORT=0, as in all tests"
    told = call(*words, STREAMPRUNE_REPORT="")
    assert (told.exit_code, told.output) == (0, "")
    assert (tmp_path / "out" / "report.html").exists(), "it is made where nothing else is said"


def test_a_report_that_fails_costs_the_run_a_note(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "prune",
        made.model,
        "-o",
        tmp_path / "out",
        "--scores",
        made.output,
        "--keep",
        4,
        "--overwrite",
        "--report",
    ]

    def fails(error: BaseException) -> Callable[[Path], Any]:
        def read(output: Path) -> Any:
            raise error

        return read

    for error, note in (
        (RuntimeError("no such luck"), "RuntimeError: no such luck"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError(28, "No space left on device"), "No space left"),
    ):
        monkeypatch.setattr(write, "read_facts", fails(error))
        told = call(*words, "--json")
        assert told.exit_code == 0
        assert json.loads(told.stdout)["experts_per_layer"] == 4
        assert told.stderr.splitlines()[-1].startswith("note: ")
        assert note in told.stderr.splitlines()[-1]
        assert "is no report" not in call(*words, "--no-report").stderr
        assert call(*words, "--quiet").stderr == ""
