"""`run --best`: the candidate that loses least is written; its search is not made twice."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streamprune.cli import main
from streamprune.config import NO_ANCHOR, PruneSettings, RunSettings, SearchSettings
from streamprune.errors import InterruptedRunError, OutputError, ProcessesError, ReportError, ResumeError, SettingsError
from streamprune.output.verify import verify
from streamprune.output.writer import OutputWriter
from streamprune.pipeline import best
from streamprune.pipeline import prune as prune_module
from streamprune.pipeline import run as run_module
from streamprune.pipeline.best import run_best, settings_of_search
from streamprune.pipeline.candidate_command import writing_command
from streamprune.pipeline.resume import settings_to_resume
from streamprune.pipeline.search import resume_search
from streamprune.reporting.evaluations import TEXT_NAME, results_folder
from streamprune.reporting.write import write_report
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.stages import LayerTask
from tests.faults import Injected
from tests.helpers import known_family, read_tensors
from tests.test_search import searchable
from tests.tiny import make_model, tiny_config, write_token_ids

GIB = 2**30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its text."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    # (Two sources need no anchor.)
    for number, name in enumerate(("ids", "more")):
        write_token_ids(folder / f"{name}.jsonl", sequences=20, seed=number)
    return folder


def settings(made: Path, output: Path, **changes: Any) -> RunSettings:
    budget = searchable(made, 0).fits["source"].changed(keep=4).total / GIB
    given: dict[str, Any] = {
        "budget_gib": budget,
        "context": 64,
        "calibration": (str(made / "ids.jsonl"), str(made / "more.jsonl")),
    }
    return RunSettings(model=str(made / "model"), output=output, device="cpu", **given | changes)


def broken(*_: Any) -> None:
    raise Injected


def only_plain(*given: Any) -> SearchSettings:
    """The settings of a search of candidates without a refit."""
    return replace(settings_of_search(*given), candidates=("keep=3", "keep=4"))


def kl_of(output: Path) -> float:
    return float(json.loads((results_folder(output) / TEXT_NAME).read_text())["all"]["kl"])


def test_the_best_candidate_is_written_and_the_search_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Injected):  # noqa: PT012
        patch.setattr(best, "_write", broken)
        run_best(settings(made, tmp_path / "out"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(best, "search", broken)
        result = run_best(settings(made, tmp_path / "out"), quiet=True)
    found = json.loads((tmp_path / "out.search" / "search.json").read_text())
    first = found["candidates"][0]
    assert result.summary["best"] == found["best"] == first["name"]
    assert kl_of(tmp_path / "out") == pytest.approx(first["all"]["kl"], abs=1e-6)
    assert result.summary["output_bytes"] == first["weights_bytes"]
    verify(tmp_path / "out", made / "model")
    with monkeypatch.context() as patch:
        patch.setattr(LayerLoop, "run_layer", broken)
        again = run_best(settings(made, tmp_path / "out"), quiet=True).summary
    assert (again["complete"], again["best"]) == (True, first["name"])
    searched = settings_of_search(settings(made, tmp_path / "out"))
    own = searched.run_of(*(first[name] for name in ("keep", "width", "weights", "refit")))
    words = shlex.split(writing_command(searched.output, own).replace(" OUT ", f" {tmp_path / 'by-hand'} "))
    assert CliRunner().invoke(main, words[1:]).exit_code == 0
    assert "these are of a search" in (tmp_path / "by-hand" / "README.md").read_text()
    by_hand, written = read_tensors(tmp_path / "by-hand"), read_tensors(tmp_path / "out")
    assert {name for name in written if not torch.equal(written[name], by_hand[name])} == set()
    html = write_report(tmp_path / "out").read_text()
    assert f"<b>{first['name']}</b>" not in html
    assert 'id="search"' in html
    assert first["name"] in html
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputError, match=r"settings\.method: 'reap' there(.|\n)*--best keeps its search there"):
        run_best(settings(made, tmp_path / "out", method="frequency"), quiet=True)


def test_the_command_that_writes_a_candidate_has_what_decides_it() -> None:
    own = RunSettings(
        model="m", output=Path("o"), keep=4, refit=True, seed=0, calibration=("a b", "c"), for_engine="vllm"
    )
    words = shlex.split(writing_command(Path("found"), own))
    assert words[:7] == ["streamprune", "run", "m", "-o", "OUT", "--scores", "found"]
    options = " ".join(words[7:])
    for wanted in ("--keep 4", "--seed 0", "--calibration a b --calibration c", "--for vllm", "--refit"):
        assert wanted in options


def test_a_search_that_resume_finished_is_not_made_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work folder has the budget in bytes; the command has GiB, in a number that no bytes come to."""
    budget = searchable(made, 0).fits["source"].changed(keep=4).total / GIB + 0.4 / GIB
    monkeypatch.setattr(best, "settings_of_search", only_plain)
    given = settings(made, tmp_path / "out", budget_gib=budget, checkpoint_every=0.0)
    usual = LayerLoop.run_layer

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        if task.index == 2:
            raise Injected
        usual(self, task, following)

    with monkeypatch.context() as patch, pytest.raises(Injected):  # noqa: PT012
        patch.setattr(LayerLoop, "run_layer", run_layer)
        run_best(given, quiet=True)
    with pytest.raises(ResumeError, match="is for a budget of"):
        run_best(settings(made, tmp_path / "out", budget_gib=budget * 1.1), quiet=True)
    with pytest.raises(ProcessesError, match="Resume it without a launcher"):
        settings_to_resume(tmp_path / "out.search.work", {})
    resume_search(tmp_path / "out.search.work", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(best, "search", broken)
        assert run_best(given, quiet=True).summary["best"] == "4 experts"


def test_resume_goes_on_from_the_search_to_the_output(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting stays, whether it was stopped in the search or between the search and the output."""
    monkeypatch.setattr(best, "settings_of_search", only_plain)
    output, searched = tmp_path / "out", tmp_path / "out.search.work"
    given = settings(made, output, checkpoint_every=0.0, report=False, max_shard_bytes=30_000)
    usual = LayerLoop.run_layer

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        if task.index == 2:
            raise InterruptedRunError("stopped")
        usual(self, task, following)

    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):  # noqa: PT012
        patch.setattr(LayerLoop, "run_layer", run_layer)
        run_best(given, quiet=True, anchor=NO_ANCHOR)
    told = CliRunner().invoke(main, ["status", str(tmp_path / "out.work")])
    assert told.stdout.startswith(f"{searched}: "), told.stderr
    refused = CliRunner().invoke(main, ["resume", str(searched), "--from-layer", "1"])
    assert "unfinished `streamprune run --best`. Leave out --from-layer" in refused.stderr
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(best, "_write", lambda *given: asked.append(given) or broken())
        assert isinstance(CliRunner().invoke(main, ["resume", str(searched)]).exception, Injected)
    assert replace(asked[0][1], model=given.model) == given
    assert asked[0][0].anchor == NO_ANCHOR
    assert (tmp_path / "out.search").is_dir()
    assert not searched.exists()
    # The search is done: nothing but the output is left, by whichever work folder it is named.
    for place in (searched, tmp_path / "out.work"):
        told = CliRunner().invoke(main, ["status", str(place)])
        assert f"not written yet: {output}\nResume with: streamprune resume {place}" in told.stdout, told.stderr
        done = CliRunner().invoke(main, ["resume", str(place), "--json"])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["best"] == "4 experts"
        assert (output / "model.safetensors.index.json").is_file()
        assert not (output / "report.html").exists()
        shutil.rmtree(output)


@pytest.mark.parametrize("refit", [False, True])
def test_an_output_that_resume_finishes_has_the_search(
    made: Path, tmp_path: Path, refit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there as soon as the output has its name."""
    names = ("keep=4,refit",) if refit else ("keep=3", "keep=4")
    monkeypatch.setattr(
        best, "settings_of_search", lambda *given: replace(settings_of_search(*given), candidates=names)
    )
    with monkeypatch.context() as patch, pytest.raises(Injected):  # noqa: PT012
        patch.setattr(OutputWriter, "finish", broken)
        run_best(settings(made, tmp_path / "out", checkpoint_every=0.0), quiet=True)
    resumed = run_module.resume if refit else prune_module.resume
    resumed(tmp_path / "out.work", quiet=True)
    found = json.loads((tmp_path / "out.search" / "search.json").read_text())
    kept = json.loads((results_folder(tmp_path / "out") / "search.json").read_text())
    assert kept == {name: value for name, value in found.items() if name not in ("request", "best_command")}
    assert kl_of(tmp_path / "out") == pytest.approx(found["candidates"][0]["all"]["kl"], abs=1e-6)
    # Another output by the same scores is not the best candidate.
    prune_module.prune(
        PruneSettings(
            model=str(made / "model"), output=tmp_path / "other", scores=tmp_path / "out.search", keep=4, resume="never"
        ),
        quiet=True,
    )
    assert not results_folder(tmp_path / "other").exists()


def test_a_search_that_was_changed_by_hand_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best, "settings_of_search", only_plain)
    with monkeypatch.context() as patch, pytest.raises(Injected):  # noqa: PT012
        patch.setattr(best, "_write", broken)
        run_best(settings(made, tmp_path / "out"), quiet=True)
    path = tmp_path / "out.search" / "search.json"
    found = json.loads(path.read_text())
    for name in ("experts_per_layer", "data", "candidates"):
        path.write_text(json.dumps({key: value for key, value in found.items() if key != name}))
        with pytest.raises(ReportError, match=name):
            run_best(settings(made, tmp_path / "out"), quiet=True)


def test_a_candidate_without_a_refit_is_written_by_the_scores_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the search are the output's then."""
    monkeypatch.setattr(best, "settings_of_search", only_plain)
    run_best(settings(made, tmp_path / "out"), quiet=True)
    found = json.loads((tmp_path / "out.search" / "search.json").read_text())
    assert found["best"] == "4 experts"
    assert kl_of(tmp_path / "out") == found["candidates"][0]["all"]["kl"]
    record = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert [len(layer["kept"]) for layer in record["layers"]] == [4] * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget_gib": None, "keep": 4}, "give a budget, --budget-gib"),
        ({"refit": True}, "Leave out --refit"),
        ({"by": "channels"}, "give a budget, --budget-gib"),
        ({"schedule": "global"}, "omit --schedule"),
        ({"weights": "fp8"}, "Name those of candidates"),
    ],
    ids=str,
)
def test_what_the_search_decides_is_refused(made: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        run_best(settings(made, tmp_path / "out", **changes), quiet=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "experts"], "does not offer --quantize yet"),
        (["--rounding", "rtn", "--tensor-parallel", "2"], "does not offer --rounding, --tensor-parallel yet"),
        (["--weights", "w4a16"], "Leave out --weights"),
        (["--dry-run"], "cannot say what it is"),
    ],
    ids=str,
)
def test_options_that_the_search_decides_or_lacks_are_refused(
    made: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    given = ["run", str(made / "model"), "-o", str(tmp_path / "out"), "--budget-gib", "1", "--best", *options]
    shown = CliRunner().invoke(main, given)
    assert shown.exit_code == SettingsError.exit_code
    assert words in " ".join(shown.stderr.split())
