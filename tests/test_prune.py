"""Pruning from scores: the same bytes as a run, without torch, and in the memory of a file copy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import InterruptedRunError, ResumeError, ScoresError, SettingsError
from streamprune.output.verify import verify
from streamprune.output.writer import OutputWriter
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import resume, run
from streamprune.saliency.methods import METHODS
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores, write_scores
from streamprune.selection.select import score_layer
from streamprune.selection.settings import SelectionSettings, mix_weights
from streamprune.work.enter import StopRequest
from tests.helpers import check_bytes, known_family, read_tensors, token_ids, tree_bytes
from tests.thorough import crossed, mostly_thorough
from tests.tiny import make_model, tiny_config, write_token_ids

#: Scores of the model of `Model`, which streamprune 0.1.0 wrote.
FORMAT_1 = Path(__file__).parent / "scores_format_1.safetensors"
#: Two sources of calibration text, by file name.
SOURCES = ("code.jsonl", "prose.jsonl")
EXPERTS = "model.layers.{block}.mlp.experts.{expert}.up_proj.weight"


class Model:
    """A tiny model, two files of calibration tokens, and the scores that were taken on both at once."""

    def __init__(self, folder: Path, family: str) -> None:
        self.kind = known_family(family)
        self.folder = make_model(folder / "model", tiny_config(self.kind))
        self.place = folder
        for number, name in enumerate(SOURCES):
            write_token_ids(folder / name, seed=number)
        self.scores = folder / "scores.safetensors"
        self.score(self.scores)

    def score(self, output: Path, *sources: str, **settings: Any) -> Scores:
        run(self.settings(output, *(sources or SOURCES), only_score=True, **settings), quiet=True)
        return read_scores(output)

    def settings(self, output: Path, *sources: str, **settings: Any) -> RunSettings:
        files = tuple(str(self.place / name) for name in sources or SOURCES)
        return RunSettings(model=str(self.folder), output=output, calibration=files, **settings)

    def prune(self, output: Path, **settings: Any) -> Any:
        given = {"scores": self.scores, **settings}
        return prune(PruneSettings(model=str(self.folder), output=output, **given), quiet=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


MIXES = ["code.jsonl=0.3,prose.jsonl=0.7", "prose.jsonl=1"]


@pytest.mark.parametrize(
    ("method", "schedule", "mix"),
    crossed(
        ["reap", "frequency", "composite", "random"], ["uniform", "linear-decrease", "global"], MIXES,
        usual=[
            ("reap", "uniform", MIXES[0]), ("frequency", "linear-decrease", MIXES[1]),
            ("composite", "global", MIXES[0]), ("random", "uniform", MIXES[1]),
        ],
    ),
)  # fmt: skip
def test_pruning_equals_a_run_to_the_byte(qwen: Model, tmp_path: Path, method: str, schedule: str, mix: str) -> None:
    goal = {"keep": 5, "method": method, "schedule": schedule, "mix": mix, "seed": 3}
    # The seed also chooses text, of which there is no more than is asked for here.
    run(qwen.settings(tmp_path / "run", **goal), quiet=True)
    qwen.prune(tmp_path / "prune", scores=tmp_path / "run", **goal)
    assert tree_bytes(tmp_path / "run") == tree_bytes(tmp_path / "prune")


@pytest.mark.parametrize(
    "family",
    mostly_thorough(
        ["deepseek_v3", "gpt_oss", "qwen3_5_moe", "llama4", "granitemoehybrid", "dbrx", "nemotron_h", "gemma4_text"],
        ("deepseek_v3", "gpt_oss", "dbrx"),
    ),
)
def test_every_layout_is_pruned_from_scores_alone(tmp_path: Path, family: str) -> None:
    model = Model(tmp_path, family)
    for schedule in ("uniform", "linear-increase"):
        goal: dict[str, Any] = {"keep": model.kind.keep, "schedule": schedule, "spread": None}
        one, other = tmp_path / f"run-{schedule}", tmp_path / f"prune-{schedule}"
        run(model.settings(one, **goal), quiet=True)
        result = model.prune(other, **goal)
        assert tree_bytes(one) == tree_bytes(other)
        kept = {layer.index: list(layer.kept) for layer in result.layers}
        check_bytes(model.folder, other, kept)
        assert verify(other, model.folder).tensors == len(read_tensors(other))


def test_protected_experts_and_a_budget_equal_a_run(qwen: Model, tmp_path: Path) -> None:
    goal: dict[str, Any] = {"budget_gib": 0.50098, "context": 64, "protect_super_experts": True, "schedule": "global"}
    run(qwen.settings(tmp_path / "run", **goal), quiet=True)
    qwen.prune(tmp_path / "prune", **goal)
    assert tree_bytes(tmp_path / "run") == tree_bytes(tmp_path / "prune")
    report = json.loads((tmp_path / "run" / "streamprune.json").read_text())
    protected = {int(block): experts for block, experts in report["protected"].items()}
    assert protected
    for layer in report["layers"]:
        assert set(protected.get(layer["index"], ())) <= set(layer["kept"])


def test_a_file_of_format_1_is_pruned_from(qwen: Model, tmp_path: Path) -> None:
    """It chooses what the same scores choose in the present format, and says which version made it."""
    recorded = read_scores(FORMAT_1).provenance["source"]["fingerprint"]
    # Another machine's torch may give the tiny model other weights than those that were scored.
    present = open_checkpoint(qwen.folder).fingerprint()
    old = tmp_path / "old.safetensors"
    old.write_bytes(FORMAT_1.read_bytes().replace(recorded.encode(), present.encode()))
    write_scores(tmp_path / "new.safetensors", read_scores(old))
    for name in ("old", "new"):
        command = ["prune", qwen.folder, "--scores", tmp_path / f"{name}.safetensors", "-o", tmp_path / name]
        goal = ["--keep", 5, "--schedule", "global", "--mix", MIXES[0], "--quiet"]
        told = CliRunner().invoke(main, [str(word) for word in [*command, *goal]])
        assert told.exit_code == 0, told.output
    assert tree_bytes(tmp_path / "old") == tree_bytes(tmp_path / "new")
    report = json.loads((tmp_path / "old" / "streamprune.json").read_text())
    assert report["versions"]["streamprune"] == "0.1.0"
    check_bytes(qwen.folder, tmp_path / "old", {layer["index"]: layer["kept"] for layer in report["layers"]})


def test_neither_torch_nor_transformers_is_loaded(qwen: Model, tmp_path: Path) -> None:
    script = (
        "import sys; from streamprune.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    command = ["prune", qwen.folder, "-o", tmp_path / "out", "--scores", qwen.scores, "--schedule", "global"]
    goal = ["--budget-gib", "0.50098", "--context", "64", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command), *goal], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n")
    assert (tmp_path / "out" / "streamprune.json").is_file()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak of a whole process, for 2 and for 12 blocks of 6 MiB: the difference is less than half of one block."""
    script = (
        "import sys; from pathlib import Path; from streamprune.pipeline.prune import prune\n"
        "from streamprune.config import PruneSettings; from streamprune.hardware.memory import peak_resident_bytes\n"
        "model, scores, out = sys.argv[1:]\n"
        "prune(PruneSettings(model=model, output=Path(out), scores=Path(scores), keep=4), quiet=True)\n"
        "print(peak_resident_bytes())"
    )
    peaks = []
    for blocks in (2, 12):
        config = tiny_config(known_family("qwen3_moe"))
        config.num_hidden_layers, config.moe_intermediate_size = blocks, 1024
        model = make_model(tmp_path / f"m{blocks}", config)
        tokens = write_token_ids(tmp_path / "ids.jsonl")
        scores = tmp_path / f"s{blocks}.safetensors"
        run(RunSettings(model=str(model), output=scores, only_score=True, calibration=(str(tokens),)), quiet=True)
        command = [sys.executable, "-c", script, str(model), str(scores), str(tmp_path / f"o{blocks}")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 3 * 2**20, peaks


@pytest.fixture(scope="module")
def remixed(qwen: Model) -> tuple[Scores, list[tuple[str, Scores]]]:
    """Scores of both sources; and, for two mixes of them, the scores of a run on that mix.

    Two parts code and one part prose, once by weights and once by giving the code twice; and one source alone.
    """
    lines = (qwen.place / "code.jsonl").read_text()
    (qwen.place / "twice.jsonl").write_text(lines + lines)
    mixes = [("code.jsonl=2,prose.jsonl=1", ("twice.jsonl", "prose.jsonl")), ("code.jsonl=1", ("code.jsonl",))]
    runs = [
        (mix, qwen.score(qwen.place / f"mix{number}.safetensors", *sources, batch_tokens=24))
        for number, (mix, sources) in enumerate(mixes)
    ]
    return qwen.score(qwen.place / "both.safetensors", batch_tokens=24), runs


@pytest.mark.parametrize("method", [method for method in METHODS if not METHODS[method].is_random])
def test_remixed_scores_equal_those_of_a_run_on_that_mix(
    remixed: tuple[Scores, list[tuple[str, Scores]]], method: str
) -> None:
    mixed, runs = remixed
    for mix, really in runs:
        weights = mix_weights(mix, mixed.sources, mixed.source_tokens)
        for one, other in zip(mixed.layers, really.layers, strict=True):
            by_weights = np.array(score_layer(one, SelectionSettings(method=method), weights))
            by_tokens = np.array(score_layer(other, SelectionSettings(method=method), (1.0,) * len(really.sources)))
            if method not in ("reap", "man", "ean-mean", "msan", "max-activation"):
                # Sums over tokens: the mix counts as many tokens as were scored, whatever their shares.
                by_weights = by_weights * (really.tokens / mixed.tokens)
            np.testing.assert_allclose(by_weights, by_tokens, rtol=1e-9)


def test_an_uneven_result_loads_and_says_how(qwen: Model, tmp_path: Path) -> None:
    result = qwen.prune(tmp_path / "out", keep=4, schedule="linear-decrease", spread=0.25)
    counts = [len(layer.kept) for layer in result.layers]
    assert sum(counts) == 16
    assert counts == sorted(counts)
    assert result.summary["experts_per_layer"] == counts
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [layer.mlp.experts.num_experts for layer in model.model.layers] == counts
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=token_ids()).logits).all()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "vLLM and llama.cpp read one number" in card


