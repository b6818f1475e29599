"""What the report does with parts that are damaged, with cards that were edited, and at the end of a run."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamprune.checkpoint.index import is_small_file
from streamprune.reporting import write
from streamprune.reporting.evaluations import without_folders
from streamprune.reporting.write import markers, with_sections
from tests.helpers import tree_bytes
from tests.reports import (
    Reported,
    call,
    generation_result,
    put,
)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(output: Path) -> None:
        path = output / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def result(name: str, value: Any) -> Callable[[Path], None]:
    return lambda output: put(output, name, value)


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name != key}


def refitted(told: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The record of an output with a refit of its first layer, with these facts."""
    first = told["layers"][0]
    each = [0.5] * len(first["kept"])
    layer = {"index": first["index"], "shares": each, "tokens": [9] * len(each), "changes": each, "before": 0.5,
             "after": 0.25, "catch_up": 1.0, **facts}  # fmt: skip
    return {**told, "refit": {"anchor": None, "fitted_tokens": 9, "judging_tokens": 9, "layers": [layer]}}


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no record": (lambda output: (output / "streamprune.json").unlink(), "has no streamprune.json"),
    "record no JSON": (lambda output: (output / "streamprune.json").write_text("{"), "cannot be read as JSON"),
    "no layers": (changed("streamprune.json", lambda told: {**told, "layers": []}), "length >= 1 - at `$.layers`"),
    "other format": (changed("streamprune.json", lambda told: {**told, "format": 7}), "format 7"),
    "unknown expert": (
        changed("streamprune.json", lambda told: {**told, "layers": [{**told["layers"][0], "kept": [9]}]}),
        "`$.layers[0].kept[0]` is 9, but there are 8 experts",
    ),
    "scores that are no numbers": (
        changed("streamprune.json", lambda told: {**told, "layers": [{**told["layers"][0], "scores": [math.nan] * 8}]}),
        "`$.layers[0].scores[0]`",
    ),
    "use": (
        changed("streamprune.json", lambda told: {**told, "use": {**told["use"], "context": 0}}),
        ">= 1 - at `$.use.context`",
    ),
    "experts that are not ascending": (
        changed("streamprune.json", lambda told: {**told, "layers": [{**told["layers"][0], "kept": [2, 1]}]}),
        "ascending order - at `$.layers[0]`",
    ),
    "protected layer": (
        changed("streamprune.json", lambda told: {**told, "protected": {"77": [1]}}), "'77' is not a layer"
    ),
    "channels of experts that keep theirs": (
        changed("streamprune.json", lambda told: {**told, "layers": [{**told["layers"][0], "channels": "AAAA"}]}),
        "`$.layers[0].channels` does not match the width None",
    ),
    "a refit of another layer": (changed("streamprune.json", lambda told: refitted(told, index=9)), "ascending order"),
    "a refit of other experts": (
        changed("streamprune.json", lambda told: refitted(told, shares=[1.0] * 9)), "has not one value for each of"
    ),
    "an impossible refit": (
        changed("streamprune.json", lambda told: refitted(told, before=-1.0)), "values below 0 or that are not finite"
    ),
    "text without loss": (
        result("text.json", {"sources": [{"name": "x", "tokens": 3}]}),
        "missing required field `loss` - at `$.sources[0]`",
    ),
    "text of a list": (result("text.json", [1]), "not an object"),
    "text of another format": (
        result("text.json", {"format": 2, "sources": []}), "invalid enum value 2 - at `$.format`"
    ),
    "interval": (
        result("text.json", {"sources": [{"name": "x", "tokens": 3, "loss": 1, "loss_interval": [2, 1]}]}),
        "`loss_interval` is [2.0, 1.0], not [low, high] - at `$.sources[0]`",
    ),
    "name with a line break": (
        result("text.json", {"sources": [{"name": "a\nb", "tokens": 3, "loss": 1}]}),
        "`name` is 'a\\nb', not a name that can be printed - at `$.sources[0]`",
    ),
    "verdict": (
        result("generation.json", generation_result("fine")),
        "invalid enum value 'fine' - at `$.verdict`",
    ),
    "mode": (
        result("generation.json", {"verdict": "loops", "modes": [{"decoding": "a", "form": "b"}]}),
        "missing required field `prompts` - at `$.modes[0]`",
    ),
    "tasks": (result("tasks.json", {"results": [1]}), "expected `object`, got `array` - at `$.results`"),
    "scores": (lambda output: (output / "scores" / "scores.safetensors").write_bytes(b"x" * 90), "scores"),
    "log": (lambda output: Path(f"{output}.streamprune.log").write_text("no log"), "is not a log of a run"),
    "weights": (lambda output: (output / "model.safetensors.index.json").unlink(), "is it a complete model folder"),
    "marker": (
        lambda output: (output / "README.md").write_text(markers("pictures")[0]), "1 lines that begin its section"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_damaged_is_one_error_and_changes_nothing(how: str, copied: Path) -> None:
    damage, message = BROKEN[how]
    damage(copied)
    before = tree_bytes(copied)
    told = call("report", copied)
    assert told.exit_code == 1
    assert told.stdout == ""
    assert told.stderr.startswith("Error: ")
    assert told.stderr.count("\n") == 1
    assert message.lower() in told.stderr.lower()
    assert tree_bytes(copied) == before


def test_sections_leave_the_rest_of_a_card_alone() -> None:
    for card in (b"", b"# Title", "# Größe\r\n\r\nedited \xff by hand\r\n".encode("latin-1"), b"a\n\n\n"):
        once = with_sections(card, {"pictures": "## Pictures\n\n![x](y)", "evaluation": "## Evaluation"})
        assert once.startswith(card)
        assert once.index(b"## Evaluation") < once.index(b"## Pictures")
        assert with_sections(once, {"pictures": "## Pictures\n\n![x](y)", "evaluation": "## Evaluation"}) == once
        assert with_sections(card, {"pictures": "", "evaluation": "\n"}) == card
        moved = once.replace(b"## Evaluation", b"old text") + b"more by hand"
        assert with_sections(moved, {"evaluation": "## Evaluation"}) == once + b"more by hand"
    empty = f"# Title\n\n{chr(10).join(markers('evaluation'))}\n\nThe end.\n".encode()
    filled = with_sections(empty, {"evaluation": "numbers"})
    assert filled == empty.replace(b"-->\n<!--", b"-->\nnumbers\n<!--")
    assert with_sections(filled, {"evaluation": ""}) == empty


def pruning_again(reported: Reported, output: Path) -> list[Any]:
    """The words of a command that makes another output of the same model and scores."""
    scores = ["--scores", reported.output, "--keep", 4]
    return ["prune", reported.model, "-o", output, *scores, "--overwrite"]


def test_a_run_says_where_its_report_is_and_works_on_with_it(reported: Reported, tmp_path: Path) -> None:
    assert reported.told.stderr.splitlines()[-1] == f"report: {reported.output / 'report.html'}"
    told = call("verify", reported.output, "--source", reported.model)
    assert told.exit_code == 0, told.output
    assert not is_small_file("report.html"), "what is made from this model has a report of its own"
    shutil.copytree(reported.output, tmp_path / "out")
    words = [*pruning_again(reported, tmp_path / "out"), "--quiet"]
    told = call(*words)
    assert (told.exit_code, told.output) == (0, "")
    assert not (tmp_path / "out" / "report.html").exists(), "STREAMPRUNE_REPORT=0, as in all tests"
    told = call(*words, STREAMPRUNE_REPORT="")
    assert (told.exit_code, told.output) == (0, "")
    assert (tmp_path / "out" / "report.html").exists(), "it is made where nothing else is said"


def test_the_report_of_prune_says_whether_it_was_verified(reported: Reported, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for option, said in (
        ("--verify", "yes: every byte was compared with the source's"),
        ("--no-verify", "no; <code>streamprune verify</code> compares it with the source"),
    ):
        told = call(*pruning_again(reported, output), option, "--report")
        assert told.exit_code == 0, told.output
        page = html.unescape((output / "report.html").read_text())
        assert f"<dt>verified</dt><dd>{said}</dd>" in page
        assert "no text was sent through the layers" in page
        assert "was interrupted" not in page
    Path(f"{output}.streamprune.log").unlink()
    assert call("report", output).exit_code == 0
    assert "<dt>verified</dt><dd>not on record" in (output / "report.html").read_text()


def test_a_report_that_fails_costs_the_run_a_note(
    reported: Reported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*pruning_again(reported, tmp_path / "out"), "--report"]

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


def test_text_that_begins_like_a_home_folder_is_kept(tmp_path: Path) -> None:
    given = {"continuation": "~ 3 km/h", "model": str(tmp_path)}
    assert without_folders(given) == {"continuation": "~ 3 km/h", "model": tmp_path.name}
