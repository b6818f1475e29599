"""`run --evaluate`: the damage on text that was held back, known beside the scoring, whatever interrupts the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.errors import CalibrationError, InterruptedRunError, OutputError, SettingsError, TooMuchLostError
from streamprune.evaluation.held_out import split_held_out, write_held_out
from streamprune.pipeline.run import resume
from streamprune.pipeline.status import status_of, status_text
from streamprune.reporting.evaluations import TEXT_NAME, read_result, results_folder
from streamprune.saliency.scores_file import read_scores
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.forward import LayerForward
from streamprune.work.saved_states import BatchState
from tests.faults import Case, Injected
from tests.helpers import known_family, tree_bytes
from tests.launching import launch
from tests.test_evaluate import measured
from tests.thorough import mostly_thorough, thorough
from tests.tiny import make_model, tiny_config, write_token_ids

PLAIN_RUN_BLOCK = LayerForward.run_layer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two sources of 12 and 8 sequences, of which one each is held back."""
    folder = tmp_path_factory.mktemp("made")
    model = make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    write_token_ids(folder / "two.jsonl", sequences=8, length=20, seed=7)
    sources = (str(write_token_ids(folder / "one.jsonl", sequences=12)), str(folder / "two.jsonl"))
    settings = {
        "keep": 5, "batch_tokens": 96, "checkpoint_every": 0.0, "calibration": sources, "evaluate": True,
        "dtype": "float32",
    }  # fmt: skip
    case = Case(model, folder / "one.jsonl", folder / "undisturbed", settings, {})
    case.run()
    case.expected = tree_bytes(case.output)
    return case


def found(output: Path) -> dict[str, Any]:
    result = read_result(results_folder(output), TEXT_NAME)
    assert result is not None
    return result


def check_close(result: dict[str, Any], expected: dict[str, Any], within: float = 1e-9) -> None:
    for each, other in zip([*result["sources"], result["all"]], [*expected["sources"], expected["all"]], strict=True):
        assert each.keys() == other.keys()
        for name, value in each.items():
            exact = value is None or isinstance(value, str)
            assert value == (other[name] if exact else pytest.approx(other[name], abs=within, rel=within)), name


CHOICES: list[dict[str, Any]] = [
    {},
    {"propagate": "pruned"},
    {"schedule": "global"},
    {"schedule": "linear-decrease"},
    {"protect_super_experts": True, "keep": 7},
]


@pytest.mark.parametrize("choice", mostly_thorough(CHOICES, CHOICES[1:3]), ids=str)
def test_what_a_run_says_is_what_eval_says_afterwards(choice: dict[str, Any], made: Case, tmp_path: Path) -> None:
    """From the files that were written, also where blocks keep different numbers of experts."""
    case = made.at(tmp_path / "out")
    summary = case.run(**choice).summary
    told = found(case.output)
    assert summary["evaluation"] == told
    assert [(each["name"], each["sequences"], each["tokens"]) for each in told["sources"]] == [
        ("one.jsonl", 1, 23), ("two.jsonl", 1, 19),
    ]  # fmt: skip
    assert told["all"]["kl"] > 1e-4
    assert len(told["all"]["hidden_error"]) == 4
    recipe = tmp_path / "out.held-out" / "recipe.json"
    uneven = "schedule" in choice
    check_close(measured(case.output, case.model, recipe, dtype="float32", trust_remote_code=uneven), told)


