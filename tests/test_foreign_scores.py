"""Scores from somebody else: nothing that their file says is believed, and whatever is wrong ends in one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import CheckpointError, ScoresError, SettingsError
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores, write_scores
from tests.helpers import tree_bytes
from tests.test_prune import EXPERTS, Model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


def set_all(patterns: dict[str, Any], value: Any) -> None:
    patterns.update(dict.fromkeys(patterns, value))


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: layout["tensors"].__setitem__("blocks", 3),
        lambda layout: layout["tensors"]["moe_blocks"].pop(),
        lambda layout: set_all(layout["tensors"]["patterns"], None) or layout["tensors"]["patterns"].pop(EXPERTS),
        lambda layout: set_all(layout["tensors"]["patterns"], [0, 2, 0]),
        lambda layout: set_all(layout["tensors"]["patterns"], [9, 1, 0]),
        lambda layout: layout["tensors"].__setitem__("patterns", 7),
        lambda layout: layout["tensors"].__setitem__("count_names", [["x"]]),
        lambda layout: layout["loading"].__setitem__("model_type", "../../evil"),
        lambda layout: layout["memory"]["cache"].__setitem__("itemsize", "two"),
        lambda layout: layout["memory"]["shape"].__setitem__("hidden", 10**30),
        lambda layout: layout["tensors"].__setitem__("blocks", 10**12),
        lambda layout: layout["tensors"].__setitem__("blocks", 4.0),
        lambda layout: layout["tensors"]["moe_blocks"].append(3),
        lambda layout: layout["tensors"]["moe_blocks"].reverse(),
        # A model without its last norm would load, with a new one.
        lambda layout: layout["tensors"]["dropped"].append("model.norm.weight"),
        lambda layout: layout["tensors"]["dropped"].append("model.layers.1.mlp.experts.2.up_proj.weight"),
        lambda layout: layout["tensors"]["patterns"].update({"{block}.{block}.x": None}),
        lambda layout: layout["tensors"]["patterns"].update({"{block}.{expert}.{expert}.x": None}),
        lambda layout: layout["tensors"]["patterns"].update({"model.norm.weight": None}),
        lambda layout: layout["memory"]["shape"].__setitem__("hidden", None),
        lambda layout: layout["memory"]["shape"].__setitem__("wide_routing", 3),
        lambda layout: layout["memory"].__setitem__("itemsize", None),
        lambda layout: layout["memory"]["cache"]["layers"][0].__setitem__("values_per_token", None),
        lambda layout: layout.clear(),
    ],
)
def test_a_forged_layout_is_refused(qwen: Model, tmp_path: Path, change: Callable[[Any], None]) -> None:
    scores = read_scores(qwen.scores)
    layout = json.loads(json.dumps(scores.layout))
    change(layout)
    forged = Scores(scores.layers, scores.sources, scores.source_tokens, scores.spec, scores.provenance, layout)
    write_scores(tmp_path / "forged.safetensors", forged)
    with pytest.raises(CheckpointError, match="Score the model again"):
        qwen.prune(tmp_path / "out", scores=tmp_path / "forged.safetensors", keep=4)


def test_scores_without_a_layout_are_enough(qwen: Model, tmp_path: Path) -> None:
    """Those of somebody else's tool, perhaps: then the model is built to find out."""
    scores = read_scores(qwen.scores)
    bare = Scores(scores.layers, scores.sources, scores.source_tokens, scores.spec, scores.provenance)
    write_scores(tmp_path / "bare.safetensors", bare)
    qwen.prune(tmp_path / "bare", scores=tmp_path / "bare.safetensors", keep=4)
    qwen.prune(tmp_path / "full", keep=4)
    bare_files, full_files = tree_bytes(tmp_path / "bare"), tree_bytes(tmp_path / "full")
    name = "scores/scores.safetensors"
    assert bare_files.pop(name) != full_files.pop(name)
    assert bare_files == full_files


