"""`streamprune inspect`: what it says is what the statistics say, quickly, and for any size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from streamprune.cli import main
from streamprune.errors import SettingsError
from streamprune.models.config_json import ExpertSpec
from streamprune.saliency.scores import FIELDS, LayerStatistics, Scores
from streamprune.saliency.scores_file import write_scores
from streamprune.selection.compare import changed_settings
from streamprune.selection.inspect import BARS, inspect_scores
from streamprune.selection.retention import retentions
from streamprune.selection.select import Selector
from streamprune.selection.settings import SelectionSettings
from tests.made_scores import make_scores


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    made = make_scores()
    write_scores(tmp_path / "s.safetensors", made)
    return made


@pytest.fixture
def inspect(tmp_path: Path, scores: Scores) -> Any:
    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["inspect", str(tmp_path / "s.safetensors"), *arguments])

    return call


def as_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def chosen(scores: Scores, selection: SelectionSettings, total: int) -> Any:
    return Selector(selection, scores.spec, scores.sources, scores.source_tokens, total).all(scores.layers)


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_scores_alone_are_shown(inspect: Any, scores: Scores) -> None:
    body = as_json(inspect("--json"))
    assert (body["model"], body["moe_layers"], body["experts_per_layer"], body["kept"]) == ("org/model", 4, 12, None)
    assert [source["share"] for source in body["sources"]] == [0.4, 0.6]
    for layer, told in zip(scores.layers, body["layers"], strict=True):
        tokens, gated = (layer.values[list(FIELDS).index(name)].sum(axis=0) for name in ("tokens", "gated_norms"))
        reap = np.divide(gated, tokens, out=np.zeros(12), where=tokens > 0)
        assert told["scores"] == pytest.approx(reap.tolist())
        assert list(told["quartiles"].values()) == pytest.approx(np.quantile(reap, [0, 0.25, 0.5, 0.75, 1]).tolist())
        assert told["histogram"] == np.histogram(reap, bins=BARS)[0].tolist()
        assert 11 in told["never_seen"]
        assert told["never_seen"] == np.flatnonzero(tokens == 0).tolist()
        assert told["keep"] is told["kept"] is told["boundary"] is None
    text = inspect().stdout
    assert "4 layers of 12 experts (top-2); 100 calibration tokens" in text
    assert ["source1", "60", "60.0%"] in [line.split() for line in text.splitlines()]
    assert "say --keep, --ratio or --total" in text
    assert "retention" not in text


def test_a_choice_is_shown_with_its_boundary_and_what_it_keeps(inspect: Any, scores: Scores) -> None:
    arguments = ["--keep", "5", "--method", "ean", "--mix", "source1=1", "--schedule", "global", "--floor", "3"]
    body = as_json(inspect(*arguments, "--json"))
    choice = chosen(scores, SelectionSettings("ean", "source1=1", "global", floor=3), 20)
    assert body["kept"] == 20
    assert [told["kept"] for told in body["layers"]] == [list(layer.kept) for layer in choice.layers]
    for told in body["layers"]:
        values, stays = told["scores"], set(told["kept"])
        line = told["boundary"]
        assert line["last_kept_score"] == min(values[expert] for expert in stays) == values[line["last_kept"]]
        out = [value for expert, value in enumerate(values) if expert not in stays]
        assert line["first_removed_score"] == max(out) == values[line["first_removed"]]
        assert line["margin"] == pytest.approx(1 - max(out) / line["last_kept_score"])
    expected = retentions(scores, choice)
    assert [(told["source"], told["kept"], told["best"]) for told in body["retention"]] == [
        (each.source, each.kept, each.best) for each in expected
    ]
    text = inspect(*arguments).stdout
    least, most = min(choice.counts), max(choice.counts)
    assert 3 <= least < most
    assert (
        f"method ean, schedule global: keeps 20 of 48 experts, {least} to {most} of 12 by layer; 58.3% removed" in text
    )
    assert ["source0", f"{expected[0].kept:.1%}"] in [line.split()[:2] for line in text.splitlines()]
    assert [line.split()[:2] for line in text.splitlines() if line[:5].strip().isdigit()] == [
        [str(layer.index), str(len(layer.kept))] for layer in choice.layers
    ]


def test_ways_to_say_how_many(inspect: Any, tmp_path: Path) -> None:
    keep = [layer["kept"] for layer in as_json(inspect("--keep", "6", "--json"))["layers"]]
    (tmp_path / "k.json").write_text(json.dumps(keep))
    (tmp_path / "c.json").write_text("[6, 6, 6, 6]")
    for way in (("--ratio", "0.5"), ("--total", "24"), ("--keep-file", str(tmp_path / "k.json")),
                ("--schedule", str(tmp_path / "c.json"))):  # fmt: skip
        assert [layer["kept"] for layer in as_json(inspect(*way, "--json"))["layers"]] == keep
    assert as_json(inspect("--total", "23", "--json"))["kept"] == 23


def test_a_comparison_says_which_experts_differ_and_what_sources_gain(inspect: Any, scores: Scores) -> None:
    text = "mix=source1=1;method=weighted-ean"
    (told,) = as_json(inspect("--keep", "4", "--compare", text, "--json"))["comparisons"]
    one = chosen(scores, SelectionSettings(), 16)
    two = chosen(scores, SelectionSettings("weighted-ean", "source1=1"), 16)
    for layer, first, second in zip(told["layers"], one.layers, two.layers, strict=True):
        ours, theirs = set(first.kept), set(second.kept)
        assert layer["first_only"] == sorted(ours - theirs)
        assert layer["second_only"] == sorted(theirs - ours)
        assert layer["jaccard"] == len(ours & theirs) / len(ours | theirs)
    assert told["jaccard"] == pytest.approx(np.mean([layer["jaccard"] for layer in told["layers"]]))
    assert 0 < told["changed"] == sum(len(layer["second_only"]) for layer in told["layers"])
    before, after = (retentions(scores, choice) for choice in (one, two))
    assert [each["gain"] for each in told["retention"]] == pytest.approx(
        [new.kept - old.kept for old, new in zip(before, after, strict=True)]
    )
    shown = inspect("--keep", "4", "--compare", text, "--compare", "method=reap").stdout
    assert f"Compared with {text}: {told['changed']} experts differ, mean Jaccard {told['jaccard']:.3f}" in shown
    # A difference of two shares: percentage points.
    assert "  change in points\n" in shown
    assert f"  {100 * (after[1].kept - before[1].kept):+.1f}\n" in shown
    assert "Both keep the same experts in every layer." in shown


def test_one_layer_shows_every_expert(inspect: Any, scores: Scores) -> None:
    text = inspect("--keep", "4", "--layer", "3", "--compare", "mix=source1=1").stdout
    start = text.index("Experts of layer 3")
    rows = [line.split() for line in text[start:].splitlines()[2:14]]
    view = inspect_scores(scores, SelectionSettings(), chosen(scores, SelectionSettings(), 16))["layers"][2]
    order = sorted(range(12), key=lambda expert: (-view["scores"][expert], expert))
    assert [int(row[1]) for row in rows] == order
    assert [row[4] for row in rows] == ["kept"] * 4 + ["removed"] * 8
    saliency = scores.layers[2].values[list(FIELDS).index("gated_norms"), 0]
    assert rows[0][5] == f"{saliency[order[0]] / saliency.sum():.2%}"
    body = as_json(inspect("--layer", "3", "--json"))
    assert [layer["index"] for layer in body["layers"]] == [3]


def test_warnings_of_super_experts_and_of_experts_never_seen(inspect: Any, tmp_path: Path, scores: Scores) -> None:
    layers = []
    for layer in scores.layers:
        values = layer.values.copy()
        if layer.index == 1:
            seen = np.flatnonzero(values[0].sum(axis=0))
            worst = seen[np.argmin(values[list(FIELDS).index("norms")].sum(axis=0)[seen])]
            source = int(values[0, :, worst].argmax())
            values[list(FIELDS).index("peaks"), source, worst] = 1e6
        layers.append(LayerStatistics(layer.index, values))
    write_scores(
        tmp_path / "s.safetensors",
        Scores(tuple(layers), scores.sources, scores.source_tokens, scores.spec, scores.provenance),
    )
    text = inspect("--keep", "4", "--method", "ean").stdout
    assert f"warning: super experts would be removed (layer 1: {worst}): --protect-super-experts keeps them." in text
    saved = as_json(inspect("--keep", "4", "--method", "ean", "--protect-super-experts", "--json"))
    assert worst in saved["layers"][0]["kept"]
    assert saved["super_experts"] == {"1": [worst]}
    assert not any("super experts" in warning for warning in saved["warnings"])
    # A protected expert is not where the line is drawn.
    assert saved["layers"][0]["boundary"]["last_kept"] != worst
    detail = inspect("--keep", "4", "--method", "ean", "--protect-super-experts", "--layer", "1").stdout
    assert sum("protected" in line for line in detail.splitlines()) == 1
    many = as_json(inspect("--keep", "11", "--method", "random", "--json"))["warnings"]
    assert sum("would stay that no token was routed to" in warning for warning in many) == 1


def test_a_total_beside_a_schedule_file_has_to_agree(inspect: Any, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[3, 4, 5, 6]")
    given = ("--schedule", str(tmp_path / "s.json"))
    assert inspect("--total", "18", *given, "--json").exit_code == 0
    assert "keeps 18 experts in all, but 20 were asked for" in refused(inspect("--total", "20", *given))


def test_groups_draw_a_line_each() -> None:
    scores = make_scores(experts=12, groups=3, topk_groups=2, per_source=(200, 200))
    for layer in inspect_scores(scores, SelectionSettings(), chosen(scores, SelectionSettings(), 24))["layers"]:
        boundary = layer["boundary"]
        assert boundary["margin"] >= 0
        assert boundary["last_kept"] // 4 == boundary["first_removed"] // 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "4", "--ratio", "0.5"], "Say in one way"),
        (["--keep", "1"], "the router picks 2 experts per token"),
        (["--keep", "12"], "nothing would be removed"),
        (["--total", "48"], "nothing would be removed"),
        (["--total", "7"], "7 experts cannot be divided among 4 layers"),
        (["--ratio", "nan"], "--ratio nan is not between 0 and 1"),
        (["--ratio", "1.5"], "--ratio 1.5"),
        (["--schedule", "global"], "say with --keep, --ratio or --total"),
        (["--protect-super-experts"], "say with --keep, --ratio or --total"),
        (["--keep", "4", "--schedule", "globl"], "cannot be read"),
        (["--keep", "4", "--mix", "code=1"], "no source 'code'. The scores have: source0 (40 tokens)"),
        (["--keep", "4", "--spread", "0.1"], "--spread"),
        (["--compare", "mix=source1=1"], "--compare shows two selections side by side"),
        (["--keep", "4", "--compare", "source1=1"], "is not a change of the selection"),
        (["--keep", "4", "--compare", "method=wanda"], "'wanda' is not a value of method. It takes: reap, frequency,"),
        (["--keep", "4", "--compare", "mix=code=1"], "--compare 'mix=code=1': --mix: there is no source 'code'"),
        (["--keep", "4", "--compare", "spread=0.1"], "--compare 'spread=0.1': --spread 0.1 is for --schedule"),
        (["--keep", "4", "--compare", "floor=x"], "'x' is not a value of floor"),
        (["--layer", "0"], "--layer 0 has no experts. Layers with experts: 1, 2, 3, 4"),
        (["--keep-file", "none.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments: list[str], message: str, inspect: Any) -> None:
    assert message in refused(inspect(*arguments))


def test_a_bad_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"nothing")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "s")])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 's'}: no safetensors file, or damaged")


def test_what_a_comparison_may_change() -> None:
    base = SelectionSettings("ean", "a=1", "linear-decrease", 0.2)
    assert changed_settings(base, "mix=") == (SelectionSettings("ean", None, "linear-decrease", 0.2), None)
    assert changed_settings(base, "schedule=global") == (SelectionSettings("ean", "a=1", "global"), None)
    assert changed_settings(base, "schedule=linear-increase") == (
        SelectionSettings("ean", "a=1", "linear-increase", 0.2),
        None,
    )
    assert changed_settings(base, "mix=a=1,b=2; method=reap;floor=3;seed=4;protect-super-experts=yes;width=8") == (
        SelectionSettings("reap", "a=1,b=2", "linear-decrease", 0.2, 3, True, 4),
        8,
    )
    for text in ("", "=", "mix", "x=1", "method=reap;method=ean", "seed=" + "9" * 5000, "protect-super-experts=maybe"):
        with pytest.raises(SettingsError, match="--compare"):
            changed_settings(base, text)


def test_a_large_file_stays_readable_and_quick_and_imports_no_torch(tmp_path: Path) -> None:
    """48 layers of 128 experts, as Qwen3-30B-A3B has them: one line per layer, and little work beside the start-up."""
    draw = np.random.default_rng(0)
    layers = []
    for block in range(48):
        values = draw.lognormal(size=(len(FIELDS), 3, 128))
        tokens = draw.integers(100, 5000, size=(3, 128)).astype(float)
        values[list(FIELDS).index("tokens")] = tokens
        values[list(FIELDS).index("top_choices")] = tokens // 8
        layers.append(LayerStatistics(block, values))
    names = ("code", "general", "a source with quite a long name")
    spec = ExpertSpec((), "num_experts", 128, 8)
    for name, some in (("s", layers), ("small", layers[:1])):
        scores = Scores(tuple(some), names, (100_000,) * 3, spec, {"model": "Qwen/Qwen3-30B-A3B"})
        write_scores(tmp_path / name, scores)
    script = (
        "import sys; from streamprune.cli import main; "
        "main(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    cpu_seconds = {}
    for name in ("small", "s"):
        arguments = ["inspect", str(tmp_path / name), "--keep", "64", "--compare", "mix=code=1"]
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments, "--compare", "method=ean"],
            check=True,
            capture_output=True,
            text=True,
        )
        cpu_seconds[name] = os.times().children_user - before.children_user
    # 48 times the layers; most of the time is Python's start. (By the processor's time: a clock also counts others'.)
    assert cpu_seconds["s"] < 5 * cpu_seconds["small"]
    lines = done.stdout.splitlines()
    assert len(lines) < 48 * 3 + 40
    # Warnings are whole sentences, for the terminal to wrap.
    assert max(len(line) for line in lines[1:] if not line.startswith("warning: ")) <= 120
    table = lines[lines.index("") + 1 :][:49]
    assert max(map(len, table)) <= 120


def test_a_terminal_without_the_letters_is_no_error(tmp_path: Path) -> None:
    write_scores(tmp_path / "s", make_scores())
    script = "import sys; from streamprune.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", str(tmp_path / "s"), "--keep", "4"],
        env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"layer" in done.stdout