def test_what_is_held_back_is_not_scored_on(made: Case, tmp_path: Path) -> None:
    """The scores are those of a run that never saw it."""
    given = [Path(path).read_text().splitlines() for path in made.settings["calibration"]]
    held = [(made.output.with_name("undisturbed.held-out") / f"{n}.jsonl").read_text().splitlines() for n in (0, 1)]
    rest = []
    for number, (lines, without) in enumerate(zip(given, held, strict=True)):
        assert len(without) == 1
        left = [line for line in lines if json.loads(line)["input_ids"] != json.loads(without[0])["input_ids"]]
        assert len(left) == len(lines) - 1
        path = tmp_path / Path(made.settings["calibration"][number]).name
        path.write_text("\n".join(left) + "\n")
        rest.append(str(path))
    case = made.at(tmp_path / "out")
    case.run(evaluate=False, calibration=tuple(rest))
    ours, others = (read_scores(each.output / "scores" / "scores.safetensors") for each in (made, case))
    assert ours.source_tokens == others.source_tokens == (11 * 24, 7 * 20)
    for layer, other in zip(ours.layers, others.layers, strict=True):
        assert (layer.values == other.values).all()
    told = json.loads((made.output / "streamprune.json").read_text())["calibration"]
    assert (told["sequences"], told["held_back"]["sequences"], told["held_back"]["tokens"]) == (18, 2, 44)
    assert [source["sequences"] for source in told["recipe"]["sources"]] == [11, 7]


def test_parts_are_spread_and_reproducible() -> None:
    sequences = tuple(torch.full((2,), number) for number in range(100))
    whole = Calibration(sequences, ("a", "b"), (0,) * 60 + (1,) * 40, "")
    part = split_held_out(whole)
    assert part.held_out is not None
    numbers = [int(ids[0]) for ids in part.held_out.sequences]
    assert numbers == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert part.held_out.fingerprint == split_held_out(whole).held_out.fingerprint  # type: ignore[union-attr]
    assert sorted([*numbers, *(int(ids[0]) for ids in part.sequences)]) == list(range(100))
    with pytest.raises(CalibrationError, match="b has 1 sequences of two tokens or more; --evaluate needs one to"):
        split_held_out(replace(whole, sequences=sequences[:3], source_of=(0, 0, 1)))


def breaking_run_block(monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException) -> list[int]:
    """Let the `nth` call fail once; returns a list that counts them."""
    calls = [0]

    def run_layer(self: LayerForward, index: int, block: nn.Module, ids: Any, state: BatchState) -> BatchState:
        calls[0] += 1
        if calls[0] == nth:
            raise error
        return PLAIN_RUN_BLOCK(self, index, block, ids, state)

    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    return calls


@pytest.mark.parametrize("choice", [{}, {"propagate": "pruned"}, {"schedule": "global"}], ids=str)
def test_broken_off_anywhere_it_goes_on_to_the_same(
    choice: dict[str, Any], made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thoroughly: bool
) -> None:
    whole = made.at(tmp_path / "whole")
    calls = breaking_run_block(monkeypatch, 0, Injected())
    whole.run(**choice)
    expected = tree_bytes(whole.output)
    # Some in every block and pass; their number has no divisor in common with that of a block's.
    for nth in range(2, calls[0] + 1, 13 if thoroughly else 37):
        case = made.at(tmp_path / f"out{nth}")
        breaking_run_block(monkeypatch, nth, Injected())
        with pytest.raises(Injected):
            case.run(**choice)
        # (Where not even the first block was done, nothing was kept.)
        case.run(**choice)
        assert tree_bytes(case.output) == expected


