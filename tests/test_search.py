"""`search`: every candidate has the figures of its own run, in one pass; interrupted anywhere, to the same bytes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec import structs

from streamprune.checkpoint.index import open_checkpoint, read_json
from streamprune.cli import main
from streamprune.config import EvalSettings, PruneSettings, RunSettings, SearchSettings
from streamprune.errors import DoesNotFitError, InterruptedRunError, OutputError, ResumeError, SettingsError
from streamprune.evaluation.evaluate import evaluate_text, read_data
from streamprune.fit.estimate import Fit
from streamprune.fit.structure import footprint_of_skeleton
from streamprune.hardware.memory import GIB
from streamprune.models.open import describe_model
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import run
from streamprune.pipeline.search import resume_search, search
from streamprune.planning.candidates import Candidate, Searchable, lay_out
from streamprune.progress import Progress
from streamprune.reporting.charts import Drawing, draw_picture
from streamprune.reporting.search import ACTIVATIONS, search_lines, search_result
from streamprune.reporting.search_page import draw_search
from streamprune.streaming import predictions
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.quantize_stage import QuantizeStage
from streamprune.streaming.refit_stage import RefitStage
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import ForwardStage, LayerTask, PrunedForwardStage
from tests.faults import Injected, tree_bytes
from tests.helpers import known_family
from tests.thorough import crossed, mostly_thorough
from tests.tiny import make_model, tiny_config, write_token_ids

CONTEXT = 64
NAMED = ("keep=5", "keep=5,refit", "keep=8,width=16", "keep=6,width=24,refit")
#: The same number of candidates that are quantized, by GPTQ too, and after a refit.
ROUNDED = ("keep=5,weights=fp8-dynamic,refit", "weights=w4a16", "keep=6,weights=w4a16,refit", "keep=6,weights=w8a16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its text, and the searches of NAMED (`out`) and ROUNDED candidates (`rounded`)."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    write_token_ids(folder / "ids.jsonl", sequences=30)
    search(settings(folder, folder / "out"), quiet=True)
    search(settings(folder, folder / "rounded", candidates=ROUNDED), quiet=True)
    return folder


def settings(made: Path, output: Path, **changes: Any) -> SearchSettings:
    given: dict[str, Any] = {
        "candidates": NAMED, "budget_gib": 2.0, "context": CONTEXT, "drop_above": 0.0, "anchor": "none",
        "calibration": (str(made / "ids.jsonl"),), "checkpoint_every": 0.0, "batch_tokens": 48, "device": "cpu",
    }  # fmt: skip
    return SearchSettings(model=str(made / "model"), output=output, **given | changes)


def read(output: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((output / "search.json").read_text())
    return result


def on_its_own(made: Path, searched: str, candidate: dict[str, Any], output: Path) -> tuple[float, int]:
    """The KL of a candidate that is pruned and evaluated on its own, on the text that the search `searched` held out;
    and the bytes of its weights.
    """
    model, text = str(made / "model"), (str(made / "ids.jsonl"),)
    size: dict[str, Any] = {"keep": candidate["keep"] if candidate["keep"] < 8 else None, "width": candidate["width"]}
    size |= {"weights": candidate["weights"], "rounding": candidate["rounding"]}
    if candidate["refit"] or candidate["rounding"] == "gptq":
        anchor = "none" if candidate["refit"] else None
        own = RunSettings(
            model=model, output=output, **size, refit=candidate["refit"], evaluate=True, anchor=anchor,
            calibration=text, device="cpu",
        )  # fmt: skip
        result = run(own, quiet=True)
    else:
        result = prune(PruneSettings(model=model, output=output, scores=made / searched, **size), quiet=True)
    data = EvalSettings(model=str(output), against=model, data=(str(made / f"{searched}.held-out"),), device="cpu")
    with Progress(0, quiet=True) as progress:
        kl = float(evaluate_text(data, read_data(data), progress).result["all"]["kl"])
    return kl, result.summary["output_bytes"]


@pytest.mark.parametrize("searched", ["out", "rounded"])
def test_every_candidate_has_the_damage_and_the_bytes_of_a_run_of_its_own(
    made: Path, tmp_path: Path, searched: str
) -> None:
    found = read(made / searched)
    damages = {each["name"]: each["all"]["kl"] for each in found["candidates"]}
    assert list(damages.values()) == sorted(damages.values())
    assert len(set(damages.values())) == len(NAMED)
    own, sizes = {}, {}
    for number, each in enumerate(found["candidates"]):
        own[each["name"]], sizes[each["name"]] = on_its_own(made, searched, each, tmp_path / str(number))
    assert own == pytest.approx(damages, abs=1e-6)
    assert found["best"] == min(own, key=lambda name: own[name])
    assert sizes == {each["name"]: each["weights_bytes"] for each in found["candidates"]}


@pytest.mark.parametrize(("searched", "notes"), [("out", []), ("rounded", [ACTIVATIONS])])
def test_formats_whose_activations_are_rounded_too_are_noted(made: Path, searched: str, notes: list[str]) -> None:
    found = read(made / searched)
    assert found["notes"] == notes
    shown = "\n".join(search_lines(search_result(found)))
    assert ("engines also round activations" in shown.replace("\n", " ")) == bool(notes)
    assert ("engines also round activations" in (made / searched / "report.html").read_text()) == bool(notes)


@pytest.mark.parametrize("many", [False, True])
def test_labels_of_the_chart_do_not_overlap(made: Path, many: bool) -> None:
    result = search_result(read(made / "out"))
    if many:
        # All at one place, as the same experts in several formats nearly are.
        best = result.best
        same = [structs.replace(each, total_bytes=best.total_bytes, all=best.all) for each in result.candidates * 3]
        result = structs.replace(result, candidates=same)
    drawn: list[Drawing] = []

    def draw() -> Drawing:
        drawn.append(draw_search(result))
        return drawn[-1]

    draw_picture("search", draw)
    labels = drawn[0][0].axes[0].texts
    assert {label.get_text() for label in labels} <= {"5 x 32", "8 x 16", "6 x 24"}
    assert len(labels) >= 4
    boxes = [label.get_window_extent() for label in labels]
    assert not [one for one, other in combinations(boxes, 2) if one.overlaps(other)]


def test_each_layer_is_read_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, loaded = LayerWeights.loaded, []

    def counted(self: LayerWeights, index: int) -> Any:
        loaded.append(index)
        return usual(self, index)

    monkeypatch.setattr(LayerWeights, "loaded", counted)
    search(settings(made, tmp_path / "out"), quiet=True)
    assert loaded == [0, 1, 2, 3]
    assert tree_bytes(tmp_path / "out") == tree_bytes(made / "out")


def test_computed_tensors_are_freed_with_their_side(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never those of two candidates are in memory, nor any after a layer."""
    usual, load, most = LayerLoop.run_layer, LayerWeights.making_room, list[int]()
    tasks: list[LayerTask] = []

    def held() -> int:
        # (The embeddings are loaded before there is a layer.)
        return sum(bool(version.computed) for task in tasks[-1:] for version in task.versions.values())

    def making_room(self: LayerWeights, *given: Any) -> Any:
        most.append(held())
        return load(self, *given)

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        tasks.append(task)
        usual(self, task, following)
        assert held() == 0
        assert len(task.versions) == len(ROUNDED)

    monkeypatch.setattr(LayerLoop, "run_layer", run_layer)
    monkeypatch.setattr(LayerWeights, "making_room", making_room)
    search(settings(made, tmp_path / "out", candidates=ROUNDED), quiet=True)
    assert len(tasks) == 4
    assert max(most) == 1