def test_provenance_of_a_stranger_is_checked(qwen: Model, tmp_path: Path) -> None:
    scores = read_scores(qwen.scores)
    for part in ("model", "source", "calibration", "versions", "settings", "revision"):
        provenance = {name: value for name, value in scores.provenance.items() if name != part}
        forged = Scores(scores.layers, scores.sources, scores.source_tokens, scores.spec, provenance, scores.layout)
        write_scores(tmp_path / "forged.safetensors", forged)
        with pytest.raises(ScoresError, match="do not say where they come from"):
            qwen.prune(tmp_path / "out", scores=tmp_path / "forged.safetensors", keep=4)


@pytest.mark.parametrize("with_layout", [True, False])
@pytest.mark.parametrize("settings", [{"keep": 4}, {"keep": 4, "schedule": "global"}, {"keep_file": "list.json"}])
def test_scores_of_other_blocks_are_refused(
    qwen: Model, tmp_path: Path, settings: dict[str, Any], with_layout: bool
) -> None:
    """They have the model's fingerprint, and leave a block out or are of others."""
    scores = read_scores(qwen.scores)
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2]] * 4))
    if "keep_file" in settings:
        settings = {"keep_file": tmp_path / "list.json"}
    shifted = tuple(replace(layer, index=layer.index + 3) for layer in scores.layers)
    for layers in (scores.layers[:3], scores.layers[1:], shifted):
        forged = replace(scores, layers=layers, layout=scores.layout if with_layout else None)
        write_scores(tmp_path / "forged.safetensors", forged)
        # A list that goes with the model does not go with such scores, which are what is looked at first.
        with pytest.raises((ScoresError, SettingsError), match=r"or other layers|layers with experts|has no layer"):
            qwen.prune(tmp_path / "out", scores=tmp_path / "forged.safetensors", **settings)
    assert not list(tmp_path.glob("out*"))


def test_scores_of_other_experts_are_refused(qwen: Model, tmp_path: Path) -> None:
    scores = read_scores(qwen.scores)
    fewer = tuple(replace(layer, values=layer.values[:, :, :6], channels=None) for layer in scores.layers)
    forged = replace(scores, layers=fewer, spec=replace(scores.spec, count=6), layout=None)
    write_scores(tmp_path / "forged.safetensors", forged)
    with pytest.raises(ScoresError, match=r"has scores of 6 experts \(top-2\), but .* the model has 8 \(top-2\)"):
        qwen.prune(tmp_path / "out", scores=tmp_path / "forged.safetensors", keep=4)
    # With fewer experts per token than the router really picks, too few could be kept.
    write_scores(tmp_path / "forged.safetensors", replace(scores, spec=replace(scores.spec, top_k=1)))
    with pytest.raises(ScoresError, match=r"8 experts \(top-1\), but .* 8 \(top-2\)"):
        qwen.prune(tmp_path / "out", scores=tmp_path / "forged.safetensors", keep=1)


def test_sources_of_a_provenance_are_those_of_the_scores(qwen: Model, tmp_path: Path) -> None:
    scores = read_scores(qwen.scores)
    calibration = {**scores.provenance["calibration"], "sources": [{"name": "flattery", "tokens": 10**9}]}
    forged = replace(scores, provenance={**scores.provenance, "calibration": calibration})
    write_scores(tmp_path / "forged.safetensors", forged)
    with pytest.raises(ScoresError, match="do not say where they come from"):
        qwen.prune(tmp_path / "out", scores=tmp_path / "forged.safetensors", keep=4)


def test_a_provenance_cannot_say_how_experts_were_chosen(qwen: Model, tmp_path: Path) -> None:
    """Of its settings only those of the scoring get into streamprune.json and the card: not in the choice's place."""
    scores = read_scores(qwen.scores)
    told = {**scores.provenance["settings"], "mix": 5, "method": "random", "keep": 7, "model": "other", "note": "mine"}
    write_scores(tmp_path / "told.safetensors", replace(scores, provenance={**scores.provenance, "settings": told}))
    qwen.prune(tmp_path / "told", scores=tmp_path / "told.safetensors", keep=4)
    qwen.prune(tmp_path / "usual", keep=4)
    told_report, usual = (json.loads((tmp_path / name / "streamprune.json").read_text()) for name in ("told", "usual"))
    assert told_report == usual
    assert (tmp_path / "told" / "README.md").read_bytes() == (tmp_path / "usual" / "README.md").read_bytes()
