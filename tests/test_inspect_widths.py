"""`streamprune inspect --width`: how much of the energy of channels narrower experts keep, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from streamprune.cli import main
from streamprune.models.config_json import WidthSpec
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import write_scores
from streamprune.selection.energy import energy_by_rank, energy_by_width, energy_retentions
from streamprune.selection.select import Selection, Selector
from streamprune.selection.settings import SelectionSettings
from tests.made_scores import make_scores

WIDTH = 8


@pytest.fixture
def scores() -> Scores:
    return make_scores(width=WIDTH)


def inspect(folder: Path, scores: Scores, *arguments: str) -> Result:
    write_scores(folder / "s.safetensors", scores)
    return CliRunner().invoke(main, ["inspect", str(folder / "s.safetensors"), *arguments])


def as_json(folder: Path, scores: Scores, *arguments: str) -> dict[str, Any]:
    result = inspect(folder, scores, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def selected(scores: Scores, total: int, width: int, mix: str | None = None) -> Selection:
    settings = SelectionSettings(mix=mix)
    return Selector(
        settings, scores.spec, scores.sources, scores.source_tokens, total, None, width
    ).all(scores.layers)  # fmt: skip


def loop(scores: Scores, selection: Selection, source: int) -> tuple[list[float], float, float]:
    """The share of a source's energy that stays in each layer and in all, and the best possible; by plain loops."""
    by_layer, kept, best, every = [], 0.0, 0.0, 0.0
    for layer, chosen in zip(scores.layers, selection.layers, strict=True):
        assert layer.channels is not None
        assert chosen.channels is not None
        energies = layer.channels[source].astype(np.float64)
        stays = sum(
            energies[expert, channel]
            for expert, channels in zip(chosen.kept, chosen.channels.indices, strict=True)
            for channel in channels
        )
        width = chosen.channels.indices.shape[1]
        tops = sorted((sum(sorted(row.tolist())[-width:]) for row in energies), reverse=True)
        by_layer.append(stays / energies.sum())
        kept, best, every = kept + stays, best + sum(tops[: len(chosen.kept)]), every + energies.sum()
    return by_layer, kept / every, best / every


def test_the_energy_kept_is_that_of_a_loop(scores: Scores) -> None:
    for total, width, mix in ((48, 3, None), (20, 5, "source1=1"), (24, 7, "source0=3,source1=1")):
        selection = selected(scores, total, width, mix)
        for number, found in enumerate(energy_retentions(scores, selection)):
            by_layer, kept, best = loop(scores, selection, number)
            assert found.layers == pytest.approx(by_layer)
            assert (found.kept, found.best) == pytest.approx((kept, best))
            assert (found.worst, scores.layer_indices.index(found.worst_layer)) == pytest.approx(
                (min(by_layer), int(np.argmin(by_layer)))
            )
            assert kept < best
    # Chosen for one source alone by the energy itself, nothing is left to gain.
    alone = energy_retentions(scores, selected(scores, 48, 3, "source1=1"))[1]
    assert alone.kept == pytest.approx(alone.best)
    # Nothing is said where experts keep their channels, or none are scored.
    whole = tuple(replace(layer, channels=None) for layer in selection.layers)
    assert energy_retentions(scores, replace(selection, layers=whole)) == ()
    assert energy_retentions(make_scores(), selection) == ()


def test_the_energy_of_widths_is_that_of_their_selections(scores: Scores) -> None:
    found = energy_by_width(scores, (1.0, 1.0), (6, 2))
    for shares, width in zip(found, (6, 2), strict=True):
        expected = energy_retentions(scores, selected(scores, 48, width))
        assert shares == pytest.approx([each.kept for each in expected])
    ranks = energy_by_rank(scores.layers[0], (1.0, 0.0))
    assert scores.layers[0].channels is not None
    assert ranks == pytest.approx(np.sort(scores.layers[0].channels[0].astype(np.float64))[:, ::-1].mean(axis=0))


def test_scores_alone_show_what_widths_would_keep(tmp_path: Path, scores: Scores) -> None:
    body = as_json(tmp_path, scores)
    assert [each["width"] for each in body["widths"]] == [6, 4, 2]
    expected = energy_by_width(scores, (1.0, 1.0), (6, 4, 2))
    assert [list(each["energy"].values()) for each in body["widths"]] == expected
    assert body["channels_per_expert"] == WIDTH
    text = inspect(tmp_path, scores).stdout
    assert "say --keep, --ratio, --total or --width" in text
    assert ["4", "50%", f"{expected[1][0]:.1%}", f"{expected[1][1]:.1%}"] in [
        line.split() for line in text.splitlines()
    ]
    assert "widths" not in as_json(tmp_path, make_scores())