def test_a_keep_file_needs_no_scores(qwen: Model, tmp_path: Path) -> None:
    first = qwen.prune(tmp_path / "first", keep=3, method="ean")
    for scores in (None, qwen.scores):
        output = tmp_path / f"by-hand-{scores is None}"
        result = qwen.prune(output, scores=scores, keep_file=tmp_path / "first" / "streamprune.json")
        assert [layer.kept for layer in result.layers] == [layer.kept for layer in first.layers]
        weights = {name: data for name, data in tree_bytes(output).items() if name.startswith("model")}
        assert weights == {
            name: data for name, data in tree_bytes(tmp_path / "first").items() if name.startswith("model")
        }
        assert "chosen by hand" in (output / "README.md").read_text()
        assert verify(output, qwen.folder)
    lists = {str(block): [0, 1, 2 + block] for block in range(4)}
    lists["2"] = [7, 0]
    (tmp_path / "list.json").write_text(json.dumps(lists))
    result = qwen.prune(tmp_path / "listed", scores=None, keep_file=tmp_path / "list.json")
    assert [layer.kept for layer in result.layers] == [(0, 1, 2), (0, 1, 3), (0, 7), (0, 1, 5)]
    check_bytes(qwen.folder, tmp_path / "listed", {layer.index: list(layer.kept) for layer in result.layers})