@pytest.mark.parametrize(("layer", "every"), crossed([1, 3], [0.0, 1e6], usual=[(1, 1e6), (3, 0.0)]))
def test_a_killed_search_goes_on_to_the_same_bytes(
    made: Path, tmp_path: Path, layer: int, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, ran = LayerLoop.run_layer, []

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        if task.index == layer and "killed" not in ran:
            ran.append("killed")
            raise Injected
        ran.append(str(task.index))
        usual(self, task, following)

    monkeypatch.setattr(LayerLoop, "run_layer", run_layer)
    given = settings(made, tmp_path / "out", checkpoint_every=every)
    with pytest.raises(Injected):
        search(given, quiet=True)
    before = len(ran)
    search(given, quiet=True)
    assert ran[before] == (str(layer) if every == 0.0 else "0")
    # Once more, and nothing is computed.
    (tmp_path / "out.work").mkdir()
    number = len(ran)
    again = search(given, quiet=True)
    assert again["complete"] is True
    assert again["candidates"] == read(tmp_path / "out")["candidates"]
    assert len(ran) == number
    with pytest.raises(OutputError, match=r"is not empty[^\n]*\n.*\n  settings\.drop_above: 0\.0 there, 3\.0 now"):
        search(replace(given, drop_above=3.0), quiet=True)
    assert tree_bytes(tmp_path / "out") == tree_bytes(made / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("stage", "searched"),
    mostly_thorough(
        [(ScoreStage, "out"), (RefitStage, "out"), (PrunedForwardStage, "out"), (RefitStage, "rounded"),
         (QuantizeStage, "rounded"), (PrunedForwardStage, "rounded")],
        [(ScoreStage, "out"), (RefitStage, "out"), (QuantizeStage, "rounded"), (PrunedForwardStage, "rounded")],
    ),
)  # fmt: skip
def test_a_search_that_was_stopped_in_any_stage_goes_on(
    made: Path, tmp_path: Path, stage: type[ForwardStage], searched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, asked, named = stage.compute, [], NAMED if searched == "out" else ROUNDED

    def compute(self: Any, task: LayerTask, *arguments: Any) -> Any:
        after = usual(self, task, *arguments)
        if task.index == 2 and not asked:
            asked.append(2)
            os.kill(os.getpid(), signal.SIGTERM)
        return after

    monkeypatch.setattr(stage, "compute", compute)
    with pytest.raises(InterruptedRunError, match="Resume with: streamprune resume"):
        search(settings(made, tmp_path / "out", checkpoint_every=1e6, candidates=named), quiet=True)
    monkeypatch.undo()
    resume_search(tmp_path / "out.work", quiet=True)
    assert tree_bytes(tmp_path / "out") == tree_bytes(made / searched)


def test_hopeless_candidates_are_given_up_and_change_nothing_else(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models lose so little that the harmless is not passed over, unless a lower bound says so."""
    monkeypatch.setattr("streamprune.pipeline.search_layers._HARMLESS", 0.0)
    best, *_, worst = (each["name"] for each in read(made / "out")["candidates"])
    given = settings(made, tmp_path / "out", drop_above=1.05, checkpoint_every=1e6)
    usual = LayerLoop.run_layer

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        usual(self, task, following)
        if task.index == 2:
            raise Injected

    with monkeypatch.context() as patch:
        patch.setattr(LayerLoop, "run_layer", run_layer)
        with pytest.raises(Injected):
            search(given, quiet=True)
    search(given, quiet=True)
    search(settings(made, tmp_path / "whole", drop_above=1.05), quiet=True)
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    rows = {each["name"]: each for each in read(tmp_path / "out")["candidates"]}
    assert rows[worst]["given_up"]["kl"] > 1.05 * rows[worst]["given_up"]["best_kl"] > 0
    expected = {each["name"]: each["all"] for each in read(made / "out")["candidates"]}
    assert {name: row["all"] for name, row in rows.items() if "all" in row} == {
        name: expected[name] for name, row in rows.items() if "all" in row
    }
    assert best in {name for name, row in rows.items() if "all" in row}


def test_a_measurement_within_the_model_that_was_stopped_is_made_after_all(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprune.pipeline.search_layers._HARMLESS", 0.0)
    search(settings(made, tmp_path / "whole", drop_above=1.05), quiet=True)
    given_up = [each["given_up"]["layer"] for each in read(tmp_path / "whole")["candidates"] if "given_up" in each]
    assert 0 in given_up
    usual, asked = predictions.add_slice, []

    def add_slice(*arguments: Any) -> Any:
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments)

    monkeypatch.setattr(predictions, "add_slice", add_slice)
    with pytest.raises(InterruptedRunError, match="1 of 4 layers are done"):
        search(settings(made, tmp_path / "out", drop_above=1.05, checkpoint_every=1e6), quiet=True)
    resume_search(tmp_path / "out.work", quiet=True)
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_other_candidates_do_not_resume(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        if task.index == 1:
            raise Injected
        usual(self, task, following)

    usual = LayerLoop.run_layer
    monkeypatch.setattr(LayerLoop, "run_layer", run_layer)
    with pytest.raises(Injected):
        search(settings(made, tmp_path / "out"), quiet=True)
    with pytest.raises(ResumeError, match=r"candidates: 5 experts; .* then, 5 experts now"):
        search(settings(made, tmp_path / "out", candidates=("keep=5",)), quiet=True)


def searchable(made: Path, budget: int, **use: Any) -> Searchable:
    folder = made / "model"
    raw = read_json(folder / "config.json")
    skeleton = describe_model(folder, raw, False, "auto").skeleton
    footprint = footprint_of_skeleton(str(folder), raw, skeleton, open_checkpoint(folder).tensors)
    fit = Fit(footprint, settings(made, made / "x").serving(footprint.max_positions), budget)
    return Searchable(skeleton.spec, skeleton.width, {"source": fit}, **use)


def test_candidates_are_laid_out_from_whole_experts_to_whole_width(made: Path) -> None:
    unpruned = searchable(made, 0).fits["source"]
    half = unpruned.changed(keep=4).total
    model = searchable(made, half)
    found = lay_out(model)
    plain = [each for each in found.candidates if not each.refit]
    assert plain[0] == Candidate(4)
    assert plain[-1].keep == 8
    assert plain[-1].width is not None
    assert 2 < len(plain) <= 4
    assert [each.keep for each in plain] == sorted({each.keep for each in plain})
    assert {(each.keep, each.width) for each in found.candidates if each.refit} == {each.shape for each in plain}
    for each in found.candidates:
        assert model.fit_of(each).fits
    refused = lay_out(searchable(made, half, fixed_width="said why", no_refit="said so"))
    assert refused.candidates == (Candidate(4),)
    assert refused.left_out == ("refitted ones: said so.", "narrower experts: said why.")
    with pytest.raises(SettingsError, match="already fits"):
        lay_out(searchable(made, unpruned.total))
    with pytest.raises(DoesNotFitError, match=r"Nothing fits .* even with 2 experts"):
        lay_out(searchable(made, half // 100))


@pytest.mark.parametrize(
    ("candidates", "kind", "words"),
    [
        (("keep=9",), SettingsError, "choose from 2 to 8 experts"),
        (("keep=8",), SettingsError, "removes nothing"),
        (("keep=five",), SettingsError, "'five' is not a number"),
        (("experts=5",), SettingsError, "'experts=5' is not understood"),
        (("keep=5", "keep=5,weights=source"), SettingsError, "given twice"),
        (("keep=5,weights=bf16",), SettingsError, "the source does not have them quantized"),
        (("width=33",), SettingsError, "each expert has 32 channels"),
        (("auto", "keep=5"), SettingsError, "Give it alone"),
        (("auto",), SettingsError, "already fits"),
    ],
)
def test_candidates_that_cannot_be_are_refused(
    made: Path, tmp_path: Path, candidates: tuple[str, ...], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        search(settings(made, tmp_path / "out", candidates=candidates), quiet=True)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_the_command_prints_the_table_and_json(made: Path, tmp_path: Path) -> None:
    budget = searchable(made, 0).fits["source"].changed(keep=4).total / GIB
    given = {"--budget-gib": budget, "--context": CONTEXT, "--calibration": made / "ids.jsonl", "--anchor": "none"}
    options = [str(part) for item in given.items() for part in item]
    arguments = ["search", str(made / "model"), "--device", "cpu", *options, "-o"]
    shown = CliRunner().invoke(main, [*arguments, str(tmp_path / "a")])
    assert shown.exit_code == 0, shown.stderr
    assert "cost: about" in shown.stderr
    assert "\nbest: " in shown.stdout
    printed = CliRunner().invoke(main, [*arguments, str(tmp_path / "b"), "--json", "--quiet"])
    result = json.loads(printed.stdout)
    assert result["candidates"] == read(tmp_path / "a")["candidates"]
    assert f"best: {result['best']} " in shown.stdout
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<svg" in page
    assert "mathdefault" not in page, "formulas are not set: its text is there as it is"
    again = CliRunner().invoke(main, [*arguments, str(tmp_path / "a")])
    assert again.exit_code == 0
    assert "is finished already" in again.stderr