def test_a_width_is_shown_with_what_it_keeps(tmp_path: Path, scores: Scores) -> None:
    body = as_json(tmp_path, scores, "--width", "4", "--mix", "source0=1")
    expected = energy_retentions(scores, selected(scores, 48, 4, "source0=1"))
    assert (body["width"], body["kept"]) == (4, 48)
    assert [(each["source"], each["kept"], each["best"]) for each in body["energy"]] == [
        (each.source, each.kept, each.best) for each in expected
    ]
    # By the mix, which is the first source alone here.
    assert [layer["energy_kept"] for layer in body["layers"]] == pytest.approx(list(expected[0].layers))
    text = inspect(tmp_path, scores, "--width", "4", "--mix", "source0=1").stdout
    assert "each keeps 4 of its 8 channels; 50.0% of the experts' parameters stay" in text
    assert ["source1", f"{expected[1].kept:.1%}", f"{expected[1].best:.1%}"] in [
        line.split()[:3] for line in text.splitlines()
    ]
    assert "Domain retention" not in text, "it is 100 % where all experts stay"
    assert "last kept" not in text
    assert "note: 4 channels are no multiple of 8 (16 bytes)" in text
    both = inspect(tmp_path, scores, "--width", "4", "--keep", "6", "--layer", "3").stdout
    assert "Domain retention" in both
    assert "Energy kept" in both
    rows = [line.split() for line in both[both.index("Experts of layer 3") :].splitlines()[2:14]]
    assert [row[5] == "-" for row in rows] == [False] * 6 + [True] * 6


def test_ways_to_say_a_width(tmp_path: Path, scores: Scores) -> None:
    for way, kept, width in (
        (("--ratio", "0.5", "--by", "channels"), 48, 4),
        (("--ratio", "0.5", "--by", "both"), 32, 6),
        (("--ratio", "0.5", "--by", "channels", "--width-multiple", "3"), 48, 6),
        (("--total", "23", "--width", "3", "--schedule", "global"), 23, 3),
        (("--keep", "12", "--width", "3"), 48, 3),
    ):
        body = as_json(tmp_path, scores, *way)
        assert (body["kept"], body["width"]) == (kept, width), way
    (tmp_path / "c.json").write_text("[6, 6, 5, 6]")
    assert as_json(tmp_path, scores, "--schedule", str(tmp_path / "c.json"), "--width", "3")["kept"] == 23


def test_widths_are_compared(tmp_path: Path, scores: Scores) -> None:
    changes = ("--compare", "width=6", "--compare", "mix=source1=1")
    wider, other = as_json(tmp_path, scores, "--width", "4", *changes)["comparisons"]
    first = [each.kept for each in energy_retentions(scores, selected(scores, 48, 4))]
    for told, second in ((wider, selected(scores, 48, 6)), (other, selected(scores, 48, 4, "source1=1"))):
        after = [each.kept for each in energy_retentions(scores, second)]
        assert [(each["first"], each["second"]) for each in told["energy"]] == list(zip(first, after, strict=True))
    # Of nested sets it is the share that the smaller one has of the larger.
    assert wider["channels_jaccard"] == pytest.approx(4 / 6)
    assert 0.2 < other["channels_jaccard"] < 1
    # Complete experts against narrower ones.
    (told,) = as_json(tmp_path, scores, "--keep", "6", "--compare", "width=4")["comparisons"]
    assert told["channels_jaccard"] is None
    assert all(each["gain"] < 0 for each in told["energy"])
    assert "energy" not in as_json(tmp_path, scores, "--keep", "6", "--compare", "method=ean")["comparisons"][0]
    text = inspect(tmp_path, scores, "--width", "4", *changes).stdout
    assert f"Compared with width=6: 0 experts differ, mean Jaccard 1.000; of channels {4 / 6:.3f}" in text


def laid_out(scores: Scores, **tensors: Any) -> Scores:
    return replace(scores, layout={"tensors": tensors})


SHARED = {"path": [], "names": ["moe_intermediate_size"], "width": 8, "shared": "n_shared_experts", "shared_count": 1}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda _: make_scores(), ["--width", "4"], "they were made with --no-channels, or by an earlier version"),
        (
            lambda _: laid_out(make_scores(), fixed_width="its code is odd"), ["--width", "4"],
            "cannot be made narrower: its code is odd. Remove experts instead",
        ),
        (lambda made: laid_out(made, width={**SHARED, "width": 9}), ["--width", "4"], "9 channels per expert, but"),
        (lambda made: laid_out(made, width=3), ["--width", "4"], "The layout in the scores file is invalid"),
        (lambda made: laid_out(made, width=SHARED), ["--width", "5"], "Nearest widths: 4"),
        (lambda made: made, ["--width", "8"], "Keep between 1 and 7"),
        (lambda made: made, ["--by", "channels"], "--by channels says what --ratio removes"),
        (lambda made: made, ["--by", "both", "--keep", "4"], "--by both says what --ratio removes"),
        (lambda made: made, ["--width-multiple", "2"], "--width-multiple is for --by"),
        (lambda made: made, ["--width", "4", "--total", "49"], "--total 49: there are 48"),
        (lambda made: made, ["--width", "4", "--keep-file", "x"], "--keep-file lists complete experts"),
        (lambda made: made, ["--width", "4", "--compare", "width=many"], "'many' is not a value of width"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(
    change: Any, arguments: list[str], message: str, scores: Scores, tmp_path: Path
) -> None:
    result = inspect(tmp_path, change(scores), *arguments)
    assert result.exit_code != 0
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr


def test_shared_experts_limit_the_widths_that_are_shown(scores: Scores, tmp_path: Path) -> None:
    width = WidthSpec((), ("moe_intermediate_size",), 8, "n_shared_experts", 1)
    body = as_json(tmp_path, laid_out(scores, width=width.__dict__))
    assert [each["width"] for each in body["widths"]] == [4, 2]
