"""The experts of layers for multi-token prediction (MTP) are scored in their own forward, where its form is known."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import PruneSettings, SearchSettings
from streamprune.errors import InterruptedRunError, ScoresError
from streamprune.models.mtp import mtp_note, mtp_scoring_note
from streamprune.models.open import open_moe
from streamprune.output.verify import verify
from streamprune.pipeline.prune import prune as prune_by_scores
from streamprune.pipeline.search import search
from streamprune.saliency.scores import FIELDS
from streamprune.saliency.scores_file import read_scores, write_scores
from streamprune.streaming.mtp_layer import MtpLayer
from tests.faults import Case, Injected
from tests.helpers import known_family, prune, read_tensors, tree_bytes
from tests.interruptions import breaking_at, call
from tests.mtp import add_mtp, entrance, last_layer, negated, of_layer
from tests.tiny import make_model, tiny_config, write_token_ids

STYLES = [("deepseek_v3", "further"), ("glm4_moe", "further"), ("qwen3_next", "mtp")]


def make_source(folder: Path, family: str = "glm4_moe", style: str = "further") -> tuple[Path, str]:
    """A tiny model with an MTP layer whose form is known, and the path of that."""
    source = make_model(folder / "model", tiny_config(known_family(family)))
    return source, add_mtp(source, style, known=True)


def plain_scores(source: Path, path: str, style: str, sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens and Σ g·‖f‖ by expert of the MTP layer, as its formula reads, by transformers' own modules."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    trunk, layer = model.model, copy.deepcopy(model.model.layers[-1])
    # (As `add_mtp` made it.)
    layer.load_state_dict({name: -tensor for name, tensor in layer.state_dict().items()})
    embedding_norm, hidden_norm = copy.deepcopy(trunk.norm), copy.deepcopy(trunk.norm)
    first, second, projection = entrance(path, style, trunk.norm.weight.shape[0]).values()
    embedding_norm.weight, hidden_norm.weight = nn.Parameter(first), nn.Parameter(second)
    sums = {"tokens": torch.zeros(8), "gated_norms": torch.zeros(8)}

    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        hidden, chosen, gates = args
        weights = dict(module.named_parameters())
        for token in range(len(hidden)):
            for place, expert in enumerate(chosen[token].tolist()):
                gate, up = (weights["gate_up_proj"][expert] @ hidden[token]).chunk(2)
                given = weights["down_proj"][expert] @ (nn.functional.silu(gate) * up)
                sums["tokens"][expert] += 1
                sums["gated_norms"][expert] += gates[token, place] * given.norm()

    layer.mlp.experts.register_forward_hook(add)
    with torch.no_grad():
        for ids in sequences:
            hidden = trunk(ids[None]).last_hidden_state[:, :-1]
            embedded = trunk.embed_tokens(ids[None, 1:])
            mixed = torch.cat([embedding_norm(embedded), hidden_norm(hidden)], dim=-1) @ projection.T
            positions = torch.arange(mixed.shape[1])[None]
            layer(mixed, position_embeddings=trunk.rotary_emb(mixed, positions), attention_mask=None)
    return sums


@pytest.mark.parametrize(("family", "style"), STYLES)
def test_the_scores_are_those_of_the_formula(tmp_path: Path, family: str, style: str) -> None:
    source, path = make_source(tmp_path, family, style)
    prune(source, tmp_path / "out", keep=4)
    lines = (tmp_path / "calibration.jsonl").read_text().splitlines()
    plain = plain_scores(source, path, style, [torch.tensor(json.loads(line)["input_ids"]) for line in lines])
    scores = read_scores(tmp_path / "out")
    assert scores.mtp is not None
    assert scores.mtp.index == 4
    found = dict(zip(FIELDS, scores.mtp.values.sum(axis=1), strict=True))
    assert found["tokens"].tolist() == plain["tokens"].tolist()
    np.testing.assert_allclose(found["gated_norms"], plain["gated_norms"].numpy(), rtol=2e-5)
    check_own(tmp_path / "out", path)
    verify(tmp_path / "out", source)


def check_own(output: Path, path: str) -> None:
    """Assert that the MTP layer in `output` keeps its own experts, and that record and card say so."""
    record = json.loads((output / "streamprune.json").read_text())
    own, last = record["mtp"]["layer"], record["layers"][-1]
    assert record["mtp"]["experts_of"] is None
    assert len(own["kept"]) == len(last["kept"])
    best = np.argsort(-np.array(own["scores"]), kind="stable")[: len(own["kept"])]
    assert own["kept"] == sorted(best.tolist())
    assert own["kept"] != last["kept"], "the test shows nothing"
    assert "chosen by scores of their own forward" in (output / "README.md").read_text()
    source = read_tensors(output.parent / "model")
    everything = of_layer(source, last_layer(source, 4), path)
    for name, tensor in read_tensors(output).items():
        if not name.startswith(f"{path}.mlp.experts.") or "down_proj" not in name:
            continue
        head, number, rest = name.partition("experts.")[0], name.split(".")[-3], name.split(".")[-2:]
        expert = own["kept"][int(number)]
        full = negated(name, everything[f"{head}experts.{expert}.{'.'.join(rest)}"])
        assert torch.equal(tensor, full) or record["settings"]["width"], name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a source and what `run` makes of it, and the path of the MTP layer."""
    folder = tmp_path_factory.mktemp("made")
    source, path = make_source(folder)
    prune(source, folder / "scored", keep=4)
    return folder, path


