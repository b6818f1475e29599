"""What the tests of the report need: an output with one, results of evaluations, and the tables of a page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from streamprune.cli import main
from tests.helpers import known_family
from tests.tiny import make_model, tiny_config, write_token_ids

CONTEXT = 128


@dataclass(frozen=True)
class Reported:
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
        "hidden_error": [kl * layer for layer in range(4)],
    }  # fmt: skip


def text_result(*names: str) -> dict[str, Any]:
    sources = [measured(name, number) for number, name in enumerate(names)]
    whole = {key: value for key, value in measured("", 9).items() if key != "name"}
    return {
        "format": 1, "model": "out", "against": "m", "dtype": "float32",
        "data": {"fingerprint": "d", "held_back": True}, "against_source": True,
        "sources": sources, "all": whole,
    }  # fmt: skip


def generation_result(verdict: str = "loops") -> dict[str, Any]:
    went = {"ended": 0.25, "looped": 0.75, "repeated_4grams": 0.5}
    mode = {
        **went, "decoding": "greedy", "form": "chat", "thinking": True, "prompts": 16,
        "sources": [{"name": "one", "prompts": 16, **went, "repeated_4grams": None}], "original": went,
    }  # fmt: skip
    advice = ["Turn thinking off with `enable_thinking=False`."]
    return {"format": 1, "model": "out", "against": "m", "settings": {}, "modes": [mode], "verdict": verdict,
            "advice": advice}  # fmt: skip


TASKS = {
    "against": "original",
    "results": {"arc_easy": {"alias": "arc", "acc,none": 0.75, "acc_stderr,none": 0.0125}},
    "original_results": {"arc_easy": {"alias": "arc", "acc,none": 0.8, "acc_stderr,none": 0.0125}},
    "higher_is_better": {"arc_easy": {"acc": True}},
    "n-shot": {"arc_easy": 0},
    "n-samples": {"arc_easy": {"original": 100, "effective": 50}},
}


def put(output: Path, name: str, value: Any) -> None:
    (output / "evaluation").mkdir(exist_ok=True)
    (output / "evaluation" / name).write_text(json.dumps(value))


def make_reported(folder: Path) -> Reported:
    """Prune a tiny model to a budget, with two sources and layers that keep different numbers, and a report."""
    model = make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    sources = [write_token_ids(folder / f"{name}.jsonl", seed=seed) for seed, name in enumerate(("one", "two"))]
    words = [word for source in sources for word in ("--calibration", source)]
    output = folder / "out"
    told = call(
        "run", model, "-o", output, "--budget-gib", "0.5015", "--context", CONTEXT, "--schedule", "global", *words,
        "--report",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    return Reported(model, output, told)


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