def test_a_schedule_file_says_how_many(qwen: Model, tmp_path: Path) -> None:
    (tmp_path / "schedule.json").write_text("[3, 8, 2, 5]")
    goal = {"schedule": str(tmp_path / "schedule.json"), "protect_super_experts": True}
    result = qwen.prune(tmp_path / "prune", **goal)
    assert [len(layer.kept) for layer in result.layers] == [3, 8, 2, 5]
    run(qwen.settings(tmp_path / "run", **goal), quiet=True)
    assert tree_bytes(tmp_path / "run") == tree_bytes(tmp_path / "prune")
    with pytest.raises(SettingsError, match="Omit --keep"):
        qwen.prune(tmp_path / "none", keep=3, **goal)


def test_scores_of_another_model_are_refused(qwen: Model, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", tiny_config(qwen.kind), seed=9)
    settings = PruneSettings(model=str(other), output=tmp_path / "out", scores=qwen.scores, keep=4)
    with pytest.raises(ScoresError, match=r"has the scores of .* Give the model that was scored"):
        prune(settings, quiet=True)
    assert not list(tmp_path.glob("out*"))


class Injected(Exception):
    """Ends a call in the middle."""


def test_an_interrupted_pruning_goes_on(qwen: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen.prune(tmp_path / "whole", keep=4)
    usual, written = OutputWriter.write_layer, []

    def write_layer(self: OutputWriter, block: int | None, kept: Any) -> Any:
        if block == 2 and len(written) < 4:
            written.append("stopped")
            raise Injected
        written.append(block)
        return usual(self, block, kept)

    monkeypatch.setattr(OutputWriter, "write_layer", write_layer)
    with pytest.raises(Injected):
        qwen.prune(tmp_path / "out", keep=4)
    assert not (tmp_path / "out").exists()
    qwen.prune(tmp_path / "out", keep=4)
    assert written == [None, 0, 1, "stopped", 2, 3], "what was written is not written again"
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()
    # With another choice nothing of it is of use.
    written.clear()
    with pytest.raises(Injected):
        qwen.prune(tmp_path / "other", keep=4)
    qwen.prune(tmp_path / "other", keep=3)
    assert written[-5:] == [None, 0, 1, 2, 3]
    assert verify(tmp_path / "other", qwen.folder)


def test_a_stop_is_heard_between_blocks(qwen: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: True)
    with pytest.raises(InterruptedRunError, match="Resume with: streamprune resume "):
        qwen.prune(tmp_path / "out", keep=4)


def test_an_unfinished_run_is_not_taken_for_a_pruning(
    qwen: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = OutputWriter.write_layer

    def write_layer(self: OutputWriter, block: int | None, kept: Any, computed: Any) -> Any:
        if block == 2:
            raise Injected
        return usual(self, block, kept, computed)

    with monkeypatch.context() as patch:
        patch.setattr(OutputWriter, "write_layer", write_layer)
        with pytest.raises(Injected):
            run(qwen.settings(tmp_path / "out", keep=4), quiet=True)
    with pytest.raises(ResumeError, match="has an unfinished run"):
        qwen.prune(tmp_path / "out", keep=4)
    resume(tmp_path / "out.work", quiet=True)
    assert verify(tmp_path / "out", qwen.folder)


def test_bad_goals_and_missing_files_are_refused(qwen: Model, tmp_path: Path) -> None:
    def refused(words: str, *options: str, scores: Path | None = qwen.scores) -> None:
        given = ["--scores", str(scores)] if scores else []
        command = ["prune", str(qwen.folder), "-o", str(tmp_path / "out"), *given, *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (1, 2, 3), result.output
        assert re.search(words, result.stderr), result.stderr
        assert result.stderr.count("Error: ") == 1
        assert not list(tmp_path.glob("out*"))

    refused("Say in one way how far to prune")
    refused("Say which experts stay", scores=None)
    refused("No scores can be read from .*missing", "--keep", "4", scores=tmp_path / "missing")
    refused(
        "this safetensors file has no scores", "--keep", "4", scores=qwen.folder / "model-00001-of-00006.safetensors"
    )
    refused("the router picks 2 experts per token", "--keep", "1")
    refused("there is no source 'poetry'", "--keep", "4", "--mix", "poetry=1")
    refused("says itself how many experts stay", "--keep", "4", "--keep-file", "list.json")
    refused("Even with the minimum", "--budget-gib", "0.3")
    shutil.copytree(qwen.folder, tmp_path / "broken")
    (tmp_path / "broken" / "model-00002-of-00006.safetensors").unlink()
    command = ["prune", tmp_path / "broken", "-o", tmp_path / "out", "--scores", qwen.scores, "--keep", 4]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 1
    assert "model-00002-of-00006.safetensors" in result.stderr


def test_a_dry_run_tells_and_writes_nothing(qwen: Model, tmp_path: Path) -> None:
    command = [
        "prune",
        qwen.folder,
        "-o",
        tmp_path / "out",
        "--scores",
        qwen.scores,
        "--keep",
        4,
        "--dry-run",
        "--json",
    ]
    told = CliRunner().invoke(main, [str(word) for word in command])
    assert told.exit_code == 0, told.output
    assert "keeping 4 of 8" in told.stderr
    assert "domain retention" in told.stderr
    assert not list(tmp_path.iterdir())
    really = qwen.prune(tmp_path / "out", keep=4)
    told_summary, summary = json.loads(told.stdout), json.loads(json.dumps(really.summary))
    assert told_summary["memory"]["total_bytes"] == pytest.approx(summary["memory"]["total_bytes"], rel=1e-3)
    for name in ("experts_per_layer", "output_bytes", "domain_retention", "never_routed"):
        assert told_summary[name] == summary[name]
