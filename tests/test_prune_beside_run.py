"""What `prune` tells and refuses, beside what `run` does: on models of the Hub, with MTP layers, and by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import OutputError, ScoresError, SettingsError, UnsupportedModelError
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import run
from streamprune.saliency.scores_file import read_scores
from tests.helpers import tree_bytes
from tests.hub_model import arguments, hub_for_this_process, published_model
from tests.mtp import add_mtp
from tests.test_prune import Model
from tests.tiny import write_token_ids


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


def told(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored and pruned by its name: the bytes of a run, and nothing fetched that a run does not fetch."""
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        server.add("org/model", published_model(tmp_path / "source"))
        command = arguments("org/model", tmp_path, "run", "--quiet")
        told(*command)
        fetched = server.fetched()
        shutil.rmtree(tmp_path / "cache")
        server.forget()
        told("prune", "org/model", "-o", tmp_path / "prune", "--scores", tmp_path / "run", "--keep", 5, "--quiet")
        assert server.fetched() == fetched
        assert tree_bytes(tmp_path / "run") == tree_bytes(tmp_path / "prune")
        assert "base_model: org/model" in (tmp_path / "prune" / "README.md").read_text()
        # The model has changed since: its scores no longer say anything.
        files = dict(server.repos["org/model"].commits[server.repos["org/model"].refs["main"]])
        files["config.json"] = files["config.json"].replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')
        server.repos["org/model"].push(files)
        settings = PruneSettings(model="org/model", output=tmp_path / "out", scores=tmp_path / "run", keep=5)
        with pytest.raises(ScoresError, match="Give the model that was scored"):
            prune(settings, quiet=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mix", "poetry=1"), "there is no source 'poetry'. The calibration has: calibration.jsonl."),
        (("--from-layer", "4"), "--from-layer 4: the model's layers are 0 to 3."),
    ],
)
def test_mistakes_are_told_before_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], message: str
) -> None:
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        server.add("org/model", published_model(tmp_path / "source"))
        result = CliRunner().invoke(main, arguments("org/model", tmp_path, "out", *words))
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert result.stderr.endswith(f"{message}\n")
        assert len(result.stderr.splitlines()) == 1
        assert not [name for name in server.fetched() if name.endswith(".safetensors")]
        assert not list(tmp_path.glob("out*"))


def test_a_choice_that_cannot_be_costs_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Model(tmp_path, "qwen3_moe").scores
    (tmp_path / "list.json").write_text("[[0, 1]]")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        server.add("org/model", published_model(tmp_path / "source"))
        for output, words in (
            ("out", ("--keep", 1)),
            ("out", ("--keep", 4, "--mix", "poetry=1")),
            ("out", ("--keep", 4, "--schedule", "global", "--floor", 5)),
            ("out", ("--schedule", tmp_path / "missing.json")),
            ("out", ("--keep-file", tmp_path / "list.json")),
            ("full", ("--keep", 4)),
        ):
            command = ["prune", "org/model", "-o", tmp_path / output, "--scores", scores, *words]
            result = CliRunner().invoke(main, [str(word) for word in command])
            assert result.exit_code in (1, 2)
            assert result.stderr.count("Error: ") == len(result.stderr.splitlines()) == 1
            assert not [name for name in server.fetched() if name.endswith(".safetensors")], words


def test_prune_says_what_run_says_of_the_result(tmp_path: Path) -> None:
    """MTP layers kept, experts that no token met, and how the result stands to the budget."""
    model = Model(tmp_path, "deepseek_v3")
    source = model.folder
    add_mtp(source)
    few = write_token_ids(tmp_path / "few.jsonl", sequences=1, length=3)
    goal = ("--budget-gib", 0.5014, "--context", 64)
    one = told("run", source, "-o", tmp_path / "run", "--calibration", few, *goal)
    other = told("prune", source, "-o", tmp_path / "prune", "--scores", tmp_path / "run", *goal)
    assert tree_bytes(tmp_path / "run") == tree_bytes(tmp_path / "prune")
    for words in (
        "layers for multi-token prediction (MTP, ",
        "warning: none of the 3 calibration tokens was routed to some experts",
        "fits the budget of ",
        "domain retention",
    ):
        lines = [
            [line[line.index(words) :] for line in result.stderr.splitlines() if words in line]
            for result in (one, other)
        ]
        # The run tells whether it fits twice, before and after.
        assert [len(found) > 0 for found in lines] == [True, True], words
        assert lines[0][-1] == lines[1][-1]
    assert [result.stderr.count("  CUDA context ") for result in (one, other)] == [1, 1], "the table stands once"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ean"},
        {"mix": "code.jsonl=1"},
        {"schedule": "global"},
        {"schedule": "linear-decrease", "spread": 0.2},
        {"floor": 7},
        {"protect_super_experts": True},
        {"seed": 3},
    ],
)
def test_a_keep_file_alone_says_which_experts_stay(qwen: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2]] * 4))
    for scores in (None, qwen.scores):
        with pytest.raises(SettingsError, match="--keep-file says itself which experts stay"):
            qwen.prune(tmp_path / "out", scores=scores, keep_file=tmp_path / "list.json", **settings)
    assert not list(tmp_path.glob("out*"))


def test_a_quantized_model_is_refused_by_hand_too(qwen: Model, tmp_path: Path) -> None:
    shutil.copytree(qwen.folder, tmp_path / "hqq")
    config = json.loads((tmp_path / "hqq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (tmp_path / "hqq" / "config.json").write_text(json.dumps(config))
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2]] * 4))
    settings = PruneSettings(model=str(tmp_path / "hqq"), output=tmp_path / "out", keep_file=tmp_path / "list.json")
    with pytest.raises(UnsupportedModelError, match=r"is quantized \(hqq\)"):
        prune(settings, quiet=True)


def test_scores_replace_nothing_but_scores(qwen: Model, tmp_path: Path) -> None:
    """--overwrite with the wrong name must not cost the user the calibration text."""
    text = write_token_ids(tmp_path / "text.jsonl")

    def score(output: Path) -> None:
        files = (str(text),)
        settings = RunSettings(
            model=str(qwen.folder), output=output, only_score=True, calibration=files, overwrite=True
        )
        run(settings, quiet=True)

    before = text.read_bytes()
    with pytest.raises(OutputError, match=r"text.jsonl exists and has no scores, so it is not replaced"):
        score(text)
    assert text.read_bytes() == before
    weights = shutil.copy(qwen.folder / "model-00001-of-00006.safetensors", tmp_path)
    with pytest.raises(OutputError, match="has no scores"):
        score(Path(weights))
    (tmp_path / "scores.safetensors").touch()
    for _ in range(2):
        score(tmp_path / "scores.safetensors")
        assert read_scores(tmp_path / "scores.safetensors").sources == ("text.jsonl",)
