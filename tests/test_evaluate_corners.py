"""Corners of evaluation: odd logits, odd configs, odd names, few sequences, text held back for another model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamprune.config import RunSettings
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.evaluation.held_out import pruned_folder
from streamprune.evaluation.metrics import summary_of, sums_by_source
from streamprune.progress import Progress
from streamprune.reporting.evaluations import TEXT_NAME, read_result
from streamprune.streaming.forward import ORIGINAL, PRUNED
from streamprune.streaming.layer_errors import LayerErrors
from streamprune.streaming.predictions import SequenceFigures, TokenFigures, add_slice, figures_of, find_head, no_sums
from tests.helpers import known_family, load_whole, prune, tree_bytes
from tests.hub_model import hub_for_this_process, published_model
from tests.test_evaluate import in_memory, measured
from tests.test_evaluate_cli import called, refused
from tests.tiny import make_model, tiny_config, write_token_ids
from tests.tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `out` made of it with a part of its text held back, and other text."""
    folder = tmp_path_factory.mktemp("made")
    model = make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    write_token_ids(folder / "ids.jsonl", sequences=20)
    write_token_ids(folder / "held.jsonl", sequences=3, seed=9)
    prune(model, folder / "out", keep=4, calibration=(str(folder / "ids.jsonl"),), evaluate=True)
    return folder


@pytest.mark.parametrize("size", [3, 8])
def test_tokens_that_a_model_rules_out_and_ties_change_nothing(size: int) -> None:
    """Whole slices of -inf, first and last; and of several likeliest tokens the first counts, as in argmax."""
    torch.manual_seed(0)
    ids = torch.randint(4, 12, (2, 6))
    both = {side: torch.randn(2, 6, 16) for side in (ORIGINAL, PRUNED)}
    for logits in both.values():
        logits[..., :4] = logits[..., 13:] = -torch.inf
        logits[0, :, 5] = logits[0, :, 11] = 9.0
    sums = no_sums(ids, 2)
    for begin in range(0, 16, size):
        part = {side: logits[..., begin : begin + size] for side, logits in both.items()}
        sums = add_slice(sums, ids, begin, [part[PRUNED]], part[ORIGINAL])
    found = figures_of(sums)
    before, after = (both[side][:, :-1].double().log_softmax(-1) for side in (ORIGINAL, PRUNED))
    expected = -after.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.loss, expected, rtol=0, atol=1e-12)
    divergence = torch.where(before.isfinite(), before.exp() * (before - after), 0.0).sum(-1)
    torch.testing.assert_close(found.kl, divergence, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.agrees, (before.argmax(-1) == after.argmax(-1)).double())
    assert torch.equal(sums[0, :, 3], torch.full((6,), 5.0, dtype=torch.float64))