def stopping(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Ask to stop behind the `nth` micro-batch."""
    usual, done = MicroBatches._advance, [0]

    def advance(self: MicroBatches, *arguments: Any) -> int:
        reached = usual(self, *arguments)
        done[0] += 1
        if done[0] == nth:
            self._stop.signal = 15
        return reached

    monkeypatch.setattr(MicroBatches, "_advance", advance)


@pytest.mark.parametrize("choice", [pytest.param({}, marks=thorough), {"propagate": "pruned"}], ids=str)
def test_stopped_anywhere_it_goes_on_from_there(
    choice: dict[str, Any], made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thoroughly: bool
) -> None:
    """Also while the output head is read off, and with a second stop while it goes on."""
    whole = made.at(tmp_path / "whole")
    calls = breaking_run_block(monkeypatch, 0, Injected())
    whole.run(**choice, checkpoint_every=1e6)
    monkeypatch.undo()
    expected, all_calls = tree_bytes(whole.output), calls[0]
    stops = 0
    for nth in range(1, 100, 14 if thoroughly else 29):
        case = made.at(tmp_path / f"out{nth}")
        with monkeypatch.context() as patch:
            stopping(patch, nth)
            try:
                case.run(**choice, checkpoint_every=1e6)
                break
            except InterruptedRunError:
                stops += 1
            stopping(patch, 5)
            calls = breaking_run_block(patch, 0, Injected())
            try:
                case.resume(checkpoint_every=1e6)
            except InterruptedRunError:
                case.resume(checkpoint_every=1e6)
            assert calls[0] <= all_calls - nth // 2, "what was done before is not done again"
        assert tree_bytes(case.output) == expected
    assert stops > (2 if thoroughly else 1)


def test_killed_behind_the_evaluation_it_is_not_done_again(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.output.writer import OutputWriter

    case = made.at(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(OutputWriter, "finish", lambda *_: (_ for _ in ()).throw(Injected()))
        with pytest.raises(Injected):
            case.run()
    calls = breaking_run_block(monkeypatch, 0, Injected())
    case.resume()
    assert calls == [0]
    case.check()


def test_out_of_memory_changes_nothing(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thoroughly: bool
) -> None:
    sources = (str(write_token_ids(tmp_path / "ids.jsonl", sequences=30)),)
    whole = made.at(tmp_path / "whole")
    calls = breaking_run_block(monkeypatch, 0, Injected())
    whole.run(calibration=sources)
    for nth in range(1, calls[0] + 1, 7 if thoroughly else 17):
        case = made.at(tmp_path / f"out{nth}")
        breaking_run_block(monkeypatch, nth, torch.OutOfMemoryError("CUDA out of memory."))
        case.run(calibration=sources)
        check_close(found(case.output), found(whole.output), 1e-6)


def test_several_processes_find_the_same(made: Case, tmp_path: Path) -> None:
    words = ["run", made.model, "-o", "out", "--keep", 5, "--batch-tokens", 48, "--dtype", "float32", "--evaluate"]
    for source in made.settings["calibration"]:
        words += ["--calibration", source]
    alone = made.at(tmp_path / "alone")
    alone.run(batch_tokens=48)
    told = launch(words, [tmp_path] * 2).end()
    assert [status for status, *_ in told] == [0, 0], told
    result, expected = found(tmp_path / "out"), found(alone.output)
    check_close(result, expected, 1e-6)
    assert (tmp_path / "out.held-out" / "0.jsonl").read_text()


def test_a_hopeless_run_ends_early_and_can_be_gone_on_with(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made.at(tmp_path / "out")
    with pytest.raises(TooMuchLostError, match=r"After layer 0/3 .* above 4 x --stop-if-kl 1e-05\. .*resume") as told:
        case.run(stop_if_kl=1e-5)
    assert told.value.exit_code == 4
    assert not case.output.exists()
    assert not (case.work / "layers" / "00001.json").exists()
    assert "exceeds 1e-05 nats per token (--stop-if-kl)" in status_text(status_of(case.work))
    # The same command, or a limit that it is above as well, computes nothing: it would go on beyond layer 0 otherwise.
    with monkeypatch.context() as patch:
        calls = breaking_run_block(patch, 0, Injected())
        for again, limit in ((case.run, 1e-5), (case.resume, 1e-6)):
            with pytest.raises(TooMuchLostError) as repeated:
                again(stop_if_kl=limit)
            assert str(repeated.value).startswith("It was refused before, ")
            assert str(told.value).replace("1e-05", f"{limit:g}") in str(repeated.value)
        assert calls == [0]
    case.resume(stop_if_kl=50.0)
    case.check()


def test_a_finished_run_that_lost_too_much_leaves_its_scores(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.pipeline import run_evaluation as of_run

    monkeypatch.setattr(of_run, "_MEASUREMENTS", 1)
    case = made.at(tmp_path / "out")
    with pytest.raises(TooMuchLostError, match="Change the selection with `streamprune prune --scores"):
        case.run(stop_if_kl=1e-5)
    assert not case.output.exists()
    assert read_scores(tmp_path / "out.scores.safetensors").layer_indices == (0, 1, 2, 3)
    calls = breaking_run_block(monkeypatch, 0, Injected())
    resume(case.work, quiet=True, stop_if_kl=50.0)
    assert calls == [0]
    case.check()


def test_other_evaluations_than_ours_are_not_believed(made: Case, tmp_path: Path) -> None:
    """The record of one in the work folder counts only for the text that is held back here."""
    from streamprune.work.folder import WorkFolder

    case = made.at(tmp_path / "out")
    case.interrupt(at=3)
    ours = found(made.output)
    forged = [
        {"data": {}, "sources": []},
        {**ours, "all": 3},
        {**ours, "against": None},
        {**ours, "all": {**ours["all"], "kl_p99": None}},
        {**ours, "all": {**ours["all"], "kl_interval": [1.0]}},
        {name: value for name, value in ours.items() if name != "against"},
        [1],
    ]
    for body in forged:
        with WorkFolder(case.work) as work:
            work.write_evaluation(body)  # type: ignore[arg-type]
            assert work.read_evaluation() is None
    case.resume()
    case.check()


def test_what_was_measured_on_a_choice_counts_no_more_when_blocks_are_scored_again(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is measured behind the scoring: the choice may be another one then."""
    case = made.at(tmp_path / "out")
    with pytest.raises(TooMuchLostError):
        case.run(schedule="global", stop_if_kl=1e-9)
    calls = breaking_run_block(monkeypatch, 0, Injected())
    with pytest.raises(TooMuchLostError):
        case.resume()
    assert calls == [0], "nothing has changed"
    with pytest.raises(TooMuchLostError):
        case.resume(from_layer=3)
    # The last block again, from the first one on as no states are left; and the text held back, through both models.
    assert calls[0] > 8 * 2


def test_what_is_chosen_at_the_end_is_in_the_plan_of_memory(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for a block beside its pruned self, and for two states of what is held back."""
    from streamprune.pipeline.run_evaluation import RunEvaluation

    usual, plans = RunEvaluation.complete, []

    def complete(self: RunEvaluation, *given: Any) -> None:
        plans.append(self._runtime.plan)
        usual(self, *given)

    monkeypatch.setattr(RunEvaluation, "complete", complete)
    for place, choice in (("during", {}), ("after", {"schedule": "global"})):
        made.at(tmp_path / place).run(**choice)
    during, after = (plan.needs for plan in plans)
    assert (after.sides, after.states) == (during.sides, during.states)
    # Before it is known how many experts stay of a block, all may.
    assert after.layer > during.layer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop_if_kl": 1.0}, "--stop-if-kl 1 needs --evaluate"),
        ({"evaluate": True, "stop_if_kl": 0.0}, "Give nats per token above 0"),
    ],
)
def test_stop_if_kl_is_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        RunSettings(model="m", output=Path("o"), keep=1, **given)


def test_a_folder_of_somebody_else_is_not_written_into(made: Case, tmp_path: Path) -> None:
    held = calibration_held(made)
    (tmp_path / "out.held-out").mkdir()
    (tmp_path / "out.held-out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.held-out has files that streamprune did not make"):
        write_held_out(tmp_path / "out", held)
    assert [path.name for path in (tmp_path / "out.held-out").iterdir()] == ["mine.txt"]
    (tmp_path / "out.held-out" / "mine.txt").unlink()
    assert write_held_out(tmp_path / "out", held).is_file()
    assert write_held_out(tmp_path / "out", held).is_file(), "our own is replaced"


def calibration_held(case: Case) -> Calibration:
    rows = tuple(torch.tensor(json.loads(line)["input_ids"]) for line in case.tokens.read_text().splitlines())
    held = split_held_out(Calibration(rows, ("one",), (0,) * len(rows), "")).held_out
    assert held is not None
    return held
