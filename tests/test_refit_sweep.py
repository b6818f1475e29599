"""A refit whose experts are all selected before it begins: after a global schedule, or from saved scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, ResumeError, ScoresError, SettingsError, TooMuchLostError
from streamprune.evaluation.held_out import held_back_fingerprint
from streamprune.output.verify import verify
from streamprune.pipeline.run import resume, run
from streamprune.pipeline.run_layers import both_sweeps
from streamprune.reporting.card import THIS_MODEL
from streamprune.reporting.record import read_record
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.refit_stage import RefitStage
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import ForwardStage, LayerTask, PrunedForwardStage
from streamprune.work.saved_states import Generations
from tests.faults import Case, Injected, breaking_at
from tests.helpers import known_family, tree_bytes
from tests.launching import launch
from tests.test_refit_run import check_stop_in, small_case, stop_in, tensors_of
from tests.tiny import make_model, tiny_config, write_token_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return small_case(tmp_path_factory.mktemp("made"), schedule="global", evaluate=True)


def end_in_refit(case: Case, layer: int, **changes: Any) -> None:
    """Run until a layer is to be refitted, and end there without any warning."""
    usual = LayerLoop.run_layer

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        if task.index == layer and any(isinstance(stage, RefitStage) for stage in self._stages) and not task.replayed:
            raise Injected
        usual(self, task, following)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerLoop, "run_layer", run_layer)
        with pytest.raises(Injected):
            case.run(**changes)
    assert not case.output.exists()


def test_experts_that_are_ranked_over_all_layers_are_refitted(made: Case) -> None:
    record = json.loads(made.expected["streamprune.json"])
    assert len({len(layer["kept"]) for layer in record["layers"]}) > 1
    assert len(record["refit"]["layers"]) == len(record["layers"])
    assert all(layer["after"] < layer["before"] for layer in record["refit"]["layers"])
    assert verify(made.output, made.model).computed == len(record["computed"]) > 0
    [result] = [json.loads(data) for name, data in made.expected.items() if name.endswith("text.json")]
    assert result["all"]["kl"] > 0


@pytest.mark.parametrize("every", [0.0, 1e6], ids=["states saved", "all recomputed"])
def test_a_kill_while_scoring_goes_on(made: Case, tmp_path: Path, every: float) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=2, checkpoint_every=every)
    case.resume()
    case.check()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("every", [0.0, 1e6], ids=["states saved", "all recomputed"])
def test_a_kill_while_refitting_goes_on(made: Case, tmp_path: Path, layer: int, every: float) -> None:
    case = made.at(tmp_path / "out")
    end_in_refit(case, layer, checkpoint_every=every)
    case.resume()
    case.check()


@pytest.mark.parametrize("stage", [ScoreStage, RefitStage, PrunedForwardStage])
def test_a_stop_in_any_stage_goes_on(
    made: Case, tmp_path: Path, stage: type[ForwardStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_stop_in(stage, made.at(tmp_path / "out"), monkeypatch)


def test_states_of_the_scoring_are_gone_once_all_layers_are_scored(
    made: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = made.at(tmp_path / "out")
    forget = Generations.forget
    with pytest.MonkeyPatch.context() as patch:
        # As if the run were killed right before they are removed.
        patch.setattr(Generations, "forget", lambda _: None)
        end_in_refit(case, 0)
    assert Generations.forget is forget
    assert list((case.work / "states").iterdir())
    capfd.readouterr()
    resume(case.work)
    assert "cannot be used" not in capfd.readouterr().err
    case.check()
    end_in_refit(case := made.at(tmp_path / "other"), 0)
    assert not list((case.work / "states").iterdir())


def test_layers_that_are_to_be_refitted_again_stay_so_after_another_kill(once: Case, tmp_path: Path) -> None:
    case = once.at(tmp_path / "out")
    end_in_refit(case, 3, scores=once.output)
    written = [json.loads(path.read_text()) for path in sorted((case.work / "layers").iterdir())]
    with breaking_at(1), pytest.raises(Injected):
        case.resume(from_layer=1)
    left = [json.loads(path.read_text()) for path in sorted((case.work / "layers").iterdir())]
    shards = [[bool(each["body"]["shards"]) for each in found] for found in (written, left)]
    assert shards == [[True, True, True, True], [True, False, False, True]]
    case.resume()
    assert weights_of(tree_bytes(case.output)) == weights_of(once.expected)


def test_a_layer_can_be_refitted_again(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    end_in_refit(case, 3)
    case.resume(from_layer=1)
    case.check()


def test_the_summary_is_of_both_sweeps(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    record = json.loads(made.expected["streamprune.json"])
    assert case.run().summary["calibration_tokens"] == record["calibration"]["tokens"]
    one = {"calibration_tokens": 9, "states": "ram", "shrinks": [{"layer": 1}]}
    both = both_sweeps(one, {"calibration_tokens": 4, "states": "disk", "shrinks": [{"layer": 2}]})
    assert both == {"calibration_tokens": 9, "states": "disk", "shrinks": [{"layer": 1}, {"layer": 2}]}


def test_too_much_lost_while_refitting_offers_the_scores(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    scores = tmp_path / "out.scores.safetensors"
    with pytest.raises(TooMuchLostError, match=re.escape(f"`streamprune run --refit --scores {scores}`")):
        case.run(stop_if_kl=1e-9)
    assert scores.is_file()


@pytest.mark.parametrize("apart", [True, False])
def test_text_counts_as_held_back_only_if_the_scores_say_so(
    made: Case, once: Case, tmp_path: Path, apart: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case(made.model, made.tokens, tmp_path / "out", {**once.settings, "evaluate": True}, {})
    settings = {"calibration": (str(made.tokens),), **case.settings, "scores": (made if apart else once).output}
    run(RunSettings(model=str(case.model), output=case.output, **settings))
    assert ("may have been scored on the text" in capfd.readouterr().err) is not apart
    [result] = [json.loads(data) for name, data in tree_bytes(case.output).items() if name.endswith("text.json")]
    assert result["data"]["held_back"] is apart


@pytest.mark.parametrize("family", ["gemma4_text", "granitemoe"])
def test_both_kinds_of_sweep_refit_what_one_sweep_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (Behind the experts of the first is a norm.)
    once = small_case(tmp_path, family)
    again = once.at(tmp_path / "again")
    stop_in(RefitStage, 1, monkeypatch)
    with pytest.raises(InterruptedRunError):
        again.run(scores=once.output)
    monkeypatch.undo()
    again.resume()
    assert weights_of(tree_bytes(again.output)) == weights_of(once.expected)
    ranked = once.at(tmp_path / "ranked")
    ranked.run(schedule="global")
    record, before = (json.loads((each / "streamprune.json").read_text()) for each in (ranked.output, once.output))
    for layer, one in zip(record["refit"]["layers"], before["refit"]["layers"], strict=True):
        assert layer["catch_up"] == one["catch_up"] == float(family == "granitemoe")
        assert layer["after"] < layer["before"]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return small_case(tmp_path_factory.mktemp("once"))


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith((".safetensors", "config.json"))}


def test_saved_scores_give_the_same_refit_without_scoring_again(
    once: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*_: Any) -> None:
        raise AssertionError("nothing is scored")

    monkeypatch.setattr(ScoreStage, "compute", compute)
    case = once.at(tmp_path / "out")
    result = case.run(scores=once.output)
    assert weights_of(tree_bytes(case.output)) == weights_of(once.expected)
    record, before = (json.loads((each / "streamprune.json").read_text()) for each in (case.output, once.output))
    assert record == before
    assert result.summary["experts_per_layer"] == 5


def test_other_text_of_a_refit_is_told_and_repeated(once: Case, tmp_path: Path) -> None:
    other = write_token_ids(tmp_path / "other.jsonl", sequences=25)
    lines = other.read_text().splitlines(keepends=True)
    other.write_text("".join(reversed(lines)))
    case = once.at(tmp_path / "out")
    case.run(scores=once.output, calibration=(str(other),), evaluate=True)
    record = json.loads((case.output / "streamprune.json").read_text())
    assert [source["name"] for source in record["calibration"]["sources"]] == ["ids.jsonl"]
    told = record["refit"]["calibration"]
    assert told["sources"] == [{"name": "other.jsonl", "tokens": told["tokens"]}]
    assert told["held_back"]["sequences"] == 2
    assert told["recipe"]["given"]["calibration"] == ["other.jsonl"]
    card = (case.output / "README.md").read_text()
    assert f"not what the experts were scored on, but from `other.jsonl` ({told['tokens']:,} tokens)." in card
    command = next(line for line in card.splitlines() if line.startswith("streamprune run"))
    assert f"--scores {THIS_MODEL} --keep 5" in command
    assert "--calibration other.jsonl --evaluate" in command
    assert "--refit --anchor none" in command
    # It was held out of the refit, but not of the scores.
    assert held_back_fingerprint(read_record(case.output)) is None


def test_another_size_and_width_are_refitted_from_the_same_scores(once: Case, tmp_path: Path) -> None:
    case = once.at(tmp_path / "out")
    case.run(scores=once.output, keep=None, width=16)
    record = json.loads((case.output / "streamprune.json").read_text())
    assert (record["settings"]["width"], record["settings"]["keep"]) == (16, 8)
    assert verify(case.output, case.model).computed == len(record["computed"]) > 0


def test_a_kill_with_saved_scores_goes_on_unless_they_have_changed(once: Case, tmp_path: Path) -> None:
    shutil.copytree(once.output / "scores", tmp_path / "scores")
    scores = tmp_path / "scores" / "scores.safetensors"
    case = once.at(tmp_path / "out")
    end_in_refit(case, 2, scores=scores)
    data = scores.read_bytes()
    scores.write_bytes(small_scores(tmp_path, once))
    with pytest.raises(ResumeError, match="contents of the scores"):
        case.resume()
    scores.write_bytes(data)
    case.resume()
    assert weights_of(tree_bytes(case.output)) == weights_of(once.expected)


def small_scores(folder: Path, case: Case) -> bytes:
    """Scores of the same model on less text."""
    lines = case.tokens.read_text().splitlines(keepends=True)
    few = folder / "few.jsonl"
    few.write_text("".join(lines[:10]))
    other = Case(case.model, few, folder / "few.safetensors", {"only_score": True}, {})
    other.run()
    return other.output.read_bytes()


def test_scores_of_another_model_are_refused(once: Case, tmp_path: Path) -> None:
    model = make_model(tmp_path / "other", tiny_config(known_family("qwen3_moe")), seed=5)
    case = Case(model, once.tokens, tmp_path / "out", {**once.settings, "scores": once.output}, {})
    with pytest.raises(ScoresError, match="Give the model that was scored"):
        case.run()


def test_scores_without_a_refit_belong_to_prune(once: Case, tmp_path: Path) -> None:
    case = once.at(tmp_path / "out")
    with pytest.raises(SettingsError, match=r"--scores is for --refit, .* Without them use `streamprune prune`"):
        case.run(scores=once.output, refit=False, anchor=None)


def test_two_processes_refit_after_a_global_schedule(made: Case, tmp_path: Path) -> None:
    words: list[object] = [
        "run", made.model, "-o", tmp_path / "out", "--keep", 5, "--batch-tokens", 120, "--calibration", made.tokens,
        "--refit", "--anchor", "none", "--device", "cpu", "--schedule", "global", "--evaluate",
    ]  # fmt: skip
    ended = launch(words, [tmp_path] * 2).end()
    assert [code for code, *_ in ended] == [0, 0], ended
    record = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert record["computed"].keys() == json.loads(made.expected["streamprune.json"])["computed"].keys()
    before, after = tensors_of(made.output), tensors_of(tmp_path / "out")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().amax()))