def test_several_models_against_one_original_have_the_figures_of_each_alone() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 6))
    original, *models = torch.randn(4, 2, 6, 16)
    models[1][..., 3] = original[..., 3] = -torch.inf
    together, alone = no_sums(ids, 4), [no_sums(ids, 2) for _ in models]
    for begin in (0, 5, 10, 15):
        part = slice(begin, begin + 5)
        of_original = original[..., part]
        together = add_slice(together, ids, begin, (model[..., part] for model in models), of_original)
        alone = [
            add_slice(sums, ids, begin, [model[..., part]], of_original)
            for sums, model in zip(alone, models, strict=True)
        ]
    for place, sums in enumerate(alone):
        for found, expected in zip(astuple(figures_of(together, place)), astuple(figures_of(sums)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("asked", [{"output_router_logits": True}, {"return_dict": False}], ids=str)
def test_what_a_config_asks_of_the_forward_besides_is_left_out(
    asked: dict[str, bool], made: Path, tmp_path: Path
) -> None:
    """Router logits come from within the blocks, and others are not there when the output head is read off."""
    odd = shutil.copytree(made / "model", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | asked))
    result = measured(odd, None, made / "held.jsonl", dtype="float32")
    expected = in_memory(load_whole(made / "model"), None, made / "held.jsonl")
    assert result["all"]["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def figures(source: int, *losses: float) -> SequenceFigures:
    return SequenceFigures((0, 0, 0), source, TokenFigures(torch.tensor([losses], dtype=torch.float64)))


def summarize(found: list[SequenceFigures], sources: list[str], errors: Any = None) -> dict[str, Any]:
    return summary_of(sums_by_source(found, sources), sources, errors)


def test_a_source_with_a_single_sequence_leaves_all_without_an_interval() -> None:
    """Nobody knows how others of it would differ. And a source may be called what all together are."""
    several = [figures(0, 1.0, 2.0), figures(0, 4.0), figures(0, 3.0)]
    told = summarize([*several, figures(1, 5.0)], ["all", "one"], [[0.1], [0.2], [0.3]])
    first, second = told["sources"]
    assert first["loss"] == 2.5
    assert first["loss_interval"][0] < 2.5 < first["loss_interval"][1]
    assert [each["hidden_error"] for each in (first, second, told["all"])] == [[0.1], [0.2], [0.3]]
    assert second["loss_interval"] is None
    assert told["all"]["loss"] == 3.0
    assert told["all"]["loss_interval"] is None
    alone = summarize(several, ["a"])
    assert alone["all"]["loss_interval"] == alone["sources"][0]["loss_interval"] == first["loss_interval"]


def test_a_bootstrap_draws_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws of very many sequences together would take gigabytes."""
    sizes: list[tuple[int, ...]] = []
    usual = torch.randint

    def randint(count: int, size: tuple[int, ...], **named: Any) -> torch.Tensor:
        sizes.append(size)
        return usual(count, size, **named)

    monkeypatch.setattr(torch, "randint", randint)
    summarize([figures(0, 1.0), figures(0, 2.0), figures(0, 3.0)], ["a"])
    assert sizes == [(3,)] * 1000


def test_text_that_was_held_back_is_found_from_within_and_for_this_very_model(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    shutil.copytree(made / "out.held-out", tmp_path / "out.held-out")
    monkeypatch.chdir(out)
    result = called(".", "--json", "--quiet", "--no-report")
    assert json.loads(result.stdout)["all"]["sequences"] == 2
    # Made anew under the same name, and scored on all of it.
    shutil.rmtree(out)
    prune(made / "model", out, keep=4, calibration=(str(made / "ids.jsonl"),))
    assert "was not held out for" in refused(out, status=2)
    shutil.rmtree(out)
    prune(made / "model", out, keep=4, calibration=(str(made / "held.jsonl"),), evaluate=True)
    assert called(out, "--no-report").exit_code == 0
    shutil.rmtree(tmp_path / "out.held-out")
    shutil.copytree(made / "out.held-out", tmp_path / "out.held-out")
    assert "was not held out for" in refused(out, status=2)


def test_the_folder_of_text_that_was_held_back_may_be_named_itself(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--against", made / "model", "--json", "--quiet", "--no-report", "-o", made / "results"]
    expected = json.loads(called(made / "out", *given).stdout)
    assert expected["data"]["held_back"] is True
    monkeypatch.chdir(made / "out.held-out")
    for name in (made / "out.held-out", "."):
        assert json.loads(called(made / "out", *given, "--data", name).stdout) == expected


def test_names_that_nothing_has_are_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    data = ["--data", made / "held.jsonl"]
    for name in ("a" * 300, "~nosuchuser/x", "x\0y", ""):
        assert pruned_folder(name) is None
        refused(name, *data)
        refused(name)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a" * 300, "~nosuchuser/x", "x\0y", "", tmp_path / "loop", tmp_path / "nothing.held-out"):
        refused(made / "out", "--data", name)


def test_results_that_could_not_be_left_are_refused_before_anything_is_computed(made: Path, tmp_path: Path) -> None:
    given = [made / "out", "--data", made / "held.jsonl"]
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("a" * 300)):
        assert "Writing results to" in refused(*given, "-o", place)
    assert called(*given, "-o", tmp_path / "new" / "folder").exit_code == 0
    assert read_result(tmp_path / "new" / "folder", TEXT_NAME) is not None


def test_text_for_models_on_the_hub_is_read_with_their_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is fetched before any weight; for scoring too."""
    files = published_model(tmp_path / "model")
    save_tokenizer(tmp_path / "tokenizer")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        for name in ("org/one", "org/two"):
            server.add(name, files | tree_bytes(tmp_path / "tokenizer"))
        result = called("org/one", "--data", text, "--samples", 3, "--seq-len", 16, "--json", "--quiet")
        assert json.loads(result.stdout)["all"]["tokens"] == 45
        given = {"calibration": (str(text),), "samples": 3, "seq_len": 16}
        prune(Path("org/two"), tmp_path / "out", **given)
        assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_only_linear_output_heads_are_read_off(made: Path) -> None:
    model = load_whole(made / "model")
    assert find_head(model)[1] == "lm_head"
    model.lm_head = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="has no linear output head"):
        find_head(model)


@pytest.mark.parametrize(
    "saved",
    [
        {"layers": [[]], "partial": [0.0]},
        {"layers": [[0, 1.0], 7], "partial": [0.0]},
        {"layers": [[1, 1.0]], "partial": [0.0]},
        {"layers": [[0, -1.0]], "partial": [0.0]},
        {"layers": [[0, 1.0]], "partial": [0.0, 0.0]},
        {"partial": [0.0]},
        None,
    ],
    ids=str,
)
def test_errors_that_no_run_saves_are_refused(saved: Any) -> None:
    LayerErrors(1).check({"layers": [[0, 1.0]], "partial": [0.0]}, 1)
    with pytest.raises((ValueError, KeyError, TypeError)):
        LayerErrors(1).check(saved, 1)


def test_scoring_alone_has_nothing_to_evaluate() -> None:
    with pytest.raises(SettingsError, match="scoring alone makes none"):
        RunSettings(model="m", output=Path("o"), only_score=True, evaluate=True)


def test_a_bar_tells_of_the_blocks_and_of_the_predictions(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; of each no more than there is."""
    labels: list[str] = []
    left: list[int] = []
    usual, steps = Progress.start, Progress.step

    def start(self: Progress, label: str, sequences: int) -> None:
        usual(self, label, sequences)
        labels.append(label)
        left.append(sequences)

    def step(self: Progress, sequences: int) -> None:
        steps(self, sequences)
        left[-1] -= sequences

    monkeypatch.setattr(Progress, "start", start)
    monkeypatch.setattr(Progress, "step", step)
    measured(made / "out", made / "model", made / "held.jsonl")
    assert labels == [*(f"layer {number}/3" for number in range(4)), "predictions"]
    assert left == [0] * 5


def test_a_tokenizer_that_is_gone_is_told_as_the_models(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamprune.errors import CheckpointError
    from streamprune.evaluation.evaluate import same_tokenizer

    def read_bytes(path: Path) -> bytes:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read: Permission denied"):
        same_tokenizer(made, made)