OPTIONS = [{"keep": 5}, {"keep": 6, "width": 16}, {"keep": 5, "mtp": "drop"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["experts", "channels", "dropped"])
def test_prune_does_what_run_does(made: tuple[Path, str], options: dict[str, Any]) -> None:
    folder, path = made
    name = "-".join(options)
    run, pruned = folder / f"run-{name}", folder / f"prune-{name}"
    prune(folder / "model", run, calibration=(str(folder / "calibration.jsonl"),), **options)
    settings = PruneSettings(
        model=str(folder / "model"), output=pruned, scores=folder / "scored", verify=True, **options
    )
    prune_by_scores(settings, quiet=True)
    assert tree_bytes(run) == tree_bytes(pruned)
    verify(run, folder / "model")
    if "mtp" not in options:
        check_own(run, path)
    else:
        assert read_scores(run).mtp is None


#: What comes between the layers and the MTP layer, or behind both.
WAYS: list[dict[str, Any]] = [
    {},
    {"propagate": "pruned", "evaluate": True},
    {"schedule": "global", "refit": True, "anchor": "none"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "plain")
def test_it_is_resumed_to_the_same_bytes(made: tuple[Path, str], tmp_path: Path, way: dict[str, Any]) -> None:
    """Before the MTP layer is scored, within it, and where its record is to be written."""
    folder, _ = made
    write_token_ids(folder / "more.jsonl", 16)
    settings = {"keep": 5, "batch_tokens": 24, "checkpoint_every": 0.0, **way}
    case = Case(folder / "model", folder / "more.jsonl", tmp_path / "undisturbed", settings, {})
    case.run()
    case.expected = tree_bytes(case.output)
    before = case.at(tmp_path / "before")
    before.interrupt(at=4)
    before.resume()
    before.check()
    within = case.at(tmp_path / "within")
    with stopping_within(), pytest.raises(InterruptedRunError):
        within.run(checkpoint_every=1e6)
    [states] = (within.work / "states").iterdir()
    facts = json.loads((states / "index.json").read_text())["body"]["facts"]
    assert (facts["layer"], facts["done"] > 0) == (4, True)
    within.resume()
    within.check()
    behind = case.at(tmp_path / "behind")
    with breaking_at(6), pytest.raises(Injected):
        behind.run()
    behind.resume()
    behind.check()


def test_a_search_scores_it_too(made: tuple[Path, str], tmp_path: Path) -> None:
    """Also where it was stopped within that layer; with candidates that it does not go through."""
    folder, _ = made
    text = (str(write_token_ids(folder / "more.jsonl", 16)),)
    given = {"calibration": text, "budget_gib": 10.0, "candidates": ("keep=5", "keep=4,refit"), "anchor": "none"}
    settings = SearchSettings(model=str(folder / "model"), output=tmp_path / "whole", batch_tokens=48, **given)
    search(settings, quiet=True)
    with stopping_within(), pytest.raises(InterruptedRunError):
        search(replace(settings, output=tmp_path / "stopped"), quiet=True)
    search(replace(settings, output=tmp_path / "stopped"), quiet=True)
    whole, stopped = (read_scores(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.mtp is not None
    assert whole.mtp.index == 4
    for one, two in zip(whole.every, stopped.every, strict=True):
        assert np.array_equal(one.values, two.values)


def test_scores_without_it_leave_the_last_layers_choice(made: tuple[Path, str], tmp_path: Path) -> None:
    """Those of a search, of a version that did not score it, and the user's own list."""
    folder, _ = made
    scores = read_scores(folder / "scored")
    assert scores.layout is not None
    old = json.loads(json.dumps(scores.layout))
    old["tensors"].pop("mtp_form")
    for name, layout in (("search", scores.layout), ("old", old)):
        path = tmp_path / f"{name}.safetensors"
        write_scores(path, replace(scores, mtp=None, layout=layout))
        done = call("prune", folder / "model", "-o", tmp_path / name, "--scores", path, "--keep", 4)
        assert done.exit_code == 0, done.stderr
        assert "that layer 3 keeps by number: nothing is scored in them (this choice has no scores" in done.stderr
        record = json.loads((tmp_path / name / "streamprune.json").read_text())
        assert record["mtp"]["experts_of"] == 3
        check_mtp_follows(tmp_path / name)
        verify(tmp_path / name, folder / "model")


def check_mtp_follows(output: Path) -> None:
    """Assert that the experts of the MTP layer are those of the last layer."""
    tensors = read_tensors(output)
    wanted = of_layer(tensors, last_layer(tensors, 4), "model.layers.4")
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], negated(name, tensor)), name


def test_text_of_single_tokens_is_no_text_for_it(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = made
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5]}\n' * 6)
    words = ("run", folder / "model", "-o", tmp_path / "out", "--keep", 4, "--calibration", tmp_path / "ids.jsonl")
    refused = call(*words)
    assert refused.exit_code == 1
    assert "No token of the calibration reached the experts of the MTP layer" in refused.stderr
    assert call(*words, "--mtp", "drop", "--resume", "never").exit_code == 0


def test_scores_files_tell_it_apart(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = made
    scores = read_scores(folder / "scored")
    assert scores.mtp is not None
    assert (scores.layer_indices, scores.mtp.index) == ((1, 2, 3), 4)
    write_scores(tmp_path / "with.safetensors", scores)
    assert (tmp_path / "with.safetensors").read_bytes()[8:].startswith(b'{"__metadata__":{"streamprune_scores":"4"')
    write_scores(tmp_path / "without.safetensors", replace(scores, mtp=None))
    assert (tmp_path / "without.safetensors").read_bytes()[8:].startswith(b'{"__metadata__":{"streamprune_scores":"3"')
    with pytest.raises(ScoresError, match="its layer for multi-token prediction is 2, not behind the others"):
        write_scores(tmp_path / "x.safetensors", replace(scores, mtp=replace(scores.mtp, index=2)))
    # With the index of no layer of the model.
    write_scores(tmp_path / "far.safetensors", replace(scores, mtp=replace(scores.mtp, index=9)))
    told = call("prune", folder / "model", "-o", tmp_path / "o", "--scores", tmp_path / "far.safetensors", "--keep", 4)
    assert told.exit_code == 1
    assert "has scores of an MTP layer 9, but the model has" in told.stderr


def change_two(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= of_layer(tensors, "model.layers.4", "model.layers.5")


def change_unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.4.mlp.norm.weight"] = torch.ones(64)


def change_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(64, 64)


def change_lack(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.4.input_layernorm.weight"]


CHANGES = [
    (change_two, "there are 2 such layers, each of which needs what the one before it gives"),
    (change_unknown, "what model.layers.4.mlp.norm.weight does is not known"),
    (change_shape, "model.layers.4.eh_proj.weight is [64, 64], not [64, 128]"),
    (change_lack, "it has nothing like model.layers.3.input_layernorm.weight"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES, ids=[why for _, why in CHANGES])
def test_what_is_not_known_follows_the_last_layer(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], why: str
) -> None:
    source, _ = make_source(tmp_path)
    tensors = load_file(source / "mtp.safetensors")
    change(tensors)
    save_file({name: each.clone() for name, each in tensors.items()}, source / "mtp.safetensors", {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != "mtp.safetensors"}
    index["weight_map"] = kept | dict.fromkeys(tensors, "mtp.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 2}))
    layout = open_moe(open_checkpoint(source)).layout
    assert layout.mtp_layer is None
    assert layout.mtp_unscored == why
    assert {cut.layer for cut in layout.mtp_experts.values()} == {3}
    assert f"nothing is scored in them ({why})" in mtp_note(layout, scored=True)
    assert f"are not scored ({why})" in mtp_scoring_note(layout, 1)


@contextmanager
def stopping_within() -> Iterator[None]:
    """Ask for a stop at the second micro-batch of the MTP layer."""
    usual, calls = MtpLayer.entering, 0

    def entering(self: MtpLayer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MtpLayer, "entering", entering)
        yield
